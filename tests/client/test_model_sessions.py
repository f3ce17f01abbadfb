"""What a session holds after each way that `generate` may end, and what its arguments do in one."""

import asyncio
import contextlib
import copy
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

from swarm_client import InferenceSession
from swarm_client.loop_thread import LoopThread
from swarm_protocol.errors import (
    CacheFullError,
    CancelledStepError,
    InvalidRequestError,
    MaxLengthError,
    ProtocolError,
    SessionClosedError,
    SwarmError,
)
from swarm_protocol.tensors import check_wire_finite, to_wire
from tests.client.test_model import Pair, close, ids, padded
from tests.local_swarm import CLIENT_CONFIG
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("llama", tmp_path_factory.mktemp("llama"))
    with pair.served:
        yield pair


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair("opt", tmp_path_factory.mktemp("opt"))
    with pair.served:
        yield pair


OPTIONS: list[dict[str, Any]] = [
    {"num_return_sequences": 3, "do_sample": True},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"cache_implementation": "static"},
    {"eos_token_id": 5, "pad_token_id": 5},
    {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True},
    {"generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_of_generate_give_what_the_whole_model_gives(llama: Pair, options: dict[str, Any]) -> None:
    limit = {} if "generation_config" in options else {"max_new_tokens": 6}
    found, wanted = llama.generated(ids(), **limit, **options)
    if options.get("return_dict_in_generate"):
        found, wanted = found.sequences, wanted.sequences  # type: ignore[attr-defined]
    assert torch.equal(found, wanted)


def test_max_length_and_keywords_count_as_in_the_whole_model(llama: Pair) -> None:
    wanted = llama.local.generate(ids(), max_length=12, do_sample=False)
    assert torch.equal(llama.remote.generate(input_ids=ids(), max_length=12, do_sample=False), wanted)


def test_a_draft_model_that_guesses_wrong_changes_nothing(llama: Pair) -> None:
    found = llama.remote.generate(ids(), assistant_model=tiny_model("llama", seed=3), max_new_tokens=8, do_sample=False)
    assert torch.equal(found, llama.local.generate(ids(), max_new_tokens=8, do_sample=False))


def test_a_streamer_gets_every_token(llama: Pair) -> None:
    class Numbers:
        def decode(self, token_ids: Any, **_: object) -> str:
            return "".join(f"{int(token)} " for token in token_ids)

    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)  # type: ignore[arg-type]
    found = llama.remote.generate(ids(), max_new_tokens=4, do_sample=False, streamer=streamer)
    assert "".join(streamer).split() == [str(int(token)) for token in found[0, 7:]]


def test_inputs_embeds_are_served_without_a_session_and_refused_in_one(llama: Pair) -> None:
    embeds = llama.local.get_input_embeddings()(ids())
    found, wanted = (m.generate(inputs_embeds=embeds, max_new_tokens=4) for m in (llama.remote, llama.local))
    assert torch.equal(found, wanted)
    with llama.remote.inference_session(max_length=20), pytest.raises(InvalidRequestError, match="inputs_embeds"):
        llama.remote.generate(inputs_embeds=embeds, max_new_tokens=4)


def test_a_copy_of_a_model_generates_over_the_same_connection(llama: Pair) -> None:
    model = copy.deepcopy(llama.remote)
    assert torch.equal(
        model.generate(ids(), max_new_tokens=3, do_sample=False), llama.generated(ids(), max_new_tokens=3)[1]
    )


def test_sessions_are_nested(llama: Pair) -> None:
    with llama.remote.inference_session(max_length=30) as outer:
        a = llama.remote.generate(ids(), max_new_tokens=2, do_sample=False)
        with llama.remote.inference_session(max_length=30) as inner:
            llama.remote.generate(ids(seed=4), max_new_tokens=2, do_sample=False)
            with outer:
                b = llama.remote.generate(max_new_tokens=2, do_sample=False)
            assert inner.position == 8
        c = llama.remote.generate(max_new_tokens=1, do_sample=False)
    wanted = llama.local.generate(ids(), max_new_tokens=5, do_sample=False)
    assert torch.equal(torch.cat([a, b, c], 1), wanted)


@torch.no_grad()
def test_hidden_states_come_in_tuples_too(llama: Pair) -> None:
    found = llama.remote(ids(), return_dict=False, output_hidden_states=True)
    assert close(found[0], llama.local(ids()).logits)
    assert len(found[-1]) == 3


# What a session holds afterwards.


