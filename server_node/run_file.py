"""The file by which a running node of this machine is found: its process, and how many sessions it still has.

It lies beside the identity file, or, for a node without one, in a folder of its user's. The node holds a lock on it for
as long as it lives, so a file that a killed node left behind is told from that of a running one, and a process id in it
is never another program's.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from swarm_protocol.errors import ConfigError

logger = logging.getLogger(__name__)

_SUFFIX = ".run"
_SOCKET_SUFFIX = ".sock"
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class RunState:
    """What a node says of itself; `num_sessions` are still here while it `is_leaving`, None if not known yet."""

    pid: int
    is_leaving: bool = False
    num_sessions: int | None = None


class RunFile:
    """The node's own hand on its file; `descriptor` None where none can be written, and `socket_path` then, too."""

    def __init__(self, descriptor: int | None, socket_path: Path | None = None) -> None:
        self._descriptor = descriptor
        self.socket_path = socket_path
        self._write(RunState(os.getpid()))

    def leaving(self, num_sessions: int | None = None) -> None:
        """Say that the node leaves, and how many sessions are still here."""
        self._write(RunState(os.getpid(), True, num_sessions))

    def _write(self, state: RunState) -> None:
        if self._descriptor is None:
            return
        text = json.dumps({"pid": state.pid, "is_leaving": state.is_leaving, "num_sessions": state.num_sessions})
        try:
            # Always as long as the longest, so that nobody reads the end of an older text.
            os.pwrite(self._descriptor, text.ljust(_MAX_BYTES // 8).encode(), 0)
        except OSError as error:
            logger.warning("the run file cannot be written: %s", error.strerror)


@contextlib.contextmanager
def run_file(identity_path: str | None) -> Iterator[RunFile]:
    """Be found inside, by `find_node`. Raises ConfigError if a node runs with this identity already."""
    path = _path_of(identity_path)
    try:
        if identity_path is None:
            _make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        logger.warning("`umbel-node drain` will not find this node: %s: %s", path, error.strerror)
        yield RunFile(None)
        return
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            raise ConfigError(f"a node runs with the identity file {identity_path} already: name another one")
        yield RunFile(descriptor, path.with_suffix(_SOCKET_SUFFIX))
    finally:
        if identity_path is None:  # another node may be waiting at the one beside an identity
            path.unlink(missing_ok=True)
        os.close(descriptor)


class RunningNode:
    """A node of this machine, as another process sees it; a context manager."""

    def __init__(self, descriptor: int, socket_path: Path) -> None:
        self._descriptor = descriptor
        self.socket_path = socket_path

    def __enter__(self) -> "RunningNode":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        if not _lock(self._descriptor, fcntl.LOCK_SH):
            return False
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return True

    def state(self) -> RunState | None:
        """Return what the node says; None if that cannot be read now."""
        try:
            values = json.loads(os.pread(self._descriptor, _MAX_BYTES, 0))
            return RunState(int(values["pid"]), bool(values["is_leaving"]), values["num_sessions"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ask_to_leave(self) -> None:
        """Let the node drain, unless it does already: a second signal would end it at once. Raises ConfigError."""
        state = self.state()
        if state is None:
            raise ConfigError("the node has just started: try again")
        if state.is_leaving or self.has_ended():
            return
        try:
            os.kill(state.pid, signal.SIGTERM)
        except ProcessLookupError:
            return
        except PermissionError:
            raise ConfigError(f"process {state.pid} is another user's: run this as that user") from None


def find_node(identity_path: str | None) -> RunningNode:
    """Return the node that runs with this identity file, or the only one without any. Raises ConfigError."""
    if identity_path is not None:
        node = _opened(_path_of(identity_path))
        if node is None:
            raise ConfigError(f"no node runs with the identity file {identity_path}")
        return node
    # In a folder that anybody could have made, only this user's own files say whom to signal.
    paths = [path for path in sorted(_folder().glob(f"*{_SUFFIX}")) if path.lstat().st_uid == os.getuid()]
    nodes = [node for path in paths if (node := _opened(path)) is not None]
    if len(nodes) == 1:
        return nodes[0]
    for node in nodes:
        node.__exit__()
    if nodes:
        raise ConfigError(
            f"{len(nodes)} nodes without an identity file run here: send SIGTERM to the one that is meant"
        )
    raise ConfigError("no node without an identity file runs here: name the --identity that it was started with")


def _opened(path: Path) -> RunningNode | None:
    try:
        node = RunningNode(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), path.with_suffix(_SOCKET_SUFFIX))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not node.has_ended():
        return node
    node.__exit__()
    return None


def _path_of(identity_path: str | None) -> Path:
    return _folder() / f"{os.getpid()}{_SUFFIX}" if identity_path is None else Path(f"{identity_path}{_SUFFIX}")


def _folder() -> Path:
    return Path(tempfile.gettempdir(), f"umbel-{os.getuid()}")


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(1, "the folder is not this user's alone")


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
