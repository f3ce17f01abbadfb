"""Keeps what was measured in the cache folder, a small file each; what cannot be used is measured again."""

import contextlib
import logging
import os
import time
from pathlib import Path
from uuid import uuid4

from server_node.figures import Figures, FiguresKey, from_text, to_text

logger = logging.getLogger(__name__)

FOLDER = "umbel-benchmarks"
_MAX_BYTES = 64 * 1024


class FigureStore:
    """Figures of this machine: `device` names its hardware, `threads` are those of the computation."""

    def __init__(self, folder: Path, device: str, threads: int, software: str) -> None:
        self._folder = folder / FOLDER
        self._device = device
        self._threads = threads
        self._software = software

    def key(self, model: str, numerics: str, num_blocks: int) -> FiguresKey:
        """Return what figures of such a span are kept under."""
        return FiguresKey(model, numerics, num_blocks.bit_length(), self._device, self._threads, self._software)

    def read(self, key: FiguresKey) -> Figures | None:
        """Return what was measured and is not too old."""
        text = read_small(self._folder / key.file_name)
        return None if text is None else from_text(text, key, time.time())

    def write(self, key: FiguresKey, figures: Figures) -> None:
        """Keep figures. A folder that cannot be written to costs only another measurement."""
        write_small(self._folder / key.file_name, to_text(key, figures))


def read_small(path: Path) -> str | None:
    """Return a small file's text, if it has any."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError):
        return None


def write_small(path: Path, text: str) -> None:
    """Write a small file as a whole or not at all; a warning if it cannot be."""
    part = path.with_name(f"{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
    except OSError as error:
        logger.warning("what was measured cannot be kept: %s: %s", path.parent, error.strerror)
