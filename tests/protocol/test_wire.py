"""The wire: every message survives the way there; no bytes give anything but a message or a typed error."""

import contextlib
import dataclasses
import struct
import tracemalloc
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_protocol import messages as m
from swarm_protocol.errors import (
    FrameTooLargeError,
    InvalidTensorError,
    MalformedFrameError,
    ProtocolError,
    UnsupportedMessageError,
)
from swarm_protocol.transport.base import MAX_FRAME_BYTES
from swarm_protocol.wire import LAYOUT, MAX_HEADER_BYTES, MessageAssembler, WireLimits, encode

SMALL = WireLimits(max_payload_bytes=64 * 1024)


def frames_of(message: m.Message, max_frame_bytes: int = MAX_FRAME_BYTES) -> list[bytes]:
    return [b"".join(parts) for parts in encode(message, max_frame_bytes)]


def assemble(frames: list[bytes], limits: WireLimits | None = None) -> list[m.Message]:
    assembler = MessageAssembler(limits)
    return [message for frame in frames if (message := assembler.feed(frame)) is not None]


tensors = st.builds(
    lambda dtype, shape, fill: m.WireTensor(dtype, shape, (bytes([fill]) * m.tensor_bytes(dtype, shape))),
    st.sampled_from(sorted(m.DTYPE_BYTES)),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.integers(0, 255),
)
ids = st.binary(min_size=16, max_size=16)
step_ids = st.integers(1, 1 << 62)
last_ids = st.integers(0, 1 << 62)
blocks = st.integers(0, 65535)
texts = st.text(max_size=160)
seconds = st.floats(0, 1e9)
positions = st.integers(0, m.MAX_SESSION_TOKENS)
onwards = st.lists(
    st.builds(m.Onward, texts, ids, step_ids, st.none() | st.integers(1, m.MAX_SESSION_TOKENS)), max_size=m.MAX_ONWARD
).map(tuple)
every_message = st.one_of(
    st.builds(
        m.OpenSession,
        ids,
        st.lists(st.integers(1, 65535), min_size=1, max_size=16).map(tuple),
        texts,
        texts,
        blocks,
        blocks,
        st.integers(1, m.MAX_BATCH_ROWS),
        st.integers(1, m.MAX_SESSION_TOKENS),
        st.none() | texts,
        st.none() | texts,
    ),
    st.builds(m.SessionOpened, st.integers(1, 65535), ids, seconds),
    st.builds(m.ResumeSession, ids, ids, last_ids),
    st.builds(m.SessionResumed, last_ids, positions),
    st.builds(
        m.Step,
        step_ids,
        positions,
        tensors,
        st.none() | st.lists(st.integers(0, m.MAX_BATCH_ROWS - 1), max_size=m.MAX_BATCH_ROWS).map(tuple),
        st.none() | st.integers(1, m.MAX_SESSION_TOKENS),
        onwards,
        st.booleans(),
        st.none() | texts,
    ),
    st.builds(m.StepReply, step_ids, tensors, seconds, seconds),
    st.builds(m.CloseSession),
    st.builds(m.SessionClosed),
    st.builds(m.Forward, step_ids, texts, texts, blocks, blocks, tensors),
    st.builds(m.ForwardReply, step_ids, tensors),
    st.builds(m.Backward, step_ids, texts, texts, blocks, blocks, tensors, tensors),
    st.builds(m.BackwardReply, step_ids, tensors),
    st.builds(m.Ping, last_ids),
    st.builds(m.Pong, last_ids, last_ids),
    st.builds(m.JoinSession, texts, ids),
    st.builds(m.RingJoined),
    st.builds(m.SendTape, step_ids, positions, positions, onwards),
    st.builds(m.TapeSent, step_ids, tensors),
    st.builds(m.ErrorReply, st.text(max_size=64), st.text(max_size=1000), st.booleans(), st.none() | step_ids),
    st.builds(m.Draining, seconds),
    st.builds(m.OfferSession, ids, ids, texts),
    st.builds(m.SessionOffered, ids),
    st.builds(m.CopySession, ids, ids, texts, ids, positions),
    st.builds(m.SessionCopied, positions),
    st.builds(m.FetchSession, ids, positions, texts, texts, texts, blocks, blocks),
    st.builds(m.Pages, positions, tensors, tensors, st.booleans()),
    st.builds(m.ProbeMe, texts, texts, blocks, blocks, st.integers(1, 65536)),
    st.builds(m.Probed, st.text(max_size=64), st.text(max_size=1000)),
    st.builds(m.Payload, tensors),
    st.builds(m.PayloadArrived),
)


