"""What breaks the rules gets its code, and the node goes on as if nothing had been."""

import asyncio
import random
from contextlib import suppress

import pytest
import torch

from swarm_protocol.errors import StreamLostError
from swarm_protocol.messages import (
    MAX_IN_FLIGHT,
    CloseSession,
    Forward,
    Message,
    Pong,
    ResumeSession,
    SessionClosed,
    SessionOpened,
    Step,
)
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.base import MAX_FRAME_BYTES
from swarm_protocol.wire import encode
from tests.node.node_scenario import (
    CACHE_TOKENS,
    HIDDEN,
    Scenario,
    assert_error,
    assert_output,
    ended,
    forward,
    local_output,
    open_session,
    serving_node,
    settle,
    states,
    virtual,
)


def frame(message: Message) -> bytes:
    return b"".join(next(encode(message)))


def with_nan() -> torch.Tensor:
    tokens = states(3)
    tokens[0, 1, 5] = float("nan")
    return tokens


async def assert_serves(node: Scenario) -> None:
    """A well-behaved peer gets what it asks for, and then nothing is left of anybody."""
    talk, _ = await node.open(max_tokens=CACHE_TOKENS)
    assert_output(await talk.step(1, 0, states(4)), local_output(states(4)))
    assert await talk.ask(CloseSession()) == SessionClosed()
    await node.assert_clean()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (open_session(model="another"), "revision_mismatch"),
        (open_session(revision="another"), "revision_mismatch"),
        (open_session(start_block=0), "blocks_not_served"),
        (open_session(end_block=5), "blocks_not_served"),
        (open_session(start_block=3, end_block=2), "invalid_request"),
        (open_session(downstream="some body"), "invalid_request"),
        (open_session(max_tokens=CACHE_TOKENS + 1), "cache_full"),
        (open_session(batch_size=256, max_tokens=1 << 20), "cache_full"),
        (ResumeSession(b"x" * 16, b"y" * 16, 0), "session_not_found"),
    ],
)
def test_a_refused_opening_may_be_followed_by_a_better_one(request_: Message, code: str):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk = await node.dial()
            assert_error(await talk.ask(request_), code)
            assert isinstance(await talk.ask(open_session()), SessionOpened)
            await talk.ask(CloseSession())
            await assert_serves(node)

    scenario()


STEP = Step(1, 0, to_wire(states(2)))


BROKEN_ANYWHERE = {
    "a byte": (b"\x00", "malformed_frame"),
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n", "malformed_frame"),
    "half a preamble": (b"\x01\x05\x00\x00", "malformed_frame"),
    "unknown kind": (b"\x01\x63\x00\x00" + bytes(8) + bytes(4), "unsupported_message"),
    "huge header": (b"\x01\x01\x00\x00" + b"\xff\xff\xff\x7f" + bytes(4), "frame_too_large"),
    "huge payload": (b"\x01\x01\x00\x00" + bytes(4) + b"\xff\xff\xff\x7f", "frame_too_large"),
    "no msgpack": (b"\x01\x01\x00\x00\x04\x00\x00\x00" + bytes(4) + b"\xc1\xc1\xc1\xc1", "malformed_frame"),
    "a frame of zeros": (bytes([1]) + bytes(MAX_FRAME_BYTES - 1), "malformed_frame"),
    "an answer": (frame(Pong(1)), "unexpected_message"),
    "a forward pass": (frame(forward(states(2))), "unexpected_message"),
}
BROKEN_BEFORE = {
    "a step": (frame(STEP), "unexpected_message"),
    "a close": (frame(CloseSession()), "unexpected_message"),
    "a version of the future": (frame(open_session(versions=(9,))), "unsupported_version"),
}
BROKEN_INSIDE = {
    "a second opening": (frame(open_session(session_id=b"t" * 16)), "unexpected_message"),
    "a resume": (frame(ResumeSession(b"s" * 16, bytes(16), 0)), "unexpected_message"),
}


