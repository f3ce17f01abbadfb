"""Pure: messages to frames and back.

A message is one frame, or a first frame and continuation frames where its tensors do not fit into one:

    first frame          u8 layout (1) · u8 kind · u16 zero · u32 header bytes · u32 payload bytes
                         · header: the message's fields in msgpack, a tensor as [dtype, shape]
                         · zeros up to a multiple of 16 · payload: the values of the tensors, in the order of the fields
    continuation frame   u8 layout (1) · u8 0 · u16 zero · more payload

Numbers are little-endian. The payload starts at a multiple of 16 so that receivers can use it in place. What a frame
announces is never allocated before it arrived, and `WireLimits` bounds what is let in.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from swarm_protocol.errors import (
    FrameTooLargeError,
    InvalidTensorError,
    MalformedFrameError,
    ProtocolError,
    UnsupportedMessageError,
)
from swarm_protocol.messages import MESSAGE_TYPES, Message, WireTensor, tensor_bytes
from swarm_protocol.transport.base import MAX_FRAME_BYTES, Buffer

LAYOUT = 1
_FIRST = struct.Struct("<BBHII")
_CONTINUATION = struct.pack("<BBH", LAYOUT, 0, 0)
_ALIGNMENT = 16

MAX_HEADER_BYTES = 16 * 1024
"""The largest header: `OpenSession` with every text full and a prefix of 512 pages is below 12 kB, a row order of 256
rows below 1 kB."""


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What a receiver lets in.

    `max_payload_bytes` is for all tensors of one message; 64 MiB are 1,024 tokens of BLOOM-176B in float32.
    """

    max_payload_bytes: int = 64 * 1024 * 1024


def encode(message: Message, max_frame_bytes: int = MAX_FRAME_BYTES) -> Iterator[list[Buffer]]:
    """Yield the frames of `message`, each as parts to be sent one behind the other; tensor values are not copied."""
    payloads: list[Buffer] = []

    def keep_payload(value: object) -> list[object]:
        if not isinstance(value, WireTensor):
            raise NotImplementedError(f"{type(value).__name__} is not a part of any message")
        payloads.append(memoryview(value.data).cast("B"))
        return [value.dtype, value.shape]

    header = msgspec.msgpack.encode({name: getattr(message, name) for name in message.__slots__}, enc_hook=keep_payload)
    total = sum(len(payload) for payload in payloads)
    start = _FIRST.pack(LAYOUT, message.kind, 0, len(header), total)
    padding = bytes(-(len(start) + len(header)) % _ALIGNMENT)
    parts: list[Buffer] = [start + header + padding]
    room = max_frame_bytes - len(parts[0])
    for payload in payloads:
        while len(payload) > room:
            if room:
                parts.append(payload[:room])
                payload = payload[room:]
            yield parts
            parts, room = [_CONTINUATION], max_frame_bytes - len(_CONTINUATION)
        if payload:
            parts.append(payload)
            room -= len(payload)
    yield parts


class MessageAssembler:
    """Frames in, messages out; one per stream and direction. After an error the stream cannot be read on."""

    def __init__(self, limits: WireLimits | None = None) -> None:
        self._limits = limits or WireLimits()
        self._kind = 0
        self._header: Buffer = b""
        self._payload: list[Buffer] = []
        self._missing_bytes = 0

    def feed(self, frame: Buffer) -> Message | None:
        """Take one frame; return the message that it completes, or None while more frames are needed.

        Tensors of the message share the memory of the frame. Raises ProtocolError.
        """
        view = memoryview(frame).cast("B")
        if len(view) < len(_CONTINUATION) or view[0] != LAYOUT:
            raise MalformedFrameError("not a frame of a layout that this version reads")
        if self._missing_bytes:
            self._continue(view)
        else:
            self._start(view)
        if self._missing_bytes:
            return None
        message = _decode(self._kind, self._header, self._payload)
        self._header, self._payload = b"", []
        return message

    def _start(self, view: memoryview) -> None:
        if len(view) < _FIRST.size:
            raise MalformedFrameError("the frame ends inside its preamble")
        _, kind, zero, header_bytes, payload_bytes = _FIRST.unpack_from(view)
        if header_bytes > MAX_HEADER_BYTES:
            raise FrameTooLargeError("header", header_bytes, MAX_HEADER_BYTES)
        if payload_bytes > self._limits.max_payload_bytes:
            raise FrameTooLargeError("message", payload_bytes, self._limits.max_payload_bytes)
        header_end = _FIRST.size + header_bytes
        payload_start = header_end + -header_end % _ALIGNMENT
        if zero or len(view) < payload_start or len(view) - payload_start > payload_bytes:
            raise MalformedFrameError("the frame's size does not agree with its preamble")
        self._kind = kind
        self._header = view[_FIRST.size : header_end]
        self._payload = [view[payload_start:]]
        self._missing_bytes = payload_bytes - len(self._payload[0])

    def _continue(self, view: memoryview) -> None:
        if bytes(view[: len(_CONTINUATION)]) != _CONTINUATION:
            raise MalformedFrameError("a continuation frame was expected")
        part = view[len(_CONTINUATION) :]
        if not 0 < len(part) <= self._missing_bytes:
            raise MalformedFrameError("a continuation frame is empty or holds more than was announced")
        self._payload.append(part)
        self._missing_bytes -= len(part)


_TYPE_BY_KIND = {cls.kind: cls for cls in MESSAGE_TYPES}


def _decode(kind: int, header: Buffer, payload: Sequence[Buffer]) -> Message:
    cls = _TYPE_BY_KIND.get(kind)
    if cls is None:
        raise UnsupportedMessageError(kind)
    values = memoryview(payload[0] if len(payload) == 1 else b"".join(payload))
    taken = 0

    def take_payload(_: type, value: Any) -> WireTensor:
        nonlocal taken
        dtype, shape = msgspec.convert(value, tuple[str, tuple[int, ...]], strict=True)
        start, taken = taken, taken + tensor_bytes(dtype, shape)
        return WireTensor(dtype, shape, values[start:taken])

    try:
        message = msgspec.msgpack.decode(header, type=cls, dec_hook=take_payload)
    except ProtocolError:
        raise
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ProtocolError):
            raise error.__cause__ from None
        raise MalformedFrameError(f"{cls.__name__}: {error}") from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFrameError(f"{cls.__name__}: not readable: {error}") from None
    if taken != len(values):
        raise InvalidTensorError(f"{cls.__name__} carries {len(values)} bytes of values, its tensors take {taken}")
    return message
