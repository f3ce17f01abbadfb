"""The flags of `umbel-node` from a file and from the environment."""

from pathlib import Path

import pytest

from server_node import cli, flags
from swarm_protocol.errors import ConfigError
from swarm_protocol.spans import Span

FILE = """
model = "bigscience/bloom-560m"
num_blocks = 4
cache_tokens = 4096
peer_cache_share = 0.5
initial_peers = ["/ip4/192.0.2.1/tcp/1/p2p/12D3KooWa", "/ip4/192.0.2.2/tcp/2/p2p/12D3KooWb"]
no_relay = true
name = "from the file"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(FILE)
    return path


def parsed(*argv: str, **environ: str) -> dict[str, object]:
    return vars(flags.settings().parse(argv, environ))


def test_a_file_sets_what_the_command_line_could(file: Path) -> None:
    found = parsed("run", "--config", str(file))
    assert found["model"] == "bigscience/bloom-560m"
    assert (found["num_blocks"], found["cache_tokens"], found["peer_cache_share"]) == (4, 4096, 0.5)
    assert found["initial_peers"] == ["/ip4/192.0.2.1/tcp/1/p2p/12D3KooWa", "/ip4/192.0.2.2/tcp/2/p2p/12D3KooWb"]
    assert (found["relay"], found["port_mapping"], found["name"]) == (False, True, "from the file")
    plain = parsed("run", "bigscience/bloom-560m")
    assert {key: value for key, value in found.items() if key not in plain} == {}
    assert {key for key in plain if plain[key] != found[key]} == {
        "num_blocks", "cache_tokens", "peer_cache_share", "initial_peers", "relay", "name", "config",
    }  # fmt: skip


def test_variables_go_before_the_file_and_the_command_line_before_both(file: Path) -> None:
    environ = {
        "UMBEL_NODE_CONFIG": str(file),
        "UMBEL_NODE_NAME": "from the environment",
        "UMBEL_NODE_INITIAL_PEERS": "/ip4/192.0.2.3/tcp/3/p2p/12D3KooWc /ip4/192.0.2.4/tcp/4/p2p/12D3KooWd",
        "UMBEL_NODE_CACHE_TOKENS": "100",
        "UMBEL_NODE_NO_RELAY": "0",
        "PATH": "/bin",
    }
    found = parsed("run", "--cache-tokens", "200", **environ)
    assert (found["name"], found["cache_tokens"], found["num_blocks"]) == ("from the environment", 200, 4)
    assert found["initial_peers"] == ["/ip4/192.0.2.3/tcp/3/p2p/12D3KooWc", "/ip4/192.0.2.4/tcp/4/p2p/12D3KooWd"]
    assert found["relay"] is True
    found = parsed("run", "another", "--initial-peers", "/ip4/192.0.2.5/tcp/5/p2p/12D3KooWe", **environ)
    assert (found["model"], found["initial_peers"]) == ("another", ["/ip4/192.0.2.5/tcp/5/p2p/12D3KooWe"])


def test_what_excludes_a_setting_takes_its_place(file: Path) -> None:
    found = parsed("run", "--config", str(file), "--blocks", "0:7")
    assert (found["blocks"], found["num_blocks"]) == (Span(0, 7), None)
    found = parsed("run", "--config", str(file), UMBEL_NODE_BLOCKS="2:5")
    assert (found["blocks"], found["num_blocks"]) == (Span(2, 5), None)


def test_commands_take_what_they_know(tmp_path: Path) -> None:
    environ = {"UMBEL_NODE_MODEL": "m", "UMBEL_NODE_IDENTITY": "/keys/node", "UMBEL_NODE_PORT": "31337"}
    assert parsed("drain", **environ)["identity"] == "/keys/node"
    found = parsed("bootstrap", **environ)
    assert (found["port"], "model" in found) == (31337, False)
    (tmp_path / "first.toml").write_text("port = 31337\n")
    assert parsed("bootstrap", "--config", str(tmp_path / "first.toml"))["port"] == 31337


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmu_blocks = 4", "nmu_blocks is no setting of `umbel-node run`"),
        ("config = 'other.toml'", "config is no setting of `umbel-node run`"),
        ("num_blocks = 0", "num_blocks: a whole number above 0 is needed, not '0'"),
        ("num_blocks = true", "num_blocks: a text or a number is needed, not True"),
        ("dtype = 'float8'", "dtype: auto, float32, bfloat16, float16 are possible, not 'float8'"),
        ("no_relay = 'perhaps'", "no_relay: true or false is needed, not 'perhaps'"),
        ("initial_peers = 7", "initial_peers: a list of texts is needed, not 7"),
        ("initial_peers = [[]]", "initial_peers: a text or a number is needed, not []"),
        ("num_blocks = 4\nblocks = '0:4'", "blocks cannot stand beside what excludes it"),
        ("[run]\nnum_blocks = 4", "run is no setting of `umbel-node run`"),
        ("num_blocks: 4", "is not TOML: "),
        ("name = '\udcff'", "is not TOML: "),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as found:
        parsed("run", "m", "--config", str(path))
    assert str(path) in str(found.value)
    assert says in str(found.value)


def test_what_is_wrong_in_the_environment_is_named() -> None:
    with pytest.raises(ConfigError, match="UMBEL_NODE_PORT: a port is 0 to 65535, not '70000'"):
        parsed("run", "m", UMBEL_NODE_PORT="70000")
    with pytest.raises(ConfigError, match="UMBEL_NODE_NUMBLOCKS is no setting of umbel-node"):
        parsed("run", "m", UMBEL_NODE_NUMBLOCKS="4")
    with pytest.raises(ConfigError, match=r"cannot read /nowhere/node\.toml: No such file or directory"):
        parsed("run", "m", "--config", "/nowhere/node.toml")


def test_a_model_has_to_be_named_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parsed("run")
    assert capsys.readouterr().err == "umbel-node run: error: the following arguments are required: MODEL\n"


def test_a_wrong_file_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "node.toml").write_text("bloks = '0:4'\n")
    assert cli.main(["run", "m", "--config", str(tmp_path / "node.toml")]) == 2
    assert capsys.readouterr().err == (
        f"umbel-node: error: {tmp_path}/node.toml: bloks is no setting of `umbel-node run`\n"
    )


def test_the_help_names_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("run", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: 512" in shown
    assert "default: None" not in shown
