"""What the owner of a running node can ask from another terminal: how it is, and to leave."""

import json
import sys
import time

from server_node.run_file import find_node
from server_node.status import lines
from swarm_protocol.errors import SwarmError

_DRAIN_LOOK_S = 0.2


def complain(problem: str) -> None:
    """Say in one line of stderr what is wrong."""
    sys.stderr.write(f"umbel-node: error: {' '.join(problem.split())}\n")


def show_status(identity_path: str | None, *, is_json: bool) -> int:
    """Show how a node of this machine is; return the exit status: 0 if it is online, 1 if not, 2 if there is none."""
    try:
        with find_node(identity_path) as node:
            state = node.state()
    except SwarmError as error:
        complain(str(error))
        return 2
    status = state.status if state is not None else None
    if is_json:
        print(json.dumps(status))  # noqa: T201
    elif state is None or status is None:
        print("state  loading, or joining the swarm")  # noqa: T201
    else:
        print("\n".join(lines(status, max(0.0, time.time() - state.reported_s))))  # noqa: T201
    return 0 if status is not None and status["state"] == "online" else 1


def drain(identity_path: str | None) -> int:
    """Let a node of this machine leave, and show how it gets on; return the exit status."""
    try:
        with find_node(identity_path) as node:
            node.ask_to_leave()
            shown = None
            while not node.has_ended():
                state = node.state()
                count = state.num_sessions if state is not None else None
                if count is not None and count != shown:
                    shown = count
                    print(f"{count} session{'' if count == 1 else 's'} still here", flush=True)  # noqa: T201
                time.sleep(_DRAIN_LOOK_S)
            print("the node has left", flush=True)  # noqa: T201
    except SwarmError as error:
        complain(str(error))
        return 2
    except KeyboardInterrupt:
        complain("the node goes on leaving by itself")
        return 1
    return 0
