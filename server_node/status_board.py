"""Gathers what a node tells its owner from the parts that know it. All but `loading` belongs to the event loop."""

import asyncio
import os
from dataclasses import replace
from typing import Any

from server_node.node import Node
from server_node.status import NodeStatus
from server_node.version import software
from swarm_protocol.transport.base import Transport


class StatusBoard:
    """The status of one node, from before it has any part."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._clock = asyncio.get_running_loop().time
        self._started_s = self._clock()
        self._progress = (0, 0)
        self._parts: tuple[Transport, Node] | None = None
        self._is_loaded = False
        self._is_online = False
        self._is_waiting = False

    def loading(self, num_done: int, num_all: int) -> None:
        """Blocks are being loaded. Any thread may say so."""
        self._progress = (num_done, num_all)

    def waiting(self, is_waiting: bool) -> None:
        """It waits for its owner's programs to leave the device alone, or has waited."""
        self._is_waiting = is_waiting

    def loaded(self, transport: Transport, node: Node) -> None:
        """The node is there, and has blocks."""
        self._parts, self._is_loaded = (transport, node), True

    def online(self) -> None:
        """It serves."""
        self._is_online = True

    def unloaded(self) -> None:
        """It has given its blocks up."""
        self._progress, self._is_loaded, self._is_online = (0, 0), False, False

    def status(self) -> NodeStatus:
        """Return what is so now."""
        now_s = self._clock()
        num_done, num_all = self._progress
        waiting = "paused" if self._is_waiting else "opening"
        now = NodeStatus(
            "loading" if num_all else waiting,
            self._model,
            software(),
            round(now_s - self._started_s, 3),
            loaded_blocks=num_done,
            blocks_to_load=num_all,
            memory_bytes=_memory(),
        )
        if self._parts is None:
            return now
        transport, node = self._parts
        served, work = node.admission.served, node.speed.served
        now = replace(
            now,
            model=served.model,
            peer_id=transport.peer_id,
            addresses=tuple(transport.addresses),
            num_steps=work.num_steps,
            num_tokens=work.num_tokens,
            queue_s=round(work.queue_s, 6),
            errors=dict(work.errors),
            **_measured(node),
        )
        return self._of_blocks(now, node, work.tokens_per_s(now_s)) if self._is_loaded else now

    def _of_blocks(self, now: NodeStatus, node: Node, tokens_per_s: float) -> NodeStatus:
        admission = node.admission
        serving = "online" if self._is_online and node.is_reachable() else "joining"
        return replace(
            now,
            state="draining" if admission.is_draining else serving,
            blocks=str(admission.served.span),
            num_sessions=len(node.sessions),
            num_peers=admission.num_peers,
            tokens_per_s=round(tokens_per_s, 3),
            cache_tokens=admission.served.cache_tokens,
            cache_used_tokens=admission.served.cache_tokens - admission.free_tokens,
        )


def _measured(node: Node) -> dict[str, Any]:
    figures, num_blocks = node.speed.figures, len(node.admission.served.span)
    found: dict[str, Any] = {"uplink_bytes_per_s": node.speed.uplink_bytes_per_s}
    if figures is not None:
        found["decode_steps_per_s"] = {
            str(rows): round(rate, 3) for rows, rate in figures.steps_per_s(num_blocks).items()
        }
        found["prompt_tokens_per_s"] = round(figures.prompt_tokens_per_s(num_blocks), 3)
    return found


def _memory() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):
        return None
