"""What fine-tuning adds to a model's blocks: LoRA matrices (Hu et al. 2021, arXiv 2106.09685) and deep prompts.

The part of one block is named by its content, so that whoever has it can be believed, the same part is held once, and
one that changed is another one.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from swarm_protocol.errors import InvalidAdapterError
from swarm_protocol.tensors import dtype_name

PART_ID_BYTES = 32
"""SHA-256: parts come from strangers, who could make two with a shorter one."""

MAX_RANK = 1024
MAX_PROMPT_TOKENS = 4096

_PATH = re.compile(r"[A-Za-z_][\w.]{0,119}", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class LoraMatrices:
    """Adds `scale * (x @ a.T) @ b.T` to what a linear layer gives for x: `a` is (rank, in), `b` is (out, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class BlockAdapter:
    """What is added to one block.

    `lora` has the matrices by the path of the linear layer in the block, such as `self_attn.q_proj`. `prompt`
    (tokens, hidden) is added to the states of a sequence's first tokens where they enter the block.
    """

    lora: Mapping[str, LoraMatrices] = field(default_factory=dict)
    prompt: torch.Tensor | None = None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor with its name, such as `self_attn.q_proj.lora_A` or `prompt`, sorted by the path."""
        for path in sorted(self.lora):
            yield f"{path}.lora_A", self.lora[path].a
            yield f"{path}.lora_B", self.lora[path].b
        if self.prompt is not None:
            yield "prompt", self.prompt

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())


def part_id(part: BlockAdapter) -> bytes:
    """Return the SHA-256 of a part's names, scales, dtypes, shapes and values. Raises InvalidTensorError for a dtype
    that does not travel."""
    found = hashlib.sha256()
    for name, tensor in part.tensors():
        found.update(f"{name} {dtype_name(tensor.dtype)} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    for path in sorted(part.lora):
        found.update(f"{path} {part.lora[path].scale!r}\n".encode())
    return found.digest()


def check_part(part: BlockAdapter, hidden_size: int) -> None:
    """Raise InvalidAdapterError unless shapes agree with each other and values are finite.

    Whether they fit the layers of the block is seen where the block is.
    """
    for path, matrices in part.lora.items():
        if not _PATH.fullmatch(path):
            raise InvalidAdapterError(f"{path[:120]!r} is no path of a layer")
        a, b = matrices.a, matrices.b
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
            raise InvalidAdapterError(
                f"{path}: LoRA matrices of shapes {tuple(a.shape)} and {tuple(b.shape)}; "
                f"(rank, in) and (out, rank) are needed, of rank 1 to {MAX_RANK}"
            )
        if not math.isfinite(matrices.scale):
            raise InvalidAdapterError(f"{path}: the scale {matrices.scale} is not finite")
    prompt = part.prompt
    if prompt is not None and (
        prompt.dim() != 2 or prompt.shape[1] != hidden_size or not 1 <= prompt.shape[0] <= MAX_PROMPT_TOKENS
    ):
        raise InvalidAdapterError(f"a prompt of shape {tuple(prompt.shape)}; (tokens, {hidden_size}) is needed")
    for name, tensor in part.tensors():
        if not tensor.is_floating_point():
            raise InvalidAdapterError(f"{name} is of dtype {tensor.dtype}; floating numbers are needed")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidAdapterError(f"{name} holds values that are not finite")
