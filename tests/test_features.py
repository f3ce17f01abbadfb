"""docs/features.md claims nothing that no test holds."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
FEATURES = [row for row in ROWS if len(row) == 9 and row[0] != "feature"]
NAMED = re.findall(r"`(tests/[^`]+::[^`]+)`", PAGE)


def test_every_feature_that_is_claimed_names_a_test_and_no_other_does() -> None:
    assert len(FEATURES) > 30
    for name, umbel, *others, test in FEATURES:
        assert umbel[0] in "Y~–", name
        assert bool(re.fullmatch(r"`tests/\S+::\S+`", test)) == (umbel[0] != "–"), name
        assert test or umbel[0] == "–", name
        assert all(each in ("Y", "~", "–", "?") for each in others), name


def test_every_row_beside_the_page_names_a_test() -> None:
    rows = [row for row in ROWS if len(row) == 2 and row[1] != "test"]
    assert len(rows) > 8
    assert all(re.fullmatch(r"`tests/\S+::\S+`", test) for _, test in rows)


@pytest.mark.parametrize("named", sorted(set(NAMED)))
def test_named_tests_exist(named: str) -> None:
    path, _, name = named.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), named


def test_the_page_tells_readers_what_the_threat_model_says() -> None:
    model = " ".join((ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8").split())
    page = (ROOT / "templates" / "chat.html").read_text(encoding="utf-8")
    notice = re.search(r'<p class="notice"[^>]*>([^<]+)</p>', page)
    assert notice
    assert f'"{notice[1]}"' in model
