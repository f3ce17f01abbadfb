"""The files in docs/operation name what is there."""

import json
import re
from itertools import combinations
from typing import Any

import yaml

from app.config import GenerationLimits, SocketLimits
from app.factory import MAX_BODY_BYTES, site_of
from app.server import KEEPALIVE_S
from app.swarm_metrics import SwarmCollector
from tests.app.site_process import ROOT
from tests.app.test_every_route import make_app

FOLDER = ROOT / "docs" / "operation"
METRIC = re.compile(r"\b(?:umbel|process)_[a-z_]+\b")
OWN_LABELS = {"instance", "job", "le"}  # of Prometheus


def labels_of_metrics() -> dict[str, set[str]]:
    """Return the labels of all series that the site's two pages have, by name."""
    site = site_of(make_app())
    metrics = site.metrics
    metrics.request("GET", "/", 200, 1.0)
    metrics.answer("chat", "m", "stop", 1, 1)
    metrics.speed("m", 1.0, 1.0)
    metrics.rebuilt("m")
    metrics.guessed("m", 3, 2)
    families = [*metrics.registry.collect(), *SwarmCollector(site.board.report).collect()]
    found = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    return {"umbel_swarm_uptime_ratio": {"model"}, **found}  # which a site without test answers has not


def expressions() -> list[str]:
    rules = [rule for group in alerts() for rule in group["rules"]]
    targets = [target for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    return [each["expr"] for each in (*rules, *targets)]


def alerts() -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return groups


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    return found


def test_metrics_and_labels_that_are_named_exist() -> None:
    known = labels_of_metrics()
    assert len(expressions()) > 40
    for expression in expressions():
        names = METRIC.findall(expression)
        assert names or expression.startswith("up{"), expression
        for name in names:
            assert name in known, expression
        labels = {label for name in names for label in known[name]} | OWN_LABELS
        used = {name.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(",")}
        used |= set(re.findall(r"[{,]\s*([a-z_]+)\s*[!=]", expression))
        assert used <= labels, expression


def test_every_metric_of_the_site_is_on_the_dashboard() -> None:
    shown = {name for expression in expressions() for name in METRIC.findall(expression)}
    own = {name for name in labels_of_metrics() if name.startswith("umbel_")}
    without_panel = {"umbel_answers_running_max", "umbel_swarm_blocks", "umbel_swarm_needed_bytes"}
    parts = ("_created", "_count", "_sum")  # of counters and histograms
    assert {name for name in own - shown if not name.endswith(parts)} <= without_panel


def test_alerts_are_whole() -> None:
    rules = [rule for group in alerts() for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert f"has {len(rules)} rules" in (ROOT / "docs" / "running-a-site.md").read_text()
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "warn")
        assert rule["annotations"]["summary"]


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in dashboard()["panels"]]
    assert len({panel["id"] for panel in dashboard()["panels"]}) == len(places)
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(place["x"] + place["w"] <= 24 for place in places)


def seconds(name: str) -> float:
    """Return a time that nginx.conf gives."""
    found = re.search(rf"^\s*{name} (\d+)s;", (FOLDER / "nginx.conf").read_text(), re.MULTILINE)
    assert found, name
    return float(found[1])


def test_nginx_waits_longer_than_the_site_is_silent() -> None:
    assert seconds("proxy_read_timeout") > 2 * max(
        SocketLimits().ping_interval_s, GenerationLimits().sse_ping_interval_s
    )
    assert seconds("keepalive_timeout") < KEEPALIVE_S
    assert "client_max_body_size 1m;" in (FOLDER / "nginx.conf").read_text()
    assert MAX_BODY_BYTES == 1024**2
