"""The swarm's state over HTTP: for people, for programs, for the predecessor's clients; never with an address."""

import json
import re
import threading
import time
from collections.abc import Callable

import pytest
from flask.testing import FlaskClient

from app.config import SiteConfig
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry, ModelSource
from app.site import Site
from app.swarm_replies import SwarmReply, join_command
from swarm_protocol.errors import StepTimeoutError
from tests.app.fake_swarm import FakeModel
from tests.app.site_process import SiteProcess, running_site
from tests.app.swarms import SWARMS

PEERS = ("/ip4/192.0.2.1/tcp/31330/p2p/12D3KooWmadeUpPeer0001Qxb",)
ADDRESS = re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}|/(?:ip4|ip6|dns|tcp|p2p)/|12D3Koo")
PATHS = ("/swarm", "/api/v2/swarm", "/api/v1/state", "/api/v2/swarm/badge.svg", "/api/v2/swarm/events")


def make(*models: FakeModel, config: SiteConfig | None = None, loaded: bool = True) -> tuple[FlaskClient, Site]:
    registry = ModelRegistry([ModelSource(model.name, lambda model=model: model) for model in models])
    app = create_app(config or SiteConfig(initial_peers=PEERS), registry)
    if loaded:
        site_of(app).models.load()
    return app.test_client(), site_of(app)


@pytest.mark.parametrize(
    ("name", "state", "message", "missing"),
    [
        ("complete", "ready", "You can chat now.", []),
        ("degraded", "degraded", "a single node each: blocks 34–39", []),
        ("incomplete", "incomplete", "nobody has blocks 20–27", ["20:28"]),
        ("down", "down", "nobody has any block", ["0:40"]),
    ],
)
def test_the_state_is_told_to_people_and_to_programs(name: str, state: str, message: str, missing: list[str]) -> None:
    client, _ = make(FakeModel(nodes=SWARMS[name]()))
    reply = SwarmReply.model_validate(client.get("/api/v2/swarm").json)
    (model,) = reply.models
    assert (reply.version, reply.can_chat, model.state, model.missing_blocks) == (2, not missing, state, missing)
    assert message in model.message
    page = client.get("/swarm").text
    assert message in page
    assert f'class="state" data-state="{state}"' in page
    assert ("would complete it" in page) == bool(missing)
    assert client.get("/api/v1/state").json["model_reports"][0]["state"] == ("broken" if missing else "healthy")


def test_what_would_complete_a_model_is_told_with_the_command() -> None:
    client, _ = make(FakeModel(nodes=SWARMS["incomplete"]()))
    model = client.get("/api/v2/swarm").json["models"][0]
    assert model["needed"] == {"blocks": 8, "dtype": "bfloat16", "bytes": 6_000_000_000, "nf4_bytes": 1_920_000_000}
    assert model["join_command"] == f"umbel-node run umbel/fake-1b --initial-peers {PEERS[0]}"
    page = client.get("/swarm").text
    assert "about 6 GB of free memory" in page
    assert model["join_command"] in page


@pytest.mark.parametrize("name", SWARMS)
@pytest.mark.parametrize("path", PATHS)
def test_no_address_of_a_volunteer_is_anywhere(name: str, path: str) -> None:
    client, _ = make(FakeModel(nodes=SWARMS[name]()))
    text = client.get(path).text
    assert "umbel/fake-1b" in text
    shown = text.replace(PEERS[0], "").replace("http://www.w3.org/2000/svg", "")
    assert not ADDRESS.search(shown), ADDRESS.search(shown)


def test_strangers_words_are_no_markup_and_no_links() -> None:
    client, _ = make(FakeModel(name="a/<b>&\"'", nodes=SWARMS["hostile"]()))
    page = client.get("/swarm").text
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "\u202e" not in page
    assert "javascript:" not in page
    links = re.findall(r'href="([^"]*)"', page)
    assert all(re.match(r"/static/|/swarm\?lang=[a-z]+$|/$|/api/v2/swarm$|#models$", link) for link in links), links
    badge = client.get("/api/v2/swarm/badge.svg").text
    assert "a/&lt;b&gt;&amp;&quot;&#x27;" in badge
    assert "<b>" not in badge


