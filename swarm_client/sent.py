"""What a client knows of a step that was given to a node."""

from dataclasses import dataclass

from swarm_protocol.errors import StepTimeoutError, SwarmError
from swarm_protocol.message_stream import MessageStream
from swarm_protocol.messages import Step, StepReply, tensor_bytes


@dataclass(slots=True, eq=False)
class Sent:
    """A step at one node: the number and shape of it, and by and by what became of it.

    `message` is what this client sent, None if another node brings it; `sent_on` the stream that it was sent on. With
    `may_go_on` the reply may say that the output has gone on, without it.
    """

    step_id: int
    position: int
    shape: tuple[int, ...]
    dtype: str
    row_order: tuple[int, ...] | None
    max_tokens: int | None
    has_begun: bool = False
    may_go_on: bool = False
    message: Step | None = None
    sent_on: MessageStream | None = None
    reply: StepReply | None = None
    error: SwarmError | None = None

    @property
    def is_answered(self) -> bool:
        """Whether a reply has come, good or bad."""
        return self.reply is not None or self.error is not None

    @property
    def num_bytes(self) -> int:
        """What its values take on the wire, one way."""
        return tensor_bytes(self.dtype, self.shape)


class NotBroughtError(StepTimeoutError):
    """A node that is alive has not got a step that the node before has sent on."""
