"""The status page's words in the reader's language, from the same catalogues that the chat page uses.

`static/locales/CODE.json` holds what both pages say, `static/locales/swarm/CODE.json` what only this one does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from babel import Locale
from babel.numbers import format_decimal

from app.swarm_report import ModelReport, Needed
from swarm_protocol.spans import Span

LOCALES = Path(__file__).resolve().parent.parent / "static" / "locales"
ENGLISH = "en"
RIGHT_TO_LEFT = ("ar", "fa", "he", "ur")
MAX_SPANS = 6
"""Runs of blocks that a sentence names; more are told as “and more”."""

_NUMBER = "#,##0"
_PLACE = re.compile(r"\{(\w+)\}")

Catalogue = Mapping[str, str | Mapping[str, str]]


class Texts:
    """Texts in one language; a key that its catalogue lacks is read in English."""

    def __init__(self, language: str) -> None:
        self.language = language
        self.direction = "rtl" if language.split("-")[0] in RIGHT_TO_LEFT else "ltr"
        self._locale = Locale.parse(language, sep="-")
        self._catalogue = {**_catalogue(ENGLISH), **_catalogue(language)}

    def __call__(self, key: str, **values: object) -> str:
        """Return the text of `key` with `values` put in; `count` chooses among plural forms."""
        found = self._catalogue[key]
        if not isinstance(found, str):
            count = values.get("count", 0)
            form = self._locale.plural_form(count if isinstance(count, int | float) else 0)
            found = found.get(form) or found["other"]
        return _PLACE.sub(lambda place: self._shown(values.get(place[1], place[0])), found)

    def number(self, value: float) -> str:
        """Return a number with about three digits: 0.4, 12.3, 145."""
        pattern = _NUMBER if value >= 100 or value == round(value) else "#,##0.0"
        return str(format_decimal(value, format=pattern, locale=self._locale))

    def percent(self, share: float) -> str:
        """Return a share in percent; only all of it is 100."""
        value = share * 100
        return self.number(value if value in (0, 100) else min(99.9, round(value, 1)))

    def size(self, size_bytes: float) -> str:
        """Return memory: 640 MB, 1.2 GB, 12 GB."""
        unit, value = ("unit.gb", size_bytes / 1e9) if size_bytes >= 0.95e9 else ("unit.mb", size_bytes / 1e6)
        return self(unit, value=self.number(round(value, 1) if value < 10 else float(f"{value:.2g}")))

    def duration(self, seconds: float) -> str:
        """Return a round trip or a wait: 35 ms, 1.2 s."""
        if seconds < 0.1:
            return self("time.ms", value=max(1, round(seconds * 1000)))
        return self("time.s", value=self.number(round(seconds, 1)))

    def long_duration(self, seconds: float) -> str:
        """Return how long something lasted, in the unit that suits it."""
        minutes = max(1, round(seconds / 60))
        for limit, size, key in ((90, 1, "unit.minutes"), (36 * 60, 60, "unit.hours")):
            if minutes < limit:
                return self(key, count=round(minutes / size))
        return self("unit.days", count=round(minutes / (24 * 60)))

    def blocks(self, spans: Sequence[Span]) -> str:
        """Return runs of blocks as people read them: “blocks 12–19, block 23”."""
        named = [
            self("blocks.one", first=span.start)
            if len(span) == 1
            else self("blocks.many", first=span.start, last=span.end - 1)
            for span in spans[:MAX_SPANS]
        ]
        return ", ".join([*named, self("blocks.more")] if len(spans) > MAX_SPANS else named)

    def says(self, report: ModelReport) -> str:
        """Return whether one can chat with a model, and what is in the way."""
        spans = report.missing if report.state == "incomplete" else report.single
        return self(f"say.{report.state}", blocks=self.blocks(spans))

    def helps(self, needed: Needed) -> str:
        """Return what would complete a model."""
        plain, small = self.size(needed.plain_bytes), self.size(needed.nf4_bytes)
        return self("need.memory", size=plain, dtype=needed.dtype, small=small)

    def strip_text(self, report: ModelReport) -> str:
        """Return in words what the picture of a model's blocks shows."""
        if not report.replicas:
            return ""
        parts = [self("strip.fewest", last=report.num_blocks - 1, count=report.min_replicas)]
        if report.missing:
            parts = [self("strip.missing", blocks=self.blocks(report.missing))]
        elif report.weakest:
            parts.append(self("strip.weakest", blocks=self.blocks(report.weakest)))
        return " ".join(parts)

    def _shown(self, value: object) -> str:
        if isinstance(value, int):
            return str(format_decimal(value, format=_NUMBER, locale=self._locale))
        return str(value)


@cache
def texts_in(language: str) -> Texts:
    """Return the texts in one of `languages()`."""
    return Texts(language)


@cache
def languages() -> tuple[str, ...]:
    """Return the languages that there are catalogues of."""
    return tuple(sorted(path.stem for path in LOCALES.glob("*.json")))


def choose_language(wanted: Sequence[str], known: Sequence[str]) -> str:
    """Return the first of `wanted` that is among `known`, by itself or by its first part; else English."""
    for name in wanted:
        for tag in (name, name.split("-")[0]):
            found = [each for each in known if each.lower() == tag.lower()]
            if found:
                return found[0]
    return ENGLISH


def own_name(language: str) -> str:
    """Return a language's own name, such as “Deutsch”."""
    return str(Locale.parse(language, sep="-").get_display_name() or language)


def _catalogue(language: str) -> Catalogue:
    found: dict[str, str | Mapping[str, str]] = {}
    for folder in (LOCALES, LOCALES / "swarm"):
        path = folder / f"{language}.json"
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    return found
