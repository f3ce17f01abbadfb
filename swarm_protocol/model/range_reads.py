"""Read ranges of bytes of a hub repository's files over HTTP (RFC 9110, section 14), with the hub library's client.

A connection that breaks is taken up again at the byte where it broke. The hub has no checksum of a range, so what can
be checked is: the range, the size of the whole file, and that commit and ETag stay those that the first answer named.
"""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from huggingface_hub import get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from swarm_protocol.errors import CheckpointError

logger = logging.getLogger(__name__)

Sink = Callable[[memoryview], None]
"""Takes the bytes that follow those before; what it raises ends the download."""

T = TypeVar("T")

MAX_TRIES = 8
"""Of one request: with the pauses between them a minute, in which a router starts anew."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_LONGEST_ASKED_PAUSE_S = 300.0
"""The hub counts requests in windows of 5 minutes."""

_TIMEOUT_S = 30.0
"""Without a byte, or a connection."""

_TRY_AGAIN_STATUS = (408, 425, 429, 500, 502, 503, 504)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class NoRangesError(CheckpointError):
    """The server answers a request for a range with the whole file."""


class _BrokenAnswerError(Exception):
    """What may be right when it is asked for once more, and when the hub wants that at the earliest."""

    def __init__(self, problem: str, asked_pause_s: float = 0.0) -> None:
        super().__init__(problem)
        self.asked_pause_s = asked_pause_s


@dataclass(frozen=True, slots=True)
class RemoteFacts:
    """A file as the hub describes it; `etag` names its content: the SHA-256 of a file in LFS, else git's SHA-1."""

    size_bytes: int
    etag: str


class RemoteFile:
    """One file of a hub repository at a commit. `sleep` is called between tries and may raise, as a sink may."""

    def __init__(self, repo_id: str, commit: str, file_name: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self._name = f"{file_name} of {repo_id}"
        self._commit = commit
        self._url = hf_hub_url(repo_id, file_name, revision=commit)
        self._sleep = sleep
        self._facts: RemoteFacts | None = None
        self._range_etag: str | None = None

    def facts(self) -> RemoteFacts:
        """Return size and content of the file; only the first call asks. Raises CheckpointError."""
        if self._facts is None:
            self._facts = self._with_tries(self._ask)
        return self._facts

    def read(self, start: int, end: int, sink: Sink) -> None:
        """Hand the bytes `[start, end)` to `sink`, one after the other, each once.

        Raises CheckpointError if they cannot be had, and NoRangesError, before the first one, if only the whole file
        can.
        """
        position = start

        def receive(data: memoryview) -> None:
            nonlocal position
            sink(data)
            position += len(data)

        facts = self.facts()
        self._with_tries(lambda: self._request(facts, position, end, receive))

    def _with_tries(self, request: Callable[[], T]) -> T:
        problem: Exception | None = None
        asked_s = 0.0
        for attempt in range(MAX_TRIES):
            if problem is not None:
                pause_s = max(min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S), asked_s)
                logger.warning("download of %s broke, next try in %.1f s: %s", self._name, pause_s, problem)
                self._sleep(pause_s)
            try:
                return request()
            except (httpx2.TransportError, _BrokenAnswerError) as error:
                problem = error
                asked_s = error.asked_pause_s if isinstance(error, _BrokenAnswerError) else 0.0
            except HfHubHTTPError as error:
                problem = error
                asked_s = _asked_pause_s(error.response)
                if error.response.status_code not in _TRY_AGAIN_STATUS:
                    break
            except (httpx2.RequestError, HFValidationError, ConnectionError) as error:
                problem = error  # such as that of the hub's offline mode
                break
        raise CheckpointError(
            f"{self._name} is not in the local cache and cannot be downloaded: {_said(problem)}"
        ) from problem

    def _ask(self) -> RemoteFacts:
        told = get_hf_file_metadata(self._url, timeout=_TIMEOUT_S)
        if told.size is None or not told.etag:
            raise _BrokenAnswerError("the hub does not tell its size and ETag")
        if told.commit_hash not in (None, self._commit):
            raise CheckpointError(f"{self._name}: the hub gave commit {told.commit_hash} for {self._commit}")
        return RemoteFacts(told.size, told.etag)

    def _request(self, facts: RemoteFacts, start: int, end: int, sink: Sink) -> None:
        if start == end:
            return  # nothing is no range; and a connection may break after the last byte
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # Redirects are followed each time, as links to storage expire; the client drops the token on the way.
        with get_session().stream(
            "GET", self._url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
        ) as response:
            self._check(response, facts, start, end)
            num_left = end - start
            # In the sizes that they come in: what the client gathers is lost when the connection breaks.
            for chunk in response.iter_raw():
                if len(chunk) > num_left:
                    raise _BrokenAnswerError(f"more than the {end - start} bytes that were asked for came")
                num_left -= len(chunk)
                sink(memoryview(chunk))
            if num_left:
                raise _BrokenAnswerError(f"{num_left} of {end - start} bytes did not come")

    def _check(self, response: Any, facts: RemoteFacts, start: int, end: int) -> None:
        """Look at an answer before any byte of it is read."""
        status = response.status_code
        if status in _TRY_AGAIN_STATUS:
            raise _BrokenAnswerError(f"the hub answered with status {status}", _asked_pause_s(response))
        if status == 200 and (start, end) != (0, facts.size_bytes):
            raise NoRangesError(f"{self._name} can only be downloaded as a whole: its server ignores ranges")
        if status not in (200, 206):
            said = response.headers.get("x-error-message", "")
            raise CheckpointError(f"{self._name} cannot be downloaded: the hub answered with status {status} {said}")
        self._check_content(response, facts)
        if response.headers.get("content-encoding", "identity") != "identity":
            raise _BrokenAnswerError("the answer is compressed, though that was not asked for")
        if status == 206:
            text = response.headers.get("content-range", "")
            found = _CONTENT_RANGE.fullmatch(text)
            size = str(facts.size_bytes)
            if not found or found.groups() not in ((str(start), str(end - 1), size), (str(start), str(end - 1), "*")):
                raise _BrokenAnswerError(f"bytes {start}-{end - 1}/{size} were asked for, not {text!r}")

    def _check_content(self, response: Any, facts: RemoteFacts) -> None:
        """Hold every answer to be of one content, so that bytes of two never get into one tensor."""
        for answer in (*response.history, response):
            linked = answer.headers.get("x-linked-etag")
            if linked is not None and _bare(linked) != facts.etag:
                raise self._changed(facts.etag, _bare(linked))
            commit = answer.headers.get("x-repo-commit", self._commit)
            if commit != self._commit:
                raise self._changed(self._commit, commit)
        etag = response.headers.get("etag")
        if etag is None:
            return
        if self._range_etag is None:
            # A storage behind a redirect has ETags of its own.
            is_hub = not response.history and "x-linked-etag" not in response.headers
            self._range_etag = facts.etag if is_hub else _bare(etag)
        if _bare(etag) != self._range_etag:
            raise self._changed(self._range_etag, _bare(etag))

    def _changed(self, before: str, after: str) -> CheckpointError:
        return CheckpointError(f"{self._name} changed on the hub while it was downloaded: {after[:64]}, not {before}")


def _asked_pause_s(response: Any) -> float:
    """Return what a hub that has too much to do asks to wait, within reason."""
    text = response.headers.get("retry-after", "")
    return min(float(text), _LONGEST_ASKED_PAUSE_S) if text.isdecimal() else 0.0


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _said(problem: Exception | None) -> str:
    return str(problem) or type(problem).__name__
