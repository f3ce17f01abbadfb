"""The bundled libraries of the page are what their manifest says, and nothing else is there."""

import base64
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "static" / "vendor"
TOOL = ROOT / "tools" / "vendor"
MANIFEST = json.loads((VENDOR / "MANIFEST.json").read_text())


def test_files_are_those_of_the_manifest() -> None:
    found = {}
    for path in VENDOR.rglob("*"):
        if path.is_file() and path.name != "MANIFEST.json":
            digest = base64.b64encode(hashlib.sha384(path.read_bytes()).digest()).decode()
            found[path.relative_to(VENDOR).as_posix()] = (path.stat().st_size, digest)
    assert found == {name: (entry["bytes"], entry["sha384"]) for name, entry in MANIFEST["files"].items()}


def test_packages_are_pinned_free_and_named_with_their_terms() -> None:
    lock = json.loads((TOOL / "package-lock.json").read_text())["packages"]
    texts = (VENDOR / "LICENSES.txt").read_text()
    for package in MANIFEST["packages"]:
        assert lock[f"node_modules/{package['name']}"]["version"] == package["version"]
        assert package["license"] in ("MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC")
        assert re.search(rf"^{re.escape(package['name'])}$", texts, re.MULTILINE)
    wanted = json.loads((TOOL / "package.json").read_text())["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())


def test_the_style_sheet_names_only_fonts_that_are_there() -> None:
    named = set(re.findall(r"url\(([^)]+)\)", (VENDOR / "katex.css").read_text()))
    assert named == {f"fonts/{path.name}" for path in (VENDOR / "fonts").iterdir()}
    assert all(name.endswith(".woff2") for name in named)


def test_bundles_stay_modest() -> None:
    assert sum(entry["bytes"] for entry in MANIFEST["files"].values()) < 1_500_000
