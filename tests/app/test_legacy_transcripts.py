"""What the predecessor's clients send and expect, replayed against the site under gunicorn."""

import asyncio
import json
import re
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect

from tests.app.fake_swarm import ANSWER
from tests.app.socket_client import Client

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
REQUEST_ID = re.compile(r'"request_id": "[0-9a-f]{16}"')


@pytest.fixture
def client(site):
    with Client(site, origin="https://somebody.example") as found:
        yield found


def test_readme_javascript_pipelines_open_and_generate(client):
    client.send(type="open_inference_session", max_length=30)
    client.send(type="generate", inputs='A cat in French is "', max_length=30, do_sample=1, temperature=0.6, top_p=0.9)
    opened, reply = client.receive(), client.receive()
    assert opened == {"ok": True}  # no `outputs`: that is how the sample tells the two apart
    assert set(reply) == {"ok", "outputs", "stop", "token_count"}
    assert (reply["ok"], reply["stop"], reply["token_count"]) == (True, True, 30 - 6)
    assert ANSWER.startswith(reply["outputs"])


def test_chat_js_streams_token_by_token_and_goes_on_in_the_session(client, site):
    assert client.open_legacy(model="umbel/fake-1b", max_length=512) == {"ok": True}
    turn = {
        "type": "generate", "max_new_tokens": 1, "do_sample": 1, "temperature": 0.6, "top_p": 0.9, "top_k": None,
        "repetition_penalty": None, "stop_sequence": "</s>", "extra_stop_sequences": ["\n\nHuman"],
    }  # fmt: skip
    before = site.counts()["appended_tokens"]
    client.send(**turn, inputs="echo Human: hi</s>")
    replies = client.legacy_replies()
    assert [reply["outputs"] for reply in replies] == [" answer", ".", "\n\n", "Human"]
    assert [reply["stop"] for reply in replies] == [False, False, False, True]
    assert all(reply["token_count"] == 1 for reply in replies)
    first = site.counts()["appended_tokens"] - before
    client.send(**turn, inputs="echo again")
    assert client.legacy_replies()[-1]["stop"] is True
    assert site.counts()["appended_tokens"] - before - first == 2  # the second turn sent only what was new


def test_chatgpt_web_holds_the_socket_and_continues_without_inputs(client):
    client.open_legacy(model="umbel/fake-1b", max_length=2048)
    step = {"type": "generate", "max_new_tokens": 1, "stop_sequence": "###", "max_length": None}
    client.send(**step, inputs="hi", extra_stop_sequences=["small"])
    known = "".join(reply["outputs"] for reply in client.legacy_replies())
    assert known == "An umbel is a flower head made of many small"
    client.send(**step, inputs=None, extra_stop_sequences=["stalk,"])
    known += "".join(reply["outputs"] for reply in client.legacy_replies())
    assert known == "An umbel is a flower head made of many small flowers, each on its own stalk,"


async def test_a_plain_python_client_without_origin(site):
    async with connect(site.socket_url) as ws:  # with the compression that the library offers by default
        await ws.send(json.dumps({"type": "open_inference_session", "model": "umbel/fake-1b", "max_length": 64}))
        assert json.loads(await asyncio.wait_for(ws.recv(), 5)) == {"ok": True}
        await ws.send(json.dumps({"type": "generate", "inputs": "hi", "max_new_tokens": 3}))
        reply = json.loads(await asyncio.wait_for(ws.recv(), 5))
        assert reply == {"ok": True, "outputs": "An umbel is", "stop": True, "token_count": 3}


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ('{"type": "hello"}', "invalid_request"),
        ('{"type": "generate", "inputs": "x", "max_new_tokens": 1}', "invalid_request"),
        ("hello", "malformed_frame"),
        (b"\x00\xff", "malformed_frame"),
        ('{"type": "open_inference_session", "model": "other/model", "max_length": 9}', "model_not_found"),
    ],
)
def test_bad_first_frames_get_one_line_and_a_close(client, frame, code):
    client.ws.send(frame)
    reply = client.receive()
    assert (reply["ok"], reply["error"]["code"]) == (False, code)
    assert "\n" not in reply["traceback"]
    assert client.close_code() == 1000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inputs": "hi", "max_new_tokens": 90}, "Maximum length exceeded"),
        ({"inputs": "full", "max_new_tokens": 1}, "attention cache is full"),
        ({"inputs": "bug", "max_new_tokens": 1}, "InternalError"),
        ({"inputs": "long", "max_new_tokens": 1, "stop_sequence": "never"}, "Maximum length exceeded"),
    ],
)
def test_errors_keep_the_wording_and_end_the_socket(client, site, fields, words):
    client.open_legacy(max_length=64)
    client.send(type="generate", **fields)
    while (reply := client.receive())["ok"]:
        pass
    assert words in reply["traceback"]
    assert "secret" not in reply["traceback"]
    assert client.close_code() == 1000
    site.wait_for(lambda counts: counts["open_sessions"] == 0)


