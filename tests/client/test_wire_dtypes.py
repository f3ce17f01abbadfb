"""Sessions whose hidden states travel in fewer bytes: near the same numbers, also when a node dies and others begin."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swarm_client import AutoDistributedModelForCausalLM, DistributedCausalLM
from swarm_protocol.spans import Span
from swarm_protocol.wire_tensor import INT8_ROWS
from tests.local_swarm import CLIENT_CONFIG, LocalSwarm
from tests.tiny_models import save_tiny_model

HIDDEN = 32
LOSS = {"bfloat16": 0.02, INT8_ROWS: 0.05}
"""Of an output's norm; the tiny model has rows that are too short for outliers."""


@pytest.fixture(scope="module", params=sorted(LOSS))
def wire_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def served(wire_dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSwarm]:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("llama", folder)
    spans = [Span(0, 2), Span(2, 5), Span(2, 5), Span(2, 5)]
    with LocalSwarm(folder, spans, config=replace(CLIENT_CONFIG, wire_dtype=wire_dtype)) as swarm:
        swarm.folder = folder  # type: ignore[attr-defined]
        yield swarm


@pytest.fixture(scope="module")
def model(served: LocalSwarm) -> DistributedCausalLM:
    folder: Path = served.folder  # type: ignore[attr-defined]
    return AutoDistributedModelForCausalLM.from_pretrained(str(folder), swarm=served.swarm)


@pytest.fixture(scope="module")
def exact(model: DistributedCausalLM) -> torch.Tensor:
    """The outputs for `states()` when they travel in float32."""
    swarm = model.remote_blocks.swarm
    chosen, swarm.config = swarm.config, replace(swarm.config, wire_dtype="float32")
    try:
        with model.inference_session(max_length=200) as session:
            return session.step(states())
    finally:
        swarm.config = chosen


def states() -> torch.Tensor:
    return torch.randn(1, 150, HIDDEN, generator=torch.Generator().manual_seed(3))


def assert_near(found: torch.Tensor, wanted: torch.Tensor, wire_dtype: str) -> None:
    assert found.dtype == wanted.dtype
    loss = float((found - wanted).norm() / wanted.norm())
    assert 0 < loss < LOSS[wire_dtype]


def test_prompts_and_steps_lose_little(model: DistributedCausalLM, exact: torch.Tensor, wire_dtype: str) -> None:
    with model.inference_session(max_length=200) as session:
        found = [session.step(states()[:, :140]), *(session.step(states()[:, n : n + 1]) for n in range(140, 150))]
    assert_near(torch.cat(found, dim=1), exact, wire_dtype)


def test_a_rollback_computes_the_same_again(model: DistributedCausalLM) -> None:
    rows = torch.cat([states()[:, :8], states()[:, 8:16]])
    with model.inference_session(max_length=40) as session:
        first = session.step(rows)
        session.position = 3
        torch.testing.assert_close(session.step(rows[:, 3:]), first[:, 3:], rtol=0.02, atol=0.02)


def test_a_killed_nodes_blocks_are_computed_again_from_what_travelled(
    served: LocalSwarm, model: DistributedCausalLM, exact: torch.Tensor, wire_dtype: str
) -> None:
    with model.inference_session(max_length=200) as session:
        found = [session.step(states()[:, :140])]
        used = session.route[1].split()[-1]
        served.kill(next(peer for peer in served.nodes if peer == used))
        found += [session.step(states()[:, n : n + 1]) for n in range(140, 150)]
        assert session.route[1].split()[-1] != used
    assert_near(torch.cat(found, dim=1), exact, wire_dtype)


def test_known_beginnings_are_not_computed_again(model: DistributedCausalLM, wire_dtype: str) -> None:
    ids = torch.arange(1, 151)[None] % 90
    found = []
    for _ in range(2):
        with model.inference_session(max_length=200) as session, torch.inference_mode():
            session.start_with(ids[0].tolist(), torch.float32)
            known = session.position
            output = session.step(model.ends.embed(ids[:, known:], known))
            found.append((known, output[:, -1]))
    assert [known for known, _ in found] == [0, 128]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0.05, atol=0.05)
