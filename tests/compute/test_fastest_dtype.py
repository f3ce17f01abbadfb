"""A node whose owner names no dtype computes in the preferred one, or in one that is measured to be worth it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from server_node.compute import fastest_dtype as module
from server_node.compute.dtype_rule import BlockTimes, candidates, fastest
from server_node.compute.fastest_dtype import fastest_dtype, times_from
from server_node.compute.opened_model import open_model
from server_node.config import ModelChoice
from server_node.figure_store import FOLDER
from server_node.figures import MAX_AGE_S
from swarm_protocol.model.checkpoint import open_checkpoint
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("decode_s", "prompt_s", "chosen"),
    [
        (1.0, 1.0, "float32"),
        (0.9, 0.1, "float32"),  # not much faster
        (0.84, 1.0, "float32"),
        (0.83, 1.0, "bfloat16"),
        (0.5, 1.2, "bfloat16"),
        (0.5, 1.3, "float32"),  # prompts would suffer
    ],
)
def test_on_a_cpu_float32_stays_unless_bfloat16_is_a_fifth_faster(
    decode_s: float, prompt_s: float, chosen: str
) -> None:
    times = {"float32": BlockTimes(1.0, 1.0), "bfloat16": BlockTimes(decode_s, prompt_s)}
    assert fastest(times, candidates("cpu", "bfloat16")) == chosen


@pytest.mark.parametrize(
    ("stored", "preferred", "decode_s", "chosen"),
    [
        ("bfloat16", ("bfloat16", "float16"), (1.0, 0.9), "bfloat16"),
        ("bfloat16", ("bfloat16", "float16"), (1.0, 0.2), "float16"),  # a GPU that only emulates bfloat16
        ("float16", ("float16", "bfloat16"), (1.0, 1.0), "float16"),
        ("float32", ("float32", "bfloat16", "float16"), (1.0, 0.5, 0.49), "float16"),
        ("float32", ("float32", "bfloat16", "float16"), (1.0, 0.5, 0.5), "bfloat16"),
    ],
)
def test_elsewhere_the_checkpoints_own_is_preferred(
    stored: str, preferred: tuple[str, ...], decode_s: tuple[float, ...], chosen: str
) -> None:
    assert candidates("cuda", stored) == preferred
    times = {dtype: BlockTimes(seconds, 1.0) for dtype, seconds in zip(preferred, decode_s, strict=True)}
    assert fastest(times, preferred) == chosen


def test_only_figures_of_the_same_machine_that_are_not_old_are_used() -> None:
    key, times = {"device": "a CPU"}, {"float32": BlockTimes(1.0, 2.0), "bfloat16": BlockTimes(0.5, 1.0)}
    kept = {"key": key, "times": {name: asdict(some) for name, some in times.items()}, "measured_s": 100.0}
    text = json.dumps(kept)
    assert times_from(text, key, list(times), 100.0 + MAX_AGE_S) == times
    assert times_from(text, {"device": "b CPU"}, list(times), 100.0) is None
    assert times_from(text, key, ["float16"], 100.0) is None
    for now_s in (99.0, 101.0 + MAX_AGE_S):
        assert times_from(text, key, list(times), now_s) is None
    for wrong in (None, "", "[]", "{}", text.replace("0.5", "0"), text.replace("0.5", "NaN"), text.replace("_s", "")):
        assert times_from(wrong, key, list(times), 100.0) is None


@pytest.mark.parametrize("family", ["llama", "bloom", "mixtral", "gemma2"])
def test_blocks_of_any_family_are_measured_once(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(family, tmp_path / family)
    checkpoint = open_checkpoint(str(tmp_path / family))
    monkeypatch.setattr(module, "_MIN_WEIGHTS", 0)
    monkeypatch.setattr(module, "_NUM_ROUNDS", 1)
    chosen = fastest_dtype(checkpoint, 10_000, 10**9, CPU, tmp_path)
    assert chosen in (torch.float32, torch.bfloat16)
    (file,) = (tmp_path / FOLDER).iterdir()
    assert set(json.loads(file.read_text())["times"]) == {"float32", "bfloat16"}
    monkeypatch.setattr(module, "_measure", None)
    assert fastest_dtype(checkpoint, 10_000, 10**9, CPU, tmp_path) == chosen


def test_what_is_measured_decides_what_the_node_computes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model("llama", tmp_path / "llama")
    monkeypatch.setattr(module, "_MIN_WEIGHTS", 0)
    for decode_s, dtype in ((0.5, torch.bfloat16), (0.9, torch.float32)):
        times = {"float32": BlockTimes(1.0, 1.0), "bfloat16": BlockTimes(decode_s, 1.0)}
        monkeypatch.setattr(module, "_measure", lambda *_, found=times: found)
        choice = ModelChoice(str(tmp_path / "llama"), cache_dir=str(tmp_path / str(decode_s)))
        assert open_model(choice, "cpu", "auto", "none").dtype == dtype
        assert open_model(choice, "cpu", "float32", "none").dtype == torch.float32


@pytest.mark.parametrize(("weights", "free_bytes"), [(1000, 10**12), (10**9, 10**10)], ids=["small", "no room"])
def test_blocks_that_tell_nothing_or_do_not_fit_are_not_measured(
    weights: int, free_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model("llama", tmp_path / "llama")
    monkeypatch.setattr(module, "_measure", None)
    checkpoint = open_checkpoint(str(tmp_path / "llama"))
    assert fastest_dtype(checkpoint, weights, free_bytes, CPU, tmp_path) == torch.float32
