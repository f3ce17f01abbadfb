"""Protocol 3, limits and leaks, against the site under gunicorn."""

import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.app.fake_swarm import ANSWER
from tests.app.site_process import running_site
from tests.app.socket_client import Client


@pytest.fixture
def client(site):
    with Client(site) as found:
        yield found


def test_a_conversation_sends_only_what_is_new(client, site):
    opened = client.open(model="umbel/fake-1b", resume=False)
    assert opened["type"] == "opened"
    assert opened["limits"] == {
        "max_length": 2048, "max_new_tokens": 1024, "max_stops": 16, "max_frame_bytes": 262144,
    }  # fmt: skip
    assert opened["defaults"] == {
        "temperature": 0.6, "top_p": 0.9, "top_k": None, "min_p": None, "repetition_penalty": None,
        "max_new_tokens": 1024,
    }  # fmt: skip
    assert opened["served_by"] is None
    assert "resume_token" not in opened
    client.generate("hi")
    assert client.receive() == {"type": "started", "id": "a", "seq": 0, "queue_position": 0}
    assert client.receive() == {"type": "progress", "id": "a", "seq": 1, "prefill_done": 0, "prefill_total": 4}
    assert client.receive() == {"type": "progress", "id": "a", "seq": 2, "prefill_done": 4, "prefill_total": 4}
    first = client.receive()
    assert first == {"type": "delta", "id": "a", "seq": 3, "text": "An", "tokens": 1}
    text, done = client.receive_until("done")
    assert first["text"] + text == ANSWER
    assert done["finish_reason"] == "stop"
    assert done["usage"]["cached_tokens"] == 0
    assert done["timings"]["tokens_per_s"] > 0
    appended = site.counts()["appended_tokens"]
    client.generate("hi", ANSWER, "more", id="b")
    _, second = client.receive_until("done")
    assert second["id"] == "b"
    assert second["usage"]["cached_tokens"] == done["usage"]["prompt_tokens"] + done["usage"]["completion_tokens"]
    assert site.counts()["appended_tokens"] - appended == 4  # <user> more </s> <assistant>
    assert site.counts()["open_sessions"] == 1


def test_pipelined_open_and_generate(client):
    client.send(type="open", protocol=3)
    client.generate("hi", max_new_tokens=2)
    assert client.receive()["type"] == "opened"
    text, done = client.receive_until("done")
    assert (text, done["finish_reason"]) == ("An umbel", "length")


def test_cancel_keeps_the_session(client):
    client.open()
    client.generate("long")
    client.receive_until("delta")
    client.send(type="cancel", id="other")
    client.send(type="cancel", id="a")
    _, done = client.receive_until("done")
    assert done["finish_reason"] == "cancelled"
    assert 0 < done["usage"]["completion_tokens"] < 100
    client.send(type="cancel", id="a")  # too late, and harmless
    client.generate("long", "word0", "hi", id="b", max_new_tokens=1)
    _, second = client.receive_until("done")
    assert second["usage"]["cached_tokens"] >= done["usage"]["prompt_tokens"]


def test_cancel_reaches_a_step_that_hangs(client):
    client.open()
    client.generate("stuck")
    client.receive_until("delta")
    started_s = time.monotonic()
    client.send(type="cancel", id="a")
    _, done = client.receive_until("done")
    assert done["finish_reason"] == "cancelled"
    assert time.monotonic() - started_s < 1.0


def test_pings_and_busy_are_answered_while_generating(client):
    client.open()
    client.generate("long")
    client.send(type="ping")
    client.generate("hi", id="b")
    client.send(type="nonsense", id="c")
    events = []
    while len(events) < 3:
        event = client.receive()
        if event["type"] in ("pong", "error"):
            events.append((event["type"], event.get("id"), event.get("code")))
    assert events == [("pong", None, None), ("error", "b", "busy"), ("error", "c", "invalid_request")]
    client.send(type="cancel")
    assert client.receive_until("done")[1]["id"] == "a"
    client.send(type="ping", id="p")
    assert client.receive() == {"type": "pong", "id": "p"}


@pytest.mark.parametrize(
    ("question", "code", "retryable"),
    [("lost", "stream_lost", True), ("full", "cache_full", True), ("bug", "internal_error", True)],
)
def test_an_error_has_a_code_and_the_socket_goes_on(client, question, code, retryable):
    client.open()
    client.generate(question)
    _, error = client.receive_until("error")
    assert (error["id"], error["code"], error["retryable"]) == ("a", code, retryable)
    assert "secret" not in json.dumps(error)
    client.generate("hi", id="b", max_new_tokens=1)
    assert client.receive_until("done")[0] == "An"


