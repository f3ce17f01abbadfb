"""The status page `/swarm`: drawn here as a whole, in the reader's language, so that it needs no script."""

from dataclasses import dataclass
from datetime import UTC, datetime
from math import ceil

from flask import Flask, Response, make_response, render_template, request

from app.pages import STATIC_FOLDER, build_hash
from app.site import Site
from app.swarm_board import SwarmReport
from app.swarm_history import HistoryReport, Incident
from app.swarm_replies import join_command
from app.swarm_report import ModelReport
from app.swarm_svg import Piece, coverage
from app.swarm_texts import Texts, choose_language, languages, own_name, texts_in

CAUSES = {
    "missing_blocks": "missing_blocks", "timeout": "timeout", "step_timeout": "timeout", "stream_lost": "unreachable",
    "peer_unreachable": "unreachable", "cache_full": "full", "limit_exceeded": "full",
}  # fmt: skip
"""Codes of failed test answers to the words for them; all others are `other`."""

SCRIPT_TEXTS = ("theme.to_dark", "theme.to_light", "theme.title", "status.copied", "status.copy_refused", "swarm.copy")


@dataclass(frozen=True, slots=True)
class Card:
    """One model as the template draws it."""

    model: ModelReport
    history: HistoryReport | None
    pieces: list[Piece]
    command: str


def register(app: Flask, site: Site) -> None:
    """Serve the page in `app`."""
    build = build_hash(STATIC_FOLDER)

    @app.get("/swarm")
    def swarm_page() -> Response:
        asked = request.args.get("lang")
        wanted = [asked] if asked else [tag for tag, _ in request.accept_languages]
        t = texts_in(choose_language(wanted, languages()))
        report = site.board.report()
        page = render_template(
            "swarm.html",
            build=build,
            t=t,
            asked=asked,
            languages=[(name, own_name(name)) for name in languages()],
            report=report,
            time=_time,
            overall=_overall(report, t),
            cards=_cards(report, site.config.initial_peers),
            canary_minutes=ceil(site.config.status.canary_s / 60),
            cause=lambda incident: t(f"incident.{CAUSES.get(incident.cause, 'other')}"),
            lasted=lambda incident: _lasted(incident, t),
            script_texts={key: t(key) for key in SCRIPT_TEXTS},
        )
        response = make_response(page)
        response.headers["Cache-Control"] = "no-cache"
        response.vary.add("Accept-Language")
        return response


def _cards(report: SwarmReport, initial_peers: tuple[str, ...]) -> list[Card]:
    return [
        Card(model, history, coverage(model.replicas, model.nodes), join_command(model.name, initial_peers))
        for model, history in zip(report.models, report.histories, strict=True)
    ]


def _overall(report: SwarmReport, t: Texts) -> tuple[str, str]:
    """Return the state of all models together, and the sentence for it."""
    count, total = sum(model.can_chat for model in report.models), len(report.models)
    if not count:
        return "down", t("overall.none")
    if count < total:
        return "degraded", t("overall.some", count=count, total=total)
    return "ready", t("overall.all")


def _lasted(incident: Incident, t: Texts) -> str:
    lasted = t.long_duration(incident.lasted_s)
    return t("incident.open", time=lasted) if incident.is_open else lasted


def _time(at: float) -> tuple[str, str]:
    """Return a moment as machines and as people everywhere read it."""
    moment = datetime.fromtimestamp(at, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ"), moment.strftime("%Y-%m-%d %H:%M UTC")
