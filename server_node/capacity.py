"""Pure: how many blocks, and how much KV cache, fit on the device."""

from server_node.compute.device_plan import num_that_fit
from server_node.compute.opened_model import OpenedModel
from server_node.compute.worker import LoadedSpan
from server_node.config import ModelChoice
from swarm_protocol.errors import ConfigError
from swarm_protocol.tensors import dtype_name


def num_blocks_that_fit(free_bytes: int, block_bytes: int, num_blocks: int) -> int:
    """Return how many blocks of `block_bytes` a node should take: those that leave half as much again for KV cache.

    0 if not even one fits.
    """
    return min(num_blocks, free_bytes * 2 // (3 * block_bytes))


def num_blocks_to_hold(choice: ModelChoice, model: OpenedModel) -> int:
    """Return how many blocks are to be loaded, by default all that memory and disk have room for.

    Raises ConfigError if the model has not so many, or if what is asked for does not fit; it says what would.
    """
    name, in_all = model.checkpoint.name, model.checkpoint.num_blocks
    if choice.blocks is not None and choice.blocks.end > in_all:
        raise ConfigError(f"{name} has the blocks 0:{in_all}, not {choice.blocks}")
    if choice.num_blocks is not None and choice.num_blocks > in_all:
        raise ConfigError(f"{name} has {in_all} blocks, not {choice.num_blocks}")
    asked = choice.num_blocks if choice.blocks is None else len(choice.blocks)
    free_bytes = sum(model.loadable_bytes)
    in_memory = min(in_all, sum(num_blocks_that_fit(free, model.block_bytes, in_all) for free in model.loadable_bytes))
    on_disk = in_all if model.disk is None else min(in_all, model.disk.room_bytes // model.disk.block_bytes)
    wanted = min(in_memory, on_disk) if asked is None else asked
    if max(1, wanted) > num_that_fit(model.block_bytes, model.loadable_bytes) or (asked is None and not in_memory):
        raise ConfigError(_too_big_for_memory(max(1, wanted), model, free_bytes, min(in_memory, on_disk)))
    if max(1, wanted) > on_disk:
        raise ConfigError(_too_big_for_disk(max(1, wanted), model, on_disk))
    return wanted


def _too_big_for_memory(wanted: int, model: OpenedModel, free_bytes: int, fitting: int) -> str:
    takes = f"{_taken(wanted, model.block_bytes, model)} in {_held_as(model)}, but {gb(free_bytes)} of memory are free"
    if len(model.rooms) > 1:
        takes += f" ({_by_device(model)})"
    smaller = "a smaller --dtype or --quantization"
    if fitting:
        return f"{takes}: {_would_fit(fitting)} with a KV cache: use --num-blocks {fitting}, or {smaller}"
    if wanted <= num_that_fit(model.block_bytes, model.loadable_bytes):  # nobody asked for a number
        return f"{takes}, too little for a KV cache of half its size: use {smaller}, or --num-blocks 1 to try it"
    return f"{takes}: not one block would fit with a KV cache: free memory, or use {smaller}"


def _by_device(model: OpenedModel) -> str:
    """Say what is free on each device, and which of them has no room for a single block."""
    parts = []
    for room, free_bytes in zip(model.rooms, model.loadable_bytes, strict=True):
        too_small = ", too small for a block" if free_bytes < model.block_bytes else ""
        parts.append(f"{gb(free_bytes)} on {room.name}{too_small}")
    return "; ".join(parts)


def _too_big_for_disk(wanted: int, model: OpenedModel, fitting: int) -> str:
    assert model.disk is not None
    what = "--max-disk leaves" if model.disk.is_bounded else "the disk has"
    takes = f"{_taken(wanted, model.disk.block_bytes, model)} on disk, but {what} {gb(model.disk.room_bytes)} for them"
    more = "free some, raise --max-disk or name" if model.disk.is_bounded else "free some, or name"
    fewer = f"{_would_fit(fitting)}: use --num-blocks {fitting}, or" if fitting else "not one block would fit:"
    return f"{takes}: {fewer} {more} another --cache-dir"


def _taken(num_blocks: int, block_bytes: int, model: OpenedModel) -> str:
    noun = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
    return f"{noun} of {model.checkpoint.name} take{'s' if num_blocks == 1 else ''} {gb(num_blocks * block_bytes)}"


def _would_fit(num_blocks: int) -> str:
    return f"{num_blocks} block{'' if num_blocks == 1 else 's'} would fit"


def cache_tokens_to_reserve(asked: int | None, loaded: LoadedSpan) -> int:
    """Return the KV cache in tokens; by default half of the free memory. Raises ConfigError if it does not fit."""
    per_token = max(1, loaded.kv_bytes_per_token)
    tokens = loaded.free_bytes // 2 // per_token if asked is None else asked
    if not tokens or tokens * per_token > loaded.free_bytes:
        raise ConfigError(
            f"a KV cache of {max(1, tokens)} tokens takes {gb(max(1, tokens) * per_token)}, but "
            f"{gb(loaded.free_bytes)} are free, enough for {loaded.free_bytes // per_token}: "
            "serve fewer blocks, or lower --cache-tokens"
        )
    return tokens


def prefix_tokens_to_keep(asked: int | None, cache_tokens: int, loaded: LoadedSpan) -> int:
    """Return the tokens of prefixes to keep besides the KV cache; by default an eighth of it, as far as that fits.

    Raises ConfigError if what is asked for does not fit.
    """
    room = loaded.free_bytes // max(1, loaded.kv_bytes_per_token) - cache_tokens
    if asked is None:
        return min(cache_tokens // 8, room)
    if asked > room:
        raise ConfigError(f"{asked} tokens of prefixes do not fit besides the KV cache, {room} would: --prefix-tokens")
    return asked


def _held_as(model: OpenedModel) -> str:
    dtype = dtype_name(model.dtype)
    return dtype if model.scheme is None else f"{model.scheme.label} and {dtype}"


def gb(size_bytes: int) -> str:
    """Return a size as people read it."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