def test_bad_requests_leave_the_session_as_it_was(client):
    client.open()
    client.generate("hi", max_new_tokens=1)
    client.receive_until("done")
    client.generate("hi", "An", id="b")  # the template wants a user's message at the end
    assert client.receive_until("error")[1]["code"] == "invalid_request"
    client.generate("x " * 3000, id="c")
    assert client.receive_until("error")[1]["code"] == "max_length_exceeded"
    client.generate("hi", id="d", max_new_tokens=1)
    assert client.receive_until("done")[1]["id"] == "d"


def test_an_open_of_an_unknown_model_may_be_tried_again(client):
    assert client.open(model="other")["code"] == "model_not_found"
    assert client.open()["type"] == "opened"


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_protocol_3_is_for_own_pages(site, origin):
    with Client(site, origin=origin) as client:
        assert client.open()["code"] == "origin_not_allowed"
        assert client.close_code() == 4403


def test_a_wrong_origin_is_refused_before_the_upgrade(private_site):
    for origin in ("https://evil.example", "null", None):
        with pytest.raises(InvalidStatus) as refused:
            Client(private_site, origin=origin, own_page=False)
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body)["error"]["code"] == "origin_not_allowed"
    with Client(private_site) as client:
        assert client.open()["type"] == "opened"


def test_sockets_beyond_the_cap_get_503_and_pages_are_still_served(private_site):
    clients = [Client(private_site) for _ in range(3)]
    with pytest.raises(InvalidStatus) as refused:
        Client(private_site)
    response = refused.value.response
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "30"
    assert json.loads(response.body)["error"]["code"] == "no_capacity"
    assert httpx.get(f"{private_site.url}/healthz", timeout=2).json()["websockets"] == 3
    assert "Umbel" in httpx.get(private_site.url, timeout=2).text
    for client in clients:
        client.close()


def test_idle_sockets_expire(private_site):
    with Client(private_site) as native, Client(private_site) as legacy:
        native.open()
        legacy.open_legacy(max_length=9)
        native.send(type="ping")  # a ping is no use of the session
        expired = legacy.receive()
        assert expired["ok"] is False
        assert " expired" in expired["traceback"]
        assert "Session " in expired["traceback"]
        assert legacy.close_code() == 4408
        assert native.receive_until("error")[1]["code"] == "session_expired"
        assert native.close_code() == 4408


def test_twenty_conversations_at_once(site):
    def talk(number):
        with Client(site) as client:
            client.open()
            client.generate(f"question {number}")
            return client.receive_until("done", timeout_s=20)[0]

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(talk, range(20))) == [ANSWER] * 20


def test_an_oversized_frame_closes_with_1009_and_cancels(client):
    client.open()
    client.generate("stuck")
    client.receive_until("delta")
    client.ws.send("x" * 1_000_000)
    assert client.close_code() == 1009


def test_a_flood_closes_with_1008_and_cancels(client):
    client.open()
    client.generate("stuck")
    client.receive_until("delta")
    with suppress(ConnectionClosed):
        for _ in range(200):
            client.send(type="ping")
    assert client.close_code() == 1008


def test_a_slow_reader_is_dropped(site):
    client = Client(site, max_queue=1)
    client.open()
    client.generate("wide")
    site.wait_for(lambda counts: counts["open_sessions"] == 1)
    site.wait_for(lambda counts: (counts["websockets"], counts["open_sessions"]) == (0, 0), timeout_s=6)
    client.ws.close_timeout = 0.1
    client.close()


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_peer_that_vanishes_is_noticed(site, is_reset):
    client = Client(site)
    client.open()
    client.generate("stuck")
    client.receive_until("delta")
    if is_reset:
        client.ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.ws.socket.close()
    else:
        client.ws.socket.shutdown(socket.SHUT_RDWR)
    site.wait_for(lambda counts: counts["open_sessions"] == 0, timeout_s=1.5)
    client.close()


def test_handshakes_that_are_none_get_an_answer(site):
    headers = {"Connection": "Upgrade", "Upgrade": "websocket"}
    response = httpx.get(f"{site.url}/api/v2/generate", headers=headers, timeout=5)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")
    assert httpx.get(f"{site.url}/api/v2/generate", timeout=5).status_code == 400
    assert httpx.get(site.url, headers=headers, timeout=5).status_code in (200, 400)


def test_an_http_client_that_leaves_frees_its_session(site):
    def ask():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{site.url}/api/v1/generate", data={"inputs": "long", "max_new_tokens": 400}, timeout=0.3)

    asking = threading.Thread(target=ask)
    asking.start()
    site.wait_for(lambda counts: counts["open_sessions"] == 1)
    asking.join()
    site.wait_for(lambda counts: counts["open_sessions"] == 0, timeout_s=1.0)


