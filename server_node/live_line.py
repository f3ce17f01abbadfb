"""The line of a running node on its terminal, and its log where there is no terminal."""

import asyncio
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

from server_node.status import NodeStatus, status_line

logger = logging.getLogger(__name__)

_REDRAW_S = 1.0
_SUMMARY_S = 60.0
_CLEAR = "\r\x1b[K"
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Screen(logging.StreamHandler[TextIO]):
    """Writes the log, and on a terminal keeps one line below it that is redrawn. Any thread may log."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter(_LOG_FORMAT))
        self.is_terminal = stream.isatty()
        self._line = ""

    def show(self, line: str) -> None:
        """Replace the line; an empty one takes it away, as has to be done before anything else is printed."""
        if not self.is_terminal or line == self._line == "" or self._is_held():
            return
        self.acquire()
        try:
            self._line = line
            self._write(_CLEAR + self._fitting())
        finally:
            self.release()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record above the line. The lock is held, as logging has it."""
        if self._line:
            self._write(_CLEAR)
        super().emit(record)
        if self._line:
            self._write(self._fitting())

    def _is_held(self) -> bool:
        """Whether the terminal takes nothing now, as after Ctrl-S: the node must not wait for it."""
        try:
            return not select.select([], [self.stream.fileno()], [], 0)[1]
        except (OSError, ValueError):
            return False

    def _fitting(self) -> str:
        """Return what fits into the terminal's width: a line that wraps could not be taken away again."""
        try:
            width = os.get_terminal_size(self.stream.fileno()).columns or 80
        except (OSError, ValueError):
            width = 80
        return self._line[: width - 1]

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self._line = ""  # the terminal is gone; the node stays


async def keep_shown(screen: Screen, status: Callable[[], NodeStatus]) -> None:
    """Show the status until cancelled: on a terminal in its line, else in the log when something has changed."""
    told = ""
    try:
        while True:
            await asyncio.sleep(_REDRAW_S if screen.is_terminal else _SUMMARY_S)
            now = status()
            if now.state in ("opening", "loading"):
                continue  # these have a progress bar of their own
            line = status_line(now)
            if screen.is_terminal:
                screen.show(line)
            elif line != told:
                told = line
                logger.info("%s", line)
    finally:
        screen.show("")


def start_logging(level: str) -> Screen:
    """Log to stderr from now on."""
    screen = Screen(sys.stderr)
    logging.basicConfig(level=level, handlers=[screen])
    return screen
