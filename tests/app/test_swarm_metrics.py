"""The swarm's gauges for Prometheus."""

import re
import time
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from app.canary import runs_of
from app.canary_history import CanaryHistory, CanaryRun
from app.config import SiteConfig
from app.database import IN_MEMORY, Database
from app.factory import create_app, site_of
from app.generation_queue import GenerationQueue
from app.model_registry import ModelRegistry, ModelSource
from app.swarm_board import SwarmBoard
from app.swarm_metrics import SwarmCollector
from tests.app.fake_swarm import FakeModel
from tests.app.swarms import SWARMS

NOW = 1e9


def values(*models: FakeModel, loaded: bool = True) -> dict[tuple[str, ...], float]:
    registry = ModelRegistry([ModelSource(model.name, lambda model=model: model) for model in models])
    if loaded:
        registry.load()
    history = CanaryHistory(Database(IN_MEMORY))
    history.add(CanaryRun("umbel/fake-1b", NOW - 10, "ok", 0.5, 5.0, 1))
    history.add(CanaryRun("umbel/fake-1b", NOW - 5, "timeout", None, None, 1))
    board = SwarmBoard(registry, GenerationQueue(1, 1), "0.1.0", runs_of(history, lambda: NOW), lambda: NOW)
    site = CollectorRegistry()
    site.register(SwarmCollector(board.report))
    text = generate_latest(site).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_incomplete_swarm_is_counted() -> None:
    found = values(FakeModel(nodes=SWARMS["incomplete"]()))
    name = "umbel/fake-1b"
    assert found["umbel_swarm_can_chat", name] == 0
    assert (found["umbel_swarm_blocks", name], found["umbel_swarm_missing_blocks", name]) == (40, 8)
    assert found["umbel_swarm_min_replicas", name] == 0
    assert found["umbel_swarm_needed_bytes", name] == 6e9
    assert found["umbel_swarm_nodes", name, "online"] == 2
    assert found["umbel_swarm_nodes", name, "unreachable"] == 1
    assert found["umbel_swarm_nodes", name, "offline"] == 0
    assert found["umbel_swarm_uptime_ratio", name] == 0.5
    assert ("umbel_swarm_tokens_per_second", name) not in found


def test_a_complete_one_has_a_speed_and_needs_nothing() -> None:
    found = values(FakeModel(nodes=SWARMS["complete"]()))
    assert found["umbel_swarm_can_chat", "umbel/fake-1b"] == 1
    assert found["umbel_swarm_needed_bytes", "umbel/fake-1b"] == 0
    assert found["umbel_swarm_tokens_per_second", "umbel/fake-1b"] == 12.5


def test_of_models_that_are_not_open_only_that_is_told() -> None:
    found = values(FakeModel(), loaded=False)
    assert found["umbel_swarm_can_chat", "umbel/fake-1b"] == 0
    assert ("umbel_swarm_blocks", "umbel/fake-1b") not in found


def test_the_site_serves_them_and_the_page_of_the_docs_names_them_all() -> None:
    registry = ModelRegistry([ModelSource("umbel/fake-1b", FakeModel)])
    app = create_app(SiteConfig(), registry)
    registry.load()
    site_of(app).history.add(CanaryRun("umbel/fake-1b", time.time() - 5, "ok", 0.5, 5.0, 1))
    response = app.test_client().get("/metrics")
    assert response.content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert all(family.documentation and family.samples for family in families.values())
    page = (Path(__file__).resolve().parents[2] / "docs" / "status-page.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(umbel_\w+)`", page, re.MULTILINE)) == set(families)