@pytest.mark.parametrize(
    ("sent", "code", "is_open"),
    [
        pytest.param(sent, code, is_open, id=f"{what} {'inside' if is_open else 'before'}")
        for is_open, extra in ((False, BROKEN_BEFORE), (True, BROKEN_INSIDE))
        for what, (sent, code) in (BROKEN_ANYWHERE | extra).items()
    ],
)
def test_a_broken_rule_is_named_and_ends_stream_and_session(sent: bytes, code: str, is_open: bool):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk = (await node.open())[0] if is_open else await node.dial()
            await talk.stream.send([sent])
            assert_error(await talk.receive(), code)
            assert await ended(talk)
            await node.assert_clean()
            await assert_serves(node)

    scenario()


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (Step(1, 0, to_wire(states(2)[:, :, :5])), "invalid_tensor"),
        (Step(1, 0, to_wire(states(2, rows=2))), "invalid_tensor"),
        (Step(1, 0, to_wire(states(2)[0])), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.zeros(1, 2, HIDDEN, dtype=torch.int64))), "invalid_tensor"),
        (Step(1, 0, to_wire(with_nan())), "invalid_tensor"),
        (Step(1, 0, to_wire(torch.full((1, 1, HIDDEN), float("inf")))), "invalid_tensor"),
        (Step(1, 0, to_wire(states(13).to(torch.bfloat16))), "invalid_request"),
        (Step(1, 0, to_wire(states(2)), (1,)), "invalid_request"),
        (Step(1, 0, to_wire(states(2)), (0, 0)), "invalid_request"),
    ],
)
def test_a_step_with_bad_content_fails_and_the_session_goes_on_behind_it(step: Step, code: str):
    @virtual
    async def scenario() -> None:
        async with serving_node(max_step_tokens=12) as node:
            talk, _ = await node.open()
            assert_error(await talk.ask(step), code, step_id=1)
            assert_output(await talk.step(2, 0, states(3)), local_output(states(3)))
            await talk.ask(CloseSession())
            await assert_serves(node)

    scenario()


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (Step(2, 1, to_wire(states(1))), "invalid_position"),
        (Step(2, 1 << 19, to_wire(states(1))), "invalid_position"),
        (Step(3, 0, to_wire(states(1))), "step_order"),
        (Step(1 << 61, 0, to_wire(states(1))), "step_order"),
    ],
)
def test_a_step_that_has_no_place_changes_nothing(step: Step, code: str):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk, _ = await node.open()
            assert_output(await talk.step(1, 0, states(0)), states(0))
            assert_error(await talk.ask(step), code, step_id=step.step_id)
            assert_output(await talk.step(2, 0, states(3)), local_output(states(3)))
            await talk.ask(CloseSession())
            await assert_serves(node)

    scenario()


@virtual
async def test_more_tokens_than_the_session_holds_are_refused():
    async with serving_node() as node:
        talk, _ = await node.open()
        await talk.step(1, 0, states(19))
        assert_error(await talk.step(2, 19, states(2)), "max_length_exceeded", step_id=2)
        assert_output(await talk.step(2, 0, states(3)), local_output(states(3)))


@virtual
async def test_more_values_than_the_whole_cache_could_hold_are_not_let_in():
    async with serving_node() as node:
        talk, _ = await node.open()
        assert_error(await talk.step(1, 0, states(CACHE_TOKENS + 1)), "frame_too_large")
        assert await ended(talk)
        await assert_serves(node)


@virtual
async def test_a_step_that_comes_too_early_is_refused_and_the_running_one_is_answered():
    async with serving_node() as node:
        talk, _ = await node.open()
        node.worker.gate.clear()
        for number in range(1, MAX_IN_FLIGHT + 1):
            await talk.send(Step(number, number - 1, to_wire(states(1))))
        early = MAX_IN_FLIGHT + 1
        assert_error(await talk.step(early, 1, states(1)), "step_order", step_id=early)
        await talk.send(Step(1, 0, to_wire(states(1))))
        node.worker.gate.set()
        for number in range(1, early):
            assert (await talk.receive()).step_id == number
        assert_output(await talk.step(early, 0, states(3)), local_output(states(3)))


