"""Any sequence of messages, and of what is none, is answered by the rules, and nothing is left of it."""

import asyncio
import gc
import tracemalloc
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_protocol.errors import StreamLostError, error_from_wire
from swarm_protocol.messages import (
    COMPUTE_PROTOCOL,
    RING_PROTOCOL,
    SESSION_PROTOCOL,
    CloseSession,
    ErrorReply,
    JoinSession,
    Message,
    Onward,
    Ping,
    Pong,
    ResumeSession,
    SendTape,
    SessionClosed,
    SessionOpened,
    Step,
    StepReply,
)
from swarm_protocol.tensors import to_wire
from swarm_protocol.transport.memory_net import MemoryTransport
from swarm_protocol.transport.virtual_clock import run_virtual
from swarm_protocol.wire import encode
from tests.node.node_scenario import (
    CACHE_TOKENS,
    HIDDEN,
    SPAN,
    Conversation,
    Scenario,
    assert_output,
    forward,
    local_output,
    open_session,
    serving_node,
    states,
)

SESSION_IDS = (b"s" * 16, b"t" * 16)
ITSELF = "the fuzzer"
PROTOCOLS = (SESSION_PROTOCOL, SESSION_PROTOCOL, COMPUTE_PROTOCOL, RING_PROTOCOL)
"""Of the streams; the last one brings steps of the sessions on the first two."""

