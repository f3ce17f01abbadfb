"""Pure: every error that peers, clients and nodes raise or send, in one tree.

    SwarmError
    ├── ProtocolError                 a peer broke the rules of the wire or of the session
    │   ├── MalformedFrameError       malformed_frame
    │   ├── FrameTooLargeError        frame_too_large
    │   ├── UnsupportedMessageError   unsupported_message
    │   ├── UnsupportedVersionError   unsupported_version
    │   ├── UnexpectedMessageError    unexpected_message
    │   ├── StepOrderError            step_order
    │   ├── PositionError             invalid_position
    │   └── InvalidTensorError        invalid_tensor
    ├── SessionError                  a session cannot be opened or go on
    │   ├── SessionNotFoundError      session_not_found      retryable
    │   ├── SessionClosedError        session_closed
    │   ├── MaxLengthError            max_length_exceeded
    │   ├── CacheFullError            cache_full             retryable
    │   ├── TapeLostError             tape_lost
    │   ├── NodeDrainingError         node_draining          retryable
    │   ├── LimitExceededError        limit_exceeded         retryable
    │   └── CancelledStepError        cancelled
    ├── RouteError                    the swarm cannot be reached or does not cover the model
    │   ├── MissingBlocksError        missing_blocks         retryable
    │   ├── PeerUnreachableError      peer_unreachable       retryable
    │   ├── StreamLostError           stream_lost            retryable
    │   ├── StepTimeoutError          timeout                retryable
    │   ├── BlocksNotServedError      blocks_not_served      retryable
    │   └── RevisionMismatchError     revision_mismatch
    ├── ModelError                    a checkpoint or an architecture that cannot be used
    │   ├── UnsupportedFamilyError    unsupported_family
    │   ├── CheckpointError           invalid_checkpoint
    │   ├── InvalidAdapterError       invalid_adapter
    │   └── AdapterMissingError       adapter_missing        retryable
    ├── InvalidRecordError            invalid_record
    ├── ConfigError                   invalid_config
    ├── InvalidRequestError           invalid_request
    ├── InternalError                 internal_error         retryable
    └── RemoteError                   a code that this version does not know; keeps the sender's code, or remote_error

`code` is stable and is what travels and what programs match on; the text is for people and may change.
`retryable` says whether the same request may succeed at another node or later.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from swarm_protocol.spans import Span, describe_blocks


class SwarmError(Exception):
    """The root: catch it to handle whatever the swarm may answer."""

    code: ClassVar[str] = "swarm_error"
    retryable: ClassVar[bool] = False


class ProtocolError(SwarmError):
    """The other side sent something that the protocol does not allow."""

    code = "protocol_error"


class MalformedFrameError(ProtocolError):
    """A frame cannot be parsed, or a field is missing or out of its range."""

    code = "malformed_frame"


class FrameTooLargeError(ProtocolError):
    """A frame, header or message is above its limit."""

    code = "frame_too_large"

    def __init__(self, what: str, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"{what} too large: {size_bytes} bytes, at most {limit_bytes} are allowed")


class UnsupportedMessageError(ProtocolError):
    """The kind of message is unknown here; a newer peer may have sent it."""

    code = "unsupported_message"

    def __init__(self, kind: int) -> None:
        super().__init__(f"message kind {kind} is unknown to this version")


class UnsupportedVersionError(ProtocolError):
    """The two sides share no protocol version."""

    code = "unsupported_version"

    def __init__(self, theirs: Sequence[int], ours: Sequence[int]) -> None:
        super().__init__(f"no common protocol version: the peer speaks {list(theirs)}, this side {list(ours)}")


class UnexpectedMessageError(ProtocolError):
    """The message is known, but not allowed in the state that the session or stream is in."""

    code = "unexpected_message"


class StepOrderError(ProtocolError):
    """A step id is neither the next one nor one that can be answered again."""

    code = "step_order"


class PositionError(ProtocolError):
    """A step starts behind the end of what is cached, or at a negative position."""

    code = "invalid_position"

    def __init__(self, position: int, cached: int) -> None:
        super().__init__(f"position {position} is outside the cached tokens: 0 to {cached} are allowed")


class InvalidTensorError(ProtocolError):
    """A tensor has the wrong shape or dtype, the wrong number of bytes, or values that are not finite."""

    code = "invalid_tensor"


class SessionError(SwarmError):
    """A session cannot be opened or continued."""

    code = "session_error"


class SessionNotFoundError(SessionError):
    """The node does not know the session, or the resume token is not its own: open a new one."""

    code, retryable = "session_not_found", True


class SessionClosedError(SessionError):
    """The session was closed on this side; nothing more can be sent in it."""

    code = "session_closed"


class MaxLengthError(SessionError):
    """More tokens than the session was opened for. The wording is matched on by clients of the predecessor."""

    code = "max_length_exceeded"

    def __init__(self, position: int, num_tokens: int, max_length: int) -> None:
        super().__init__(
            f"Maximum length exceeded: prefix {position} + current {num_tokens} "
            f"exceeds pre-allocated maximum {max_length}"
        )


class CacheFullError(SessionError):
    """The node cannot reserve KV cache now; another node, or a later try, may succeed."""

    code, retryable = "cache_full", True

    def __init__(self, needed_tokens: int, free_tokens: int) -> None:
        super().__init__(f"attention cache is full: {needed_tokens} tokens needed, {free_tokens} free")


class TapeLostError(SessionError):
    """What a node has sent on is not there any more, or not from here on; it can only be computed again."""

    code = "tape_lost"


class NodeDrainingError(SessionError):
    """The node is leaving and takes no new sessions."""

    code, retryable = "node_draining", True


class LimitExceededError(SessionError):
    """A quota of this peer or a limit of the node is used up."""

    code, retryable = "limit_exceeded", True


class CancelledStepError(SessionError):
    """The step was cancelled by the one who asked for it."""

    code = "cancelled"


class RouteError(SwarmError):
    """No usable way through the swarm."""

    code = "route_error"


class MissingBlocksError(RouteError):
    """Some blocks of the model have no online node."""

    code, retryable = "missing_blocks", True
    missing: tuple[Span, ...] = ()

    def __init__(self, model: str, missing: Sequence[Span]) -> None:
        blocks = ", ".join(describe_blocks(span) for span in missing)
        super().__init__(f"no node of the swarm serves {blocks} of {model} now")
        self.missing = tuple(missing)


class PeerUnreachableError(RouteError):
    """A peer cannot be dialled."""

    code, retryable = "peer_unreachable", True


class StreamLostError(RouteError):
    """The stream to a peer ended in the middle of something."""

    code, retryable = "stream_lost", True


class StepTimeoutError(RouteError):
    """A peer did not answer within the deadline."""

    code, retryable = "timeout", True


class BlocksNotServedError(RouteError):
    """The node does not hold the blocks that were asked of it."""

    code, retryable = "blocks_not_served", True

    def __init__(self, asked: Span, served: Span) -> None:
        super().__init__(f"{describe_blocks(asked)} asked, but this node serves {describe_blocks(served)}")


class RevisionMismatchError(RouteError):
    """The two sides hold different weights under the same model name."""

    code = "revision_mismatch"


class ModelError(SwarmError):
    """A model cannot be used here."""

    code = "model_error"


class UnsupportedFamilyError(ModelError):
    """The architecture cannot be cut into spans; the message names it and says why."""

    code = "unsupported_family"


class CheckpointError(ModelError):
    """A checkpoint is missing, incomplete or of a kind that is not read (pickles are not)."""

    code = "invalid_checkpoint"


class InvalidAdapterError(ModelError):
    """What fine-tuning made cannot be used: files, shapes or values are wrong, or it is for another model."""

    code = "invalid_adapter"


class AdapterMissingError(ModelError):
    """The node does not hold parts of an adapter that a request names; they can be sent to it."""

    code, retryable = "adapter_missing", True


class InvalidRecordError(SwarmError):
    """A directory record is malformed, oversized, expired or not signed by its owner."""

    code = "invalid_record"


class ConfigError(SwarmError):
    """A flag, environment variable or argument has an unusable value."""

    code = "invalid_config"


class InvalidRequestError(SwarmError):
    """A request of the local caller cannot be carried out as it stands."""

    code = "invalid_request"


class InternalError(SwarmError):
    """A bug on the answering side; its log has the details, the wire has not."""

    code, retryable = "internal_error", True


class RemoteError(SwarmError):
    """An error with a code that this version does not know; `code` is the sender's."""

    code = "remote_error"

    def __init__(self, code: str, message: str, retryable: bool) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]
        self.retryable = retryable  # type: ignore[misc]


def _classes_by_code(root: type[SwarmError]) -> dict[str, type[SwarmError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        if child is not RemoteError:
            found |= _classes_by_code(child)
    return found


_BY_CODE = _classes_by_code(SwarmError)
_CODE = re.compile(r"[a-z][a-z0-9_]{0,39}")
MAX_REMOTE_CHARS = 300


def error_from_wire(code: str, message: str, retryable: bool) -> SwarmError:
    """Return the exception that an `ErrorReply` stands for; `RemoteError` where the code is unknown here.

    A stranger wrote both: people see them in terminals, logs and pages, so the text is one line of at most
    `MAX_REMOTE_CHARS` visible characters, and a code that is none becomes `remote_error`.
    """
    message = " ".join("".join(each if each.isprintable() else " " for each in message).split())[:MAX_REMOTE_CHARS]
    cls = _BY_CODE.get(code)
    if cls is None:
        return RemoteError(code if _CODE.fullmatch(code) else RemoteError.code, message, retryable)
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    return error
