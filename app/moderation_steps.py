"""Pure: when enough of a running answer is there to be looked at."""

import re

MIN_CHARS = 20  # "No." and "1." are no sentences that are worth a look
_END = re.compile(r"[.!?…]['\"”’)\]]*\s|[。！？؟।]|\n")


def next_step(text: str, num_checked: int, most_chars: int) -> bool:
    """Return whether to look at `text` now, of which the first `num_checked` letters have been looked at."""
    num_new = len(text) - num_checked
    if num_new >= most_chars:
        return True
    return num_new >= MIN_CHARS and _END.search(text, num_checked) is not None
