"""For all tests: nothing is kept in the cache folder of whoever runs them, nor by the processes that they start."""

import os
import shutil
import tempfile

import pytest

_FOLDER = tempfile.mkdtemp(prefix="umbel-tests-hub-")
# Before anything imports the hub's library, which reads it then.
os.environ["HF_HUB_CACHE"] = _FOLDER


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)
