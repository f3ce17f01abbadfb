"""Settings from the environment and the command line."""

import sys
import types

import pytest

from app import cli
from app.config import SiteConfig, SocketLimits, config_from_env
from app.server import gunicorn_settings
from swarm_protocol.errors import ConfigError


def test_the_environment_fills_every_kind_of_field():
    config = config_from_env(
        {
            "PORT": "8080",
            "UMBEL_MODELS": "a/b, c/d",
            "UMBEL_INITIAL_PEERS": "/ip4/1 /ip4/2",
            "UMBEL_WS_MAX": "7",
            "UMBEL_IDLE_S": "1.5",
            "UMBEL_PUBLIC_API": "0",
            "UMBEL_TOP_P": "0.8",
        }
    )
    assert (config.port, config.models, config.initial_peers) == (8080, ("a/b", "c/d"), ("/ip4/1", "/ip4/2"))
    assert (config.sockets.ws_max, config.sockets.idle_s) == (7, 1.5)
    assert (config.security.public_api, config.generation.top_p) == (False, 0.8)


@pytest.mark.parametrize(
    "env",
    [
        {"PORT": "x"},
        {"PORT": "99999"},
        {"UMBEL_PUBLIC_API": "maybe"},
        {"UMBEL_WS_MAX": "0"},
        {"UMBEL_SPECULATION": "guess"},
        {"UMBEL_SPECULATION": "draft"},
        {"UMBEL_DRAFT_QUANTIZATION": "int2"},
        {"UMBEL_WIRE_DTYPE": "int3"},
    ],
)
def test_unusable_values_are_refused(env):
    with pytest.raises(ConfigError):
        config_from_env(env)


def test_the_command_line_beats_the_environment(monkeypatch):
    served = []
    monkeypatch.setenv("UMBEL_MODELS", "from/env")
    monkeypatch.setattr("app.server.serve", served.append)
    assert cli.main(["serve", "--model", "a", "--model", "b", "--initial-peers", "p", "q", "--port", "81"]) == 0
    assert served == [SiteConfig(models=("a", "b"), initial_peers=("p", "q"), port=81)]


def test_serve_without_a_model_says_what_to_do(monkeypatch, capsys):
    monkeypatch.delenv("UMBEL_MODELS", raising=False)
    assert cli.main(["serve"]) == 2
    assert "--model" in capsys.readouterr().err


def test_demo_gets_its_own_arguments(monkeypatch):
    seen = []
    demo = types.ModuleType("app.demo")
    demo.run_demo = seen.append
    monkeypatch.setitem(sys.modules, "app.demo", demo)
    assert cli.main(["demo", "--port", "7"]) == 0
    assert seen == [["--port", "7"]]


def test_gunicorn_gets_one_worker_and_threads_beyond_the_sockets(monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    settings = gunicorn_settings(SiteConfig(sockets=SocketLimits(ws_max=10), http_threads=6))
    assert (settings["workers"], settings["threads"], settings["worker_connections"]) == (1, 16, 32)
    assert settings["preload_app"] is False
