"""`umbel-chat check`: what is wrong is red, whatever else is well, and nothing secret is shown."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.check import Finding, exit_status, memory_findings, proxies_finding, screen, secrets_finding
from app.cli import main
from app.config import SecurityConfig, SiteConfig
from swarm_client.model_facts import ends_bytes
from swarm_client.swarm import Swarm
from swarm_protocol.model.checkpoint import open_checkpoint
from swarm_protocol.model.parts import load_ends
from swarm_protocol.spans import Span
from tests.app.site_process import running_site
from tests.app.test_health import free_port
from tests.local_swarm import LocalSwarm
from tests.tiny_models import NUM_BLOCKS, save_tiny_model


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.mark.parametrize(
    ("secrets", "state"),
    [
        ((), "warn"),
        (("short",), "bad"),
        (("x" * 16, "short"), "bad"),
        (("x" * 16,), "ok"),
        (("x" * 32, "y" * 32), "ok"),
    ],
)
def test_secrets_are_judged_by_their_length(secrets: tuple[str, ...], state: str) -> None:
    found = secrets_finding(SiteConfig(security=SecurityConfig(signing_secrets=secrets)))
    assert found.state == state
    assert not any(secret in found.text for secret in secrets if len(secret) > 8)


@pytest.mark.parametrize(
    ("host", "number", "hsts", "state"),
    [
        ("127.0.0.1", 1, True, "ok"),
        ("127.0.0.1", 0, False, "warn"),  # behind a proxy all would have one address
        ("127.0.0.1", 0, True, "bad"),
        ("0.0.0.0", 0, False, "ok"),
        ("0.0.0.0", 1, False, "warn"),  # readers may come past the proxy
        ("::1", 1, False, "ok"),
        ("127.0.0.1", 9, False, "warn"),
        ("127.0.0.1", -1, False, "bad"),
    ],
)
def test_proxies_are_judged_by_what_goes_with_them(host: str, number: int, hsts: bool, state: str) -> None:
    config = SiteConfig(host=host, security=SecurityConfig(trusted_proxies=number, hsts=hsts))
    assert proxies_finding(config).state == state


@pytest.mark.parametrize(("free_bytes", "state"), [(100, "bad"), (4999, "bad"), (5100, "warn"), (9000, "ok")])
def test_memory_is_needed_for_all_ends_and_for_reading_the_largest(free_bytes: int, state: str) -> None:
    found = memory_findings([("a", 1000), ("b", 2000)], free_bytes)
    assert {finding.state for finding in found} == {state}
    assert memory_findings([], free_bytes) == []


def test_the_screen_ends_with_what_it_comes_to() -> None:
    well, known, wrong = (Finding("it", state, "text") for state in ("ok", "warn", "bad"))
    assert screen([well], has_colours=False) == "ok    it  text\n\nall is well\n"
    assert screen([well, known, wrong], has_colours=False).splitlines()[-1] == "1 bad, 1 to know of"
    assert screen([wrong], has_colours=True).startswith("\x1b[31mBAD \x1b[0m  it")
    assert [exit_status([well, known]), exit_status([wrong, well])] == [0, 1]


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_ends_take_what_is_told(tmp_path: Path, family: str) -> None:
    import torch

    save_tiny_model(family, tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    ends = load_ends(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    assert ends_bytes(checkpoint) == sum({each.data_ptr(): each.nbytes for each in ends.parameters()}.values())


def test_a_swarm_that_loses_a_node_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_model("llama", tmp_path / "tiny")
    monkeypatch.setenv("UMBEL_DATABASE_URL", f"sqlite:///{tmp_path}/site.db")
    monkeypatch.setenv("UMBEL_SIGNING_SECRETS", "hunter2hunter2hunter2")
    monkeypatch.setattr(Swarm, "close", lambda _: None)
    with LocalSwarm(tmp_path / "tiny", [Span(0, 2), Span(2, NUM_BLOCKS)]) as served:
        monkeypatch.setattr(Swarm, "connect", lambda _: served.swarm)
        peers = [f"/memory/{peer_id}/p2p/{peer_id}" for peer_id in served.nodes]
        command = ["check", "--model", str(tmp_path / "tiny"), "--port", str(free_port()), "--initial-peers"]
        status = main([*command, *peers])
        shown = capsys.readouterr().out
        assert status == 0, shown
        assert "hunter2" not in shown
        assert "complete, but a loss would stop answers" in shown
        assert "\x1b" not in shown
        assert not (tmp_path / "site.db").exists()

        served.stop(served.nodes[1])
        deadline_s = time.monotonic() + 60
        while main([*command, peers[0], "--json"]) == 0:
            assert time.monotonic() < deadline_s
            capsys.readouterr()
        found = json.loads(capsys.readouterr().out)
        (bad,) = (finding for finding in found["findings"] if finding["state"] == "bad")
        assert not found["ok"]
        assert bad["text"].startswith("incomplete: blocks 2–4 missing, 1 node; ")
        monkeypatch.undo()


def test_a_site_that_runs_is_found_by_a_name_that_it_answers_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    settings = {"security": {"trusted_hosts": ["chat.example.org"]}, "operation": {"health_port": port}}
    with running_site(settings=settings) as site:
        monkeypatch.setenv("UMBEL_TRUSTED_HOSTS", "chat.example.org")
        monkeypatch.setenv("UMBEL_HEALTH_PORT", str(port))
        assert main(["check", "--port", site.url.rpartition(":")[2]]) == 1  # there is no model
        shown = capsys.readouterr().out
    assert shown.count("a site answers on 127.0.0.1:") == 2, shown


def test_what_is_wrong_before_the_swarm_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UMBEL_DATABASE_URL", "mysql://umbel:hunter2@db/umbel")
    monkeypatch.setenv("UMBEL_MODERATION", "no_such_module:judge")
    monkeypatch.setenv("UMBEL_LIMITS_URL", "redis://:hunter2@127.0.0.1:1/0")
    assert main(["check", "--port", str(free_port())]) == 1
    shown = capsys.readouterr().out
    bad = {line.split()[1] for line in shown.splitlines() if line.startswith("BAD")}
    assert bad == {"configuration", "moderation", "database", "limits"}
    assert "hunter2" not in shown