CODES = {
    "malformed_frame", "frame_too_large", "unsupported_message", "unsupported_version", "unexpected_message",
    "step_order", "invalid_position", "invalid_tensor", "session_not_found", "max_length_exceeded", "cache_full",
    "tape_lost", "limit_exceeded", "blocks_not_served", "revision_mismatch", "invalid_request", "session_closed",
}  # fmt: skip
"""What a peer may be told. `internal_error` would be a bug of the node."""


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 22), st.sampled_from([HIDDEN, HIDDEN, HIDDEN, 1, 33])),
        st.lists(st.integers(0, 4), max_size=4).map(tuple),
        st.sampled_from([(1, 1, HIDDEN), (1, 3, HIDDEN), (2, 1, HIDDEN), (2, 4, HIDDEN)]),
    )
    dtypes = st.sampled_from([torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.int64])
    values = st.sampled_from([0.5] * 6 + [float("nan"), float("inf"), -float("inf"), 3e38, 0.0])

    def build(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> torch.Tensor:
        states = torch.full(shape, 0.25, dtype=torch.float32)
        if states.numel():
            states.view(-1)[-1] = value
        return states.nan_to_num(0.0).to(dtype) if dtype == torch.int64 else states.to(dtype)

    return st.builds(build, shapes, dtypes, values)


steps = st.builds(
    Step,
    st.one_of(st.integers(1, 5), st.sampled_from([1, 2, 1 << 62])),
    st.one_of(st.integers(0, 5), st.sampled_from([19, 20, 21, 1 << 20])),
    tensors().map(to_wire),
    st.one_of(st.none(), st.just((0,)), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    onward=st.sampled_from([(), (), (), (Onward("12D3KooWnobody", b"n" * 16, 1),), (Onward("?!", b"n" * 16, 1),) * 64]),
    wants_output=st.sampled_from([True, True, False]),
    upstream=st.sampled_from([None, None, "12D3KooWnobody", "?!"]),
)
openings = st.builds(
    lambda **fields: open_session(**fields),
    session_id=st.sampled_from(SESSION_IDS),
    batch_size=st.sampled_from([1, 1, 2, 256]),
    max_tokens=st.sampled_from([1, 20, 20, 64, CACHE_TOKENS, CACHE_TOKENS + 1, 1 << 20]),
    start_block=st.sampled_from([SPAN.start, SPAN.start, 0, 2, 9]),
    end_block=st.sampled_from([SPAN.end, SPAN.end, 3, 1, 65535]),
    model=st.sampled_from(["tiny-llama"] * 5 + ["", "x" * 160]),
)
forwards = st.builds(lambda states, start: forward(states, start_block=start), tensors(), st.sampled_from([1, 1, 2, 4]))
messages: st.SearchStrategy[Message] = st.one_of(
    openings,
    steps,
    steps,
    forwards,
    st.builds(Ping, st.integers(0, 1 << 62)),
    st.builds(JoinSession, st.sampled_from([ITSELF, ITSELF, "12D3KooWnobody", "?"]), st.sampled_from(SESSION_IDS)),
    st.builds(SendTape, st.integers(1, 9), st.integers(0, 9), st.integers(0, 30)),
    st.builds(CloseSession),
    st.builds(ResumeSession, st.sampled_from(SESSION_IDS), st.binary(min_size=16, max_size=16), st.integers(0, 4)),
    st.sampled_from([Pong(1), SessionClosed(), ErrorReply("x", "y", False)]),
)


@dataclass(frozen=True)
class Act:
    """Something that a peer does on one of its streams: a message as it is, cut, changed in a byte, or nonsense.

    `next` sends the message, if it is a step, with the id that is expected, and `good` a step that is right.
    """

    stream: int
    kind: str
    message: Message
    at: float
    byte: int
    frame_bytes: int


acts = st.builds(
    Act,
    st.integers(0, 3),
    st.sampled_from(
        ["send"] * 9
        + ["next"] * 9
        + ["good", "good", "change", "cut", "half", "raw", "zeros", "close", "redial", "resume", "wait", "open"]
    ),
    messages,
    st.floats(0, 0.999),
    st.integers(0, 255),
    st.sampled_from([1 << 20, 1 << 20, 200, 40]),
)


class Fuzzer:
    """A peer with some streams, of sessions and of forward passes."""

    def __init__(self, node: Scenario, transport: MemoryTransport) -> None:
        self._node = node
        self._transport = transport
        self._talks: dict[int, Conversation] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._opened: list[SessionOpened] = []
        self._last_ids: dict[int, int] = {}
        self.answers: list[Message] = []

    async def act(self, act: Act) -> None:
        """Do one thing; the streams that it needs are opened."""
        with suppress(StreamLostError):
            is_new = act.stream not in self._talks
            talk = await self._talk(act.stream)
            if is_new and act.byte % 8 and PROTOCOLS[act.stream] != COMPUTE_PROTOCOL:
                itself = self._transport.peer_id
                around = {"upstream": itself, "downstream": itself if act.byte % 2 else None}
                opening = open_session(session_id=SESSION_IDS[act.stream % 2], **around)
                is_ring = PROTOCOLS[act.stream] == RING_PROTOCOL
                await talk.send(JoinSession(itself, SESSION_IDS[act.byte % 2]) if is_ring else opening)
                await asyncio.sleep(0.001)
            if act.kind == "close":
                self._talks.pop(act.stream, None)
                await talk.stream.close()
            elif act.kind == "redial":
                self._talks.pop(act.stream, None)
                await self._talk(act.stream)
            elif act.kind == "wait":
                await asyncio.sleep(1 + 100 * act.at)
            elif act.kind == "good":
                await talk.send(Step(self._next_id(act.stream), 0, to_wire(states(3))))
            elif act.kind == "next" and isinstance(act.message, Step):
                await talk.send(replace(act.message, step_id=self._next_id(act.stream)))
            elif act.kind == "open":
                await talk.send(open_session(session_id=SESSION_IDS[act.stream % 2]))
            elif act.kind == "resume" and self._opened:
                token = self._opened[-1].resume_token
                await talk.send(ResumeSession(SESSION_IDS[act.byte % 2], token, act.byte % 3))
            elif act.kind in ("raw", "zeros"):
                size = 1 + int(act.at * 5000)
                await talk.stream.send([bytes([act.byte]) * size if act.kind == "raw" else b"\x01" + bytes(size)])
            else:
                await self._send_frames(talk, act)
        await asyncio.sleep(0.001)

    async def _send_frames(self, talk: Conversation, act: Act) -> None:
        message = act.message
        if isinstance(message, JoinSession) and message.client == ITSELF:
            message = replace(message, client=self._transport.peer_id)
        frames = [b"".join(parts) for parts in encode(message, act.frame_bytes)]
        if act.kind == "half":
            frames = frames[: max(1, len(frames) // 2)]
        for number, frame in enumerate(frames):
            at = int(act.at * len(frame))
            if act.kind == "cut" and number == len(frames) - 1:
                frame = frame[: at or 1]
            elif act.kind == "change" and number == int(act.at * len(frames)):
                frame = frame[:at] + bytes([act.byte]) + frame[at + 1 :]
            await talk.stream.send([frame])

    def _next_id(self, number: int) -> int:
        self._last_ids[number] = self._last_ids.get(number, 0) + 1
        return self._last_ids[number]

    async def _talk(self, number: int) -> Conversation:
        if number not in self._talks:
            talk = self._talks[number] = await self._node.dial(self._transport, PROTOCOLS[number])
            self._last_ids.pop(number, None)
            self._readers.append(asyncio.create_task(self._read(number, talk), name="reader"))
        return self._talks[number]

    async def _read(self, number: int, talk: Conversation) -> None:
        with suppress(StreamLostError):
            while True:
                answer: Any = await talk.receive()
                self.answers.append(answer)
                if isinstance(answer, SessionOpened):
                    self._opened.append(answer)
        if self._talks.get(number) is talk:
            del self._talks[number]

    async def leave(self) -> None:
        """End every stream."""
        for talk in list(self._talks.values()):
            await talk.stream.close()
        await asyncio.gather(*self._readers)


async def fuzz(sequences: list[list[Act]]) -> None:
    """Let peers act against one node, each by itself but at the same time; then look at what is left."""
    async with serving_node(frame_s=5.0, resume_grace_s=5.0, max_step_tokens=12, peer_messages_per_s=20) as node:
        good, _ = await node.open(max_tokens=10)
        fuzzers = [Fuzzer(node, node.network.transport()) for _ in sequences]

        async def run(fuzzer: Fuzzer, sequence: list[Act]) -> None:
            for act in sequence:
                await fuzzer.act(act)

        await asyncio.gather(*(run(*pair) for pair in zip(fuzzers, sequences, strict=True)))
        assert_output(await good.step(1, 0, states(4)), local_output(states(4)))
        await asyncio.gather(*(fuzzer.leave() for fuzzer in fuzzers))
        for answer in (answer for fuzzer in fuzzers for answer in fuzzer.answers):
            if isinstance(answer, ErrorReply):
                assert answer.code in CODES, answer
                assert error_from_wire(answer.code, answer.message, answer.retryable).code == answer.code
                assert "Traceback" not in answer.message
            elif isinstance(answer, StepReply):
                assert answer.hidden_states.shape[2] == HIDDEN
        assert await good.ask(CloseSession()) == SessionClosed()
        await good.stream.close()
        await asyncio.sleep(200)
        assert not node.serving.done()
        await node.assert_clean()
        assert node.node.admission.held_bytes == 0
        assert not node.worker._tickets


@given(st.lists(st.lists(acts, min_size=1, max_size=12), min_size=1, max_size=3))
@settings(max_examples=120, deadline=None)
def test_any_sequence_is_answered_by_the_rules_and_leaves_nothing(sequences: list[list[Act]]) -> None:
    run_virtual(fuzz(sequences))


def test_memory_is_back_to_the_start_after_many_hostile_peers() -> None:
    steps_ = [Step(1, 0, to_wire(states(12))), Step(7, 0, to_wire(states(1))), Step(2, 40, to_wire(states(3)))]
    nan = to_wire(torch.full((1, 3, HIDDEN), float("nan")))

    def hostile(number: int) -> list[Act]:
        kinds = ("send", "change", "cut", "half", "raw", "zeros", "redial", "resume", "close")
        out = [Act(number % 2, "open", CloseSession(), 0.0, 0, 1 << 20)]
        for index, kind in enumerate(kinds):
            message = [*steps_, Step(1, 0, nan), forward(states(9))][(number + index) % 5]
            out.append(Act((number + index) % 3, kind, message, (number * 7 + index) % 10 / 10, number % 256, 200))
        return out

    async def scenario() -> None:
        async with serving_node(frame_s=5.0, resume_grace_s=5.0, max_step_tokens=12) as node:

            async def round_of_peers(first: int, count: int) -> None:
                for number in range(first, first + count):
                    transport = node.network.transport()
                    fuzzer = Fuzzer(node, transport)
                    for act in hostile(number):
                        await fuzzer.act(act)
                    await fuzzer.leave()
                    # The network in memory keeps a peer's links for good; they are no part of the node.
                    await transport.close()
                    del node.network._peers[transport.peer_id]
                await asyncio.sleep(100)
                node.network._links.clear()
                gc.collect()

            await round_of_peers(0, 30)
            tracemalloc.start()
            start_bytes, _ = tracemalloc.get_traced_memory()
            await round_of_peers(30, 30)
            middle_bytes, _ = tracemalloc.get_traced_memory()
            await round_of_peers(60, 90)
            end_bytes, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            # What a peer leaves are its two buckets and the identity that the network made for it.
            assert end_bytes - middle_bytes < 90 * 3000, (start_bytes, middle_bytes, end_bytes)
            await node.assert_clean()

    run_virtual(scenario())
