"""The files for containers name what is there: commands, flags, variables, files and ports."""

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.config import config_from_env
from server_node.flags import node_config, settings
from swarm_protocol.transport.network_config import NetworkConfig

ROOT = Path(__file__).parent.parent
PEER = "/ip4/192.0.2.7/tcp/31337/p2p/12D3KooWBtSpLWGCbYFvzUPCJKmVqVqrCoKXE2VYF6tAx8ptuyGg"
GIVEN = {"MODEL": "umbel/model", "INITIAL_PEERS": PEER}


def filled(text: str, given: dict[str, str]) -> str:
    """Put variables in, as compose does: `${NAME-}` is empty where none is given."""
    return re.sub(r"\$\{(\w+)-\}", lambda match: given.get(match[1], ""), text)


def service(name: str, given: dict[str, str]) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(filled((ROOT / "compose.yaml").read_text(), given))["services"]
    return services[name]


@pytest.mark.parametrize("given", [GIVEN, {"MODEL": GIVEN["MODEL"]}])
def test_the_nodes_of_the_compose_file_start_with_flags_and_variables_that_exist(given: dict[str, str]) -> None:
    bootstrap, node = service("bootstrap", given), service("node", given)
    for each in (bootstrap, node):
        assert each["command"][0] == "umbel-node"
    settings().parse(bootstrap["command"][1:], {})
    chosen = node_config(settings().parse(node["command"][1:], node["environment"]))
    assert chosen.model.source == "umbel/model"
    assert chosen.network.initial_peers == tuple(filter(None, [given.get("INITIAL_PEERS")]))
    assert chosen.network.port != 31337
    check = node["healthcheck"]["test"]
    assert check[:2] == ["CMD", "umbel-node"]
    asked = settings().parse(check[2:], {})
    assert (asked.command, asked.identity) == ("status", chosen.network.identity_path)
    assert int(node["stop_grace_period"].removesuffix("s")) > chosen.limits.drain_s + 15


def test_the_site_of_the_compose_file_starts_with_variables_that_exist() -> None:
    site = service("site", GIVEN)
    chosen = config_from_env(site["environment"])
    assert (chosen.models, chosen.initial_peers) == (("umbel/model",), (GIVEN["INITIAL_PEERS"],))
    assert f"127.0.0.1:{chosen.port}/healthz" in site["healthcheck"]["test"][-1]
    assert site["command"] == ["gunicorn", "-c", *procfile_arguments()]


def procfile_arguments() -> list[str]:
    command = (ROOT / "Procfile").read_text().removeprefix("web: ")
    return re.sub("'", "", command).split()[2:]


def test_what_the_image_needs_is_copied_into_it() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [line.removeprefix("!") for line in lines if line.startswith("!")]
    left_out = {"tests", "bench", "docs", "examples", "tools"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and is_source(path)}
    assert folders - left_out == {name for name in copied if (ROOT / name).is_dir()}
    assert {"pyproject.toml", "README.md", "LICENSE", "gunicorn.conf.py"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)


def is_source(path: Path) -> bool:
    made = (".*", "*.egg-info", "build", "dist", "__pycache__")
    return not any(fnmatch.fnmatch(path.name, pattern) for pattern in made)


def test_every_folder_of_code_is_installed() -> None:
    chosen = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    packages = {name.removesuffix("*") for name in chosen}
    folders = {path.parent for name in packages for path in (ROOT / name).rglob("*.py")}
    assert ROOT / "app/migrations/versions" in folders
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_listening_is_possible_from_outside() -> None:
    assert NetworkConfig().host == "0.0.0.0"
    assert service("node", GIVEN)["network_mode"] == "host"
