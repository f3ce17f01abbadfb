"""The page's texts: no key is missing in any language, none is left over, and what is put in agrees."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CATALOGUES = sorted((ROOT / "static" / "locales").glob("*.json"))
ENGLISH: dict[str, Any] = json.loads((ROOT / "static" / "locales" / "en.json").read_text())
FORMS = {"zero", "one", "two", "few", "many", "other"}
SOURCES = sorted((ROOT / "static" / "js").rglob("*.js"))
TEMPLATE = (ROOT / "templates" / "chat.html").read_text()


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def forms(value: Any) -> list[str]:
    return list(value.values()) if isinstance(value, dict) else [value]


def all_placeholders(value: Any) -> set[str]:
    return set().union(*(placeholders(text) for text in forms(value)))


def test_there_is_a_catalogue_and_it_is_read():
    assert "en" in [path.stem for path in CATALOGUES]
    assert len(ENGLISH) > 50


@pytest.mark.parametrize("path", CATALOGUES, ids=lambda path: path.stem)
def test_a_language_has_the_keys_of_english_and_fills_in_the_same(path):
    pairs: list[tuple[str, Any]] = json.loads(path.read_text(), object_pairs_hook=lambda found: found)
    keys = [key for key, _ in pairs]
    assert sorted(keys) == sorted(set(keys)), "a key stands there twice"
    texts = json.loads(path.read_text())
    assert set(texts) == set(ENGLISH)
    for key, value in texts.items():
        assert isinstance(value, dict) == isinstance(ENGLISH[key], dict), key
        if isinstance(value, dict):
            assert {"other"} <= set(value) <= FORMS, key
        assert all(text.strip() for text in forms(value)), key
        assert all_placeholders(value) == all_placeholders(ENGLISH[key]), key
        assert not re.search(r"<\w", json.dumps(value)), f"{key}: texts are no markup"


def test_every_text_that_the_page_names_exists_and_every_one_that_exists_is_named():
    code = "\n".join(path.read_text() for path in SOURCES)
    literal = set(re.findall(r"""\bt\(\s*['`]([\w.]+)['`]""", code))
    literal |= set(re.findall(r'data-t(?:-[a-z-]+)?="([^"]+)"', TEMPLATE))
    assert sorted(literal - set(ENGLISH)) == []
    prefixes = tuple(re.findall(r"\bt\(\s*`([\w.]+\.)\$\{", code))
    quoted = set(re.findall(r"['`]([a-z_]+\.[a-z_.0-9]+)['`]", code))
    assert sorted(key for key in set(ENGLISH) - literal - quoted if not key.startswith(prefixes)) == []


def test_the_template_shows_english_until_the_catalogue_is_there():
    found = re.findall(r'data-t="([^"]+)"[^>]*>([^<]*)<', TEMPLATE)
    assert found
    for key, text in found:
        assert html.unescape(text).strip() == ENGLISH[key], key
    for name in ("aria-label", "title", "placeholder"):
        for tag in re.findall(rf"<[^>]*data-t-{name}=[^>]*>", TEMPLATE):
            key, text = re.search(rf'data-t-{name}="([^"]+)"', tag), re.search(rf'(?<!-){name}="([^"]+)"', tag)
            assert key is not None
            assert text is not None
            assert html.unescape(text[1]) == ENGLISH[key[1]], tag
