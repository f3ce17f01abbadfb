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
    step_tokens: int = 512
    blocked_peers: frozenset[PeerId] = field(default_factory=frozenset)
