"""The page's texts: no key is missing in any language, none is left over, and what is put in agrees."""

import html
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from app.swarm_page import CAUSES
from app.swarm_report import NodeStatus, SwarmStatus

ROOT = Path(__file__).resolve().parents[2]
LOCALES = ROOT / "static" / "locales"
CATALOGUES = sorted(LOCALES.glob("*.json"))
SWARM_CATALOGUES = sorted((LOCALES / "swarm").glob("*.json"))  # of the status page, which the site fills in itself
ENGLISH: dict[str, Any] = json.loads((LOCALES / "en.json").read_text())
SWARM_ENGLISH: dict[str, Any] = json.loads((LOCALES / "swarm" / "en.json").read_text())
FORMS = {"zero", "one", "two", "few", "many", "other"}
SOURCES = sorted((ROOT / "static" / "js").rglob("*.js"))
TEMPLATE = "".join((ROOT / "templates" / name).read_text() for name in ("chat.html", "embed.html"))


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


def forms(value: Any) -> list[str]:
    return list(value.values()) if isinstance(value, dict) else [value]


def all_placeholders(value: Any) -> set[str]:
    return set().union(*(placeholders(text) for text in forms(value)))


def test_there_is_a_catalogue_and_it_is_read():
    assert "en" in [path.stem for path in CATALOGUES]
    assert len(ENGLISH) > 50
    assert [path.stem for path in CATALOGUES] == [path.stem for path in SWARM_CATALOGUES]
    assert not set(ENGLISH) & set(SWARM_ENGLISH)


@pytest.mark.parametrize(
    "path", [*CATALOGUES, *SWARM_CATALOGUES], ids=lambda path: path.relative_to(LOCALES).with_suffix("").as_posix()
)
def test_a_language_has_the_keys_of_english_and_fills_in_the_same(path):
    english = ENGLISH if path.parent == LOCALES else SWARM_ENGLISH
    pairs: list[tuple[str, Any]] = json.loads(path.read_text(), object_pairs_hook=lambda found: found)
    keys = [key for key, _ in pairs]
    assert sorted(keys) == sorted(set(keys)), "a key stands there twice"
    texts = json.loads(path.read_text())
    assert set(texts) == set(english)
    for key, value in texts.items():
        assert isinstance(value, dict) == isinstance(english[key], dict), key
        if isinstance(value, dict):
            assert {"other"} <= set(value) <= FORMS, key
        assert all(text.strip() for text in forms(value)), key
        assert all_placeholders(value) == all_placeholders(english[key]), key
        assert not re.search(r"<\w", json.dumps(value)), f"{key}: texts are no markup"


def test_every_text_that_the_page_names_exists_and_every_one_that_exists_is_named():
    code = "\n".join(path.read_text() for path in SOURCES)
    literal = set(re.findall(r"""\bt\(\s*['`]([\w.]+)['`]""", code))
    literal |= set(re.findall(r'data-t(?:-[a-z-]+)?="([^"]+)"', TEMPLATE))
    assert sorted(literal - set(ENGLISH)) == []
    prefixes = tuple(re.findall(r"\bt\(\s*`([\w.]+\.)\$\{", code))
    quoted = set(re.findall(r"['`]([a-z_]+\.[a-z_.0-9]+)['`]", code))
    assert sorted(key for key in set(ENGLISH) - literal - quoted if not key.startswith(prefixes)) == []


def test_every_text_of_the_status_page_exists_and_is_used():
    code = "\n".join(path.read_text() for path in sorted((ROOT / "app").glob("swarm_*.py")))
    code += (ROOT / "templates" / "swarm.html").read_text() + (ROOT / "app" / "api_swarm.py").read_text()
    named = set(re.findall(r"""['"`]([a-z_]+\.[a-z_]+)['"`]""", code))
    prefixes = set(re.findall(r"""['"]([a-z_]+\.)(?:['"] ?\+|\{)""", code))
    known = set(ENGLISH) | set(SWARM_ENGLISH)
    used = {key for key in named if key.split(".")[0] in {each.split(".")[0] for each in SWARM_ENGLISH}}
    assert sorted(used - known) == []
    assert sorted(key for key in set(SWARM_ENGLISH) - named if not key.startswith(tuple(prefixes))) == []
    for prefix, values in {
        "state.": get_args(SwarmStatus), "say.": get_args(SwarmStatus), "node_state.": get_args(NodeStatus),
        "incident.": {*CAUSES.values(), "other"},
    }.items():  # fmt: skip
        assert {prefix + value for value in values} <= known


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
