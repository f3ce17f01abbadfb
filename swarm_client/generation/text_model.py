"""A distributed model as text: what the chat site uses."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import torch

from swarm_client.block_size import block_size
from swarm_client.events import EventListener
from swarm_client.generation.draft_model import DraftModel, DraftSession, load_draft_model
from swarm_client.generation.embedder import DistributedEmbedder
from swarm_client.generation.ends_worker import ENDS_WORKER, ChosenToken, EndsRow
from swarm_client.generation.prompt_format import chat_stop, chat_token_ids, common_prefix, continued_ids
from swarm_client.generation.sampling import TokenChooser
from swarm_client.generation.speculation import Speculator, StepCost, check_speculation
from swarm_client.generation.stream import NextToken, stream_text
from swarm_client.generation.text_session import ChatMessage, SamplingParams, TextDelta
from swarm_client.generation.token_bytes import token_bytes
from swarm_client.generation_times import GenerationTimes
from swarm_client.inference_session import InferenceSession
from swarm_client.model_swarm import ModelSwarm
from swarm_client.remote_blocks import RemoteBlocks
from swarm_protocol.errors import CancelledStepError, ConfigError, InvalidRequestError, MaxLengthError, SwarmError
from swarm_protocol.model.checkpoint import Checkpoint
from swarm_protocol.model.parts import EndsModule
from swarm_protocol.spans import describe_blocks

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 2048
"""For models whose config names no limit, such as BLOOM: it was trained on 2,048 tokens (arXiv:2211.05100)."""


class DistributedTextModel:
    """Fulfils `TextModel`. Any thread may call it; sessions belong to one thread each."""

    def __init__(self, checkpoint: Checkpoint, ends: EndsModule, blocks: RemoteBlocks) -> None:
        self._tokenizer: Any = checkpoint.tokenizer()
        self._ends = ends
        self._blocks = blocks
        self._end_tokens = _end_tokens(checkpoint, self._tokenizer)
        self.name = checkpoint.name
        limit = getattr(checkpoint.config, "max_position_embeddings", None)
        self.max_length = int(limit or DEFAULT_MAX_LENGTH)
        self.block_size = block_size(checkpoint)
        self._encode_lock = threading.Lock()
        self._token_bytes: dict[int, bytes] = {}
        self._checkpoint = checkpoint
        self._draft_model: DraftModel | None = None
        self._draft_lock = threading.Lock()
        self._speculation = blocks.swarm.config.speculation

    @property
    def stop_token(self) -> str | None:
        """The text of the token that ends an assistant's turn; None if the model has none."""
        token: str | None = self._tokenizer.eos_token
        return token

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of `text`."""
        with self._encode_lock:  # a fast tokenizer refuses to be used by two threads at once ("Already borrowed")
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def chat_token_ids(
        self, messages: Sequence[ChatMessage], *, continue_last: bool = False, has_turn: bool = True
    ) -> list[int]:
        """Return the chat prompt of `messages`; see `prompt_format`. Raises InvalidRequestError."""
        with self._encode_lock:
            return chat_token_ids(self._tokenizer, messages, continue_last=continue_last, has_turn=has_turn)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of `token_ids`, spaces as they are."""
        text: str = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token stands for in a text, as UTF-8; a token may be a part of a character."""
        found = self._token_bytes.get(token_id)
        if found is None:  # 22 µs, and with alternatives there are 20 of them for each token of an answer
            with self._encode_lock:
                found = self._token_bytes[token_id] = token_bytes(self._tokenizer, token_id)
        return found

    def embedder(self) -> DistributedEmbedder:
        """Return what turns tokens into vectors; each `embed` has sessions of its own."""
        return DistributedEmbedder(self._ends, self._blocks.session, self.max_length)

    def open_session(
        self, max_length: int, *, standby: bool | None = None, speculation: str | None = None
    ) -> "DistributedTextSession":
        """Return an empty session for up to `max_length` tokens; the caches are reserved when it first generates.

        With `standby` a second node follows along at each hop, `speculation` guesses tokens ahead; None is what
        `ClientConfig` says. Raises MaxLengthError if the model cannot hold so many, and ConfigError if a draft model is
        wanted and there is none that fits.
        """
        if not 1 <= max_length <= self.max_length:
            raise MaxLengthError(0, max_length, self.max_length)
        chosen = check_speculation(self._speculation if speculation is None else speculation)
        drafter = self.draft_model().session() if chosen == "draft" else None
        speculator = None if chosen == "off" else Speculator(drafter)
        session = self._blocks.session(max_length, standby=standby)
        return DistributedTextSession(self, self._ends, session, self._end_tokens, speculator, drafter)

    def prepare(self) -> None:
        """Load the draft model, if sessions are to have one; where it does not fit, they do with prompt lookup.

        For whoever opens several models with one configuration. Raises CheckpointError or UnsupportedFamilyError.
        """
        if self._speculation != "draft":
            return
        try:
            self.draft_model()
        except ConfigError as error:
            logger.warning("tokens are guessed by prompt lookup alone: %s", error)
            self._speculation = "ngram"

    def draft_model(self) -> DraftModel:
        """Return the model that guesses, loaded at the first call. Raises ConfigError if there is none that fits."""
        config = self._blocks.swarm.config
        with self._draft_lock:
            if self._draft_model is None:
                if config.draft_model is None:
                    raise ConfigError("speculation with a draft model needs ClientConfig.draft_model")
                self._draft_model = load_draft_model(config.draft_model, config.draft_quantization, self._checkpoint)
            return self._draft_model

    def missing_blocks(self) -> Sequence[str]:
        """Return the runs of blocks that no node serves now, as people read them."""
        return [describe_blocks(span) for span in self._blocks.swarm.missing_blocks(self._blocks.model)]

    def swarm(self) -> ModelSwarm:
        """Return what is known of the model's nodes; see `TextModel`."""
        return self._blocks.swarm.seen(self._blocks.model)

    @property
    def turn_stop(self) -> tuple[str, ...]:
        """The strings that end an assistant's turn besides its end token."""
        return chat_stop(self._tokenizer)


