"""`umbel-node drain` and `status`: what is done to a node that runs on this machine, from another process."""

import json
import sys
import time

from server_node.run_file import find_node
from server_node.status import status_table
from server_node.status_socket import read_status
from swarm_protocol.errors import SwarmError

_DRAIN_LOOK_S = 0.2


def complain(problem: str) -> None:
    """Write the one line that says why a command did not do what it was asked for."""
    sys.stderr.write(f"umbel-node: error: {' '.join(problem.split())}\n")


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


def show_status(identity_path: str | None, *, is_json: bool) -> int:
    """Show what a node of this machine does now.

    Returns 0 if it is online, 1 if it is not yet or leaves, 2 if there is none or it does not answer.
    """
    try:
        with find_node(identity_path) as node:
            status = read_status(node.socket_path)
    except SwarmError as error:
        complain(str(error))
        return 2
    if status is None:
        complain("the node has just started, or leaves, and does not answer: try again")
        return 1
    print(json.dumps(status.as_json()) if is_json else status_table(status), flush=True)  # noqa: T201
    return status.exit_status
