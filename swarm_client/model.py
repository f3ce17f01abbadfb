"""Transformers' own model classes with the swarm in the place of their blocks."""

import contextlib
import contextvars
import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import ModelOutput

from swarm_client.config import ClientConfig
from swarm_client.events import EventListener
from swarm_client.generation.text_model import DistributedTextModel
from swarm_client.generation.text_session import ChatMessage, SamplingParams
from swarm_client.generation.text_stream import TextStream
from swarm_client.inference_session import InferenceSession, active_session
from swarm_client.remote_blocks import BlocksCall, RemoteBlocks, RemoteCache, blocks_call, left_padding
from swarm_client.routing.find_route import ModelKey
from swarm_client.swarm import Swarm
from swarm_protocol.errors import ConfigError, InvalidRequestError
from swarm_protocol.model.checkpoint import Checkpoint, open_checkpoint
from swarm_protocol.model.parts import EndsModule, build_client_model

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Generation:
    """A running `generate`: its session, made when the size is known if there was none, and what it does to rows.

    `prompt` are the ids (batch, n) that it starts from.
    """

    session: InferenceSession | None
    num_beams: int = 1
    prompt: torch.Tensor | None = None


_GUESSING = (GenerationMode.ASSISTED_GENERATION,)
"""Modes that put guessed tokens through the model, at the end some more than are wanted."""

_generating: "contextvars.ContextVar[_Generation | None]" = contextvars.ContextVar("umbel_generate", default=None)
"""The `generate` that runs in this thread."""


class DistributedCausalLM(PreTrainedModel):  # type: ignore[misc]
    """What is added to a family's `…ForCausalLM`; every distributed model is an instance of both.

    Safe to use from several threads, each with a session of its own.
    """

    remote_blocks: RemoteBlocks
    ends: EndsModule
    checkpoint: Checkpoint

    def inference_session(
        self, *, max_length: int, standby: bool | None = None, on_event: EventListener | None = None
    ) -> InferenceSession:
        """Return a session for up to `max_length` tokens a row; a context manager. Caches are reserved at first use.

        With `standby` a second node follows along at each hop; None is what `ClientConfig.standby` says. `on_event` is
        told what happens to the route (`swarm_client.events`), by the thread that waits for the step.
        """
        return self.remote_blocks.session(max_length, on_event, standby=standby)

    def _forward(self, family_forward: Callable[..., Any], **kwargs: Any) -> Any:
        """Run the family's forward with the session's cache. Inside a session only new tokens are passed.

        `output_hidden_states=True` gives the states (batch, seq, hidden) that enter the first block, and those after
        every span of the route. Raises InvalidRequestError for masks with holes, and in a session for padding behind.
        """
        cache = kwargs.get("past_key_values")
        session = cache.session if isinstance(cache, RemoteCache) else active_session()
        if session is not None:
            kwargs["past_key_values"] = RemoteCache(session)
        kwargs["use_cache"] = session is not None
        start = session.position if session is not None else 0
        with_states = bool(kwargs.pop("output_hidden_states", False))
        padding = left_padding(kwargs.get("attention_mask"), may_end_early=session is None)
        with blocks_call(BlocksCall(padding, with_states)) as call:
            output = family_forward(self, **kwargs)
        if session is not None:
            _remember_tokens(session, start, kwargs.get("input_ids"))
        if with_states:
            if not call.span_outputs:
                raise InvalidRequestError("the rows went through different spans; their states cannot be put together")
            states = (call.entering, *call.span_outputs)
            if isinstance(output, tuple):
                return (*output, states)
            output.hidden_states = states
        return output

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        session: InferenceSession | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, in `session`, in the session entered with `with`, or in one of its own.

        In a session, `inputs` are the new tokens only (None goes on from the last one), and so is what is returned;
        what came before is not computed again, except behind a beam search, which leaves its beams in the caches.
        Random numbers are torch's own generator's, so that a text sampled here differs from `stream`'s at equal seeds.
        Raises MaxLengthError when the session gets too long. After an error the session holds what it held before.
        """
        session = session or active_session()
        if inputs is None:
            inputs = kwargs.pop("input_ids", None)
        generation = _Generation(session, prompt=inputs)
        token = _generating.set(generation)
        try:
            if session is None:
                return super().generate(inputs, generation_config, *args, **kwargs)
            before = _token_ids_before(session, inputs, kwargs)
            session.recover()
            with _kept_on_error(session, generation), session.cancellable(), session.time_log.generation(perf_counter):
                if before is not None:
                    inputs = _behind(before, inputs)
                    mask = kwargs.get("attention_mask")
                    kwargs["attention_mask"] = _whole_mask(session.token_padding, before, inputs, mask)
                    session.position = min(session.position, inputs.shape[1] - 1)
                result = super().generate(inputs, generation_config, *args, **kwargs)
            return _keep_sequences(session, result, before, generation.num_beams)
        finally:
            _generating.reset(token)
            if session is None and generation.session is not None:
                generation.session.close()

    def text_model(self) -> DistributedTextModel:
        """Return this model with its tokenizer, as text in and text out; what the chat site uses."""
        with _text_models_lock:
            found = _text_models.get(self)
            if found is None:  # parsing a tokenizer takes seconds
                found = _text_models[self] = DistributedTextModel(self.checkpoint, self.ends, self.remote_blocks)
        return found

    def stream(
        self,
        prompt: str | Sequence[ChatMessage],
        params: SamplingParams,
        *,
        max_length: int | None = None,
        on_event: EventListener | None = None,
        speculation: str | None = None,
    ) -> TextStream:
        """Yield the continuation of a text, or the answer to messages, as text deltas; closing the iterator cancels.

        For several turns over one cache use `text_model().open_session(…)`. `max_length` None makes the session as
        long as prompt and `params.max_new_tokens` need. `on_event` is told what happens to the route, by the thread
        that asks for the next delta. `speculation` is `off`, `ngram` or `draft`, None what `ClientConfig.speculation`
        says; the text is the same. Raises SwarmError.
        """
        return TextStream(self.text_model(), prompt, params, max_length, on_event, speculation)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by transformers' `generate` when it knows how many rows and tokens there will be."""
        if model_kwargs.get("past_key_values") is not None:
            raise InvalidRequestError("past_key_values cannot be passed: use session=")
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        generation = _generating.get() or _Generation(None)
        generation.num_beams = generation_config.num_beams or 1
        session = generation.session
        if session is None:
            guessed = max(1, generation_config.prompt_lookup_num_tokens or 0) if generation_mode in _GUESSING else 0
            session = generation.session = self.remote_blocks.session(max(1, max_cache_length + guessed))
        elif session.batch_size not in (None, rows):
            logger.info("the session goes from %d to %d rows and is computed again", session.batch_size, rows)
            session.reset()
        if rows == 1 and generation_mode not in _GUESSING:
            _start_with_prompt(session, generation.prompt, model_kwargs.get("attention_mask"), self.ends.dtype)
        model_kwargs["past_key_values"] = RemoteCache(session)
        generation_config.use_cache = True

    def close(self) -> None:
        """Leave the swarm, if this model joined it by itself. Idempotent."""
        if self._owns_swarm:
            self.remote_blocks.swarm.close()

    _owns_swarm = False