def test_sigterm_lets_answers_end_and_closes_with_1012():
    with running_site("--delay", "0.005") as site, Client(site) as idle, Client(site) as legacy, Client(site) as short:
        with Client(site) as stuck:
            idle.open()
            legacy.open_legacy(max_length=9)
            short.open()
            stuck.open()
            short.generate("hi")
            stuck.generate("stuck")
            stuck.receive_until("delta")
            started_s = time.monotonic()
            site.process.terminate()
            assert idle.receive() == {"type": "bye", "reason": "draining"}
            assert idle.close_code() == legacy.close_code() == 1012
            text, done = short.receive_until("done")
            assert (ANSWER.endswith(text), done["finish_reason"]) == (True, "stop")
            assert short.close_code() == 1012
            error = stuck.receive_until("error")[1]
            assert (error["id"], error["code"], error["retryable"]) == ("a", "draining", True)
            assert stuck.receive()["type"] == "bye"
            assert stuck.close_code() == 1012
        assert site.process.wait(10) == 0
        assert time.monotonic() - started_s < 20.0  # not the minutes that gunicorn would leave a socket
    assert not any("Traceback" in line or "ERROR" in line for line in site.log), "".join(site.log)


def told(client, until="done"):
    """Return the events up to one of a kind, deltas put together and without pongs."""
    events = []
    while not events or events[-1][0] != until:
        if (event := client.receive())["type"] in ("pong", "progress"):
            continue
        if event["type"] == "delta" and events and events[-1][0] == "delta":
            events[-1] = ("delta", events[-1][1] + event["text"])
        else:
            events.append((event["type"], event.get("cause", event.get("text", event.get("reason")))))
    return events


def test_what_happens_to_the_route_is_told_in_between_the_deltas(client):
    client.open()
    client.generate("replaced", max_new_tokens=4)
    assert told(client) == [
        ("started", None), ("route_changed", "opened"), ("delta", "one two"),
        ("waiting", "looking"), ("waiting", "missing_blocks"), ("waiting", "missing_blocks"),
        ("route_changed", "node_lost"), ("recovered", None), ("delta", " more more"), ("done", None),
    ]  # fmt: skip


def test_a_ping_is_answered_while_blocks_are_waited_for(client):
    client.open()
    client.send(type="generate", id="a", messages=[{"role": "user", "content": "vanish"}])
    while client.receive().get("cause") != "looking":
        pass
    client.send(type="ping", id="p")
    kinds = []
    while "error" not in kinds:
        kinds.append(client.receive()["type"])
    assert kinds.count("pong") == 1
    assert kinds.index("pong") < kinds.index("error")


def test_events_carry_what_programs_and_people_need(client):
    client.open()
    client.generate("vanish")
    while (event := client.receive())["type"] != "waiting" or event["cause"] == "looking":
        pass
    assert event == {
        "type": "waiting", "id": "a", "seq": event["seq"], "blocks": ["12:16"],
        "cause": "missing_blocks", "waited_s": 0.4, "left_s": 29.6,
        "message": "blocks 12–15 have no node; waiting 30 s more",
    }  # fmt: skip
    _, error = client.receive_until("error", skip=("waiting",))
    assert error["code"] == "missing_blocks"
    assert "blocks 12–15" in error["message"]


def test_a_cancel_ends_a_wait(client):
    client.open()
    client.generate("vanish")
    while client.receive()["type"] != "waiting":
        pass
    client.send(type="cancel", id="a")
    assert client.receive_until("done", skip=("waiting",))[1]["finish_reason"] == "cancelled"


def test_times_come_where_they_are_asked_for(client):
    client.open()
    client.generate("hi", max_new_tokens=3)
    assert "times" not in client.receive_until("done")[1]
    client.generate("hi", id="b", fields={"times": True}, max_new_tokens=3)
    times = client.receive_until("done")[1]["times"]
    assert (times["tokens"], times["recoveries"]) == (3, 1)
    assert times["hops"][0]["blocks"] == "0:12"
    assert times["per_token"]["total_s"] == 0.01


def test_the_older_protocol_hears_of_no_events(site):
    with Client(site) as client:
        client.open_legacy(max_length=512)
        client.send(type="generate", inputs="replaced", max_new_tokens=1, stop_sequence="no such text", times=True)
        replies = [client.receive() for _ in range(6)]
        assert {tuple(reply) for reply in replies} == {("ok", "outputs", "stop", "token_count")}
        assert "".join(reply["outputs"] for reply in replies) == "one two more more more more"
