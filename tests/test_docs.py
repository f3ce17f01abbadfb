"""The pages in docs/ say what the code does: tables, flags, defaults, diagrams and examples are compared with it."""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import pytest

import app.cli
import app.demo
import server_node.cli
import server_node.flags
import swarm_client
from app import chat_protocol as chat
from app import errors as site_errors
from app.config import (
    AddressLimits,
    GenerationLimits,
    OperationConfig,
    SecurityConfig,
    SiteConfig,
    SocketLimits,
    StatusConfig,
    config_from_env,
)
from app.limits import CloseCode
from app.native_generation import offered_defaults, offered_limits
from app.request_models import OneShot
from app.site_metrics import GAUGES, SiteMetrics
from server_node.config import ComputeChoice, ModelChoice, NodeConfig, NodeLimits
from server_node.metrics import metrics_text
from server_node.status import NodeStatus
from swarm_client.config import ClientConfig
from swarm_client.events import Prefilled, Recovered, RouteChanged, RoutePart, RouteReason, Waiting
from swarm_client.time_log import TimeLog
from swarm_protocol import errors
from swarm_protocol.ids import PeerId
from swarm_protocol.messages import MESSAGE_TYPES
from swarm_protocol.move_claims import MoveClaim
from swarm_protocol.records import NodeRecord
from swarm_protocol.session_state import TRANSITIONS, State
from swarm_protocol.spans import Span
from swarm_protocol.transport.network_config import NetworkConfig

PART = RoutePart(Span(0, 1), PeerId("p"))
ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "wire",
    "session",
    "configuration",
    "running-a-node",
    "api",
    "threat-model",
    "status-page",
    "running-a-site",
    "database",
)
FILES = [*(ROOT / "docs" / f"{name}.md" for name in PAGES)]
FILES += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]

CONFIGS = (
    NodeConfig, ModelChoice, ComputeChoice, NetworkConfig, NodeLimits, SiteConfig, SocketLimits, GenerationLimits,
    SecurityConfig, StatusConfig, OperationConfig, AddressLimits, ClientConfig,
)  # fmt: skip
SITE_CONFIGS = (
    SiteConfig, SocketLimits, GenerationLimits, SecurityConfig, StatusConfig, OperationConfig, AddressLimits
)  # fmt: skip
NODE_CONFIGS = (NodeConfig, ModelChoice, ComputeChoice, NetworkConfig)

FLAG_SAMPLES = {
    "--name": "n", "--revision": "r", "--cache-dir": "c", "--blocks": "0:2", "--num-blocks": "3", "--device": "cuda",
    "--dtype": "bfloat16", "--threads": "2", "--cache-tokens": "5", "--initial-peers": "/ip4/1.2.3.4", "--host": "::",
    "--port": "99", "--announce": "/ip4/1.2.3.4", "--identity": "key",
    "--prefix-tokens": "0", "--max-disk": "50GB", "--max-sessions": "4", "--peer-sessions": "2",
    "--peer-cache-share": "0.5", "--drain-timeout": "5", "--quantization": "int8",
    "--max-bandwidth": "5MB",
}  # fmt: skip


# --- reading the pages


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """Return what is below `heading`, up to the next heading of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", _without_code(text), re.DOTALL | re.MULTILINE)
    assert found, f"no heading {heading!r}"
    return found[1]


def tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every table, without its head."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[_cells(row) for row in block.splitlines()[2:]] for block in blocks]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def fences(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


# --- session.md


def state_diagram() -> str:
    """Return the Mermaid diagram of `session_state.TRANSITIONS`."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.OPENING.value}"]
    for state, events in TRANSITIONS.items():
        lines += [f"    {state.value} --> {after.value}: {event.value}" for event, after in events.items()]
    return "\n".join([*lines, f"    {State.CLOSED.value} --> [*]"]) + "\n"


def test_the_state_diagram_is_the_table_of_the_code() -> None:
    assert fences(page("session"), "mermaid") == [state_diagram()]


def test_every_state_is_explained() -> None:
    (rows,) = tables(section(page("session"), "States"))
    assert [code_spans(row[0])[0] for row in rows] == [state.value for state in State]


@pytest.mark.parametrize("name", ["session", "wire"])
def test_examples_without_a_swarm_run(name: str) -> None:
    names: dict[str, object] = {}
    for block in fences(page(name), "python"):
        exec(compile(block, f"{name}.md", "exec"), names)


# --- wire.md


def test_every_message_is_in_the_table_with_its_kind_and_fields() -> None:
    first, second = tables(section(page("wire"), "Messages"))
    found = {(int(row[0]), code_spans(row[1])[0], tuple(code_spans(row[2]))) for row in first}
    assert found == {(cls.kind, cls.__name__, tuple(f.name for f in dataclasses.fields(cls))) for cls in MESSAGE_TYPES}
    explained = {name for row in second for name in code_spans(row[0])}
    assert explained == {field.name for cls in MESSAGE_TYPES for field in dataclasses.fields(cls)}


