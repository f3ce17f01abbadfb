"""litellm, by its OpenAI provider and by the one that it has for Petals' chat, against a site under gunicorn."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app.fake_swarm import ANSWER
from tests.app.site_process import SiteProcess

PYTHON = os.environ.get("LITELLM_PYTHON") or (sys.executable if importlib.util.find_spec("litellm") else "")
CLIENT = Path(__file__).with_name("litellm_client.py")
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}


@pytest.mark.skipif(
    not PYTHON,
    reason="litellm is NOT TESTED: it wants openai<3, so it needs an environment of its own. "
    "python -m venv X && X/bin/pip install litellm, then LITELLM_PYTHON=X/bin/python",
)
def test_litellm_reads_what_the_site_answers(site: SiteProcess) -> None:
    command = [PYTHON, str(CLIENT), site.url, "umbel/fake-1b"]
    done = subprocess.run(command, env={**os.environ, **OFFLINE}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["whole"] == found["streamed"] == ANSWER
    assert found["tokens"] > 5
    assert found["finish"] == ["stop"]
    assert found["vectors"] == 2
    assert found["n"] == "BadRequestError"
    assert found["full"] in ("ServiceUnavailableError", "InternalServerError")
    assert found["petals"] == "An umbel is"
