"""The page's pure modules, tested by node's own runner, and rules that hold for all of its files."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = [*sorted((ROOT / "static" / "js").rglob("*.js")), ROOT / "static" / "widget" / "loader.js"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_pure_modules_pass_their_own_tests():
    tests = sorted(str(path) for path in (ROOT / "tests" / "js").glob("*.test.mjs"))
    result = subprocess.run(["node", "--test", *tests], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_modules_never_make_markup_of_strings(path):
    text = path.read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text)
    assert not re.search(r"""https?://(?!www\.w3\.org/2000/svg)""", text)


@pytest.mark.parametrize("path", [path for path in MODULES if path.read_text().startswith("/** Pure:")], ids=str)
def test_pure_modules_touch_no_page(path):
    text = path.read_text()
    assert not re.search(r"\b(document|window|localStorage|fetch|WebSocket|setTimeout)\b", text)
    assert not re.search(r"Math\.random|Date\.now|performance\.now", text)