@pytest.mark.parametrize("num_returned", [1, 3])
@pytest.mark.parametrize("next_beams", [1, 3])
def test_a_session_goes_on_behind_a_beam_search(llama: Pair, num_returned: int, next_beams: int) -> None:
    for seed in range(3):
        with llama.remote.inference_session(max_length=60):
            a = llama.remote.generate(
                ids(seed=seed), max_new_tokens=5, num_beams=3, num_return_sequences=num_returned, do_sample=False
            )
            b = llama.remote.generate(max_new_tokens=5, num_beams=next_beams, do_sample=False)
        wanted = llama.local.generate(a, max_new_tokens=5, num_beams=next_beams, do_sample=False)
        assert torch.equal(torch.cat([a, b], 1), wanted)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_generate_that_failed_leaves_what_was_there(llama: Pair, num_beams: int) -> None:
    other = ids(columns=6, seed=9)
    with llama.remote.inference_session(max_length=20) as session:
        for prompt in (ids(), other):  # the first call of the session may fail too
            with pytest.raises(MaxLengthError):
                llama.remote.generate(prompt, max_new_tokens=30, num_beams=num_beams, do_sample=False)
            assert (session.position, session.token_ids) == (0, None)
        a = llama.remote.generate(ids(), max_new_tokens=2, do_sample=False)
        with pytest.raises(MaxLengthError):
            llama.remote.generate(ids(columns=3, seed=3), max_new_tokens=30, num_beams=num_beams, do_sample=False)
        assert session.token_ids is not None
        assert torch.equal(session.token_ids, a)
        found = llama.remote.generate(
            other, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    wanted = llama.local.generate(
        torch.cat([a, other], 1), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert all(close(x, y) for x, y in zip(found.scores, wanted.scores, strict=True))


def test_padding_that_generate_found_itself_is_kept(opt: Pair) -> None:
    tokens, _ = padded()
    wanted = opt.local.generate(tokens, max_new_tokens=8, do_sample=False)
    with opt.remote.inference_session(max_length=40):
        a = opt.remote.generate(tokens, max_new_tokens=4, do_sample=False)
        b = opt.remote.generate(max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.cat([a, b], 1), wanted)


def test_a_session_rolled_back_to_its_beginning_takes_other_rows(llama: Pair) -> None:
    tokens, mask = padded()
    with llama.remote.inference_session(max_length=40) as session:
        llama.remote.generate(ids(), max_new_tokens=4, do_sample=False)
        session.position = 0
        with pytest.raises(InvalidRequestError, match="nothing to go on from"):
            llama.remote.generate(max_new_tokens=2)
        found = llama.remote.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    wanted = llama.local.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, wanted)


def test_states_between_tokens_are_refused_by_generate(llama: Pair) -> None:
    with llama.remote.inference_session(max_length=40) as session:
        llama.remote(ids())
        session.step(torch.zeros(1, 3, 32))
        llama.remote(ids(columns=2))
        with pytest.raises(InvalidRequestError, match="hidden states"):
            llama.remote.generate(ids(columns=9), max_new_tokens=2)


def test_padding_in_the_middle_of_a_session_is_refused(llama: Pair) -> None:
    tokens, mask = padded()
    with llama.remote.inference_session(max_length=40):
        llama.remote(ids(3))
        with pytest.raises(InvalidRequestError, match="very beginning"):
            llama.remote(tokens, attention_mask=mask)


@pytest.mark.parametrize("shape", [(3, 32), (0, 3, 32), (257, 1, 32)])
def test_shapes_that_are_no_hidden_states_are_refused(llama: Pair, shape: tuple[int, ...]) -> None:
    with llama.remote.inference_session(max_length=40) as session, pytest.raises(InvalidRequestError, match="shape"):
        session.step(torch.zeros(shape))


@torch.no_grad()
def test_states_after_every_span_come_for_rows_that_begin_with_nothing_but_padding(llama: Pair) -> None:
    tokens, mask = ids(2, 600), torch.ones(2, 600, dtype=torch.long)
    mask[:, :300] = 0  # more than the columns of one step
    with llama.remote.inference_session(max_length=700):
        found = llama.remote(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [states.shape for states in found] == [(2, 600, 32)] * 3


# Errors and cancels in the middle of a step.


def test_an_input_in_pieces_that_failed_leaves_the_position(llama: Pair) -> None:
    states = llama.remote.ends.embed(ids(columns=1200))
    states[:, 700] = torch.nan  # refused by the first node, in the second of three pieces
    with llama.remote.inference_session(max_length=1300) as session:
        session.step(states[:, :10])
        with pytest.raises(SwarmError, match="finite"):
            session.step(states[:, 10:])
        assert session.position == 10
        assert session.step(states[:, 10:20]).shape == (1, 10, 32)


def test_values_that_are_not_finite_are_not_taken_for_an_output(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with llama.remote.inference_session(max_length=20) as session:
        with monkeypatch.context() as patch:
            # The bits of an infinite number, whatever came.
            patch.setattr(
                "swarm_client.swarm_session.check_wire_finite",
                lambda output: check_wire_finite(to_wire(torch.full(output.shape, torch.inf))),
            )
            with pytest.raises(ProtocolError, match="finite"):
                llama.remote.generate(ids(), max_new_tokens=2)
        assert session.position == 0
    with llama.remote.inference_session(max_length=20):
        found = llama.remote.generate(ids(), max_new_tokens=2, do_sample=False)
    assert torch.equal(found, llama.local.generate(ids(), max_new_tokens=2, do_sample=False))


def test_a_cancel_between_two_pieces_is_not_lost(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with llama.remote.inference_session(max_length=1300) as session:
        assemble = session._assemble

        def cancel_then_assemble(*arguments: Any) -> Any:
            session.cancel()
            return assemble(*arguments)

        monkeypatch.setattr(session, "_assemble", cancel_then_assemble)
        with pytest.raises(CancelledStepError):
            # Rows with padding go one piece after the other.
            session.step(llama.remote.ends.embed(ids(2, columns=600)), padding=[0, 3])
        monkeypatch.undo()
        assert session.position == 0
        session.cancel()  # nothing runs: nothing happens
        assert session.step(llama.remote.ends.embed(ids())).shape == (1, 7, 32)


def test_a_cancel_between_two_tokens_ends_a_generate(llama: Pair) -> None:
    def cancel(_: Any, scores: torch.Tensor) -> torch.Tensor:
        session.cancel()
        return scores

    with llama.remote.inference_session(max_length=100) as session:
        with pytest.raises(CancelledStepError):
            llama.remote.generate(ids(), max_new_tokens=50, logits_processor=[cancel])
        found = llama.remote.generate(ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(found, llama.local.generate(ids(), max_new_tokens=3, do_sample=False))


def test_an_opening_can_be_cancelled(llama: Pair) -> None:
    session = llama.remote.inference_session(max_length=20)
    llama.served.freeze(llama.served.nodes[1], is_frozen=True)
    timer = threading.Timer(0.2, session.cancel)
    timer.start()
    with pytest.raises(CancelledStepError):
        session.step(torch.zeros(1, 1, 32))
    timer.join()
    llama.served.freeze(llama.served.nodes[1], is_frozen=False)
    assert session.step(torch.zeros(1, 1, 32)).shape == (1, 1, 32)
    session.close()


def stop(token_ids: torch.Tensor, _: Any) -> torch.Tensor:
    """A stopping criterion that lets one token through."""
    return torch.ones(token_ids.shape[0], dtype=torch.bool)


def test_rows_of_which_some_cannot_be_held_leave_nothing_open(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path, cache_tokens=512, config=replace(CLIENT_CONFIG, max_wait_s=0.5))
    tokens, mask = padded()
    with pair.served:
        for _ in range(3):  # a node has memory for 512 tokens: for the one padded row or the two others, not for all
            with pytest.raises(CacheFullError):
                pair.remote.generate(tokens, attention_mask=mask, max_new_tokens=187)
        assert pair.remote.generate(ids(1), max_length=500, max_new_tokens=None, stopping_criteria=[stop]).shape == (
            1,
            8,
        )


def test_leaving_a_session_of_a_closed_swarm_is_quiet(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path)
    with pair.served, contextlib.ExitStack() as stack:
        stack.enter_context(pair.remote.inference_session(max_length=20))
        pair.remote.generate(ids(), max_new_tokens=2)
        for peer_id in list(pair.served._tasks):
            pair.served.kill(peer_id)
        pair.served.swarm.close()
        with pytest.raises(SessionClosedError):
            pair.remote.generate(max_new_tokens=2)


def test_a_loop_that_is_being_closed_lets_nobody_wait() -> None:
    async def sleep_long() -> None:
        await asyncio.sleep(1000)

    loop = LoopThread()
    ended: list[BaseException] = []

    def work() -> None:
        while not ended:
            try:
                loop.run(sleep_long())
            except SessionClosedError as error:
                ended.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    loop.close()
    loop.close()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_session_may_be_left_in_another_thread(llama: Pair) -> None:
    session = llama.remote.inference_session(max_length=20)
    session.__enter__()
    errors: list[BaseException] = []

    def leave() -> None:
        try:
            session.__exit__(None, None, None)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    with pytest.raises(SessionClosedError):
        session.step(torch.zeros(1, 1, 32))
    assert session.route == []


def test_a_session_that_another_thread_left_is_nobodys_any_more(llama: Pair) -> None:
    session = llama.remote.inference_session(max_length=20)
    session.__enter__()
    leaving = threading.Thread(target=leave_quietly, args=(session,))
    leaving.start()
    leaving.join()
    assert llama.remote.generate(ids(), max_new_tokens=2).shape == (1, 9)


def leave_quietly(session: InferenceSession) -> None:
    with contextlib.suppress(ValueError):  # the context is the other thread's
        session.__exit__(None, None, None)
