"""Whether the owner's own programs use the device."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from server_node.owner_use import BUSY_FOR_S, BUSY_SHARE, IDLE_FOR_S, IDLE_SHARE, OwnerUse
from server_node.owner_watch import CpuShare, GpuShare, OwnerWatch, watch_devices
from swarm_protocol.errors import ConfigError
from tests.node.node_scenario import virtual


def after(*stretches: tuple[float, float], period_s: float = 2.0) -> OwnerUse:
    """Return what is known after stretches of a share and its seconds."""
    use, now_s = OwnerUse(), 0.0
    for share, seconds in stretches:
        for _ in range(int(seconds / period_s)):
            use.sampled(share, now_s)
            now_s += period_s
    return use


LONG, LONG_IDLE = BUSY_FOR_S + 4, IDLE_FOR_S + 4


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [
        ([], None),
        ([(0.0, BUSY_FOR_S - 4)], None),
        ([(0.0, LONG)], False),
        ([(BUSY_SHARE - 0.01, LONG)], False),
        ([(1.0, LONG)], True),
        ([(0.0, LONG), (1.0, BUSY_FOR_S - 4)], False),
        ([(0.0, LONG), (1.0, 6.0), (0.0, 2.0), (1.0, 6.0)], False),
        ([(0.0, LONG), (BUSY_SHARE, LONG)], True),
        ([(1.0, LONG), (0.0, LONG)], True),
        ([(1.0, LONG), (0.0, LONG_IDLE)], False),
        ([(1.0, LONG), (IDLE_SHARE, 2 * LONG_IDLE)], True),
        ([(1.0, LONG), (0.0, IDLE_FOR_S - 10), (IDLE_SHARE, 2.0), (0.0, IDLE_FOR_S - 10)], True),
        ([(1.0, LONG), (0.0, LONG_IDLE), (BUSY_SHARE - 0.01, 2 * LONG_IDLE)], False),
    ],
)
def test_somebody_is_there_after_a_while_of_use_and_away_after_a_longer_one_of_none(
    stretches: list[tuple[float, float]], expected: bool | None
):
    assert after(*stretches).is_there is expected


def test_a_watch_waits_for_both():
    @virtual
    async def scenario() -> None:
        import asyncio

        shares = iter([0.0] * 20 + [0.9] * 20 + [0.0] * 200)
        watch, clock = OwnerWatch(lambda: next(shares)), asyncio.get_running_loop().time
        await watch.until_away()
        begun_s = clock()
        await watch.until_there()
        there_s = clock()
        assert 20 <= there_s - begun_s <= 60
        await watch.until_away()
        assert IDLE_FOR_S <= clock() - there_s <= IDLE_FOR_S + 60

    scenario()


def test_other_programs_are_seen_on_a_cpu_and_nodes_are_not():
    own, other = CpuShare(), CpuShare()
    spin = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: pass"
    process = subprocess.Popen([sys.executable, "-c", spin])
    try:
        # A child of this process is one of the node's own; seen from elsewhere it is somebody's program.
        others = psutil.Process(process.pid)
        other._nodes._found, other._nodes._found_at_s = {os.getpid()}, time.monotonic()
        own(), other()
        begun_s = others.cpu_times().user
        deadline_s = time.monotonic() + 15
        while others.cpu_times().user < begun_s + 0.5 and time.monotonic() < deadline_s:
            time.sleep(0.05)
        seen_with, seen_without = other(), own()
        assert seen_with > 0.02
        assert seen_without < seen_with
    finally:
        process.kill()
        process.wait()


class FakeDriver:
    """What `pynvml` is asked."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 - the library's name
        pass

    class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
        pass

    def __init__(self) -> None:
        self.samples: list[Any] | Exception = FakeDriver.NVMLError_NotFound()

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetProcessUtilization(self, handle: str, seen_us: int) -> list[Any]:
        assert handle == "GPU-1234"
        if isinstance(self.samples, Exception):
            raise self.samples
        return self.samples


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    return fake


def sample(pid: int, percent: int, at_us: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, smUtil=percent, timeStamp=at_us)


def test_other_programs_are_seen_on_a_gpu(driver: FakeDriver):
    share = GpuShare(torch.device("cuda:0"))
    assert share() == 0.0
    driver.samples = [sample(1, 30, 10), sample(1, 50, 20), sample(os.getpid(), 90, 20), sample(2**22 + 1, 10, 15)]
    assert share() == pytest.approx(0.6)
    assert share() == 0.0, "the same samples again are old"
    driver.samples = [sample(1, 90, 30), sample(2**22 + 1, 90, 31)]
    assert share() == 1.0


def test_a_driver_that_tells_nothing_is_named_at_the_start(driver: FakeDriver):
    driver.samples = FakeDriver.NVMLError_NotSupported()
    with pytest.raises(ConfigError, match=r"does not tell who uses cuda:1: .*NotSupported"):
        watch_devices("cuda:1")
    with pytest.raises(ConfigError, match="for cpu and cuda"):
        watch_devices("mps")