def test_the_strategy_makes_every_kind_of_message() -> None:
    kinds = [cls.kind for cls in m.MESSAGE_TYPES]
    assert len(set(kinds)) == len(kinds) == 30


@given(every_message, st.integers(2048, 4096))
def test_a_message_survives_the_way_there(message: m.Message, max_frame_bytes: int) -> None:
    frames = frames_of(message, MAX_HEADER_BYTES + max_frame_bytes)
    assert all(0 < len(frame) <= MAX_HEADER_BYTES + max_frame_bytes for frame in frames)
    (arrived,) = assemble(frames)
    assert arrived == message


@pytest.mark.parametrize("rows", [0, 1, 100, 5000])
@pytest.mark.parametrize("max_frame_bytes", [200, 4096, MAX_FRAME_BYTES])
def test_big_tensors_travel_in_chunks_below_the_frame_limit(rows: int, max_frame_bytes: int) -> None:
    values = bytes(range(256)) * rows
    message = m.StepReply(7, m.WireTensor("float32", (1, rows, 64), values))
    frames = frames_of(message, max_frame_bytes)
    assert max(len(frame) for frame in frames) <= max_frame_bytes
    assert len(frames) >= len(values) // max_frame_bytes
    (arrived,) = assemble(frames)
    assert bytes(arrived.hidden_states.data) == values


def test_messages_follow_each_other_on_one_stream() -> None:
    sent = [m.Ping(1), m.Step(1, 0, m.WireTensor("int64", (3,), bytes(24))), m.CloseSession()]
    arrived = assemble([frame for message in sent for frame in frames_of(message, 80)])
    assert arrived == sent


def test_the_payload_starts_aligned() -> None:
    (frame,) = frames_of(m.ForwardReply(1, m.WireTensor("float32", (2,), b"ABCDEFGH")))
    assert frame.index(b"ABCDEFGH") % 16 == 0


@settings(max_examples=400)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
def test_any_bytes_give_a_message_or_a_typed_error(frames: list[bytes]) -> None:
    assembler = MessageAssembler(SMALL)
    for frame in frames:
        try:
            message = assembler.feed(frame)
        except ProtocolError:
            return
        assert message is None or isinstance(message, m.MESSAGE_TYPES)


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=12,
)
field_names = sorted({field.name for cls in m.MESSAGE_TYPES for field in dataclasses.fields(cls)})


@settings(max_examples=400)
@given(
    st.sampled_from([cls.kind for cls in m.MESSAGE_TYPES]),
    st.dictionaries(st.sampled_from(field_names), msgpack_values, max_size=9),
    st.binary(max_size=40),
)
def test_headers_of_any_content_give_a_message_or_a_typed_error(
    kind: int, fields: dict[str, object], payload: bytes
) -> None:
    header = msgspec.msgpack.encode(fields)
    head = struct.pack("<BBHII", LAYOUT, kind, 0, len(header), len(payload)) + header
    frame = head + bytes(-len(head) % 16) + payload
    with contextlib.suppress(ProtocolError):
        assert isinstance(MessageAssembler(SMALL).feed(frame), m.MESSAGE_TYPES)


@settings(max_examples=300)
@given(every_message, st.data())
def test_a_flipped_byte_gives_a_message_or_a_typed_error(message: m.Message, data: st.DataObject) -> None:
    frame = bytearray(frames_of(message)[0])
    index = data.draw(st.integers(0, len(frame) - 1))
    frame[index] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        MessageAssembler(SMALL).feed(bytes(frame))


def with_header(kind: int, header: bytes, payload: bytes = b"") -> bytes:
    head = struct.pack("<BBHII", LAYOUT, kind, 0, len(header), len(payload)) + header
    return head + bytes(-len(head) % 16) + payload


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


