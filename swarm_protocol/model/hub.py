"""Fetch a hub repository's files into the local cache: the small ones at once, a shard of weights when it is needed.

Only safetensors are ever asked for, no pickles and no code.
"""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from swarm_protocol.errors import CheckpointError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")

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
        cached = self.folder / file_name
        if cached.is_file():
            return cached
        try:
            path = huggingface_hub.hf_hub_download(
                self.repo_id, file_name, revision=self.commit, cache_dir=self.cache_dir
            )
        except _HUB_ERRORS as error:
            raise CheckpointError(
                f"{file_name} of {self.repo_id} is not in the local cache and cannot be downloaded: {error}"
            ) from error
        return Path(path)


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
