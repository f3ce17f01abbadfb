"""Whether peers are reached is told without addresses, remembered, and not to be misused."""

import threading

import pytest

from app.config import SiteConfig
from app.errors import NoCapacityError
from app.factory import create_app, site_of
from app.model_registry import ModelRegistry
from app.reach import A_MINUTE, AT_A_TIME, KEPT_S, MAX_KEPT, Reachability
from swarm_protocol.errors import PeerUnreachableError
from swarm_protocol.ids import PeerId

GOOD, BAD = "12D3KooWgood", "12D3KooWbad"


def name(beginning: str, number: int) -> str:
    """Return a peer id: base58 has no 0."""
    return beginning + str(number).replace("0", "z")


class Net:
    """Peers, of which one answers; counts calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now_s = 0.0

    def reach(self, peer_id: PeerId) -> float:
        self.calls.append(peer_id)
        if peer_id == BAD:
            raise PeerUnreachableError("dial /ip4/203.0.113.9/tcp/31330 failed")
        return 0.01

    def reachability(self) -> Reachability:
        return Reachability(self.reach, lambda: self.now_s)


def test_answers_are_remembered_for_a_while() -> None:
    net = Net()
    checks = net.reachability()
    assert [checks.check(peer).is_ok for peer in (GOOD, BAD, GOOD, BAD)] == [True, False, True, False]
    assert net.calls == [GOOD, BAD]
    net.now_s = KEPT_S
    assert checks.check(GOOD).is_ok
    assert net.calls == [GOOD, BAD, GOOD]


def test_few_peers_are_dialled_a_minute_and_few_remembered() -> None:
    net = Net()
    checks = net.reachability()
    for number in range(A_MINUTE):
        checks.check(name("peer", number))
    with pytest.raises(NoCapacityError):
        checks.check("a")
    assert checks.check(name("peer", 1)).is_ok  # is known
    net.now_s += 60
    for number in range(MAX_KEPT + 10):
        net.now_s += 3
        checks.check(name("more", number))
    assert len(checks._known) == MAX_KEPT


def test_only_some_wait_at_the_same_time() -> None:
    inside, may_end = threading.Semaphore(0), threading.Event()

    def slow(_: PeerId) -> float:
        inside.release()
        may_end.wait(30)
        return 0.1

    checks = Reachability(slow)
    threads = [threading.Thread(target=checks.check, args=(name("ways", number),)) for number in range(AT_A_TIME)]
    for thread in threads:
        thread.start()
        assert inside.acquire(timeout=30)
    with pytest.raises(NoCapacityError):
        checks.check("a")
    may_end.set()
    for thread in threads:
        thread.join(30)
    assert checks.check("a").is_ok


def test_it_is_served_in_the_form_of_the_predecessor() -> None:
    net = Net()
    app = create_app(SiteConfig(), ModelRegistry([], ping=net.reach))
    client = app.test_client()
    assert client.get(f"/api/v1/is_reachable/{GOOD}").json == {
        "success": True, "ok": True, "message": "the peer answered", "your_ip": "127.0.0.1"
    }  # fmt: skip
    answer = client.get(f"/api/v1/is_reachable/{BAD}")
    assert (answer.status_code, answer.json["success"]) == (200, False)
    assert "203.0.113" not in answer.text
    for wrong in ("127.0.0.1:80", "a" * 200, "..", "0OIl"):
        assert client.get(f"/api/v1/is_reachable/{wrong}").status_code in (400, 404)
    assert net.calls == [GOOD, BAD]


def test_without_a_swarm_nobody_is_reached() -> None:
    app = create_app(SiteConfig(), ModelRegistry([]))
    assert not site_of(app).reachability.check(GOOD).is_ok