class AutoDistributedModelForCausalLM:
    """Makes distributed models of any family; not instantiated itself."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Checkpoint,
        *,
        initial_peers: Sequence[str] = (),
        swarm: Swarm | None = None,
        config: ClientConfig | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
    ) -> "DistributedCausalLM":
        """Return the model of `source`, a folder, a GGUF file or a hub repository, with its blocks in the swarm.

        Only embeddings, final norm and head are loaded here. `initial_peers` joins the swarm there and leaves it with
        the model's `close`; `swarm` shares a connection. `dtype` (or `torch_dtype`) is that of the ends, and the
        widest that travels: float32 by default on a CPU, the checkpoint's on a GPU.

        Raises ConfigError, CheckpointError, UnsupportedFamilyError or PeerUnreachableError.
        """
        checkpoint = (
            open_checkpoint(source, revision=revision, cache_dir=cache_dir) if isinstance(source, str) else source
        )
        place = torch.device(device)
        chosen = choose_dtype(torch_dtype if dtype is None else dtype, checkpoint, place)
        key = ModelKey(checkpoint.name, checkpoint.revision, checkpoint.num_blocks, checkpoint.config.model_type)
        is_own = swarm is None
        if swarm is None:
            swarm = Swarm.connect(connection_config(config, initial_peers))
        try:
            blocks = RemoteBlocks(swarm, key)
            model = build_client_model(checkpoint, blocks, dtype=chosen, device=place)
        except BaseException:
            if is_own:
                swarm.close()
            raise
        model.requires_grad_(False)
        ends = EndsModule(model)  # made of the family's class, before it learns of sessions
        model.__class__ = _distributed_class(type(model))
        distributed = cast(DistributedCausalLM, model)
        # Bypasses nn.Module's registration: the blocks are a submodule already, in their place.
        object.__setattr__(distributed, "remote_blocks", blocks)
        object.__setattr__(distributed, "ends", ends)
        object.__setattr__(distributed, "checkpoint", checkpoint)
        object.__setattr__(distributed, "_owns_swarm", is_own)
        return distributed


def connection_config(config: ClientConfig | None, initial_peers: Sequence[str]) -> ClientConfig:
    """Return `config` with `initial_peers`. Raises ConfigError if there is no peer to start from."""
    chosen = config or ClientConfig()
    if initial_peers:
        chosen = replace(chosen, initial_peers=tuple(initial_peers))
    if not chosen.initial_peers:
        raise ConfigError("initial_peers is empty: give the multiaddress of at least one peer of the swarm")
    return chosen


def choose_dtype(wanted: torch.dtype | str | None, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """Return the dtype of a client's ends. Raises ConfigError for one that cannot be used."""
    if wanted is None or wanted == "auto":
        return torch.float32 if device.type == "cpu" and wanted is None else checkpoint.dtype
    dtype = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype {wanted} is not served; use float32, bfloat16 or float16")
    return dtype


