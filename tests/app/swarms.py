"""Made-up swarms of a model with 40 blocks, by name, for pages and pictures."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from app.canary_history import CanaryRun
from swarm_client.model_swarm import SeenNode
from swarm_protocol.records import NodeRecord

NUM_BLOCKS = 40
VERSION = "0.1.0"


def seen(number: int, start: int, end: int, ping_s: float | None = 0.03, **fields: object) -> SeenNode:
    is_unreachable = bool(fields.pop("is_unreachable", False))
    plain = NodeRecord(
        f"12D3KooWmadeUpPeer{number:04}Qx{chr(97 + number % 26)}", "umbel/fake-1b", "rev", start, end, "online", 1, 0.0,
        2e9, (1,), f"umbel {VERSION}", "bfloat16", "rev/bfloat16/cuda", 6000, 8192, "", 0.004,
    )  # fmt: skip
    return SeenNode(dataclasses.replace(plain, **fields), ping_s, is_unreachable)  # type: ignore[arg-type]


def _quarters() -> list[SeenNode]:
    return [
        seen(1, 0, 20, 0.012, name="physics lab", block_step_s=0.003),
        seen(2, 20, 40, 0.034, name="Ada’s workstation", block_step_s=0.004, free_tokens=900),
        seen(3, 0, 14, 0.048, numerics="rev/bfloat16/int4-g32/cpu", block_step_s=0.021),
        seen(4, 14, 30, 0.09, name="basement", software="umbel 0.0.9", block_step_s=0.006),
        seen(5, 30, 40, 0.18, dtype="float32", block_step_s=0.011),
    ]


def complete() -> list[SeenNode]:
    return [*_quarters(), seen(6, 8, 24, 0.021, name="club", block_step_s=0.005), seen(7, 24, 40, 0.3, state="joining")]


def degraded() -> list[SeenNode]:
    return [*_quarters()[:4], seen(8, 30, 34, None, block_step_s=0.008)]


def incomplete() -> list[SeenNode]:
    return [
        _quarters()[0],
        seen(9, 28, 40, 0.04, name="Ada’s workstation", block_step_s=0.004),
        seen(10, 20, 28, None, name="attic", is_unreachable=True),
        seen(11, 20, 28, 0.1, state="draining"),
    ]


def hostile() -> list[SeenNode]:
    """What strangers may put into records."""
    return [
        seen(12, 0, 40, name="<img src=x onerror=alert(1)>", software="umbel 1.0 <b>", dtype="</td>", numerics="/" * 9),
        seen(13, 0, 40, name="203.0.113.7", software="/ip4/203.0.113.8/tcp/31337", numerics="javascript:alert(1)"),
        seen(14, 39, 65000, name="\u202egnp.exe /dns/host.example/tcp/1", free_tokens=10**15),
    ]


def made_up_runs(model: str, now: float, *, is_well: bool) -> list[CanaryRun]:
    """A month of test answers, every two hours, with a bad night; the last day fails from noon on unless `is_well`."""
    runs = []
    for number in range(360, 0, -1):
        is_down = 200 <= number <= 203 or (not is_well and number <= 3)
        speed = 11 + 3 * math.sin(number / 9) + 2 * math.sin(number * 1.7)
        if is_down:
            runs.append(CanaryRun(model, now - 7200 * number, "missing_blocks", None, None, 0))
        else:
            runs.append(CanaryRun(model, now - 7200 * number, "ok", 0.5 + number % 4 / 10, speed, 2))
    return runs


SWARMS: dict[str, Callable[[], Sequence[SeenNode]]] = {
    "complete": complete,
    "degraded": degraded,
    "incomplete": incomplete,
    "down": lambda: [],
    "hostile": hostile,
}
