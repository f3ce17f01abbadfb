"""A checkpoint that is about to be served: what its blocks will take on the device, before any weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from server_node.compute.block_loader import module_bytes
from server_node.compute.device import device_rooms, free_memory_bytes, usable_devices
from server_node.compute.device_plan import DeviceRoom
from server_node.compute.fastest_dtype import fastest_dtype
from server_node.compute.quantization import Held, quantized_bytes, scheme_of
from server_node.config import ModelChoice
from swarm_protocol.model.anatomy import build_empty, find_anatomy
from swarm_protocol.model.checkpoint import Checkpoint, Progress, open_checkpoint
from swarm_protocol.model.hub import cache_folder
from swarm_protocol.model.tensor_loading import TensorLoader
from swarm_protocol.spans import Span
from swarm_protocol.tensors import dtype_name


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What a block takes of the disk cache, and what there is for all; `is_bounded` by `--max-disk`, not the disk.

    `spans` are there already.
    """

    block_bytes: int
    room_bytes: int
    is_bounded: bool
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint, and what one of its blocks takes on the device in the dtype and the scheme chosen for it.

    `loading_bytes` is needed besides while blocks are loaded. `disk` is None where nothing has to be downloaded.
    `rooms` are the devices, if the memory of one is not that of all; `free_bytes` is their sum.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    device_type: str
    block_bytes: int
    free_bytes: int
    scheme: Held | None = None
    loading_bytes: int = 0
    disk: OnDisk | None = None
    rooms: tuple[DeviceRoom, ...] = ()

    @property
    def loadable_bytes(self) -> tuple[int, ...]:
        """What blocks and caches can take of each device, with what loading needs besides taken off."""
        each = [room.free_bytes for room in self.rooms] or [self.free_bytes]
        return tuple(max(0, free_bytes - self.loading_bytes) for free_bytes in each)

    @property
    def numerics(self) -> str:
        """What a record says of it: equal for nodes whose KV caches are interchangeable."""
        return f"{self.checkpoint.revision}/{dtype_name(self.dtype)}/{self.kernels}"

    @property
    def kernels(self) -> str:
        """What computes, as far as results depend on it: the end of a record's numerics."""
        return self.device_type if self.scheme is None else f"{self.scheme.label}/{self.device_type}"


def open_model(
    choice: ModelChoice, device: str, dtype: str, quantization: str, on_download: Progress | None = None
) -> OpenedModel:
    """Open a checkpoint and measure a block, as `ComputeWorker.open_model` says."""
    devices = usable_devices(device)
    target = devices[0]
    scheme = scheme_of(quantization, target)
    checkpoint = open_checkpoint(
        choice.source,
        revision=choice.revision,
        cache_dir=choice.cache_dir,
        max_disk_bytes=choice.max_disk_bytes,
        on_download=on_download,
    )
    chosen = _chosen_dtype(choice, dtype, checkpoint, target, scheme)
    empty = build_empty(checkpoint.config, chosen)
    disk = _on_disk(choice, checkpoint, empty)
    anatomy = find_anatomy(empty)
    blocks = getattr(empty.get_submodule(anatomy.decoder), anatomy.blocks)
    # Families with layers of several kinds differ by block: the largest one stands for all.
    plain_bytes = max(module_bytes(block) for block in blocks)
    rooms = device_rooms(devices)
    free_bytes = sum(room.free_bytes for room in rooms)
    if scheme is None:
        return OpenedModel(checkpoint, chosen, target.type, plain_bytes, free_bytes, disk=disk, rooms=rooms)
    block_bytes = max(quantized_bytes(block, scheme) for block in blocks)
    # One block at a time is there as it is in the file.
    return OpenedModel(checkpoint, chosen, target.type, block_bytes, free_bytes, scheme, plain_bytes, disk, rooms)


def _on_disk(choice: ModelChoice, checkpoint: Checkpoint, empty: PreTrainedModel) -> OnDisk | None:
    """Measure the blocks that are asked for, else the largest of three: each may be in another file."""
    last, loader = checkpoint.num_blocks - 1, TensorLoader(checkpoint, empty)
    if choice.blocks is not None and choice.blocks.end <= checkpoint.num_blocks:
        span = choice.blocks
        room = loader.disk_room(range(span.start, span.end))
        if room is None:
            return None
        return OnDisk(-(-room.needed_bytes // len(span)), room.room_bytes, room.is_bounded)
    rooms = [room for block in sorted({0, last // 2, last}) if (room := loader.disk_room([block])) is not None]
    if not rooms:
        return None
    largest = max(rooms, key=lambda room: room.needed_bytes)
    spans = loader.spans_here(checkpoint.num_blocks)
    return OnDisk(largest.needed_bytes, largest.room_bytes, largest.is_bounded, spans)


def _chosen_dtype(
    choice: ModelChoice, dtype: str, checkpoint: Checkpoint, device: torch.device, scheme: Held | None
) -> torch.dtype:
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if scheme is not None:
        # What packed products are fast in, and bitsandbytes; CUDA devices before Ampere are slow with it.
        is_old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float16 if is_old else torch.bfloat16
    empty = build_empty(checkpoint.config, torch.float32)
    blocks = getattr(empty.get_submodule((anatomy := find_anatomy(empty)).decoder), anatomy.blocks)
    num_weights = max(sum(weight.numel() for weight in block.parameters()) for block in blocks)
    return fastest_dtype(checkpoint, num_weights, free_memory_bytes(device), device, cache_folder(choice.cache_dir))
