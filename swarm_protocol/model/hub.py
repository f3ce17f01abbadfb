"""Fetch a hub repository's files into the local cache: the small ones at once, a shard of weights when it is needed.

Only safetensors are ever asked for, no pickles and no code.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from swarm_protocol.errors import CheckpointError

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")

_MAX_DOWNLOADS = 2
_SHA256 = re.compile(r"[0-9a-f]{64}")

# What the hub's library raises without a network are OSErrors.
_HUB_ERRORS = (HfHubHTTPError, HFValidationError, OSError)


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository at one commit: `folder` is its snapshot in the cache, which may lack shards."""

    repo_id: str
    commit: str
    folder: Path
    cache_dir: str | None

    def fetch(self, file_name: str) -> Path:
        """Return the path of a file, downloaded if the cache lacks it. Raises CheckpointError if it cannot be had."""
        return self.cached(file_name) or self._download(file_name)

    @property
    def pieces_folder(self) -> Path:
        """Where pieces of shards are kept that are not there as a whole; repositories share it."""
        return cache_folder(self.cache_dir) / "umbel-pieces"

    def cached(self, file_name: str) -> Path | None:
        """Return the path of a file that is in the hub library's cache as a whole."""
        path = self.folder / file_name
        return path if path.is_file() else None

    def _download(self, file_name: str) -> Path:
        for _ in range(_MAX_DOWNLOADS):
            try:
                path = Path(
                    huggingface_hub.hf_hub_download(
                        self.repo_id, file_name, revision=self.commit, cache_dir=self.cache_dir
                    )
                )
            except _HUB_ERRORS as error:
                raise CheckpointError(
                    f"{file_name} of {self.repo_id} is not in the local cache and cannot be downloaded: {error}"
                ) from error
            if _is_sound(path):
                return path
            logger.warning("%s of %s came with a wrong SHA-256 and is dropped", file_name, self.repo_id)
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise CheckpointError(f"{file_name} of {self.repo_id} comes with a wrong SHA-256 from the hub each time")


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder that is meant by `cache_dir`, where None is the hub library's own."""
    return Path(cache_dir or huggingface_hub.constants.HF_HUB_CACHE).expanduser()


def _is_sound(path: Path) -> bool:
    """Return whether a file has the SHA-256 that the hub library names its content by, which it does for big files."""
    wanted = path.resolve().name
    if not _SHA256.fullmatch(wanted):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == wanted


def open_repository(repo_id: str, *, revision: str | None = None, cache_dir: str | None = None) -> HubRepository:
    """Return the repository with its small files in the cache; without a network the cache alone is used.

    Raises CheckpointError if neither the hub nor the cache has it.
    """
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=list(SMALL_FILES)
            )
        )
    except _HUB_ERRORS as error:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder or GGUF file here, nor a hub repository that is in the local cache "
            f"or can be downloaded: {error}"
        ) from error
    return HubRepository(repo_id, folder.name, folder, cache_dir)
