"""The swarm as the site sees it, for Prometheus: read from the last report whenever it is asked for."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import get_args

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.swarm_board import SwarmReport
from app.swarm_report import ModelReport, NodeStatus

Value = Callable[[ModelReport], float | None]

GAUGES: dict[str, tuple[str, Value]] = {
    "umbel_swarm_can_chat": ("Whether answers of the model come now.", lambda model: float(model.can_chat)),
    "umbel_swarm_blocks": ("Blocks of the model.", lambda model: model.num_blocks or None),
    "umbel_swarm_missing_blocks": (
        "Blocks that no node serves.",
        lambda model: sum(map(len, model.missing)) if model.replicas else None,
    ),
    "umbel_swarm_min_replicas": (
        "Nodes of the block that has the fewest.",
        lambda model: model.min_replicas if model.replicas else None,
    ),
    "umbel_swarm_tokens_per_second": ("Speed of an answer, measured or reckoned.", lambda model: model.tokens_per_s),
    "umbel_swarm_needed_bytes": (
        "Memory that would complete the model, with its share of KV cache.",
        lambda model: model.needed.plain_bytes if model.needed else 0 if model.replicas else None,
    ),
}
"""Names to help and value; None where there is nothing to tell."""


class SwarmCollector(Collector):
    """Registered once with a site's registry. `report` is `SwarmBoard.report`."""

    def __init__(self, report: Callable[[], SwarmReport]) -> None:
        self._report = report

    def describe(self) -> Iterable[Metric]:
        """Return nothing: asking for the metrics when they are registered would look at the swarm."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the gauges of all models."""
        report = self._report()
        for name, (text, value) in GAUGES.items():
            family = GaugeMetricFamily(name, text, labels=["model"])
            for model in report.models:
                found = value(model)
                if found is not None:
                    family.add_metric([model.name], found)
            yield family
        nodes = GaugeMetricFamily("umbel_swarm_nodes", "Nodes of the model.", labels=["model", "state"])
        uptime = GaugeMetricFamily(
            "umbel_swarm_uptime_ratio", "Share of the last day's test answers that came.", labels=["model"]
        )
        for model, history in zip(report.models, report.histories, strict=True):
            counts = Counter(node.state for node in model.nodes)
            for state in get_args(NodeStatus):
                nodes.add_metric([model.name, state], counts[state])
            if history is not None and history.day.uptime is not None:
                uptime.add_metric([model.name], history.day.uptime)
        yield nodes
        yield uptime