@virtual
async def test_steps_behind_one_that_fails_fail_with_it_in_their_order():
    async with serving_node() as node:
        talk, _ = await node.open()
        node.worker.gate.clear()
        for number, columns in enumerate((2, 30, 1), start=1):  # the second is longer than the session
            await talk.send(Step(number, 0 if number == 1 else 2, to_wire(states(columns))))
        await talk.send(Step(2, 2, to_wire(states(1) * torch.nan)))
        await talk.send(Step(3, 3, to_wire(states(1))))
        await settle()
        node.worker.gate.set()
        answers = [await talk.receive() for _ in range(5)]
        assert [(answer.step_id, getattr(answer, "code", "")) for answer in answers] == [
            (2, "max_length_exceeded"),
            (3, "step_order"),
            (1, ""),
            (2, "invalid_tensor"),
            (3, "invalid_position"),
        ]
        assert_output(await talk.step(4, 2, states(3)[:, 2:]), local_output(states(3))[:, 2:])


@virtual
async def test_a_finished_step_that_comes_again_is_answered_from_memory():
    async with serving_node() as node:
        talk, _ = await node.open()
        first = await talk.step(1, 0, states(2))
        node.worker.bug = RuntimeError("must not be computed again")
        assert await talk.step(1, 0, states(2)) == first


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (forward(states(2), model="another"), "revision_mismatch"),
        (forward(states(2), revision="another"), "revision_mismatch"),
        (forward(states(2), end_block=9), "blocks_not_served"),
        (forward(states(2), start_block=3, end_block=3), "invalid_request"),
        (forward(states(2)[:, :, :5]), "invalid_tensor"),
        (forward(with_nan()), "invalid_tensor"),
        (forward(states(0)), "invalid_tensor"),
        (forward(states(7, rows=2).to(torch.bfloat16)), "invalid_request"),
    ],
)
def test_a_bad_forward_pass_is_refused_and_a_good_one_may_follow(request_: Forward, code: str):
    @virtual
    async def scenario() -> None:
        async with serving_node(max_step_tokens=12) as node:
            talk = await node.dial_compute()
            assert_error(await talk.ask(request_), code, step_id=1)
            assert_output(await talk.ask(forward(states(2))), local_output(states(2)))
            await talk.stream.close()
            await assert_serves(node)

    scenario()


@pytest.mark.parametrize("sent", [frame(open_session()), frame(STEP), frame(CloseSession()), b"\x00"])
def test_what_has_no_place_on_a_compute_stream_ends_it(sent: bytes):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk = await node.dial_compute()
            await talk.stream.send([sent])
            assert (await talk.receive()).code in ("unexpected_message", "malformed_frame")
            assert await ended(talk)
            await assert_serves(node)

    scenario()


