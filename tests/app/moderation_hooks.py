"""Functions that tests name as moderation."""

import time

from app.moderation import Moderated


def judge(asked: Moderated) -> str | None:
    """Refuse by words; `sleepy` takes longer than anybody waits, `broken` raises."""
    if "sleepy" in asked.text:
        time.sleep(20)
    if "broken" in asked.text:
        raise ValueError(asked.text)
    if asked.kind == "prompt":
        return "Not that question, please." if "forbidden" in asked.text else None
    return "Not that answer, please." if "word40" in asked.text else None


not_a_function = 3