_text_models: "weakref.WeakKeyDictionary[DistributedCausalLM, DistributedTextModel]" = weakref.WeakKeyDictionary()
_text_models_lock = threading.Lock()
_classes: dict[type, type] = {}


def _distributed_class(family: type[PreTrainedModel]) -> type:
    """Return the class that is both `family` and DistributedCausalLM; one for each family."""
    if family not in _classes:
        signature = inspect.signature(family.forward)
        names = list(signature.parameters)[1:]

        def forward(self: DistributedCausalLM, *args: Any, **kwargs: Any) -> Any:
            return self._forward(family.forward, **dict(zip(names, args, strict=False)), **kwargs)

        # transformers looks up in the signature what it may pass: position ids, logits to keep, and more.
        forward.__signature__ = signature  # type: ignore[attr-defined]
        forward.__doc__ = DistributedCausalLM._forward.__doc__
        _classes[family] = type(f"Distributed{family.__name__}", (DistributedCausalLM, family), {"forward": forward})
    return _classes[family]


def _start_with_prompt(
    session: InferenceSession, prompt: torch.Tensor | None, mask: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Let a new session of one row begin with what nodes know of `prompt` from earlier ones; all but its last token."""
    is_padded = mask is not None and not bool((mask == 1).all())
    if prompt is not None and prompt.dim() == 2 and not prompt.is_floating_point() and not is_padded:
        session.start_with(prompt[0, :-1].tolist(), dtype)


def _behind(before: torch.Tensor, inputs: torch.Tensor | None) -> torch.Tensor:
    """Return `inputs` (batch, n) behind the ids that a session holds."""
    if inputs is None:
        return before
    if inputs.shape[0] != before.shape[0]:
        raise InvalidRequestError(
            f"the session has {before.shape[0]} rows of tokens, the inputs have {inputs.shape[0]}"
        )
    return torch.cat([before.to(inputs.device), inputs], dim=1)


def _whole_mask(
    padding: Sequence[int], before: torch.Tensor, whole: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the mask of all columns of `whole`: the padding that `before` begins with, and no other."""
    num_new = whole.shape[1] - before.shape[1]
    if mask is not None and num_new and not bool((mask[:, -num_new:] == 1).all()):
        raise InvalidRequestError("padding is only possible at the very beginning of a session")
    full = torch.ones_like(whole)
    for row, columns in enumerate(padding):
        full[row, :columns] = 0
    return full


def _token_ids_before(
    session: InferenceSession, inputs: torch.Tensor | None, options: Mapping[str, Any]
) -> torch.Tensor | None:
    """Return the ids that `session` holds, None if it is new. Raises InvalidRequestError if `generate` cannot go on."""
    known = session.token_ids
    if session.position > (0 if known is None else known.shape[1]):
        raise InvalidRequestError("the session was fed with hidden states; generate needs to know its token ids")
    if options.get("inputs_embeds") is not None:
        raise InvalidRequestError("inputs_embeds cannot be used in a session, which keeps token ids; pass input_ids")
    if known is not None and known.shape[1]:
        return known
    if known is not None and inputs is None:
        raise InvalidRequestError("the session holds nothing to go on from: pass input_ids")
    return None


@contextlib.contextmanager
def _kept_on_error(session: InferenceSession, generation: _Generation) -> Iterator[None]:
    """Let the session hold the same ids as now if the block fails, and no cached tokens that are not theirs."""
    token_ids, position = session.token_ids, session.position
    try:
        yield
    except BaseException:
        if generation.num_beams > 1:
            session.reset()
        session.position = min(session.position, position)
        session.token_ids = token_ids
        raise


def _keep_sequences(session: InferenceSession, result: Any, before: torch.Tensor | None, num_beams: int) -> Any:
    """Let `session` hold the sequences of `result`, and return it without those columns that were there `before`."""
    sequences = result.sequences if isinstance(result, ModelOutput) else result
    if session.padding:
        session.token_padding = _row_padding(session.padding, sequences.shape[0])
    if num_beams > 1:
        session.reset()  # its rows are the last beams, in an order of their own
    session.token_ids = sequences.clone()
    new = sequences if before is None else sequences[:, before.shape[1] :].clone()
    if isinstance(result, ModelOutput):
        result.sequences = new
        return result
    return new


def _row_padding(padding: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """Return the left padding of each of `num_rows` sequences that came of the session's rows, in their order."""
    return tuple(padding[row * len(padding) // num_rows] for row in range(num_rows))


def _remember_tokens(session: InferenceSession, start: int, input_ids: torch.Tensor | None) -> None:
    """Keep the ids of a plain forward in a session; `generate` replaces them by its whole sequences."""
    generation = _generating.get()
    if input_ids is None or (generation is not None and generation.session is session):
        return
    known = session.token_ids
    if start > (0 if known is None else known.shape[1]):
        return
    kept = input_ids[:, :0] if known is None or not start else known[:, :start]
    session.token_ids = torch.cat([kept, input_ids], dim=1)
    session.token_padding = session.padding
