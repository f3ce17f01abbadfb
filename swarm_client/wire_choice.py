"""Pure: in which dtype hidden states travel in a session.

What the nodes compute with is as exact as anything wider, so that is the widest that travels. Over a slow line they
travel in half of that or less, where a real model of the family was measured to bear it.
"""

from collections.abc import Mapping, Sequence

from swarm_client.routing.find_route import Hop
from swarm_protocol.errors import ConfigError
from swarm_protocol.wire_tensor import DTYPE_BYTES, INT8_ROWS

AUTO, COMPUTED = "auto", "computed"
WIRE_CHOICES = (AUTO, COMPUTED, "float32", "bfloat16", "float16", INT8_ROWS)
"""What `ClientConfig.wire_dtype` may be."""

SLOW_WIRE_DTYPES: Mapping[str, str] = {"llama": INT8_ROWS}
"""By family, what travels over slow lines; bfloat16 for all others.

Where `bench.wire_quality` found, with real weights of that family, that perplexity changes by 0.3 % at most and 98 % of
the most likely next tokens stay: llama with SmolLM2-135M-Instruct.
"""


def check_choice(wire_dtype: str) -> None:
    """Raise ConfigError unless `wire_dtype` can be chosen."""
    if wire_dtype not in WIRE_CHOICES:
        raise ConfigError(f"wire_dtype {wire_dtype[:20]!r} is none of {', '.join(WIRE_CHOICES)}")


def choose_wire_dtype(choice: str, hops: Sequence[Hop], family: str, own: str, slow_bytes_per_s: float = 0.0) -> str:
    """Return the dtype in which states travel through `hops` whose client has them in `own`; never a wider one.

    `choice` is one of `WIRE_CHOICES`. A line is slow whose node can send less than `slow_bytes_per_s`; one that was not
    measured is not.
    """
    if choice not in (AUTO, COMPUTED):
        return _narrower(own, choice)
    # What a node does not say is taken for the client's own.
    computed = _widest([hop.dtype if hop.dtype in DTYPE_BYTES else own for hop in hops] or [own])
    wanted = _narrower(own, computed)
    is_slow = any(hop.uplink_bytes_per_s is not None and hop.uplink_bytes_per_s < slow_bytes_per_s for hop in hops)
    if choice == COMPUTED or not is_slow:
        return wanted
    return _narrower(wanted, SLOW_WIRE_DTYPES.get(family, "bfloat16"))


def _widest(dtypes: Sequence[str]) -> str:
    """Return one that loses nothing of any of these: of bfloat16 and float16 neither does for the other."""
    most = max(DTYPE_BYTES[dtype] for dtype in dtypes)
    found = {dtype for dtype in dtypes if DTYPE_BYTES[dtype] == most}
    return found.pop() if len(found) == 1 else "float32"


def _narrower(own: str, wanted: str) -> str:
    if wanted == INT8_ROWS:
        return wanted
    return wanted if DTYPE_BYTES[wanted] < DTYPE_BYTES.get(own, 0) else own