class DistributedTextSession:
    """Fulfils `TextSession`. `token_ids[:position]` is cached at the nodes; at least the last one never needs to be."""

    def __init__(
        self,
        model: DistributedTextModel,
        ends: EndsModule,
        session: InferenceSession,
        end_tokens: frozenset[int],
        speculator: Speculator | None = None,
        drafter: DraftSession | None = None,
    ) -> None:
        self._model = model
        self._ends = ends
        self._session = session
        self._end_tokens = end_tokens
        self._token_ids: list[int] = []
        self._turn_stop: tuple[str, ...] = ()
        self._cancelled = threading.Event()
        self._choosing: Future[ChosenToken] | None = None
        self._cached_tokens: int | None = None  # at the first step of a generation; None before it
        # The last token, where it is and its states, if the worker made them.
        self._embedded: tuple[int, int, torch.Tensor | None] = (0, 0, None)
        self._speculator, self._drafter = speculator, drafter
        # Tokens of the last step that were not asked for yet; the nodes have cached all but the last one.
        self._coming: deque[NextToken] = deque()
        self._end = 0  # where the running generation ends at the latest

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens of the session."""
        return tuple(self._token_ids)

    @property
    def max_length(self) -> int:
        """The most tokens that the session can hold."""
        return self._session.max_length

    @property
    def route(self) -> Sequence[str]:
        """The route as people read it, a line for each hop; empty before the first token."""
        return self._session.route

    def append_text(self, text: str, *, add_special_tokens: bool | None = None) -> int:
        """Tokenize `text` behind what is there; see `TextSession`."""
        is_first = not self._token_ids
        ids = self._model.encode(
            text, add_special_tokens=is_first if add_special_tokens is None else add_special_tokens
        )
        if len(self._token_ids) + len(ids) > self.max_length:
            raise MaxLengthError(len(self._token_ids), len(ids), self.max_length)
        self._forget_coming()
        self._turn_stop = ()
        self._token_ids += ids
        return len(ids)

    def set_messages(self, messages: Sequence[ChatMessage], *, continue_last: bool = False) -> int:
        """Make the session hold the chat prompt of `messages`; see `TextSession`."""
        ids = self._model.chat_token_ids(messages, continue_last=continue_last)
        if continue_last:
            ids = continued_ids(self._token_ids, ids, self._model.encode, self._decode_all)
        if len(ids) >= self.max_length:
            raise MaxLengthError(len(ids), 1, self.max_length)
        self._forget_coming()
        kept = min(common_prefix(self._token_ids, ids), len(ids) - 1, self._session.position)
        self._session.position = kept
        self._token_ids = ids
        self._turn_stop = self._model.turn_stop
        return kept

    def keep_messages(self, messages: Sequence[ChatMessage]) -> int:
        """Drop the tokens behind those of `messages`; see `TextSession`."""
        ids = self._model.chat_token_ids(messages, has_turn=False) if messages else []
        kept = common_prefix(self._token_ids, ids)
        self.replace_tail(len(self._token_ids) - kept, ())
        return kept

    def _decode_all(self, token_ids: Sequence[int]) -> str:
        return self._model.decode(token_ids, skip_special_tokens=False)

    def replace_tail(self, num_tokens: int, token_ids: Sequence[int]) -> None:
        """Drop the last `num_tokens` tokens and put `token_ids` in their place; see `TextSession`."""
        kept = max(0, len(self._token_ids) - num_tokens)
        if kept + len(token_ids) > self.max_length:
            raise MaxLengthError(kept, len(token_ids), self.max_length)
        self._coming.clear()
        self._session.position = min(self._session.position, kept)
        self._token_ids = self._token_ids[:kept] + list(token_ids)

    @property
    def cached_tokens(self) -> int:
        """How many tokens the last `generate` found cached; see `TextSession`."""
        return self._cached_tokens or 0

    @property
    def times(self) -> GenerationTimes:
        """Where the time of the last `generate` went until now."""
        return self._session.times

    def generate(self, params: SamplingParams, on_event: EventListener | None = None) -> Iterator[TextDelta]:
        """Yield the continuation piece by piece; see `TextSession`."""
        if not self._token_ids:
            raise InvalidRequestError("the session is empty: there is nothing to continue")
        if len(self._token_ids) + params.max_new_tokens > self.max_length:
            raise MaxLengthError(len(self._token_ids), params.max_new_tokens, self.max_length)
        chooser = TokenChooser(params)
        self._forget_coming()
        self._end = len(self._token_ids) + params.max_new_tokens
        self._cancelled.clear()
        self._cached_tokens = None
        self._session.recover()
        self._session.on_event = on_event
        self._session.time_log.restart()
        return stream_text(
            replace(params, stop=params.stop + self._turn_stop),
            lambda: self._next_token(chooser),
            lambda ids: self._model.decode(ids, skip_special_tokens=params.skip_special_tokens),
            self._token_ids,
            self._end_tokens,
        )

    def cancel(self) -> None:
        """End a running `generate` now. Any thread."""
        self._cancelled.set()
        self._session.cancel()
        self._withdraw_row()

    def close(self) -> None:
        """Free the caches at the nodes. Idempotent."""
        self._withdraw_row()
        self._session.close()
        if self._drafter is not None:
            self._drafter.close()

    def _withdraw_row(self) -> None:
        choosing = self._choosing
        if choosing is not None:
            choosing.cancel()

    def _forget_coming(self) -> None:
        """Forget what was computed beyond the tokens that were asked for."""
        self._coming.clear()
        self._session.position = min(self._session.position, len(self._token_ids))

    def _next_token(self, chooser: TokenChooser) -> NextToken:
        if not self._coming:
            self._take_step(chooser)
        elif self._cancelled.is_set():
            raise CancelledStepError("generation was cancelled")
        token = self._coming.popleft()
        self._token_ids.append(token.token_id)
        return token

    @torch.inference_mode()
    def _take_step(self, chooser: TokenChooser) -> None:
        """Compute the next token, and as many behind it as were guessed."""
        log = self._session.time_log
        # From before the look at the flag, so that no cancel falls in between.
        with self._session.cancellable(), log.token(time.perf_counter):
            if self._cancelled.is_set():
                raise CancelledStepError("generation was cancelled")
            draft = self._draft(chooser)
            started_s = time.perf_counter()
            log.drafts(len(draft))
            states = self._step_somewhere(draft)[:, -1 - len(draft) :]
            chosen = self._choose(chooser, states, draft)
            tokens = (*chosen.before, chosen)
            # What was wrong goes from the caches with the next step.
            self._session.position = len(self._token_ids) + len(chosen.before)
            log.accepted(len(chosen.before))
        if self._speculator is not None:
            cost = self._cost(time.perf_counter() - started_s) if log.is_last_a_token else None
            self._speculator.came(draft, [token.token_id for token in tokens], cost)
        self._embedded = (len(self._token_ids) + len(chosen.before), chosen.token_id, chosen.embedded)
        self._coming.extend(NextToken(token.token_id, token.logprobs) for token in tokens)

    def _draft(self, chooser: TokenChooser) -> tuple[int, ...]:
        """Return the tokens that are guessed to come; a step may not bring more than are wanted."""
        if self._speculator is None:
            return ()
        return self._speculator.draft(self._token_ids, self._end - len(self._token_ids) - 1, chooser)

    def _cost(self, seconds: float) -> StepCost:
        timings = self._session.last_timings
        queue_s, compute_s = max(((timing.queue_s, timing.compute_s) for timing in timings), default=(0.0, 0.0))
        return StepCost(seconds, queue_s, compute_s)

    def _step_somewhere(self, draft: tuple[int, ...]) -> torch.Tensor:
        """Take a step; where nobody can go on with what is cached, with all tokens on a new route."""
        began_s = time.perf_counter()
        try:
            return self._step(draft)
        except SwarmError as error:
            if not error.retryable or self._session.is_taped:
                raise
            logger.info("computing %d tokens again: %s", len(self._token_ids), error)
            self._session.recover()
        output = self._step(draft)
        self._session.went_on(began_s, len(self._token_ids))
        return output

    def _step(self, draft: tuple[int, ...]) -> torch.Tensor:
        """Return the states of the tokens that are not cached yet, and of the draft, after the last block."""
        if self._session.batch_size is None:
            self._session.start_with(self._token_ids[:-1], self._ends.dtype)
        self._session.position = min(self._session.position, len(self._token_ids) - 1)
        if self._cached_tokens is None:
            self._cached_tokens = self._session.position
        return self._session.step(self._embed_rest(draft))

    def _embed_rest(self, draft: tuple[int, ...]) -> torch.Tensor:
        """Return the states (1, n, hidden) of the tokens that are not cached, and of the draft."""
        position = self._session.position
        rest = [*self._token_ids[position:], *draft]
        at, token_id, states = self._embedded
        if states is not None and (position, rest) == (at, [token_id]):
            return states
        return self._ends.embed(torch.tensor([rest]), position)

    def _choose(self, chooser: TokenChooser, states: torch.Tensor, draft: tuple[int, ...]) -> ChosenToken:
        is_last = len(self._token_ids) + len(draft) + 1 >= self.max_length
        row = EndsRow(self._ends, chooser, states, self._token_ids, is_last, draft)
        self._choosing = choosing = ENDS_WORKER.submit(row)
        try:
            if self._cancelled.is_set():
                choosing.cancel()
            return choosing.result()
        except CancelledError:
            raise CancelledStepError("generation was cancelled") from None
        finally:
            choosing.cancel()
            self._choosing = None


def _end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a turn: those of the generation config and the tokenizer's own."""
    configured = checkpoint.generation_config().eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
