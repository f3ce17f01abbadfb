"""Look how much of the device the owner's own programs use.

All nodes of this machine count as nobody's own program, else two of them would wait for each other.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from server_node.owner_use import OwnerUse
from swarm_protocol.errors import ConfigError

PERIOD_S = 2.0

_LOOK_FOR_NODES_S = 30.0
"""Between two looks at all processes for other nodes, which takes some milliseconds."""

_NODE_WORDS = ("umbel-node", "server_node")


UsedShare = Callable[[], float]
"""Returns which share of the device others have used since the call before, 0 to 1."""


class OwnerWatch:
    """Watches one device. Belongs to the event loop."""

    def __init__(self, used_share: UsedShare) -> None:
        self._used_share = used_share
        self._use = OwnerUse()

    async def until_away(self) -> None:
        """Wait until nobody uses the device."""
        await self._until(lambda: self._use.is_there is False)

    async def until_there(self) -> None:
        """Wait until somebody does."""
        await self._until(lambda: self._use.is_there is True)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await asyncio.sleep(PERIOD_S)
            self._use.sampled(self._used_share(), asyncio.get_running_loop().time())


def watch_devices(devices: str) -> OwnerWatch:
    """Return a watch for torch's `devices`, as `--device` names them. Raises ConfigError where their use is unknown."""
    shares = [_share_of(torch.device(device.strip())) for device in devices.split(",")]
    return OwnerWatch(lambda: max(share() for share in shares))


def _share_of(device: torch.device) -> UsedShare:
    if device.type == "cuda":
        return GpuShare(device)
    if device.type == "cpu":
        return CpuShare()
    raise ConfigError(f"--only-when-idle is for cpu and cuda: who uses {device} cannot be told")


class CpuShare:
    """Of all cores together."""

    def __init__(self) -> None:
        self._nodes = _Nodes()
        self._last: tuple[float, float, dict[int, float]] | None = None

    def __call__(self) -> float:
        """Return the share since the call before; 0 the first time."""
        times = psutil.cpu_times()
        # A guest's time is counted as its user's already.
        idle = ("idle", "iowait", "guest", "guest_nice")
        busy_s = sum(seconds for name, seconds in times._asdict().items() if name not in idle)
        now = time.monotonic(), busy_s, _seconds_of(self._nodes.pids())
        last, self._last = self._last, now
        if last is None or now[0] <= last[0]:
            return 0.0
        of_nodes_s = sum(seconds - last[2].get(pid, seconds) for pid, seconds in now[2].items())
        others_s = now[1] - last[1] - of_nodes_s
        others: float = others_s / (now[0] - last[0]) / (psutil.cpu_count() or 1)
        return min(1.0, max(0.0, others))


class GpuShare:
    """Of one GPU's time, from what its driver counts for each process."""

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            # By its id, since the driver does not know what CUDA_VISIBLE_DEVICES leaves out.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nodes, self._seen_us = _Nodes(), 0
            self._fresh_samples()
        except Exception as error:  # no library, no driver, no such GPU, no count: each has a kind of its own
            raise ConfigError(f"--only-when-idle: the driver does not tell who uses {device}: {error!r}") from error

    def __call__(self) -> float:
        """Return the share since the call before."""
        used: dict[int, int] = {}
        for sample in self._fresh_samples():
            if sample.pid not in self._nodes.pids():
                used[sample.pid] = max(used.get(sample.pid, 0), sample.smUtil)
        return min(1.0, sum(used.values()) / 100)

    def _fresh_samples(self) -> list[Any]:
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_us)
        except self._nvml.NVMLError_NotFound:  # nothing ran
            return []
        fresh = [sample for sample in samples if sample.timeStamp > self._seen_us]
        self._seen_us = max((sample.timeStamp for sample in fresh), default=self._seen_us)
        return fresh


class _Nodes:
    """The processes of all nodes of this machine, their network daemons included."""

    def __init__(self) -> None:
        self._found: set[int] = set()
        self._found_at_s = float("-inf")

    def pids(self) -> set[int]:
        if time.monotonic() - self._found_at_s > _LOOK_FOR_NODES_S:
            self._found_at_s = time.monotonic()
            nodes = [psutil.Process(), *(each for each in psutil.process_iter(["cmdline"]) if _is_node(each))]
            self._found = {pid for node in nodes for pid in _with_children(node)}
        return self._found


def _is_node(process: psutil.Process) -> bool:
    first_words = (process.info["cmdline"] or [])[:4]
    return any(word in part for part in first_words for word in _NODE_WORDS)


def _with_children(process: psutil.Process) -> set[int]:
    try:
        return {process.pid, *(child.pid for child in process.children(recursive=True))}
    except psutil.Error:  # it has just ended
        return {process.pid}


def _seconds_of(pids: set[int]) -> dict[int, float]:
    found = {}
    for pid in pids:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.Error:
            continue
        found[pid] = times.user + times.system
    return found
