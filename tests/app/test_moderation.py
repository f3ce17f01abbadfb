"""What the operator's moderation refuses is neither generated nor shown, whatever API it comes by."""

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import httpx
import pytest

from app.config import OperationConfig, SiteConfig
from app.errors import ModerationFailedError, RefusedError
from app.model_registry import ModelRegistry
from app.moderation import Hook, Moderated, load_hook
from app.moderation_steps import next_step
from app.site import Site
from swarm_client.generation.text_session import TextDelta
from swarm_protocol.errors import ConfigError
from tests.app.site_process import ROOT, SiteProcess, running_site
from tests.app.socket_client import Client

MODEL = "umbel/fake-1b"
PROMPT, ANSWER = "Not that question, please.", "Not that answer, please."


@pytest.fixture(scope="module")
def moderated() -> Iterator[SiteProcess]:
    operation = {
        "moderation": "tests.app.moderation_hooks:judge", "moderation_timeout_s": 1.5, "moderation_step_chars": 60,
    }  # fmt: skip
    with running_site("--delay", "0.001", settings={"operation": operation}) as site:
        yield site


def ask_chat(site: SiteProcess, text: str) -> tuple[str, str, str]:
    """Return the text that was shown, the code and the message of the error."""
    with Client(site) as client:
        client.open()
        client.generate(text)
        shown, error = client.receive_until("error")
        return shown, error["code"], error["message"]


def ask_stream(site: SiteProcess, text: str) -> tuple[str, str, str]:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
    found = httpx.post(f"{site.url}/v1/chat/completions", json=body, timeout=20)
    if found.status_code != 200:
        return "", found.json()["error"]["code"], found.json()["error"]["message"]
    events = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
    shown = "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    return shown, events[-1]["error"]["code"], events[-1]["error"]["message"]


def ask_legacy(site: SiteProcess, text: str) -> tuple[str, str, str]:
    body = {"inputs": text, "max_new_tokens": 500}
    found = httpx.post(f"{site.url}/api/v1/generate", json=body, timeout=20).json()
    return "", found["error"]["code"], found["error"]["message"]


def ask_legacy_socket(site: SiteProcess, text: str) -> tuple[str, str, str]:
    with Client(site) as client:
        client.open_legacy(max_length=2000)
        client.send(type="generate", inputs=text, max_new_tokens=1, stop_sequence="###")
        shown = ""
        while (reply := client.receive())["ok"]:
            shown += reply["outputs"]
        return shown, reply["error"]["code"], reply["error"]["message"]


WAYS = [ask_chat, ask_stream, ask_legacy, ask_legacy_socket]


def refused(way: object) -> str:
    return "content_filter" if way is ask_stream else "content_refused"


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_prompt_is_not_generated(moderated: SiteProcess, way) -> None:
    before = moderated.counts()["generated_tokens"]
    assert way(moderated, "a forbidden thing") == ("", refused(way), PROMPT)
    assert moderated.counts()["generated_tokens"] == before


@pytest.mark.parametrize("way", WAYS)
def test_a_refused_answer_ends_before_its_text_is_shown(moderated: SiteProcess, way) -> None:
    shown, code, message = way(moderated, "long")
    assert (code, message) == (refused(way), ANSWER)
    assert "word40" not in shown
    assert way is ask_legacy or shown.startswith("word0 word1")
    moderated.wait_for(lambda counts: counts["open_sessions"] == 0)


@pytest.mark.parametrize(("way", "word"), [(ask_chat, "sleepy"), (ask_stream, "broken"), (ask_legacy, "broken")])
def test_what_cannot_be_judged_is_refused(moderated: SiteProcess, way, word: str) -> None:
    shown, code, _ = way(moderated, word)
    assert (shown, code) == ("", "moderation_failed")


def test_a_call_that_hangs_holds_up_nobody_else(moderated: SiteProcess) -> None:
    with Client(moderated) as client, Client(moderated) as other:
        client.open()
        other.open()
        client.generate("sleepy")
        other.generate("brief")
        assert other.receive_until("done")[0] == " yes"
        assert client.receive_until("error")[1]["code"] == "moderation_failed"


def test_embeddings_are_asked_for_as_well(moderated: SiteProcess) -> None:
    found = httpx.post(f"{moderated.url}/v1/embeddings", json={"model": MODEL, "input": ["a", "forbidden"]}, timeout=20)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "content_filter")