def test_a_frame_of_a_megabyte_closes_with_1009(client):
    client.send(type="open_inference_session", max_length=9, padding="x" * 1_000_000)
    assert client.close_code() == 1009


def test_closing_the_socket_cancels(client, site):
    client.open_legacy(max_length=64)
    client.send(type="generate", inputs="stuck", max_new_tokens=1, stop_sequence="never")
    client.receive()
    client.close()
    counts = site.wait_for(lambda counts: counts["open_sessions"] == 0, timeout_s=1.0)
    assert counts["cancels"] >= 1


def frame_of(line: str) -> str | bytes:
    """Return what a `>` line of a transcript sends."""
    if line.startswith("hex:"):
        return bytes.fromhex(line.removeprefix("hex:"))
    return "x" * 1_048_576 if line == "megabyte" else line


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcripts_are_repeated_byte_for_byte(site, path):
    """Lines: `> frame` is sent, `< frame` must come, `closed CODE` must follow, `connect` begins a new socket."""
    with ExitStack() as sockets:
        client = sockets.enter_context(Client(site, own_page=False))
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "connect":
                client = sockets.enter_context(Client(site, own_page=False))
            elif kind == ">":
                client.ws.send(frame_of(rest))
            elif kind == "<":
                assert REQUEST_ID.sub('"request_id": "ID"', str(client.ws.recv(10))) == rest
            elif kind == "closed":
                assert client.close_code() == int(rest)
            else:
                assert kind == "#", line


BOUNDARY = "----JavaBoundary7MA4YWxkTrZu0gW"
PARTS = {"model": "umbel/fake-1b", "inputs": "brief Wörld", "max_new_tokens": "9", "do_sample": "true"}
PART = '--{}\r\nContent-Disposition: form-data; name="{}"\r\nContent-Type: text/plain; charset=UTF-8\r\n\r\n{}\r\n'
MULTIPART = "".join(PART.format(BOUNDARY, name, value) for name, value in PARTS.items())


@pytest.mark.parametrize(
    ("content_type", "body", "answer"),
    [
        pytest.param(
            "application/x-www-form-urlencoded",
            b"model=umbel%2Ffake-1b&inputs=brief+W%C3%B6rld&max_new_tokens=256&temperature=0.7&top_p=0.9&do_sample=True",
            b'{"ok":true,"outputs":" yes"}\n',
            id="litellm",
        ),
        pytest.param(
            f"multipart/form-data; boundary={BOUNDARY}",
            f"{MULTIPART}--{BOUNDARY}--\r\n".encode(),
            b'{"ok":true,"outputs":" yes"}\n',
            id="java",
        ),
        pytest.param(
            "application/x-www-form-urlencoded; charset=UTF-8",
            b"inputs=brief&max_length=64&do_sample=0&stop_sequence=yes",  # there are no stops in this API
            b'{"ok":true,"outputs":" yes"}\n',
            id="node",
        ),
    ],
)
def test_forms_of_http_clients_are_answered_byte_for_byte(site, content_type, body, answer):
    headers = {"Content-Type": content_type, "User-Agent": "some client"}
    response = httpx.post(f"{site.url}/api/v1/generate", content=body, headers=headers, timeout=10)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
    assert response.content == answer


def test_an_error_of_a_form_is_200_and_has_no_outputs(site):
    found = httpx.post(f"{site.url}/api/v1/generate", data={"inputs": "full", "max_new_tokens": "9"}, timeout=10)
    assert found.status_code == 200
    assert set(found.json()) == {"ok", "traceback", "error"}  # litellm looks for `outputs` alone
    assert "attention cache is full" in found.json()["traceback"]
