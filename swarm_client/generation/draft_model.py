"""A small model on this machine that guesses what the distributed one will say next.

All sessions of a process share it, and one thread computes for all of them. It follows a session's tokens in a KV cache
of its own; while it is far behind, as after a prompt, it catches up beside the steps of the swarm, and nobody waits.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache

from swarm_client.generation.prompt_format import common_prefix
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.speculation import check_draft_quantization
from swarm_protocol.errors import ConfigError
from swarm_protocol.model.checkpoint import Checkpoint, open_checkpoint
from swarm_protocol.model.few_rows import speed_up
from swarm_protocol.model.parts import EndsModule, SpanModule, load_ends, load_span
from swarm_protocol.model.quantized_linears import PackedLayers, replace_linears, scheme_named
from swarm_protocol.spans import Span

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

PIECE_TOKENS = 64
"""Of a prompt that is caught up with: between two pieces others get their drafts."""

WAIT_TOKENS = 8
"""Up to so many tokens behind, a draft waits for them: they cost about as much as two."""

CACHES_MOST = 4
"""Sessions whose keys and values are kept. Where more are under way, nodes are busy and nothing is guessed."""

TIME_MEMORY = 0.9
"""Of the measured seconds of a token, with each draft."""


class DraftModel:
    """The model and its thread. Any thread may call it."""

    def __init__(self, ends: EndsModule, blocks: SpanModule, max_length: int) -> None:
        """`ends` and `blocks` are those of one model, all of it."""
        self.max_length = max_length
        self._ends, self._blocks = ends, blocks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draft-model")
        self._lock = threading.Lock()
        self._recent: list[DraftSession] = []
        self.token_s = 0.0
        """What a guessed token takes, waiting for the thread among it."""
        self._thread.submit(self._warm_up).result()

    def session(self) -> "DraftSession":
        """Return what guesses for one session."""
        return DraftSession(self)

    def used(self, session: "DraftSession") -> None:
        """Note that a session's cache is wanted; that of the one that has rested longest may go."""
        with self._lock:
            self._recent = [each for each in self._recent if each is not session] + [session]
            gone = self._recent[:-CACHES_MOST]
            self._recent = self._recent[-CACHES_MOST:]
        for each in gone:
            self._thread.submit(each._empty)

    def forget(self, session: "DraftSession") -> None:
        """Free a session's cache."""
        with self._lock:
            self._recent = [each for each in self._recent if each is not session]
        self._thread.submit(session._empty)

    def took(self, token_s: float) -> None:
        """Note what a token of a draft took."""
        self.token_s = TIME_MEMORY * self.token_s + (1 - TIME_MEMORY) * token_s

    @torch.inference_mode()
    def run(self, cache: "_Cache", token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits (vocab) behind `token_ids`, which go behind those in the cache. In the thread only."""
        position = cache.get_seq_length()
        states = self._ends.embed(torch.tensor([list(token_ids)]), position).to(self._blocks.dtype)
        output: torch.Tensor = self._blocks(states, cache=cache)
        return self._ends.logits(output[:, -1:].to(self._ends.dtype))[0, -1]

    def _warm_up(self) -> None:
        cache = _Cache()
        self.run(cache, [0])
        started_s = time.perf_counter()
        for _ in range(3):
            self.run(cache, [0])
        self.token_s = (time.perf_counter() - started_s) / 3


class DraftSession:
    """Guesses for one session; used by one thread at a time, like the session."""

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._ids: list[int] = []
        self._cache = _Cache()
        self._following: Future[None] | None = None
        self._is_closed = self._is_broken = False

    @property
    def token_s(self) -> float:
        """What a guessed token takes, measured."""
        return self._model.token_s

    def is_ready(self, token_ids: Sequence[int]) -> bool:
        """Whether a draft behind `token_ids` can be had at once; if not, the model begins to catch up."""
        if self._is_broken or len(token_ids) >= self._model.max_length:
            return False
        if self._following is not None:
            if not self._following.done():
                return False
            self._is_broken = self._following.exception() is not None
            self._following = None
        if self._num_behind(token_ids) > WAIT_TOKENS:
            self._model.used(self)
            self._following = self._model._thread.submit(self._follow, list(token_ids[:-1]))
            return False
        return True

    def draft(self, token_ids: Sequence[int], most: int, chooser: TokenChooser) -> tuple[int, ...]:
        """Return up to `most` tokens that may come behind `token_ids`, as `chooser` would choose them."""
        most = min(most, self._model.max_length - len(token_ids))
        if most < 1:
            return ()
        self._model.used(self)
        started_s = time.perf_counter()
        try:
            found = self._model._thread.submit(self._draft, list(token_ids), most, chooser).result()
        except Exception:
            # A text does not need guesses. Whatever the chooser refuses, it refuses without them, too.
            logger.exception("the draft model failed; this session goes on without it")
            self._is_broken = True
            return ()
        self._model.took((time.perf_counter() - started_s) / most)
        return found

    def close(self) -> None:
        """Stop catching up and free the cache."""
        self._is_closed = True
        self._model.forget(self)

    def _num_behind(self, token_ids: Sequence[int]) -> int:
        """Return how many tokens are not in the cache."""
        return len(token_ids) - common_prefix(self._ids, token_ids)

    # in the model's thread

    def _follow(self, token_ids: list[int]) -> None:
        """Have all of `token_ids` in the cache."""
        self._keep(len(token_ids) - self._num_behind(token_ids))
        while len(self._ids) < len(token_ids) and not self._is_closed:
            piece = token_ids[len(self._ids) : len(self._ids) + PIECE_TOKENS]
            self._model.run(self._cache, piece)
            self._ids += piece

    def _draft(self, token_ids: list[int], most: int, chooser: TokenChooser) -> tuple[int, ...]:
        # The last one is run in any case, for its logits.
        self._keep(min(len(token_ids) - self._num_behind(token_ids), len(token_ids) - 1))
        rest, context = token_ids[len(self._ids) :], list(token_ids)
        while len(context) < len(token_ids) + most:
            logits = self._model.run(self._cache, rest)
            self._ids += rest
            rest = [chooser.choose(logits, context)]
            context += rest
        return tuple(context[len(token_ids) :])

    def _keep(self, num_tokens: int) -> None:
        """Drop what is behind the first `num_tokens` tokens from the cache."""
        if num_tokens < len(self._ids):
            self._cache.crop(num_tokens - len(self._ids))
            del self._ids[num_tokens:]

    def _empty(self) -> None:
        self._ids, self._cache = [], _Cache()


class _Cache(DynamicCache):  # type: ignore[misc]
    """The keys and values of one row."""

    def advance(self, num_tokens: int) -> None:
        """Count tokens, as spans ask of caches: this one knows them by its keys."""


def load_draft_model(source: str, quantization: str, checkpoint: Checkpoint) -> DraftModel:
    """Return the model of `source`, a folder, a GGUF file or a hub repository, to guess for that of `checkpoint`.

    With a `quantization` other than `none` its large layers are packed and the blocks run in bfloat16, if this CPU has
    products for it. Raises ConfigError if it knows other tokens, CheckpointError or UnsupportedFamilyError if it cannot
    be opened.
    """
    check_draft_quantization(quantization)
    draft = open_checkpoint(source)
    if draft.tokenizer().get_vocab() != checkpoint.tokenizer().get_vocab():
        raise ConfigError(f"{draft.name} has other tokens than {checkpoint.name}: it cannot guess for it")
    scheme = None if quantization == "none" else scheme_named(quantization)
    if scheme is None and quantization != "none":
        logger.warning("no products for %s on this CPU: the draft model runs in float32", quantization)
    blocks = load_span(
        draft,
        Span(0, draft.num_blocks),
        dtype=torch.float32 if scheme is None else torch.bfloat16,
        device=CPU,
        on_block=None if scheme is None else partial(_pack, PackedLayers(scheme)),
    )
    speed_up(blocks)
    ends = load_ends(draft, dtype=torch.float32, device=CPU)
    limit = getattr(draft.config, "max_position_embeddings", None)
    model = DraftModel(ends, blocks, int(limit or 1 << 20))
    logger.info("draft model %s: %.1f ms a token", draft.name, model.token_s * 1e3)
    return model


def _pack(layers: PackedLayers, block: nn.Module) -> None:
    replace_linears(block, layers)
