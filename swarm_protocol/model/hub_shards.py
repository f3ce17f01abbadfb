"""Read tensors of a hub repository, downloading no more of its shards than is wanted.

A shard that is in the hub library's cache as a whole is read there. Of others the header is downloaded, and then the
wanted tensors, neighbours in one request; a tensor is a piece of the disk cache, or several if it is big.
"""

import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256

import torch

from swarm_protocol.errors import CheckpointError
from swarm_protocol.model.hub import HubRepository
from swarm_protocol.model.piece_cache import Piece, PieceCache, PieceWriter
from swarm_protocol.model.range_reads import NoRangesError, RemoteFacts, RemoteFile
from swarm_protocol.model.safetensors_files import (
    HEADER_START,
    MAX_HEADER_BYTES,
    DiskRoom,
    TensorEntry,
    header_size,
    parse_header,
    read_header,
    read_tensor,
    tensor_of,
)

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 * 1024 * 1024
"""At most in one piece: what is lost when the process ends in the middle."""

REQUEST_BYTES = 64 * 1024 * 1024
"""At most in one request of several pieces: large enough that waiting for answers does not count."""

WHOLE_SHARE = 0.9
"""From this share of a shard on, it is downloaded as a whole, and the hub library keeps it."""

_SLEEP_S = 0.5
_PLAIN_ETAG = re.compile(r"[0-9A-Za-z]{8,128}")


