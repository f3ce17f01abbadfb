"""Show how a download or the loading of blocks gets on."""

import logging
import sys
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

_PERIOD_S = 5.0


def show_progress(what: str, unit: str) -> Callable[[int, int], None]:
    """Return what shows it: a bar on a terminal, else a line of the log every few seconds. `unit` is `B` or a noun.

    It takes what is done and how much there is in all; 0 in all, while that is unknown, shows nothing.
    """
    return _bar(what, unit) if sys.stderr.isatty() else _log_lines(what, unit)


def _bar(what: str, unit: str) -> Callable[[int, int], None]:
    from tqdm import tqdm

    bar: tqdm | None = None

    def show(num_done: int, num_all: int) -> None:
        nonlocal bar
        if not num_all:
            return
        bar = bar or tqdm(total=num_all, desc=what, unit=unit, unit_scale=unit == "B", file=sys.stderr)
        bar.update(num_done - bar.n)
        if num_done == num_all:
            bar.close()
            bar = None

    return show


def _log_lines(what: str, unit: str) -> Callable[[int, int], None]:
    shown_s = time.monotonic()

    def tell(num_done: int, num_all: int) -> None:
        nonlocal shown_s
        if num_all and (num_done == num_all or time.monotonic() - shown_s >= _PERIOD_S):
            shown_s = time.monotonic()
            logger.info("%s: %s", what, _amount(num_done, num_all, unit))

    return tell


def _amount(num_done: int, num_all: int, unit: str) -> str:
    if unit != "B":
        return f"{num_done} of {num_all} {unit}s"
    scale, name = (1e9, "GB") if num_all >= 1e9 else (1e6, "MB")
    return f"{num_done / scale:.2f} of {num_all / scale:.2f} {name}"