def site_with(monkeypatch: pytest.MonkeyPatch, hook: Hook, **operation: object) -> Site:
    monkeypatch.setattr("app.moderation.load_hook", lambda _: hook)
    config = OperationConfig(moderation="a:b", **operation)  # type: ignore[arg-type]
    return Site(SiteConfig(operation=config), ModelRegistry([]))


def slow(_: Moderated) -> None:
    time.sleep(2)


def wrong(_: Moderated) -> str | None:
    return True  # type: ignore[return-value]


def broken(_: Moderated) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("hook", [slow, wrong, broken])
@pytest.mark.parametrize("is_open", [False, True])
def test_failures_are_refused_or_allowed_as_configured(
    monkeypatch: pytest.MonkeyPatch, hook: Hook, is_open: bool
) -> None:
    timeout_s = 0.1 if hook is slow else 60.0
    site = site_with(monkeypatch, hook, moderation_fail_open=is_open, moderation_timeout_s=timeout_s)
    if is_open:
        site.moderator.check_prompt("hello", "chat", "m")
    else:
        with pytest.raises(ModerationFailedError):
            site.moderator.check_prompt("hello", "chat", "m")
    assert b'umbel_moderation_total{kind="prompt",outcome="failed"} 1.0' in site.metrics.text()


def test_an_answer_is_shown_as_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def note(asked: Moderated) -> None:
        seen.append((asked.text, asked.is_last))

    site = site_with(monkeypatch, note)
    pieces = ["An umbel is a flower head.", " It", " is", " made", " of many flowers. ", "Yes", "."]
    deltas = [TextDelta(piece, (1,), None) for piece in pieces]
    deltas[-1] = TextDelta(".", (1,), "stop")
    shown: list[tuple[str, int]] = []
    for delta in site.moderator.checked(iter(deltas), "chat", "m"):
        assert seen  # nothing comes before it was looked at
        shown.append((delta.text, len(seen)))
    assert [text for text, _ in shown] == pieces
    assert [text for text, _ in seen] == ["".join(pieces[:2]), "".join(pieces[:5]), "".join(pieces)]
    assert [is_last for _, is_last in seen] == [False, False, True]


def test_what_a_cancel_leaves_unseen_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_with(monkeypatch, lambda _: "no")
    deltas = [TextDelta("some", (1,), None), TextDelta(" more", (), "cancelled")]
    (last,) = site.moderator.checked(iter(deltas), "chat", "m")
    assert (last.text, last.finish_reason) == ("", "cancelled")


@pytest.mark.parametrize(
    ("text", "num_checked", "expected"),
    [
        ("A sentence that is long enough. ", 0, True),
        ("A sentence that is long enough.", 0, False),  # 3.14 may follow
        ("No. Yes. ", 0, False),
        ("A sentence that is long enough. And then some", 32, False),
        ("これは十分に長い文章です。これはもっと長い文章です。", 0, True),
        ("x" * 100, 0, True),
        ("x" * 100, 1, False),
    ],
)
def test_answers_are_looked_at_by_sentences_or_letters(text: str, num_checked: int, expected: bool) -> None:
    assert next_step(text, num_checked, 100) is expected


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "module:function"),
        (":judge", "module:function"),
        ("no_such_module:judge", "cannot be imported"),
        ("tests.app.moderation_hooks:nothing", "no function nothing"),
        ("tests.app.moderation_hooks:not_a_function", "no function not_a_function"),
    ],
)
def test_a_hook_that_is_not_there_ends_the_start(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Site(SiteConfig(operation=OperationConfig(moderation=name)), ModelRegistry([]))
    assert load_hook("tests.app.moderation_hooks:judge")


def example(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "terms").write_text("bad word\n\nhorrid\n")
    monkeypatch.setenv("BLOCKED_TERMS_FILE", str(tmp_path / "terms"))
    site = site_with(monkeypatch, example(ROOT / "docs" / "operation" / "moderation.py").refuse_terms)
    site.moderator.check_prompt("a badword", "chat", "m")
    with pytest.raises(RefusedError, match="does not talk about that"):
        site.moderator.check_prompt("user: a Bad Word", "chat", "m")
