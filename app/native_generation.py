"""Pure: what a protocol 3 `generate` means in the client library's terms, and how its answer is measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from app.chat_protocol import Timings
from app.config import GenerationLimits, SiteConfig
from app.limits import tokens_per_s
from app.request_models import MAX_STOPS, Generate, Sampling
from swarm_client.generation.text_session import SamplingParams


def native_sampling(request: Generate, max_new_tokens: int, limits: GenerationLimits) -> SamplingParams:
    """Return the sampling of a request, with the site's defaults where it says nothing."""
    return site_sampling(request.params, request.stop, max_new_tokens, limits, do_sample=request.params.do_sample)


def site_sampling(
    asked: Sampling,
    stop: Sequence[str],
    max_new_tokens: int,
    limits: GenerationLimits,
    *,
    do_sample: bool | None = None,
) -> SamplingParams:
    """Return what was asked for in the client library's terms, with the site's defaults where it says nothing.

    `do_sample` None samples unless the temperature is 0.
    """
    temperature = limits.temperature if asked.temperature is None else asked.temperature
    do_sample = temperature > 0 if do_sample is None else do_sample and temperature > 0
    top_p = limits.top_p if asked.top_p is None else asked.top_p
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature if do_sample else None,
        top_k=(asked.top_k or None) if do_sample else None,
        top_p=(top_p or None) if do_sample else None,
        min_p=asked.min_p if do_sample else None,
        repetition_penalty=asked.repetition_penalty,
        seed=asked.seed,
        stop=tuple(stop),
    )


def offered_limits(max_length: int, config: SiteConfig) -> dict[str, int]:
    """Return the `limits` that a client of protocol 3 is told."""
    return {
        "max_length": max_length,
        "max_new_tokens": min(max_length, config.generation.max_new_tokens),
        "max_stops": MAX_STOPS,
        "max_frame_bytes": config.sockets.max_frame_bytes,
    }


def offered_defaults(max_length: int, limits: GenerationLimits) -> dict[str, float | int | None]:
    """Return what `native_sampling` takes where a request says nothing; None is not applied."""
    return {
        "temperature": limits.temperature,
        "top_p": limits.top_p,
        "top_k": None,
        "min_p": None,
        "repetition_penalty": None,
        "max_new_tokens": min(max_length, limits.max_new_tokens),
    }


@dataclass(slots=True)
class AnswerMeter:
    """Counts the tokens of one answer and takes its times; `started_s` is when the request was accepted."""

    started_s: float
    num_tokens: int = 0
    _first_s: float | None = None
    _last_s: float = 0.0
    _first_tokens: int = 0

    def count(self, num_tokens: int, now_s: float) -> None:
        """Take note of tokens that arrived now."""
        if not num_tokens:
            return
        if self._first_s is None:
            self._first_s, self._first_tokens = now_s, num_tokens
        self._last_s = now_s
        self.num_tokens += num_tokens

    def timings(self) -> Timings:
        """Return the time to the first token, and the speed behind the first piece, which carries the prefill."""
        if self._first_s is None:
            return Timings(None, None)
        speed = tokens_per_s(self.num_tokens - self._first_tokens, self._first_s, self._last_s)
        return Timings(round(self._first_s - self.started_s, 3), None if speed is None else round(speed, 2))
