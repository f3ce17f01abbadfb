"""Protocol 3 over sockets that break: answers that go on, the queue, heartbeats, and nothing that leaks."""

import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.app.fake_swarm import ANSWER, EOS, PIECES
from tests.app.site_process import SiteProcess, running_site
from tests.app.socket_client import Client

SETTINGS = {
    "sockets": {
        "ws_max": 60, "heartbeat_s": 0.2, "resume_grace_s": 4.0, "resume_per_address": 3, "send_timeout_s": 1.0,
        "drain_s": 1.0,
    },
    "generation": {"running_max": 2},
}  # fmt: skip
LONG_S = 30.0


@pytest.fixture(scope="module")
def site() -> Iterator[SiteProcess]:
    """Overrides the common one: two generations at a time, and many heartbeats."""
    with running_site("--delay", "0.01", settings=SETTINGS) as process:
        yield process


def drop(client: Client) -> None:
    """Break the connection as a network does: without a close frame."""
    client.ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.ws.socket.shutdown(socket.SHUT_RDWR)
    client.close()


def frames_until(client: Client, kinds: tuple[str, ...], num: int | None = None) -> list[dict[str, Any]]:
    """Return the numbered frames up to one of these kinds, or the first `num`."""
    found: list[dict[str, Any]] = []
    while num is None or len(found) < num:
        frame = client.receive(LONG_S)
        if frame["type"] == "heartbeat":
            assert frame == {"type": "heartbeat", "id": frame["id"]}
            continue
        found.append(frame)
        if frame["type"] in kinds:
            break
    return found


def text_of(frames: list[dict[str, Any]]) -> str:
    return "".join(frame.get("text", "") for frame in frames)


def resume(site: SiteProcess, token: str, from_seq: int, id: str = "a") -> tuple[Client, dict[str, Any]]:  # noqa: A002
    client = Client(site)
    client.send(type="resume", token=token, id=id, from_seq=from_seq)
    return client, client.receive(LONG_S)


@pytest.mark.parametrize("cut", [1, 3, 4, 20, 60])
def test_an_answer_that_was_cut_off_goes_on_without_a_lost_or_doubled_frame(site, cut):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    assert len(token) == 32
    client.generate("hi")
    before = frames_until(client, ("done",), num=cut)
    drop(client)
    client, resumed = resume(site, token, cut)
    with client:
        assert (resumed["type"], resumed["resumed"], resumed["from_seq"]) == ("resumed", True, cut)
        assert resumed["limits"]["max_length"] == 2048
        frames = before + frames_until(client, ("done",))
        assert [frame["seq"] for frame in frames] == list(range(len(frames)))
        assert text_of(frames) == ANSWER
        client.generate("hi", ANSWER, "more", id="b")
        assert text_of(frames_until(client, ("done",))) == ANSWER
        client.send(type="bye")
        assert client.close_code() == 1000


def test_a_break_after_a_break_and_frames_asked_for_twice(site):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    client.generate("hi")
    frames: list[dict[str, Any]] = []
    for _ in range(4):
        frames = frames[: max(0, len(frames) - 2)]
        frames += frames_until(client, ("done",), num=5)
        drop(client)
        client, resumed = resume(site, token, len(frames) - 2)
        assert resumed["resumed"]
    frames = frames[:-2] + frames_until(client, ("done",))
    client.close()
    assert [frame["seq"] for frame in frames] == list(range(len(frames)))
    assert text_of(frames) == ANSWER


def test_a_second_tab_takes_the_answer_over(site):
    with Client(site) as first:
        token = first.open(resume=True)["resume_token"]
        first.generate("hi")
        frames_until(first, ("delta",))
        second, resumed = resume(site, token, 0)
        with second:
            assert resumed["resumed"]
            assert first.close_code(LONG_S) == 4409
            assert text_of(frames_until(second, ("done",))) == ANSWER


def test_what_cannot_be_resumed_says_why_and_the_socket_may_open(site):
    with Client(site) as client:
        for token in ("0" * 32, ""):
            client.send(type="resume", token=token, id="a", from_seq=0)
            assert client.receive() == {"type": "resumed", "resumed": False, "reason": "unknown"}
        token = client.open(resume=True)["resume_token"]
        client.generate("hi", max_new_tokens=2)
        frames_until(client, ("done",))
        for id_, seq in (("a", 999), ("other", 0)):
            other, resumed = resume(site, token, seq, id_)
            with other:
                assert resumed == {"type": "resumed", "resumed": False, "reason": "lost"}
                assert other.open()["type"] == "opened"
        client.send(type="bye")
        assert client.close_code() == 1000
    other, resumed = resume(site, token, 0)
    with other:
        assert resumed == {"type": "resumed", "resumed": False, "reason": "unknown"}


