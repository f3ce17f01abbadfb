"""An example of a moderation hook: refuses what holds one of the terms of a file, one a line.

BLOCKED_TERMS_FILE=terms.txt PYTHONPATH=docs/operation UMBEL_MODERATION=moderation:refuse_terms umbel-chat serve …
"""

import os
import re
from pathlib import Path

from app.moderation import Moderated

_TERMS = [line.strip() for line in Path(os.environ["BLOCKED_TERMS_FILE"]).read_text(encoding="utf-8").splitlines()]
_PATTERN = re.compile("|".join(rf"\b{re.escape(term)}\b" for term in _TERMS if term) or r"\b\B", re.IGNORECASE)

SENTENCES = {
    "prompt": "This site does not talk about that.",
    "answer": "The answer was stopped: it came to what this site does not talk about.",
}


def refuse_terms(asked: Moderated) -> str | None:
    """Return None to allow it, or the sentence that the reader is told instead."""
    return SENTENCES[asked.kind] if _PATTERN.search(asked.text) else None