class HubShards:
    """The shards of a repository. Any thread may read from it; one at a time may prepare.

    `progress` counts the bytes of a download. Whole shards are only fetched where the disk cache has no bound, since
    the hub library's cache has none.
    """

    def __init__(
        self, repository: HubRepository, cache: PieceCache, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self._repository = repository
        self._cache = cache
        self._download = _Download(cache, progress or (lambda done, total: None))
        self._remotes: dict[str, RemoteFile] = {}
        self._shards: dict[str, _Shard] = {}
        self._whole: dict[str, Mapping[str, TensorEntry]] = {}

    def entries(self, file_name: str) -> Mapping[str, TensorEntry]:
        """Return the tensors of a shard by name. Raises CheckpointError if its header cannot be had or read."""
        path = self._repository.cached(file_name)
        if path is not None:
            if file_name not in self._whole:
                self._whole[file_name] = read_header(path)
            return self._whole[file_name]
        if file_name not in self._shards:
            try:
                self._shards[file_name] = self._read_header(file_name)
            except NoRangesError:
                self._fetch_whole(file_name)
                return self.entries(file_name)
        return self._shards[file_name].entries

    def prepare(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> None:
        """Have the tensors of these shards on disk, and keep them there. Raises CheckpointError."""
        shards: dict[str, _Shard] = {}
        for file_name, entries in wanted.items():
            self.entries(file_name)
            if self._repository.cached(file_name) is not None:
                continue
            shard = self._shards[file_name]
            size_bytes = sum(entry.size_bytes for entry in entries)
            if self._cache.max_bytes is None and size_bytes >= WHOLE_SHARE * shard.facts.size_bytes:
                self._repository.fetch(file_name)
            else:
                shards[file_name] = shard
        pieces = [piece for name, shard in shards.items() for piece in (shard.header, *shard.pieces(wanted[name]))]
        missing = self._cache.claim(pieces)
        self._download.begin(sum(piece.size_bytes for piece in missing))
        for file_name, shard in shards.items():
            try:
                for request in _requests(piece for piece in missing if piece.file == shard.folder):
                    self._fetch(file_name, shard.facts, request)
            except NoRangesError:
                self._fetch_whole(file_name)
        self._download.begin(0)

    def disk_room(self, wanted: Mapping[str, Sequence[TensorEntry]]) -> DiskRoom | None:
        """Return what `prepare` needs of the disk, None if every shard is there as a whole. Raises CheckpointError."""
        pieces: list[Piece] = []
        for file_name, entries in wanted.items():
            self.entries(file_name)
            if self._repository.cached(file_name) is None:
                shard = self._shards[file_name]
                pieces += [shard.header, *shard.pieces(entries)]
        if not pieces:
            return None
        needed_bytes = sum(piece.disk_bytes for piece in pieces)
        return DiskRoom(needed_bytes, self._cache.room_bytes(self._folder()), self._cache.max_bytes is not None)

    def are_here(self, wanted: Mapping[str, Collection[str]]) -> bool:
        """Whether tensors, named by shard, are in the cache; not, where a header would have to be asked for."""
        return all(self._are_here(file_name, names) for file_name, names in wanted.items())

    def _are_here(self, file_name: str, names: Collection[str]) -> bool:
        if self._repository.cached(file_name) is not None:
            return True
        if file_name not in self._shards:
            noted = _parse_note(self._cache.noted(self._note_name(file_name)))
            if noted is None or not self._cache.has([self._header_of(*noted)]):
                return False
        entries = self.entries(file_name)
        shard = self._shards[file_name]
        return all(name in entries for name in names) and self._cache.has(shard.pieces(entries[name] for name in names))

    def _header_of(self, facts: RemoteFacts, end: int) -> Piece:
        return Piece(f"{self._folder()}/{_content_name(facts.etag)}", 0, end)

    def read(self, file_name: str, entry: TensorEntry) -> torch.Tensor:
        """Return a tensor, downloaded if it was not prepared or if the disk damaged it. Raises CheckpointError."""
        self.entries(file_name)
        path = self._repository.cached(file_name)
        if path is not None:
            return read_tensor(path, entry)
        data = torch.empty(entry.size_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy().data)
        shard = self._shards[file_name]
        for piece in shard.pieces([entry]):
            begin = piece.start - entry.offset
            self._read_piece(file_name, shard.facts, piece, view[begin : begin + piece.size_bytes])
        return tensor_of(data, entry)

    def _read_piece(self, file_name: str, facts: RemoteFacts, piece: Piece, view: memoryview) -> None:
        if self._cache.read_into(piece, view):
            return
        self._fetch(file_name, facts, [piece])
        if not self._cache.read_into(piece, view):
            raise CheckpointError(f"the disk does not keep what is written: {self._cache.folder / piece.path}")

    def _read_header(self, file_name: str) -> "_Shard":
        """Return a shard by what is noted of it and its header in the cache, or else by what the hub says."""
        noted = _parse_note(self._cache.noted(self._note_name(file_name)))
        if noted is None:
            facts = self._remote(file_name).facts()
            start = bytearray()
            self._remote(file_name).read(0, min(HEADER_START, facts.size_bytes), start.extend)
            noted = facts, HEADER_START + header_size(file_name, bytes(start), facts.size_bytes)
        facts, end = noted
        header = self._header_of(facts, end)
        data = bytearray(end)
        self._read_piece(file_name, facts, header, memoryview(data))
        try:
            entries = parse_header(file_name, bytes(data[HEADER_START:]), facts.size_bytes)
        except CheckpointError:
            self._cache.drop(header)  # it may have come wrong, and would be so for ever
            raise
        note = json.dumps({"size": facts.size_bytes, "etag": facts.etag, "header_end": end})
        self._cache.note(self._note_name(file_name), note)
        return _Shard(header.file, facts, header, entries)

    def _fetch(self, file_name: str, facts: RemoteFacts, pieces: Sequence[Piece]) -> None:
        remote = self._remote(file_name)
        found = remote.facts()
        if found != facts:
            self._cache.note(self._note_name(file_name), "")
            raise CheckpointError(
                f"{file_name} of {self._repository.repo_id} changed on the hub while it was downloaded: {found.etag} "
                f"of {found.size_bytes} bytes, not {facts.etag} of {facts.size_bytes}"
            )
        self._download.run(remote, pieces)

    def _fetch_whole(self, file_name: str) -> None:
        if self._cache.max_bytes is not None:
            raise CheckpointError(
                f"{file_name} of {self._repository.repo_id} can only be downloaded as a whole, since its server "
                "ignores ranges, and whole files are not kept while the disk cache has a bound"
            )
        logger.warning("the server of %s ignores ranges: it is downloaded as a whole", file_name)
        self._repository.fetch(file_name)

    def _remote(self, file_name: str) -> RemoteFile:
        if file_name not in self._remotes:
            repository = self._repository
            self._remotes[file_name] = RemoteFile(
                repository.repo_id, repository.commit, file_name, self._download.sleep
            )
        return self._remotes[file_name]

    def _note_name(self, file_name: str) -> str:
        return f"{self._folder()}/{self._repository.commit}/{file_name}.json"

    def _folder(self) -> str:
        return "models--" + self._repository.repo_id.replace("/", "--")


class _Shard:
    """A shard of which the header is known."""

    def __init__(self, folder: str, facts: RemoteFacts, header: Piece, entries: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.facts = facts
        self.header = header
        self.entries = entries

    def pieces(self, entries: Iterable[TensorEntry]) -> list[Piece]:
        """Return the pieces that tensors are in: the same ones whatever else is wanted."""
        return [
            Piece(self.folder, start, min(start + PIECE_BYTES, entry.offset + entry.size_bytes))
            for entry in entries
            for start in range(entry.offset, entry.offset + entry.size_bytes, PIECE_BYTES)
        ]


class _Download:
    """Writes what comes from the hub into the cache, and tells how it gets on."""

    def __init__(self, cache: PieceCache, progress: Callable[[int, int], None]) -> None:
        self._cache = cache
        self._progress = progress
        self._done = self._total = 0

    def begin(self, total_bytes: int) -> None:
        self._done, self._total = 0, total_bytes

    def run(self, remote: RemoteFile, pieces: Sequence[Piece]) -> None:
        """Download neighbouring pieces in one request; what is whole stays if it fails. Raises CheckpointError."""
        with _Splitter(self._cache, pieces) as splitter:

            def receive(data: memoryview) -> None:
                splitter.write(data)
                self._count(len(data))

            remote.read(pieces[0].start, pieces[-1].end, receive)

    def sleep(self, seconds: float) -> None:
        """Wait; whoever listens to the progress may end it meanwhile."""
        ends_s = time.monotonic() + seconds
        while (left_s := ends_s - time.monotonic()) > 0:
            self._count(0)
            time.sleep(min(left_s, _SLEEP_S))

    def _count(self, num_bytes: int) -> None:
        # What nobody announced, as headers and a damaged piece, does not count.
        self._done = min(self._done + num_bytes, self._total)
        self._progress(self._done, self._total)


class _Splitter:
    """Cuts bytes that come one after the other into neighbouring pieces; one that is whole is in the cache at once."""

    def __init__(self, cache: PieceCache, pieces: Sequence[Piece]) -> None:
        self._cache = cache
        self._left = deque(pieces)
        self._writer: PieceWriter | None = None
        self._open = ExitStack()

    def __enter__(self) -> "_Splitter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, data: memoryview) -> None:
        while data:
            if self._writer is None:
                self._writer = self._open.enter_context(self._cache.writing(self._left.popleft()))
            part = data[: self._writer.num_missing]
            self._writer.write(part)
            data = data[len(part) :]
            if not self._writer.num_missing:
                self._open.close()
                self._writer = None


def _requests(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield the pieces of a file in groups without gaps that are not too big for one request."""
    group: list[Piece] = []
    for piece in sorted(pieces):
        if group and (piece.start != group[-1].end or piece.end - group[0].start > REQUEST_BYTES):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _content_name(etag: str) -> str:
    return etag if _PLAIN_ETAG.fullmatch(etag) else sha256(etag.encode()).hexdigest()


def _parse_note(text: str | None) -> tuple[RemoteFacts, int] | None:
    try:
        fields = json.loads(text or "")
        noted = RemoteFacts(int(fields["size"]), str(fields["etag"])), int(fields["header_end"])
    except (ValueError, KeyError, TypeError):
        return None
    return noted if HEADER_START < noted[1] <= HEADER_START + MAX_HEADER_BYTES else None