BAD_FRAMES: list[tuple[str, bytes, type[ProtocolError]]] = [
    ("empty", b"", MalformedFrameError),
    ("another layout", b"\x02\x05\x00\x00" + bytes(12), MalformedFrameError),
    ("cut in the preamble", b"\x01\x05\x00\x00\x01", MalformedFrameError),
    ("reserved bits set", struct.pack("<BBHII", 1, 30, 7, 0, 0) + bytes(4), MalformedFrameError),
    ("header over its limit", struct.pack("<BBHII", 1, 30, 0, MAX_HEADER_BYTES + 1, 0), FrameTooLargeError),
    ("payload over its limit", struct.pack("<BBHII", 1, 5, 0, 0, 65537) + bytes(4), FrameTooLargeError),
    ("payload of 4 GiB announced", struct.pack("<BBHII", 1, 5, 0, 0, 2**32 - 1) + bytes(4), FrameTooLargeError),
    ("continuation without a start", b"\x01\x00\x00\x00" + bytes(12), UnsupportedMessageError),
    ("unknown kind", with_header(200, pack({})), UnsupportedMessageError),
    ("more payload than announced", with_header(30, pack({"nonce": 1})) + b"x", MalformedFrameError),
    ("missing field", with_header(30, pack({})), MalformedFrameError),
    ("field of another type", with_header(30, pack({"nonce": "1"})), MalformedFrameError),
    ("number out of range", with_header(30, pack({"nonce": -1})), MalformedFrameError),
    ("not a map", with_header(30, pack([1, 2])), MalformedFrameError),
    ("trailing bytes in the header", with_header(30, pack({"nonce": 1}) + b"\x00"), MalformedFrameError),
    ("deep nesting", with_header(30, b"\x91" * 9000 + b"\x90"), MalformedFrameError),
    ("deep nesting in an unknown field", with_header(30, b"\x81\xa1x" + b"\x91" * 9000 + b"\x90"), MalformedFrameError),
    (
        "payload that no tensor takes",
        with_header(30, pack({"nonce": 1}), b"abcd"),
        InvalidTensorError,
    ),
    (
        "tensor larger than the payload",
        with_header(21, pack({"request_id": 1, "hidden_states": ["float32", [4]]}), b"abcd"),
        InvalidTensorError,
    ),
    (
        "tensor of a foreign dtype",
        with_header(21, pack({"request_id": 1, "hidden_states": ["object", [1]]}), b"abcd"),
        InvalidTensorError,
    ),
    (
        "negative dimension",
        with_header(21, pack({"request_id": 1, "hidden_states": ["float32", [-1]]}), b"abcd"),
        InvalidTensorError,
    ),
    (
        "huge dimensions",
        with_header(21, pack({"request_id": 1, "hidden_states": ["float32", [2**31 - 1] * 4]}), b"abcd"),
        InvalidTensorError,
    ),
    (
        "tensor that is no pair",
        with_header(21, pack({"request_id": 1, "hidden_states": {"a": 1}}), b"abcd"),
        MalformedFrameError,
    ),
    (
        "session id of 15 bytes",
        with_header(3, pack({"session_id": b"a" * 15, "resume_token": b"b" * 16, "last_step_id": 0})),
        MalformedFrameError,
    ),
]


@pytest.mark.parametrize(("frame", "error"), [row[1:] for row in BAD_FRAMES], ids=[row[0] for row in BAD_FRAMES])
def test_bad_frames_are_refused_by_type(frame: bytes, error: type[ProtocolError]) -> None:
    with pytest.raises(error):
        MessageAssembler(SMALL).feed(frame)


@pytest.mark.parametrize(
    "continuation", [b"\x01\x00\x00\x00", b"\x01\x05\x00\x00abcd", b"\x01\x00\x00\x00" + bytes(5000)]
)
def test_bad_continuations_are_refused(continuation: bytes) -> None:
    first, *_ = frames_of(m.ForwardReply(1, m.WireTensor("float32", (100,), bytes(400))), 100)
    assembler = MessageAssembler(SMALL)
    assert assembler.feed(first) is None
    with pytest.raises(MalformedFrameError):
        assembler.feed(continuation)


def test_a_claimed_size_is_never_allocated() -> None:
    head = pack({"request_id": 1, "hidden_states": ["float32", [1, 4096, 4096]]})
    frame = struct.pack("<BBHII", LAYOUT, 21, 0, len(head), 64 * 1024 * 1024) + head
    frame += bytes(-len(frame) % 16)
    tracemalloc.start()
    try:
        assert MessageAssembler().feed(frame) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_every_message_is_a_frozen_slotted_dataclass() -> None:
    for cls in m.MESSAGE_TYPES:
        assert dataclasses.is_dataclass(cls)
        assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        assert hasattr(cls, "__slots__")
        assert typing.get_type_hints(cls)["kind"] == typing.ClassVar[int]
