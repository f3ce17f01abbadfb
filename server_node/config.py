"""Pure: how a node is set up. `flags.py` builds these from the arguments and the environment that `cli.py` reads."""

from dataclasses import dataclass, field

from swarm_protocol.spans import Span
from swarm_protocol.transport.network_config import NetworkConfig


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which blocks of which model. `blocks` fixes the span; else `num_blocks` are placed where the swarm lacks them.

    With neither, as many blocks as fit into memory are taken. `revision` and `cache_dir` are the hub's; None for its
    defaults. `max_disk_bytes` bounds what is kept of models of which only parts were downloaded.
    """

    source: str
    revision: str | None = None
    cache_dir: str | None = None
    max_disk_bytes: int | None = None
    blocks: Span | None = None
    num_blocks: int | None = None


@dataclass(frozen=True, slots=True)
class ComputeChoice:
    """What the blocks run on.

    `device` is one of torch's, or several of one type with commas between them, among which the span is split.
    `dtype` "auto" is float32 on a CPU, where it is exact, and the checkpoint's own elsewhere, unless another one is
    measured to be a fifth faster (`compute/dtype_rule.py`); with quantized weights it is bfloat16, in which their
    products are fast. `quantization` is "none", "int8" or "nf4"; CUDA's are bitsandbytes', a CPU's "nf4" is 4-bit
    integers in groups of 32. `threads` None leaves torch's choice, one per
    core; several nodes on one machine should have one each, since their threads take the cores from each other (40 to
    60 % of throughput). `cache_tokens` is the KV cache in tokens per block over the whole span; None takes half of the
    memory that is free once the weights are loaded: the rest is for activations and for whatever else runs on a
    volunteer's machine. `prefix_tokens` are kept besides, of prompts that sessions may share; None is an eighth of the
    cache; 0 keeps none.
    """

    device: str = "cpu"
    dtype: str = "auto"
    quantization: str = "none"
    threads: int | None = None
    cache_tokens: int | None = None
    prefix_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What strangers may use. Every bound of memory and time that a peer can reach is here."""

    max_sessions: int = 512
    """Open at once; memory is the real limit, this one bounds the bookkeeping."""
    max_sessions_per_peer: int = 128
    """One chat site is one peer, with a session per reader."""
    max_streams_per_peer: int = 288
    """Its sessions, each with a stream of its own and one from the node before, and its forward passes."""
    max_streams: int = 2048
    max_step_tokens: int = 4096
    """Rows times tokens of one step: what the device thread does before the next one gets its turn."""
    max_payload_bytes: int = 64 * 1024 * 1024
    """Of one message, whatever `max_step_tokens` says: 1,024 tokens of BLOOM-176B in float32."""
    max_cache_share_per_peer: float = 0.75
    """Of the KV cache; the rest is there for others, whoever comes first. 1.0 for a swarm of one's own."""
    headroom_share: float = 0.125
    """Of the KV cache; no new session takes it while others are open, so that those can grow: an answer that is cut off
    costs its reader more than a session that opens elsewhere."""
    max_queued_per_peer: int = 128
    """Steps and forward passes that wait or run; as many as sessions, since each has one step at a time."""
    max_queued: int = 512
    peer_bytes_per_s: int = 32 * 1024 * 1024
    """Read from one peer. A chat site's 128 sessions at 3 tokens/s of BLOOM-176B in float32 send two thirds of it, at
    30 tokens/s of a small model nearly all of it; its own uplink is mostly slower."""
    peer_burst_bytes: int = 256 * 1024 * 1024
    """What it may send at once before that: prompts of 4,500 tokens of BLOOM-176B in float32."""
    peer_messages_per_s: int = 50
    """From one peer, of messages and new streams that make the device compute nothing: 16 sessions opened and closed a
    second. Each takes the event loop and the daemon 0.5 to 1.5 ms together."""
    peer_burst_messages: int = 1000
    """What it may send at once before that: a site's 128 sessions that open, resume or have a step each, and as many
    again; the steps are given back when they are computed."""
    tape_bytes: int = 1024 * 1024 * 1024
    """Of this machine's memory, for what sessions have sent on, so that it can be sent to another node when the next
    one dies: 8,000 tokens of BLOOM-176B in bf16 are 235 MB. Half of it at most for one peer."""
    join_s: float = 3.0
    """To reach the next node of a session. One that cannot be reached is served through the client from then on."""
    resume_grace_s: float = 60.0
    """How long a session whose stream dropped keeps its cache."""
    idle_s: float = 1800.0
    """A session without a step for so long is closed; a reader of a long answer comes back sooner."""
    first_message_s: float = 15.0
    """For a stream to say what it is for."""
    frame_s: float = 60.0
    """Between the frames of one message: 2 MiB at 35 kB/s."""
    send_s: float = 60.0
    """For one frame to leave; the same."""
    drain_s: float = 60.0
    """For open sessions to move to other nodes when this one leaves: 2,000 tokens of 15 blocks of BLOOM-7.1B in bf16,
    0.5 GB, are copied in it at 65 Mbit/s; a computer that is shut down waits hardly longer for a program."""


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Everything that `umbel-node run` was asked for. `name` is shown to people, at most 40 characters of it.

    Without initial peers in `network` the node starts a swarm of its own.
    """

    model: ModelChoice
    compute: ComputeChoice = field(default_factory=ComputeChoice)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    limits: NodeLimits = field(default_factory=NodeLimits)
    name: str = ""
    only_when_idle: bool = False
    """Pause, with all memory given back, while other programs of this machine use the device."""
