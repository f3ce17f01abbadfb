"""Gathers what a node tells its owner from the parts that know it. All but `loading` belongs to the event loop."""

import asyncio
import os
from dataclasses import replace

from server_node.node import Node, software
from server_node.status import NodeStatus
from swarm_protocol.transport.base import Transport


class StatusBoard:
    """The status of one node, from before it has any part."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._clock = asyncio.get_running_loop().time
        self._started_s = self._clock()
        self._progress = (0, 0)
        self._parts: tuple[Transport, Node] | None = None
        self._is_online = False

    def loading(self, num_done: int, num_all: int) -> None:
        """Blocks are being loaded. Any thread may say so."""
        self._progress = (num_done, num_all)

    def loaded(self, transport: Transport, node: Node) -> None:
        """The node is there."""
        self._parts = transport, node

    def online(self) -> None:
        """It serves."""
        self._is_online = True

    def status(self) -> NodeStatus:
        """Return what is so now."""
        now_s = self._clock()
        num_done, num_all = self._progress
        early = NodeStatus(
            "loading" if num_all else "opening",
            self._model,
            software(),
            round(now_s - self._started_s, 3),
            loaded_blocks=num_done,
            blocks_to_load=num_all,
            memory_bytes=_memory(),
        )
        if self._parts is None:
            return early
        transport, node = self._parts
        admission, work = node.admission, node.speed.served
        return replace(
            early,
            state="draining" if admission.is_draining else "online" if self._is_online else "joining",
            model=admission.served.model,
            peer_id=transport.peer_id,
            addresses=tuple(transport.addresses),
            blocks=str(admission.served.span),
            num_sessions=len(node.sessions),
            num_peers=admission.num_peers,
            tokens_per_s=round(work.tokens_per_s(now_s), 3),
            cache_tokens=admission.served.cache_tokens,
            cache_used_tokens=admission.served.cache_tokens - admission.free_tokens,
            num_steps=work.num_steps,
            num_tokens=work.num_tokens,
            queue_s=round(work.queue_s, 6),
            errors=dict(work.errors),
        )


def _memory() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return None
