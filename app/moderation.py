"""A function of the operator's that sees prompts and answers, and may refuse them (`UMBEL_MODERATION=module:function`).

It gets a `Moderated`, and returns None to allow it or the sentence that the reader is told instead. Of a running answer
it gets all of the text at ends of sentences, or after so many letters; what it has not allowed yet is held back, so
nobody reads what is refused. Every call has a thread of its own and a deadline, so it may be slow, and a call that
never returns holds up nothing but its own answer. What fails or takes too long counts as refused, or, if the operator
says so, as allowed.
"""

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

from app import request_ids
from app.config import OperationConfig
from app.errors import ModerationFailedError, RefusedError
from app.moderation_steps import next_step
from app.site_metrics import SiteMetrics
from swarm_client.generation.text_session import TextDelta
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CALLS = 256  # at the same time, those included that never return; each is a thread


@dataclass(frozen=True, slots=True)
class Moderated:
    """What a hook is asked about."""

    kind: Literal["prompt", "answer"]
    text: str
    """The prompt, of a conversation all messages behind their roles; or the answer as far as it is there."""
    is_last: bool
    """Whether no more text comes behind it."""
    api: str
    model: str
    request_id: str


Hook = Callable[[Moderated], str | None]


def load_hook(name: str) -> Hook:
    """Return the function that `module:function` names. Raises ConfigError when there is none."""
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"moderation {name!r} is not of the form module:function")
    try:
        found = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # whatever the operator's module does when it is imported
        raise ConfigError(f"moderation {name!r}: {module_name} cannot be imported: {error!r}") from None
    if not callable(found):
        raise ConfigError(f"moderation {name!r}: {module_name} has no function {function_name}")
    hook: Hook = found
    return hook


def check_hook(config: OperationConfig) -> None:
    """Look whether the configured hook is there, before anything is started. Raises ConfigError."""
    if config.moderation:
        load_hook(config.moderation)


class Moderator:
    """Asks the hook of a site, if it has one. Any thread but the event loop's: it waits."""

    def __init__(self, config: OperationConfig, metrics: SiteMetrics) -> None:
        """Raises ConfigError when the configured hook is not there."""
        self._hook = load_hook(config.moderation) if config.moderation else None
        self._config, self._metrics = config, metrics
        self._places = threading.BoundedSemaphore(MAX_CALLS)

    def check_prompt(self, text: str, api: str, model: str) -> None:
        """Return if a prompt may be answered. Raises RefusedError, ModerationFailedError."""
        self._check(Moderated("prompt", text, True, api, model, request_ids.current_id() or ""))

    def checked(self, deltas: Iterator[TextDelta], api: str, model: str) -> Iterator[TextDelta]:
        """Yield the pieces of an answer that are allowed. Raises RefusedError, ModerationFailedError."""
        return self._checked(deltas, api, model) if self._hook is not None else deltas

    def _checked(self, deltas: Iterator[TextDelta], api: str, model: str) -> Iterator[TextDelta]:
        text, num_checked, held = "", 0, list[TextDelta]()
        for delta in deltas:
            held.append(delta)
            text += delta.text
            is_last = delta.finish_reason is not None
            if delta.finish_reason == "cancelled":  # nobody waits for what was not looked at
                yield replace(delta, text="")
                return
            if is_last or next_step(text, num_checked, self._config.moderation_step_chars):
                self._check(Moderated("answer", text, is_last, api, model, request_ids.current_id() or ""))
                num_checked = len(text)
                yield from held
                held.clear()
        if held:
            self._check(Moderated("answer", text, True, api, model, request_ids.current_id() or ""))
            yield from held

    def _check(self, asked: Moderated) -> None:
        if self._hook is None:
            return
        try:
            refusal = self._ask(self._hook, asked)
        except Exception as error:  # the operator's function may raise anything
            logger.error("moderation failed kind=%s", asked.kind, exc_info=error)
            self._metrics.moderated(asked.kind, "failed")
            if self._config.moderation_fail_open:
                return
            raise ModerationFailedError from None
        self._metrics.moderated(asked.kind, "allowed" if refusal is None else "refused")
        if refusal is not None:
            logger.info("moderation refused kind=%s", asked.kind)
            raise RefusedError(refusal)

    def _ask(self, hook: Hook, asked: Moderated) -> str | None:
        """Call the hook. Raises what it raises, and TimeoutError."""
        answer: Future[str | None] = Future()
        if not self._places.acquire(blocking=False):
            raise TimeoutError(f"{MAX_CALLS} calls are under way")
        thread = threading.Thread(target=self._call, args=(hook, asked, answer), name="moderation", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._places.release()
            raise
        found = answer.result(self._config.moderation_timeout_s)
        if found is not None and not isinstance(found, str):
            raise TypeError(f"the function returned {type(found).__name__}, not None or a text")
        return found

    def _call(self, hook: Hook, asked: Moderated, answer: "Future[str | None]") -> None:
        request_ids.enter(asked.request_id)
        try:
            answer.set_result(hook(asked))
        except Exception as error:
            answer.set_exception(error)
        finally:
            self._places.release()
