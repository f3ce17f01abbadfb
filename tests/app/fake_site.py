"""A site with a fake model under real gunicorn, as a program: `python -m tests.app.fake_site --port 5001`.

Adds `/test/counts` to the site, which tells what the fake and gunicorn counted.
"""

import argparse
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flask import Flask, Response, jsonify

from app.config import (
    AddressLimits,
    GenerationLimits,
    OperationConfig,
    SecurityConfig,
    SiteConfig,
    SocketLimits,
    StatusConfig,
)
from app.factory import create_app, site_of
from app.logs import configure_logs
from app.model_registry import ModelRegistry, ModelSource
from app.server import serve
from tests.app.fake_swarm import FakeModel, TalkingModel, scripted_reply
from tests.app.swarms import SWARMS, made_up_runs


def make_app(config: SiteConfig, models: Sequence[FakeModel], keys: Sequence[dict[str, Any]] = ()) -> Flask:
    sources = [ModelSource(model.name, partial(_itself, model)) for model in models]
    app = create_app(config, ModelRegistry(sources))
    site = site_of(app)
    widget_keys = {
        values["name"]: site.widget_keys.create(**{**values, "origins": tuple(values["origins"])}).key
        for values in keys
    }

    @app.get("/test/widget-keys")
    def made_keys() -> Response:
        return jsonify(widget_keys)

    @app.post("/test/revoke/<key>")
    def revoke(key: str) -> Response:
        site.widget_keys.revoke(key)
        return jsonify(ok=True)

    @app.get("/test/counts")
    def counts() -> Response:
        return jsonify(
            open_sessions=sum(model.counts.open_sessions for model in models),
            appended_tokens=sum(model.counts.appended_tokens for model in models),
            generated_tokens=sum(model.counts.generated_tokens for model in models),
            cancels=sum(model.counts.cancels for model in models),
            websockets=site.sockets.taken,
            http_generations=site.http_generations.taken,
            generating_threads=sum(thread.name == "umbel-http-generation" for thread in threading.enumerate()),
            nr_conns=_worker_connections(),
            pid=os.getpid(),
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=sum("ThreadPoolExecutor" not in thread.name for thread in threading.enumerate()),
            waiting=site.queue.num_waiting,
            answers=sum(thread.name.startswith("answer-") for thread in threading.enumerate()),
            reading_threads=sum("simple_websocket" in thread.name for thread in threading.enumerate()),
        )

    @app.post("/test/swarm/<name>")
    def change_swarm(name: str) -> Response:
        for model in models:
            model.nodes = SWARMS[name]()
            site.history.forget(model.name)
            for run in made_up_runs(model.name, time.time(), is_well=name in ("complete", "degraded")):
                site.history.add(run)
        site.board.forget()
        return jsonify(ok=True)

    return app


def _itself(model: FakeModel) -> FakeModel:
    return model


def _worker_connections() -> int:
    import gc

    from gunicorn.workers.gthread import ThreadWorker

    return next(found.nr_conns for found in gc.get_objects() if isinstance(found, ThreadWorker))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds a token")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--models", default="umbel/fake-1b", help="their names")
    parser.add_argument("--settings", default="{}", help="JSON with fields of the configuration's parts")
    parser.add_argument("--swarm", default="complete", choices=SWARMS, help="who has the models' blocks")
    options = parser.parse_args()
    settings = json.loads(options.settings)
    config = SiteConfig(
        port=options.port,
        http_threads=16,
        sockets=replace(SocketLimits(ws_max=32, drain_s=2.0), **settings.get("sockets", {})),
        generation=replace(GenerationLimits(), **settings.get("generation", {})),
        security=replace(SecurityConfig(), **settings.get("security", {})),
        status=replace(StatusConfig(canary_s=0.0), **settings.get("status", {})),
        operation=replace(OperationConfig(), **settings.get("operation", {})),
        limits=replace(AddressLimits(), **settings.get("limits", {})),
        initial_peers=tuple(settings.get("initial_peers", ())),
        database_url=settings.get("database_url", "sqlite://"),
    )
    configure_logs(config.operation)
    models = [
        TalkingModel(
            name=name,
            delay_s=options.delay,
            max_length=options.max_length,
            reply=scripted_reply,
            nodes=SWARMS[options.swarm](),
        )
        for name in options.models.split(",")
    ]
    serve(config, lambda site_config: make_app(site_config, models, settings.get("widget_keys", ())))


if __name__ == "__main__":
    main()
