"""Models open in the background, are found by name, and failures are told."""

import threading
from functools import partial

import pytest

from app.errors import ModelLoadingError, ModelNotFoundError
from app.model_registry import ModelRegistry, ModelSource
from swarm_protocol.errors import CheckpointError, PeerUnreachableError
from tests.app.fake_swarm import FakeModel


def registry_of(*models, name=None):
    return ModelRegistry([ModelSource(name or model.name, lambda model=model: model) for model in models])


def test_models_are_found_by_name_and_the_first_is_the_default():
    first, second = FakeModel(name="a/one"), FakeModel(name="b/two")
    registry = registry_of(first, second)
    registry.load()
    assert registry.is_ready
    assert registry.find(None) is first
    assert registry.find("") is first
    assert registry.find("b/two") is second
    with pytest.raises(ModelNotFoundError, match="a/one, b/two"):
        registry.find("c")


def test_a_model_is_found_by_its_source_as_well():
    registry = registry_of(FakeModel(name="real/name"), name="/models/file.gguf")
    assert [(entry.name, entry.status) for entry in registry.entries()] == [("file.gguf", "loading")]
    with pytest.raises(ModelLoadingError):
        registry.find(None)
    registry.load()
    assert registry.find("/models/file.gguf") is registry.find("real/name")


def test_loading_is_tried_again_when_that_may_help(monkeypatch):
    monkeypatch.setattr("app.model_registry.FIRST_WAIT_S", 0.0)
    outcomes = [PeerUnreachableError("nobody"), FakeModel()]

    def open_model():
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    registry = ModelRegistry([ModelSource("m", open_model)])
    registry.load()
    assert registry.is_ready


@pytest.mark.parametrize("error", [CheckpointError("no such model"), OSError("disk")])
def test_a_model_that_cannot_be_opened_is_told_and_leaves_the_others(error):
    def fail():
        raise error

    registry = ModelRegistry([ModelSource("bad", fail), ModelSource("good", FakeModel)])
    registry.load()
    assert not registry.is_ready
    assert [entry.status for entry in registry.entries()] == ["failed", "ready"]


def test_missing_blocks_are_told() -> None:
    registry = registry_of(FakeModel(missing=["blocks 3-5"]))
    registry.load()
    assert (registry.entries()[0].status, registry.entries()[0].missing) == ("incomplete", ("blocks 3-5",))


@pytest.mark.parametrize(
    ("works", "said"), [((True, True), ["ready"]), ((True, False), []), ((False, False), ["failed"])]
)
def test_the_site_is_told_when_all_models_are_open_or_none(works: tuple[bool, ...], said: list[str]) -> None:
    def opened(is_good: bool) -> FakeModel:
        if not is_good:
            raise CheckpointError("no such model")
        return FakeModel()

    told: list[str] = []
    closed = threading.Event()
    registry = ModelRegistry([ModelSource(str(i), partial(opened, w)) for i, w in enumerate(works)], closed.set)
    registry.start(lambda: told.append("ready"), lambda: told.append("failed"))
    for thread in threading.enumerate():
        if thread.name == "open-models":
            thread.join(10)
    assert told == said
    registry.close()
    assert closed.is_set()