def test_the_text_of_an_answer_that_ended_alone_is_still_there(site):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    client.generate("hi")
    frames_until(client, ("delta",))
    drop(client)
    site.wait_for(lambda counts: counts["open_sessions"] == 0 and counts["websockets"] == 0, timeout_s=LONG_S)
    client, resumed = resume(site, token, 0)
    with client:
        assert resumed["resumed"]
        assert text_of(frames_until(client, ("done",))) == ANSWER


def test_an_answer_read_through_a_socket_for_each_frame_is_whole(site):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    client.generate("hi")
    frames: list[dict[str, Any]] = []
    while not frames or frames[-1]["type"] != "done":
        frames += frames_until(client, ("done",), num=1)
        drop(client)
        client, resumed = resume(site, token, len(frames))
        assert resumed["resumed"], resumed
    client.send(type="bye")
    assert client.close_code() == 1000
    assert [frame["seq"] for frame in frames] == list(range(len(frames)))
    assert text_of(frames) == ANSWER


def test_a_client_that_resumes_and_is_gone_again_leaves_the_answer_to_the_next_one_or_to_nobody(site):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    client.generate("stuck")
    frames_until(client, ("delta",))
    drop(client)
    for _ in range(30):
        client = Client(site)
        client.send(type="resume", token=token, id="a", from_seq=0)
        drop(client)
    client, resumed = resume(site, token, 0)
    assert resumed["resumed"]
    drop(client)
    site.wait_for(lambda counts: (counts["open_sessions"], counts["websockets"]) == (0, 0), timeout_s=LONG_S)


def test_nobody_who_comes_ends_the_answer_after_the_grace(site):
    client = Client(site)
    token = client.open(resume=True)["resume_token"]
    client.generate("stuck")
    frames_until(client, ("delta",))
    drop(client)
    site.wait_for(lambda counts: counts["open_sessions"] == 0, timeout_s=LONG_S)
    client, resumed = resume(site, token, 0)
    with client:
        assert resumed["resumed"]
        assert frames_until(client, ("done",))[-1]["finish_reason"] == "cancelled"


def test_heartbeats_come_while_a_step_hangs_and_in_the_queue(site):
    clients = [Client(site) for _ in range(5)]
    for client in clients[:2]:
        client.open()
        client.generate("stuck")
        frames_until(client, ("delta",))
    for client in clients[2:]:
        client.open()
        client.generate("hi", max_new_tokens=1)
        started = client.receive()
        assert (started["type"], started["queue_position"]) == ("started", clients.index(client) - 1)
    for client in clients:
        while client.receive(LONG_S)["type"] != "heartbeat":
            pass
    clients[3].send(type="cancel", id="a")
    cancelled = frames_until(clients[3], ("done",))
    assert (cancelled[-1]["finish_reason"], cancelled[-1]["usage"]["prompt_tokens"]) == ("cancelled", 0)
    while (moved := clients[4].receive(LONG_S))["type"] != "queued":
        pass
    assert (moved["position"], moved["seq"]) == (2, 1)
    clients[0].send(type="cancel")
    for client in clients[2::2]:
        frames = frames_until(client, ("done",))
        assert [frame["position"] for frame in frames if frame["type"] == "queued"][-1] == 0
        assert text_of(frames) == "An"
    for client in clients:
        client.close()