def test_a_bug_is_an_internal_error_without_details_and_the_session_survives(caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk, _ = await node.open()
            await talk.step(1, 0, states(2))
            node.worker.bug = ZeroDivisionError("a secret of the node")
            reply = await talk.step(2, 2, states(1))
            assert_error(reply, "internal_error", step_id=2)
            assert "secret" not in reply.message
            compute = await node.dial_compute()
            assert_error(await compute.ask(forward(states(2))), "internal_error", step_id=1)
            other = await node.dial()
            assert_error(await other.ask(open_session()), "internal_error")
            await other.stream.close()
            await compute.stream.close()
            node.worker.bug = None
            assert_output(
                await talk.step(3, 2, states(3)[:, 2:]),
                local_output(torch.cat([states(2), states(3)[:, 2:]], 1))[:, 2:],
            )
            await talk.ask(CloseSession())
            await assert_serves(node)

    scenario()
    assert sum("Traceback" in (record.exc_text or "") or record.exc_info is not None for record in caplog.records) == 3


def test_a_bug_after_the_rows_may_have_moved_ends_the_session(caplog: pytest.LogCaptureFixture):
    @virtual
    async def scenario() -> None:
        async with serving_node() as node:
            talk, _ = await node.open(batch_size=2)
            node.worker.bug = ZeroDivisionError()
            assert_error(await talk.step(1, 0, states(1, rows=2), row_order=(1, 0)), "internal_error", step_id=1)
            assert await ended(talk)
            node.worker.bug = None
            await assert_serves(node)

    scenario()


@virtual
async def test_a_stream_that_says_nothing_is_closed():
    async with serving_node(first_message_s=15.0) as node:
        talk = await node.dial()
        await asyncio.sleep(16)
        assert await ended(talk)
        await node.assert_clean()


@virtual
async def test_half_a_message_does_not_hold_a_stream_for_good():
    async with serving_node(max_step_tokens=1 << 15, frame_s=60.0, resume_grace_s=60.0) as node:
        node.node.admission.free_token_blocks += 1 << 20
        talk, _ = await node.open(batch_size=256, max_tokens=80)
        frames = list(encode(Step(1, 0, to_wire(states(80, rows=256)))))
        assert len(frames) == 2
        await talk.stream.send(frames[0])
        await asyncio.sleep(59)
        assert node.node.admission.num_streams == 1
        await asyncio.sleep(2)
        assert await ended(talk)
        await asyncio.sleep(61)
        node.node.admission.free_token_blocks -= 1 << 20
        await node.assert_clean()


@virtual
async def test_a_peer_that_reads_no_answers_loses_its_stream():
    async with serving_node(send_s=60.0) as node:
        node.node.admission.free_token_blocks += 1 << 20
        talk, _ = await node.open(batch_size=256, max_tokens=20)
        # 524 kB of answer each; the memory network holds back a quarter of a megabyte.
        for step_id in range(1, 5):
            await talk.send(Step(step_id, 0, to_wire(states(16, rows=256))))
            await settle()
        await asyncio.sleep(200)
        assert node.node.admission.num_streams == 0
        node.node.admission.free_token_blocks -= 1 << 20
        await node.assert_clean()


@virtual
async def test_a_flood_of_pings_that_reads_nothing_stays_bounded():
    async with serving_node() as node:
        talk, _ = await node.open()
        ping = frame(Pong(1)).replace(b"\x01\x1f", b"\x01\x1e", 1)

        async def flood() -> None:
            while True:
                await talk.stream.send([ping])

        task = asyncio.create_task(flood())
        await asyncio.sleep(500)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await node.assert_clean()


@virtual
async def test_streams_and_sessions_of_one_peer_are_capped():
    async with serving_node(max_streams_per_peer=2, max_sessions_per_peer=1) as node:
        peer = node.network.transport()
        await node.open(peer)
        second = await node.dial(peer)
        assert_error(await second.ask(open_session(session_id=b"t" * 16)), "limit_exceeded")
        third = await node.dial(peer)
        assert_error(await third.receive(), "limit_exceeded")
        assert await ended(third)
        await node.open(node.network.transport())


@virtual
async def test_queued_steps_of_one_peer_are_capped_and_the_refused_step_can_be_sent_anew():
    async with serving_node(max_queued_per_peer=1) as node:
        peer = node.network.transport()
        talk, _ = await node.open(peer)
        other, _ = await node.open(peer, session_id=b"t" * 16)
        node.worker.gate.clear()
        await talk.send(Step(1, 0, to_wire(states(2))))
        await settle()
        assert_error(await other.step(1, 0, states(2)), "limit_exceeded", step_id=1)
        node.worker.gate.set()
        assert_output(await talk.receive(), local_output(states(2)))
        assert_output(await other.step(2, 0, states(2)), local_output(states(2)))


@virtual
async def test_a_stream_that_only_asks_and_asks_is_ended():
    async with serving_node() as node:
        talk = await node.dial()
        for _ in range(32):
            assert_error(await talk.ask(open_session(model="another")), "revision_mismatch")
        assert_error(await talk.receive(), "limit_exceeded")
        assert await ended(talk)
        await assert_serves(node)


@virtual
async def test_arbitrary_bytes_and_mutated_messages_never_stop_the_node():
    rng = random.Random(7)
    messages = [frame(open_session()), frame(STEP), frame(CloseSession()), frame(forward(states(2)))]
    async with serving_node(resume_grace_s=1.0) as node:
        for attempt in range(300):
            talk = (await node.open())[0] if attempt % 2 else await node.dial_compute()
            with suppress(StreamLostError):
                for _ in range(3):
                    sent = bytearray(rng.choice(messages))
                    for _ in range(rng.randrange(4)):
                        sent[rng.randrange(len(sent))] = rng.randrange(256)
                    await talk.stream.send([bytes(sent[: rng.randrange(1, len(sent) + 1)])])
            await settle()
            await talk.stream.close()
            await asyncio.sleep(2)
        assert not node.serving.done()
        await assert_serves(node)
