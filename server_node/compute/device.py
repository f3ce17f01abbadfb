"""What a device is good for: whether it can be used here, and how much memory is free on it."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from server_node.compute.device_plan import DeviceRoom
from swarm_protocol.errors import ConfigError

_NO_LIMIT = 1 << 62


def usable_device(device: str) -> torch.device:
    """Return the torch device called `device`. Raises ConfigError if this machine has none such."""
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise NotImplementedError("it holds no values")
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here: {reason}") from error
    return target


def usable_devices(devices: str) -> tuple[torch.device, ...]:
    """Return the torch devices that `--device` names, with commas between them.

    Raises ConfigError if one cannot be used here, and if they are of several types: what they compute would differ.
    """
    found = tuple(usable_device(device.strip()) for device in devices.split(","))
    if len({device.type for device in found}) > 1:
        raise ConfigError(f"--device {devices} names devices of several types: name those of one type")
    return found


def device_rooms(devices: Sequence[torch.device]) -> tuple[DeviceRoom, ...]:
    """Return what is free on each device; one that is named several times is shared between its names."""
    indexed = [str(_with_index(device)) for device in devices]
    return tuple(
        DeviceRoom(str(device), free_memory_bytes(device) // indexed.count(whole))
        for device, whole in zip(devices, indexed, strict=True)
    )


def _with_index(device: torch.device) -> torch.device:
    if str(device) == "cuda":  # the one that torch takes then
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def hardware_name(device: str) -> str:
    """Return what computes, as far as its speed depends on it: the GPU's name, or the CPU's and its cores."""
    if "," in device:
        return " + ".join(hardware_name(each.strip()) for each in device.split(","))
    target = torch.device(device)
    if target.type == "cuda":
        return torch.cuda.get_device_name(target)
    return f"{target.type} {_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_memory_bytes(device: torch.device) -> int:
    """Return the memory that new tensors on `device` can take. Raises ConfigError where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        import psutil
    except ImportError as error:
        raise ConfigError("how much memory is free is unknown without psutil: pip install 'umbel[node]'") from error
    return min(int(psutil.virtual_memory().available), _container_memory_bytes())


def _container_memory_bytes() -> int:
    """Return what is left of the container's own limit (cgroup v2), which the machine's figures do not know."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii").strip()
        return max(0, int(limit) - int(used)) if limit != "max" else _NO_LIMIT
    except (OSError, ValueError):
        return _NO_LIMIT
