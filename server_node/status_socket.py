"""The local socket over which a running node tells its status: a line of JSON per connection, to its own user only."""

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from server_node.status import NodeStatus, status_from
from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

_MAX_READERS = 8
_TIMEOUT_S = 5.0
_MAX_BYTES = 1024 * 1024


@contextlib.asynccontextmanager
async def status_socket(path: Path | None, status: Callable[[], NodeStatus]) -> AsyncIterator[None]:
    """Answer inside, at `path`. A node that cannot do so runs all the same."""
    if path is None:
        yield
        return
    num_readers = 0

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_readers
        num_readers += 1
        try:
            if num_readers <= _MAX_READERS:
                async with asyncio.timeout(_TIMEOUT_S):
                    writer.write(json.dumps(status().as_json()).encode() + b"\n")
                    await writer.drain()
        except (OSError, TimeoutError):
            logger.debug("who asked for the status went away")
        except Exception as error:
            logger.error("bug in the status", exc_info=error)
        finally:
            num_readers -= 1
            writer.close()

    try:
        server = await asyncio.start_unix_server(answer, sock=_bound(path))
    except OSError as error:
        logger.warning("`umbel-node status` will not find this node: %s: %s", path, error.strerror or error)
        yield
        return
    try:
        yield
    finally:
        server.close()
        _unlink(path)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _bound(path: Path) -> socket.socket:
    """Return a socket at `path`, of whatever was there before; the caller holds the lock that makes it this node's."""
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(made.fileno(), 0o600)  # before it has a name, so that nobody gets in meanwhile
        made.bind(str(path))
        path.chmod(0o600)
    except BaseException:
        made.close()
        raise
    return made


def read_status(path: Path) -> NodeStatus | None:
    """Return what the node at `path` says; None if it does not answer there yet. Raises ConfigError."""
    data = bytearray()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(_TIMEOUT_S)
            asking.connect(str(path))
            while len(data) <= _MAX_BYTES and (part := asking.recv(65536)):
                data += part
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise ConfigError(f"the node does not answer at {path}: {error.strerror or error}") from error
    try:
        return status_from(json.loads(data))
    except ValueError as error:
        raise ConfigError(f"the node at {path} answers with something else: {error}") from error
