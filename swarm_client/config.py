"""What can be set about a client; each field with its unit and the reason of its default."""

from dataclasses import dataclass, field

from swarm_protocol.ids import PeerId


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Settings of one client process.

    initial_peers   multiaddresses of peers that are in the swarm already; one that answers is enough
    identity_path   file with the key behind this client's peer id; None makes a new id every time
    host            address to listen on, where hole punching needs it; a client serves nothing
    relay           whether nodes behind a NAT may be reached through relays
    startup_s       how long joining the swarm may take (libp2p dials its slowest peers for 5–10 s)
    open_s          how long opening a session at one node may take
    step_s          how long one node may take for one step; a long prefill chunk on a slow CPU takes tens of seconds
    resume_s        how long a dropped stream is tried to be taken up again; nodes keep the cache for 60 s
    view_age_s      how often the view of the swarm is read anew in the background while it is used; records are
                    refreshed every 10 s; 0 reads it whenever a session is opened
    avoid_s         how long a node that failed is not asked again, at least and the first time; doubled each time that
                    it fails again. After it, a new record and an answered ping are wanted; a restart needs no wait
    route_attempts  how many routes are tried at once when nodes refuse or cannot be reached; after them one a second
                    is, until `max_wait_s`, unless the nodes are full
    reserve_tokens  how many tokens a session reserves ahead of those that it has, or a quarter of them if that is more;
                    less reserves more often, which costs nothing but finds a node full in the middle of an answer
    max_wait_s      how long a session waits for blocks that nobody serves, before its first step and when their node is
                    gone; 0 fails at once
    tape_bytes      what all sessions together may keep of the states that went into nodes, to play them to others; a
                    session beyond that is computed again from its tokens
    standby         whether a second node follows along at each hop, to take over at once; it takes as much KV cache
                    again
    reuse_prefixes  whether nodes may keep what they computed of a prompt for this client's later sessions
    wire_dtype      in what hidden states travel: "computed" is what the nodes compute with, never wider than what the
                    client's ends compute with; "auto" likewise, but less where a node's uplink is slow (bfloat16, or
                    int8_rows where the family bears it); or "float32", "bfloat16", "float16", "int8_rows"
    slow_bytes_per_s  below this an uplink is slow; 100 Mbit/s: 1,024 tokens of hidden 8192 take 1.3 s in bfloat16
    speculation     what guesses tokens of text sessions ahead, which one step then verifies: "off"; "ngram", which
                    looks up what followed the same tokens before; "draft", which also asks `draft_model`. The text is
                    the same
    draft_model     folder, GGUF file or hub repository of a small model with the same tokens; it runs on this machine
    draft_quantization  how the large layers of that model are held: "nf4" and "int8" pack them for the CPU, which is
                    faster and guesses nearly as well; or "none"
    passes_in_flight  micro-batches of a forward or backward pass that are under way at once, so that all nodes work
    step_tokens     most tokens (rows x columns) in one step; longer inputs are cut, so that no frame gets too large
    """

    initial_peers: tuple[str, ...] = ()
    identity_path: str | None = None
    host: str = "0.0.0.0"  # noqa: S104
    relay: bool = True
    startup_s: float = 30.0
    open_s: float = 15.0
    step_s: float = 120.0
    resume_s: float = 5.0
    view_age_s: float = 5.0
    avoid_s: float = 10.0
    route_attempts: int = 3
    reserve_tokens: int = 256
    max_wait_s: float = 30.0
    tape_bytes: int = 1024 * 1024 * 1024
    standby: bool = False
    reuse_prefixes: bool = True
    wire_dtype: str = "auto"
    slow_bytes_per_s: float = 12.5e6
    speculation: str = "off"
    draft_model: str | None = None
    draft_quantization: str = "nf4"
    passes_in_flight: int = 8
    step_tokens: int = 512
    blocked_peers: frozenset[PeerId] = field(default_factory=frozenset)