def test_every_error_code_is_in_the_table() -> None:
    (rows,) = tables(section(page("wire"), "Errors"))
    found = [(code_spans(row[0])[0], code_spans(row[1])[0], row[2]) for row in rows]
    assert found == [
        (cls.code, name, "yes" if cls.retryable else "no")
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, errors.SwarmError) and cls is not errors.RemoteError
    ]


def test_limits_are_those_of_the_code() -> None:
    (rows,) = tables(section(page("wire"), "Limits"))
    assert rows
    for _, value, constant in rows:
        module, name = code_spans(constant)[0].rsplit(".", 1)
        assert ast.literal_eval(code_spans(value)[0]) == getattr(importlib.import_module(module), name), constant


@pytest.mark.parametrize(("heading", "kind"), [("The directory", NodeRecord), ("Claims of moves", MoveClaim)])
def test_every_field_of_a_record_is_explained(heading: str, kind: type) -> None:
    (rows,) = tables(section(page("wire"), heading))
    explained = [name for row in rows for name in code_spans(row[0])]
    assert sorted(explained) == sorted(field.name for field in dataclasses.fields(kind))


# --- configuration.md


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One field of a configuration as the page has it."""

    config: type
    field: str
    set_by: tuple[str, ...]
    default: str


def config_rows(configs: Sequence[type] = CONFIGS) -> list[Row]:
    text = page("configuration")
    return [
        Row(config, code_spans(cells[0])[0], tuple(code_spans(cells[1])), cells[2])
        for config in configs
        for cells in tables(section(text, f"`{config.__name__}`"))[0]
    ]


def built_by_node(*arguments: str) -> dict[type, object]:
    """Return the parts of what `umbel-node run` makes of its arguments."""
    config = server_node.flags.node_config(server_node.flags.settings().parse(["run", "m", *arguments], {}))
    return {type(part): part for part in (config, config.model, config.compute, config.network, config.limits)}


def built_by_site(config: SiteConfig) -> dict[type, object]:
    parts = (getattr(config, field.name) for field in dataclasses.fields(config))
    return {type(part): part for part in (config, *(part for part in parts if dataclasses.is_dataclass(part)))}


def test_every_field_has_a_row_in_its_order() -> None:
    for config in CONFIGS:
        assert [row.field for row in config_rows([config])] == [f.name for f in dataclasses.fields(config)]


@pytest.mark.parametrize("row", config_rows(), ids=lambda row: f"{row.config.__name__}.{row.field}")
def test_defaults_are_those_of_the_code(row: Row) -> None:
    (field,) = (f for f in dataclasses.fields(row.config) if f.name == row.field)
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        expected = "required"
    elif dataclasses.is_dataclass(default):
        expected = "defaults"
    else:
        expected = f"`{json.dumps(default) if isinstance(default, str) else repr(default)}`"
        by_node = getattr(built_by_node().get(row.config, field), row.field, default)
        if by_node != default:
            expected += f"; `umbel-node`: `{by_node!r}`"
    assert row.default == expected


@pytest.mark.parametrize("row", [r for r in config_rows(NODE_CONFIGS) if r.set_by], ids=lambda row: row.field)
def test_flags_of_nodes_set_the_field_of_their_row(row: Row) -> None:
    (flag,) = row.set_by
    if flag == "MODEL":
        assert getattr(built_by_node()[row.config], row.field) == "m"
        return
    arguments = [flag, FLAG_SAMPLES[flag]] if flag in FLAG_SAMPLES else [flag]
    changed, default = built_by_node(*arguments)[row.config], built_by_node()[row.config]
    assert getattr(changed, row.field) != getattr(default, row.field)


CHOICES = {
    "log_format": "json",
    "wire_dtype": "float16",
    "speculation": "ngram",
    "draft_quantization": "int8",
}
"""Values of fields that take only certain texts."""


def test_variables_and_options_of_the_site_set_the_field_of_their_row() -> None:
    samples: dict[type, str] = {bool: "", int: "7", float: "7", str: "::1", tuple: "a,b"}
    for row in config_rows(SITE_CONFIGS):
        default = getattr(built_by_site(SiteConfig())[row.config], row.field)
        if dataclasses.is_dataclass(default):
            assert not row.set_by
            continue
        sample = ("no" if default else "yes") if isinstance(default, bool) else samples[type(default)]
        sample = CHOICES.get(row.field, sample)
        variable, *options = row.set_by
        assert variable == ("PORT" if row.field == "port" else f"UMBEL_{row.field.upper()}")
        changed = built_by_site(config_from_env({variable: sample}))[row.config]
        assert getattr(changed, row.field) != default, variable
        for option in options:
            values = [] if option.startswith("--no-") else ["7"]
            parsed = app.cli._parser().parse_args(["serve", "--model", "m", option, *values])
            assert getattr(app.cli.serve_config(parsed, SiteConfig()), row.field) != default, option


def help_of(main: Callable[[list[str]], object], *arguments: str) -> set[str]:
    """Return the flags that a command's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        main([*arguments, "--help"])
    return set(re.findall(r"--[a-z][a-z-]+", shown.getvalue()))


