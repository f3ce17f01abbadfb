"""Pure: what `/api/v2/swarm` and its events say, and `/api/v1/state` as health.petals.dev had it.

Times are seconds since the epoch, ranges of blocks half-open as `12:20`. No reply holds an address.
"""

import shlex
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from app.swarm_board import SwarmReport
from app.swarm_history import HistoryReport, PeriodReport
from app.swarm_report import ModelReport, Needed, NodeReport, NodeStatus, SwarmStatus
from app.swarm_texts import Texts
from swarm_protocol.spans import Span

VERSION = 2
UPDATE_PERIOD_S = 5
LIMITED_NAME_BLOCKS = 10
"""Nodes with fewer blocks were listed without their name by health.petals.dev."""


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SwarmNode(_Shape):
    """One node. `id` is the end of its peer id; `cache_free` a share from 0 to 1."""

    id: str
    name: str
    blocks: str
    state: NodeStatus
    dtype: str
    quantization: str | None
    tokens_per_s: float | None
    cache_free: float | None
    round_trip_s: float | None
    version: str
    outdated: bool


class SwarmNeeds(_Shape):
    """Memory that would complete the model, and how to join."""

    blocks: int
    dtype: str
    bytes: int
    nf4_bytes: int


class SwarmPeriod(_Shape):
    """What test answers of a period said; all None where there were none."""

    runs: int
    uptime: float | None
    first_token_s: float | None
    tokens_per_s_min: float | None
    tokens_per_s_max: float | None
    min_replicas: int | None


class SwarmIncident(_Shape):
    """Test answers failed from `began_at` on; `code` is the first one's error."""

    began_at: float
    lasted_s: float
    code: str
    open: bool


class SwarmHistory(_Shape):
    """The site's own test answers."""

    day: SwarmPeriod
    month: SwarmPeriod
    incidents: list[SwarmIncident]


class SwarmModel(_Shape):
    """One model; `message` says its state in English."""

    id: str
    state: SwarmStatus
    can_chat: bool
    message: str
    context_length: int | None
    num_blocks: int
    replicas: list[int]
    min_replicas: int
    missing_blocks: list[str]
    single_blocks: list[str]
    weakest_blocks: list[str]
    tokens_per_s: float | None
    tokens_per_s_measured: bool
    queue: int
    needed: SwarmNeeds | None
    join_command: str
    num_nodes: int
    nodes: list[SwarmNode]
    history: SwarmHistory | None


class SwarmReply(_Shape):
    """The swarm as the site sees it. Fields may be added to `version` 2, none is taken away."""

    version: int = VERSION
    can_chat: bool
    models: list[SwarmModel]


class SwarmEventModel(_Shape):
    """One model in an event."""

    id: str
    state: SwarmStatus
    can_chat: bool
    message: str
    tokens_per_s: float | None


class SwarmEvent(_Shape):
    """The data of an event `swarm`."""

    models: list[SwarmEventModel]


class ReachReply(_Shape):
    """Whether the site got through to a peer, under both names that the predecessor had. `your_ip` is the caller's."""

    success: bool
    ok: bool
    message: str
    your_ip: str


class PetalsState(BaseModel):
    """What health.petals.dev's `/api/v1/state` said, as far as an Umbel swarm has it."""

    model_config = ConfigDict(extra="allow")

    bootstrap_states: list[str] = Field(description="of each first peer: `online` if it is a node that is")
    top_contributors: dict[str, int]
    model_reports: list[dict[str, Any]]
    reachability_issues: list[dict[str, str]]
    last_updated: float
    update_period: int
    update_duration: float


def join_command(model: str, initial_peers: Sequence[str]) -> str:
    """Return the command with which a machine joins the swarm of a model."""
    return shlex.join(["umbel-node", "run", model, *(["--initial-peers", *initial_peers] if initial_peers else [])])


def swarm_reply(report: SwarmReport, texts: Texts, initial_peers: Sequence[str]) -> SwarmReply:
    """Return the reply; `texts` are English."""
    models = [
        _model(model, history, texts, join_command(model.name, initial_peers))
        for model, history in zip(report.models, report.histories, strict=True)
    ]
    return SwarmReply(can_chat=any(model.can_chat for model in report.models), models=models)


def swarm_event(report: SwarmReport, texts: Texts) -> SwarmEvent:
    """Return what is told when something changed: little, since all listeners get it."""
    return SwarmEvent(
        models=[
            SwarmEventModel(
                id=model.name,
                state=model.state,
                can_chat=model.can_chat,
                message=texts.says(model),
                tokens_per_s=_rounded(model.tokens_per_s),
            )
            for model in report.models
        ]
    )


