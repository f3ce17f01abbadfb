"""The whole network as three Protocols, and two networks that fulfil them."""

from swarm_protocol.transport.base import Directory, FrameStream, StreamHandler, Transport

__all__ = ["Directory", "FrameStream", "StreamHandler", "Transport"]