def test_no_flag_is_missing_and_none_is_invented() -> None:
    commands = {
        (server_node.cli.main, "run"), (server_node.cli.main, "bootstrap"),
        (server_node.cli.main, "drain"), (server_node.cli.main, "status"), (server_node.cli.main, "benchmark"),
        (app.cli.main, "serve"), (app.cli.main, "check"), (app.cli.main, "demo"), (app.cli.main, "widget create"),
        (app.cli.main, "keys create"), (app.cli.main, "ban add"), (app.cli.main, "usage"),
    }  # fmt: skip
    known = set().union(*(help_of(main, *command.split()) for main, command in commands))
    named = {
        flag for span in code_spans(_without_code(page("configuration"))) for flag in re.findall(r"^--[a-z-]+\w$", span)
    }
    assert named == known
    for name in PAGES:
        others = r"^(?:curl|docker|gunicorn|systemctl|useradd|certbot|\S+/pip) .*$"
        text = re.sub(others, "", page(name), flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known, name


def test_variables_are_none_but_those_that_exist() -> None:
    known = {name for row in config_rows(SITE_CONFIGS) for name in row.set_by}
    flags = help_of(server_node.cli.main, "run") | help_of(server_node.cli.main, "bootstrap")
    known |= {f"UMBEL_NODE_{flag.removeprefix('--').replace('-', '_').upper()}" for flag in flags}
    known |= {"UMBEL_NODE_MODEL", "UMBEL_NODE"}  # `UMBEL_NODE_…`
    for name in PAGES:
        assert set(re.findall(r"UMBEL_[A-Z_]*[A-Z]", page(name))) <= known, name


# --- running-a-node.md


def test_quoted_log_and_error_lines_are_in_the_code() -> None:
    files = [path for folder in ("server_node", "swarm_protocol") for path in (ROOT / folder).rglob("*.py")]
    strings = "\n".join(_texts(path) for path in files)
    rows = [row for table in tables(section(page("running-a-node"), "When it does not work")) for row in table]
    assert rows
    for row in rows:
        for part in code_spans(row[0])[0].split("…"):
            assert part.strip() in strings, part


def _texts(path: Path) -> str:
    """Return the text of all string literals, neighbours joined; what an f-string fills in is a line break."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\n" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return "\n".join(found)


# --- api.md


def test_examples_of_the_python_client_compile_and_use_names_that_exist() -> None:
    blocks = fences(page("api"), "python")
    assert len(blocks) > 5
    for block in blocks:
        for node in ast.walk(compile(block, "api.md", "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom) and node.module == "swarm_client":
                for alias in node.names:
                    assert getattr(swarm_client, alias.name)


def json_examples() -> Iterator[dict[str, object]]:
    for block in fences(page("api"), "json"):
        yield json.loads(block)


def test_frames_of_clients_are_understood() -> None:
    kinds = set()
    for values in json_examples():
        is_newer = {"id", "messages"} & set(values) or values == {"type": "bye"}
        for protocol in (None, 3 if is_newer else 2):
            if (protocol, values.get("type")) in chat._COMMANDS:
                kinds.add(type(command := chat.parse_command(dict(values), protocol)))
                sent = set(values) - {"type", "protocol"}
                assert sent <= set(type(command).model_fields), values
    assert kinds == set(chat._COMMANDS.values())


def test_frames_of_the_site_have_the_fields_that_it_sends() -> None:
    report = site_errors.ErrorReport("K", "c", "m", False, "r")
    usage, timings = chat.Usage(1, 2, 3), chat.Timings(1.0, None)
    told = [RouteChanged("opened", (), (), ()), Waiting((), "", 0.0, None), Recovered(0.0, 0), Prefilled(1, 2)]
    offer = chat.Offer("s", "m", 1, offered_limits(1, SiteConfig()), offered_defaults(1, GenerationLimits()), (PART,))
    done = chat.Done("i", "stop", usage, timings, (PART,))
    timed = dataclasses.replace(done, times=TimeLog().report().as_json())
    frames = [
        chat.opened_frame(dataclasses.replace(offer, route=()), "t"), chat.resumed_frame(offer, "i", 0),
        chat.not_resumed_frame("lost"), chat.started_frame("i", 0, 0), chat.queued_frame("i", 0, 0),
        chat.delta_frame(chat.Delta("i", "t", 1), 0), chat.done_frame(done, 0), chat.done_frame(timed, 0),
        chat.heartbeat_frame("i"), chat.rewound_frame(0),
        *(chat.event_frame(event, "i", 0) for event in told), chat.error_frame(report, None),
        chat.error_frame(report, "i", 0),
        chat.legacy_opened_frame(), chat.legacy_error_frame(report),
        chat.legacy_reply_frame(chat.LegacyReply("t", True, 1)),
    ]  # fmt: skip
    shown = {_shape(values) for values in json_examples()}
    assert {_shape(json.loads(frame)) for frame in frames} <= shown


def _shape(values: object) -> object:
    """Return the keys of an object and of those in it, and its `type`."""
    if not isinstance(values, dict):
        return None
    return values.get("type"), tuple((name, _shape(value)) for name, value in values.items())


def test_every_kind_of_frame_is_in_the_table() -> None:
    table = tables(section(page("api"), "Protocol 3"))[0]
    sent = set(re.findall(r'_dump\(\s*type="(\w+)"', inspect.getsource(chat)))
    received = {kind for protocol, kind in chat._COMMANDS if protocol == 3} | {"resume"}
    assert {code_spans(row[0])[0] for row in table if row[1] == "site"} == sent
    assert {code_spans(row[0])[0] for row in table if row[1] == "client"} == received


def test_every_reason_and_event_is_explained() -> None:
    text = section(page("api"), "What happens to a route")
    reasons = {code_spans(row[0])[0] for row in tables(text)[1]}
    assert reasons == set(get_args(RouteReason))
    assert [code_spans(row[0])[0] for row in tables(text)[0]] == ["route_changed", "waiting", "recovered"]
    for cls, row in zip((RouteChanged, Waiting, Recovered), tables(text)[0], strict=True):
        assert code_spans(row[0])[0] == cls.kind


def test_fields_of_legacy_requests_are_in_the_tables() -> None:
    one_shot = tables(section(page("api"), "`POST /api/v1/generate`"))[0]
    more = tables(section(page("api"), "Protocol 2"))[0]
    named = {code_spans(row[0])[0] for row in [*one_shot, *more]}
    assert named == set(OneShot.model_fields) | {"model"}


def test_close_codes_and_error_codes_are_in_the_tables() -> None:
    (closes,) = tables(section(page("api"), "Close codes"))
    assert [int(row[0]) for row in closes] == [code.value for code in CloseCode]
    (rows,) = tables(section(page("api"), "Errors"))
    found = {(code_spans(row[0])[0], row[1], int(row[2])) for row in rows}
    classes = [cls for cls in vars(site_errors).values() if inspect.isclass(cls) and cls.__module__ == "app.errors"]
    own = [cls for cls in classes if issubclass(cls, errors.SwarmError)]
    reports = [site_errors.ErrorReport("", cls.code, "", cls.retryable, "") for cls in own]
    assert found == {(r.code, "yes" if r.retryable else "no", site_errors.http_status(r)) for r in reports}


def test_metrics_of_sites_are_in_the_table() -> None:
    metrics = SiteMetrics(lambda: dict.fromkeys(GAUGES, 0.0))
    known = {family.name: family.type for family in metrics.registry.collect()}
    (rows,) = tables(section(page("running-a-site"), "Metrics"))
    named = {name for row in rows for name in code_spans(row[0])}
    totals = {name.removesuffix("_total") for name in named}
    assert totals == {name for name in known if name.startswith("umbel_")}
    assert all((known[name.removesuffix("_total")] == "counter") == name.endswith("_total") for name in named)


def test_metrics_of_nodes_are_in_the_table() -> None:
    measured = {"decode_steps_per_s": {"1": 1.0}, "prompt_tokens_per_s": 1.0, "uplink_bytes_per_s": 1.0}
    status = NodeStatus("online", "m", "s", 1.0, memory_bytes=1, errors={"internal": 1}, **measured)
    lines = metrics_text(lambda: status).decode().splitlines()
    (rows,) = tables(section(page("running-a-node"), "See what it does"))
    sent = {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}
    assert {name for row in rows for name in code_spans(row[0])} == sent


# --- all pages


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in FILES:
        assert set(re.findall(r"(?:`|^)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_the_changelog_begins_with_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == version


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(path.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        assert other.is_file(), target
        assert not anchor or anchor in _anchors(other.read_text(encoding="utf-8")), target


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