def _model(model: ModelReport, history: HistoryReport | None, texts: Texts, command: str) -> SwarmModel:
    return SwarmModel(
        id=model.name,
        state=model.state,
        can_chat=model.can_chat,
        message=texts.says(model),
        context_length=model.context_length,
        num_blocks=model.num_blocks,
        replicas=list(model.replicas),
        min_replicas=model.min_replicas,
        missing_blocks=_ranges(model.missing),
        single_blocks=_ranges(model.single),
        weakest_blocks=_ranges(model.weakest),
        tokens_per_s=_rounded(model.tokens_per_s),
        tokens_per_s_measured=model.is_measured,
        queue=model.queue,
        needed=None if model.needed is None else _needs(model.needed),
        join_command=command,
        num_nodes=model.num_nodes,
        nodes=[_node(node) for node in model.nodes],
        history=None if history is None else _history(history),
    )


def _needs(needed: Needed) -> SwarmNeeds:
    return SwarmNeeds(
        blocks=needed.num_blocks, dtype=needed.dtype, bytes=needed.plain_bytes, nf4_bytes=needed.nf4_bytes
    )


def _node(node: NodeReport) -> SwarmNode:
    return SwarmNode(
        id=node.short_id,
        name=node.name,
        blocks=str(node.blocks),
        state=node.state,
        dtype=node.dtype,
        quantization=node.quantization,
        tokens_per_s=_rounded(node.tokens_per_s),
        cache_free=_rounded(node.cache_free, 2),
        round_trip_s=_rounded(node.ping_s, 3),
        version=node.version,
        outdated=node.is_outdated,
    )


def _history(history: HistoryReport) -> SwarmHistory:
    return SwarmHistory(
        day=_period(history.day),
        month=_period(history.month),
        incidents=[
            SwarmIncident(
                began_at=round(each.began_at), lasted_s=round(each.lasted_s, -1), code=each.cause, open=each.is_open
            )
            for each in history.incidents
        ],
    )


def _period(period: PeriodReport) -> SwarmPeriod:
    return SwarmPeriod(
        runs=period.num_runs,
        uptime=_rounded(period.uptime, 4),
        first_token_s=_rounded(period.first_token_s, 2),
        tokens_per_s_min=_rounded(period.lowest),
        tokens_per_s_max=_rounded(period.highest),
        min_replicas=period.min_replicas,
    )


def _rounded(value: float | None, digits: int = 1) -> float | None:
    """Return a figure without the noise that would make every reply another one."""
    return None if value is None else round(value, digits)


def _ranges(spans: Sequence[Span]) -> list[str]:
    return [str(span) for span in spans]


def petals_state(report: SwarmReport, initial_ids: Sequence[str]) -> PetalsState:
    """Return the state as clients of health.petals.dev read it. `initial_ids` are the ends of the first peers' ids.

    Peers are named by the ends of their ids, here and there; addresses and places, which were in `peer_ip_info`, are
    told of nobody.
    """
    online = {node.short_id for model in report.models for node in model.nodes if node.state == "online"}
    contributors: dict[str, int] = {}
    for model in report.models:
        for node in model.nodes:
            if node.name and _shows_name(node):
                contributors[node.name] = contributors.get(node.name, 0) + len(node.blocks)
    return PetalsState(
        bootstrap_states=["online" if each in online else "unknown" for each in initial_ids],
        top_contributors=contributors,
        model_reports=[_petals_model(model) for model in report.models],
        reachability_issues=[
            {"peer_id": f"...{node.short_id}", "err": "did not answer"}
            for model in report.models
            for node in model.nodes
            if node.state == "unreachable"
        ],
        last_updated=report.at,
        update_period=UPDATE_PERIOD_S,
        update_duration=report.took_s,
    )


def _shows_name(node: NodeReport) -> bool:
    return node.state == "online" and len(node.blocks) >= LIMITED_NAME_BLOCKS


def _petals_model(model: ModelReport) -> dict[str, Any]:
    return {
        "name": model.name,
        "short_name": model.name.rsplit("/", 1)[-1],
        "state": "healthy" if model.can_chat else "broken",
        "server_rows": [_petals_row(node) for node in model.nodes],
        "num_blocks": model.num_blocks,
        "repository": None,
        "dht_prefix": model.name,
        "official": True,
        "limited": False,
    }


def _petals_row(node: NodeReport) -> dict[str, Any]:
    state = "offline" if node.state == "other_weights" else "online" if node.state == "draining" else node.state
    return {
        "short_peer_id": f"...{node.short_id}",
        "peer_id": f"...{node.short_id}",
        "peer_ip_info": "unknown",
        "show_public_name": _shows_name(node),
        "state": state,
        "span": {
            "peer_id": f"...{node.short_id}",
            "start": node.blocks.start,
            "end": node.blocks.end,
            "length": len(node.blocks),
            "server_info": {
                "state": state,
                "throughput": node.tokens_per_s,
                "start_block": node.blocks.start,
                "end_block": node.blocks.end,
                "public_name": node.name or None,
                "version": node.version or None,
                "inference_rps": node.tokens_per_s,
                "adapters": [],
                "torch_dtype": node.dtype or None,
                "quant_type": node.quantization or "none",
                "using_relay": None,
                "cache_tokens_left": node.free_tokens,
                "next_pings": None,
            },
        },
        "adapters": [],
        "pings_to_me": {},
        "cache_tokens_left_per_block": node.free_tokens,
    }
