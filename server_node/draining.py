"""Let the open sessions of a node move on before it leaves, or gives its blocks up for others.

1. Nothing new is begun: no session, no forward pass. Each open session's client is told on its stream, and the
   directory says `draining`.
2. Steps of open sessions go on. Their clients copy what is cached to a node that holds the same blocks
   (`transfers.py`), or have it computed again elsewhere, and close their sessions here when they are through.
3. A session that nothing happens in, and that nobody fetches, is ended: its client has what it takes to go on
   elsewhere. At the deadline all are.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from server_node.admission import Admission
from server_node.sessions import Session, SessionTable
from swarm_protocol.messages import Draining

logger = logging.getLogger(__name__)

IDLE_S = 5.0
"""Without a step, until a session is taken to be idle: longer than any pause of a client that generates, and than one
that was just told takes to ask for its pages."""

LOOK_S = 0.1
"""Between two looks at who is still here."""


async def drain_sessions(
    admission: Admission,
    sessions: SessionTable,
    timeout_s: float,
    announce: Callable[[], Awaitable[object]],
    on_count: Callable[[int], None],
) -> None:
    """Return when no session is open any more, or after `timeout_s`; what is open then goes on being served.

    `announce` says it in the directory; `on_count` is told how many sessions are still here whenever that changes. To
    begin sessions again, set `admission.leaves_at_s` to None.
    """
    clock = asyncio.get_running_loop().time
    admission.leaves_at_s = clock() + timeout_s
    for session in sessions:
        if session.link is not None:
            session.link.post(Draining(timeout_s))
    await announce()
    told = -1
    while True:
        for session in sessions:
            if _is_idle(session, clock()):
                _end(sessions, session)
        if len(sessions) != told:
            told = len(sessions)
            logger.info("leaving: %d sessions are still here", told)
            on_count(told)
        if not told or clock() >= admission.leaves_at_s:
            return
        await asyncio.sleep(LOOK_S)


def _is_idle(session: Session, now_s: float) -> bool:
    return not session.num_running and now_s >= session.active_s + IDLE_S


def _end(sessions: SessionTable, session: Session) -> None:
    link = session.link
    sessions.close(session)
    if link is not None:
        link.finish()
