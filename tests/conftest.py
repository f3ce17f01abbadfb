"""For all tests: nothing is kept in the folders of whoever runs them, nor by the processes that they start."""

import logging
import os
import shutil
import tempfile

import pytest

_FOLDER = tempfile.mkdtemp(prefix="umbel-tests-hub-")
# Before anything imports the hub's library, which reads it then.
os.environ["HF_HUB_CACHE"] = _FOLDER
# Below it a site has its database, unless it is told another place.
os.environ["XDG_DATA_HOME"] = f"{_FOLDER}/data"


def pytest_runtest_setup() -> None:
    """Undo what a command did to the log: pytest keeps each line, which the tests of memory would see."""
    logging.getLogger().setLevel(logging.WARNING)


def pytest_sessionfinish(session: pytest.Session) -> None:
    shutil.rmtree(_FOLDER, ignore_errors=True)
