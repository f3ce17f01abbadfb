"""Pure: how a peer takes part in the network. Apart from the network itself, so that reading it costs no import."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What `hivemind_net.open_transport` needs to know."""

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses, each with `/p2p/<peer id>`, of peers that are in the swarm; empty starts a new swarm."""

    host: str = "0.0.0.0"  # noqa: S104  # volunteers want to be reached; tests and the demo pass 127.0.0.1
    """The IPv4 or IPv6 address to listen on."""

    port: int = 0
    """The TCP port to listen on; 0 takes a free one."""

    announce: tuple[str, ...] = ()
    """Multiaddresses to give to others in place of the ones listened on, for peers behind a forwarded port."""

    identity_path: str | None = None
    """The Ed25519 key file (`identity.py`), made where there is none; None takes a key that is gone at the end."""

    relay: bool = False
    """Reach others, and be reached, through relaying peers. Off on one machine and in tests."""

    relay_for_others: bool = False
    """Carry the traffic of peers that are not reachable directly. Only when asked to: it is the owner's bandwidth."""

    map_ports: bool = False
    """Ask the router to forward the port (UPnP, NAT-PMP). Off by default: it changes a device that is not ours."""

    client_mode: bool = False
    """Use the swarm without being part of it: keep no records for others, and listen only if `relay` needs it."""

    startup_timeout_s: float = 30.0
    """Seconds until `open_transport` gives up; several times what a join over slow links takes (5 to 10 s)."""

    rpc_timeout_s: float = 3.0
    """Seconds until a peer of the directory that does not answer is passed over; hivemind's own default."""

    max_bytes_per_s: int | None = None
    """In each direction, for all peers together, of frames; None is no bound. A node keeps to it, not the transport."""

    max_incoming_streams: int = 1024
    """Streams that others may have open here; one more is closed at once. 1,200 were run at once between two peers."""
