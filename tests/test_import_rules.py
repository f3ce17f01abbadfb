"""The arrows between packages, and who may import what (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("app", "server_node", "swarm_client", "swarm_protocol")

MAY_IMPORT = {
    "app": {"swarm_client", "swarm_protocol"},
    "swarm_client": {"swarm_protocol"},
    "server_node": {"swarm_protocol"},
    "swarm_protocol": set(),
}

LIBRARIES = {
    "hivemind": (
        "swarm_protocol/transport/hivemind_net.py",
        "swarm_protocol/transport/dht_membership.py",
        "swarm_protocol/transport/p2p_daemon.py",
    ),
    "flask": ("app/",),
    "flask_sock": ("app/",),
    "gunicorn": ("app/",),
    "bitsandbytes": ("server_node/compute/bitsandbytes_layers.py",),
    "transformers": ("swarm_protocol/model/", "server_node/compute/", "swarm_client/"),
    "torch": ("swarm_protocol/", "server_node/", "swarm_client/"),
}
"""Library to the only files or folders that may import it."""

TRANSPORT_CHOOSERS = {"swarm_client/loop_thread.py", "server_node/node.py", "swarm_protocol/transport/hivemind_net.py"}

PURE_FORBIDDEN = {"asyncio", "threading", "socket", "os", "time", "random", "logging"}


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module and its line, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_a_file_imports_only_what_it_may(path: Path) -> None:
    name, package = name_of(path), path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text())
    for module, line in imported(tree):
        top = module.split(".")[0]
        if top in PACKAGES:
            assert top == package or top in MAY_IMPORT[package], f"{name}:{line} imports {module}"
        allowed = LIBRARIES.get(top)
        assert allowed is None or name.startswith(allowed), f"{name}:{line} imports {module}"
        if module == "swarm_protocol.transport.hivemind_net":
            assert name in TRANSPORT_CHOOSERS, f"{name}:{line} names the real network"
    if (ast.get_docstring(tree) or "").startswith("Pure:"):
        found = {module.split(".")[0] for module, _ in imported(tree)} & PURE_FORBIDDEN
        assert not found, f"{name} says that it is pure and imports {sorted(found)}"


def test_nothing_is_exported_that_is_not_named() -> None:
    for path in sources():
        if path.name == "__init__.py":
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "__all__" in names, f"{name_of(path)} has no __all__"


def test_the_clients_public_names_exist() -> None:
    import swarm_client

    assert set(swarm_client._HOMES) == set(swarm_client.__all__)
    for name in swarm_client.__all__:
        assert getattr(swarm_client, name) is not None