def test_all_apis_stand_in_one_line_and_those_who_leave_it_are_not_waited_for(site):
    stuck = [Client(site) for _ in range(2)]
    for client in stuck:
        client.open()
        client.generate("stuck")
        frames_until(client, ("delta",))
    legacy = Client(site)
    legacy.open_legacy(max_length=100)
    legacy.send(type="generate", inputs="hi", max_new_tokens=2)
    site.wait_for(lambda counts: counts["waiting"] == 1)
    bodies = {
        "/api/v1/generate": {"inputs": "hi", "max_new_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    }
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(httpx.post, site.url + path, json=body, timeout=LONG_S) for path, body in bodies.items()]
        site.wait_for(lambda counts: counts["waiting"] == 3, timeout_s=LONG_S)
        gone = Client(site)
        gone.open_legacy(max_length=100)
        gone.send(type="generate", inputs="hi", max_new_tokens=2)
        site.wait_for(lambda counts: counts["waiting"] == 4, timeout_s=LONG_S)
        drop(gone)
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{site.url}/api/v1/generate", json=bodies["/api/v1/generate"], timeout=0.3)
        site.wait_for(lambda counts: counts["waiting"] == 3, timeout_s=LONG_S)
        stuck[0].send(type="cancel")
        assert "".join(reply["outputs"] for reply in legacy.legacy_replies()) == "An umbel"
        answers = [answer.result(LONG_S).json() for answer in asked]
    assert answers[0]["outputs"] == answers[1]["choices"][0]["message"]["content"] == "An umbel"
    for client in (*stuck, legacy):
        client.close()


def test_an_answer_is_continued_where_it_was_cut(site):
    with Client(site) as client:
        client.open()
        client.generate("hi", max_new_tokens=5)
        frames = frames_until(client, ("done",))
        first, usage = text_of(frames), frames[-1]["usage"]
        client.generate("hi", first, id="b", fields={"continue": True})
        frames = frames_until(client, ("done",))
        assert first + text_of(frames) == ANSWER
        assert frames[-1]["usage"]["cached_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_rewind_says_what_it_keeps(site):
    with Client(site) as client:
        client.open()
        client.send(type="rewind", messages=1)
        assert client.receive() == {"type": "rewound", "position": 0}
        client.generate("hi", "hello", "more", max_new_tokens=1)
        frames_until(client, ("done",))
        client.send(type="rewind", messages=1)
        assert client.receive() == {"type": "rewound", "position": len(PIECES.findall(f"<user>hi{EOS}"))}
        client.generate("stuck", id="b")
        client.send(type="rewind", messages=0)
        assert frames_until(client, ("error",))[-1]["code"] == "busy"


def test_errors_say_when_to_try_again_and_answers_who_served_them(site):
    with Client(site) as client:
        client.open()
        client.generate("full")
        assert frames_until(client, ("error",))[-1]["retry_after"] == 15
        client.generate("replaced", id="b", max_new_tokens=3)
        served = frames_until(client, ("done",))[-1]["served_by"]
        assert served["num_nodes"] == len(served["route"]) == 2
        assert set(served["route"][0]) == {"peer", "blocks"}


def test_fifty_broken_sockets_leave_nothing(site):
    def held() -> dict[str, Any]:
        counts = site.counts()
        return {
            name: counts[name] for name in ("websockets", "open_sessions", "reading_threads", "answers", "descriptors")
        }

    before = held()
    for number in range(50):
        client = Client(site)
        client.open(resume=bool(number % 2))
        client.generate("hi")
        frames_until(client, ("delta", "started") if number % 3 else ("started",))
        drop(client)
    site.wait_for(lambda counts: all(counts[name] <= before[name] for name in before), timeout_s=LONG_S)


def test_a_site_that_ends_keeps_no_answer_without_a_socket():
    with running_site("--delay", "0.01", settings=SETTINGS) as site:
        client = Client(site)
        token = client.open(resume=True)["resume_token"]
        client.generate("stuck")
        frames_until(client, ("delta",))
        drop(client)
        site.process.terminate()
        assert site.process.wait(LONG_S) == 0
    with running_site("--delay", "0.01", settings=SETTINGS) as site:
        client, resumed = resume(site, token, 0)
        with client:
            assert resumed == {"type": "resumed", "resumed": False, "reason": "unknown"}


def test_last_words_before_a_close_are_heard():
    patient = {**SETTINGS, "sockets": {**SETTINGS["sockets"], "resume_grace_s": 600.0}}
    with running_site("--delay", "0.01", settings=patient) as site:
        for number in range(10):  # the close may be read together with the word, or behind it
            client = Client(site)
            client.open(resume=True)
            client.generate("stuck")
            frames_until(client, ("delta",))
            client.send(type=("bye", "cancel")[number % 2])
            client.ws.close(1000)
            counts = site.wait_for(lambda counts: counts["open_sessions"] == 0, timeout_s=LONG_S)
            assert counts["cancels"] == number + 1