def test_the_state_need_not_be_sent_twice() -> None:
    client, _ = make(FakeModel())
    for path in ("/api/v2/swarm", "/api/v2/swarm/badge.svg"):
        response = client.get(path)
        assert response.headers["Cache-Control"] == "public, max-age=15"
        again = client.get(path, headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")


def test_badges_are_for_each_model() -> None:
    client, _ = make(FakeModel(name="a/one"), FakeModel(name="b/two", nodes=SWARMS["down"]()))
    assert "a/one: ready, 12.5 tokens/s" in client.get("/api/v2/swarm/badge.svg").text
    response = client.get("/api/v2/swarm/badge.svg?model=b/two")
    assert "b/two: down" in response.text
    assert response.mimetype == "image/svg+xml"
    missing = client.get("/api/v2/swarm/badge.svg?model=c")
    assert (missing.status_code, missing.json["error"]["code"]) == (404, "model_not_found")


def test_models_that_are_not_open_or_not_seen_are_told_too() -> None:
    client, _ = make(FakeModel(), loaded=False)
    assert client.get("/api/v2/swarm").json["models"][0]["state"] == "loading"
    assert "still opening" in client.get("/swarm").text
    client, _ = make(FakeModel(swarm_error=StepTimeoutError("the directory took too long")))
    assert client.get("/api/v2/swarm").json["models"][0]["state"] == "unknown"
    assert "cannot see the swarm" in client.get("/swarm").text
    client, _ = make()
    assert "offers no model" in client.get("/swarm").text


def test_the_page_speaks_the_readers_language() -> None:
    client, _ = make(FakeModel(nodes=SWARMS["incomplete"]()))
    french = client.get("/swarm", headers={"Accept-Language": "de, fr-CA;q=0.8"})
    assert '<html lang="fr" dir="ltr">' in french.text
    assert "il manque : blocs 20–27" in french.text
    assert "6 Go" in french.text
    assert french.headers["Vary"] == "Accept-Language"
    assert '<html lang="ar" dir="rtl">' in client.get("/swarm?lang=ar").text
    assert '<html lang="en" dir="ltr">' in client.get("/swarm?lang=%3Cscript%3E").text


def test_the_predecessors_clients_find_their_fields() -> None:
    client, _ = make(FakeModel(nodes=SWARMS["complete"]()))
    state = client.get("/api/v1/state").json
    assert set(state) == {
        "bootstrap_states", "top_contributors", "model_reports", "reachability_issues", "last_updated",
        "update_period", "update_duration",
    }  # fmt: skip
    assert state["bootstrap_states"] == ["online"]
    assert state["top_contributors"]["physics lab"] == 20
    (report,) = state["model_reports"]
    assert (report["name"], report["short_name"], report["num_blocks"]) == ("umbel/fake-1b", "fake-1b", 40)
    row = next(row for row in report["server_rows"] if row["span"]["server_info"]["public_name"] == "physics lab")
    assert (row["short_peer_id"], row["state"], row["show_public_name"]) == ("...001Qxb", "online", True)
    assert {key: row["span"][key] for key in ("start", "end", "length")} == {"start": 0, "end": 20, "length": 20}
    info = row["span"]["server_info"]
    assert (info["torch_dtype"], info["quant_type"], info["version"]) == ("bfloat16", "none", "0.1.0")
    issues = make(FakeModel(nodes=SWARMS["incomplete"]()))[0].get("/api/v1/state").json["reachability_issues"]
    assert issues == [{"peer_id": "...010Qxk", "err": "did not answer"}]


def test_many_readers_ask_the_swarm_once() -> None:
    calls = []
    model = FakeModel()
    swarm = model.swarm
    model.swarm = lambda: calls.append(1) or swarm()  # type: ignore[method-assign, func-returns-value]
    client, _ = make(model)
    for path in PATHS * 3:
        assert client.get(path).status_code == 200
    assert len(calls) == 1


def test_while_a_slow_look_goes_on_readers_get_the_last_state() -> None:
    model = FakeModel(nodes=SWARMS["complete"]())
    _, site = make(model)
    first = site.board.report()
    is_looking, may_end = threading.Event(), threading.Event()
    swarm = model.swarm

    def slow_swarm():
        is_looking.set()
        may_end.wait(20)
        return swarm()

    model.swarm = slow_swarm  # type: ignore[method-assign]
    site.board._clock = lambda: time.time() + 60
    reader = threading.Thread(target=site.board.report)
    reader.start()
    assert is_looking.wait(20)
    assert site.board.report() is first
    may_end.set()
    reader.join(20)
    assert site.board.report() is not first


@pytest.mark.parametrize(
    ("model", "peers", "command"),
    [
        ("org/name", (), "umbel-node run org/name"),
        ("a b; rm -rf", ("/ip4/1.2.3.4/tcp/1",), "umbel-node run 'a b; rm -rf' --initial-peers /ip4/1.2.3.4/tcp/1"),
    ],
)
def test_the_command_is_safe_to_paste(model: str, peers: tuple[str, ...], command: str) -> None:
    assert join_command(model, peers) == command


# --- events, on real sockets


@pytest.fixture(scope="module")
def live() -> SiteProcess:
    settings = {"status": {"events_max": 2, "events_s": 600.0}, "generation": {"sse_ping_interval_s": 1.0}}
    with running_site(settings=settings) as process:
        yield process


def wait_until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_listeners_hear_of_changes_have_few_places_and_free_them(live: SiteProcess) -> None:
    import httpx

    def change(name: str) -> None:
        httpx.post(f"{live.url}/test/swarm/{name}", headers={"Origin": live.url}, timeout=10).raise_for_status()

    url = f"{live.url}/api/v2/swarm/events"
    heard: list[str] = []
    with httpx.Client(timeout=30) as client, client.stream("GET", url) as first, client.stream("GET", url) as second:
        assert first.status_code == second.status_code == 200
        refused = httpx.get(url, timeout=10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
        assert httpx.get(f"{live.url}/healthz", timeout=10).status_code == 200
        change("incomplete")
        for line in first.iter_lines():
            if line.startswith("data: "):
                heard.append(json.loads(line.removeprefix("data: "))["models"][0]["state"])
            if len(heard) == 2:
                break
        assert heard == ["ready", "incomplete"]
        for line in second.iter_lines():
            if line == ": ping":
                break
    change("complete")

    def is_free() -> bool:
        with httpx.stream("GET", url, timeout=10) as response:
            return response.status_code == 200

    wait_until(is_free)
