"""
Where a model comes from: an artifact's folder, a checkpoint's folder, or a hub id.

    PATH_OR_ID[@REVISION]
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from command import BadUsage, Unavailable, first_line
from service.artifact import CHECKPOINT_FILES, HUB_ID, MANIFEST

log = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Files of a hub's repository that are downloaded. Pickles are not among them."""
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = frozenset(
    {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model"}
    | {"spm.model", "sentencepiece.model"}
)
"""Files of which a tokenizer has at least one."""
LOCAL_FOLDERS = frozenset(
    {"artifacts", "build", "checkpoints", "dist", "models", "out", "output", "outputs", "runs"}
)
"""Names that folders usually have. Somebody may have the name on the hub, so an id under it is only
downloaded with a revision: a mistyped path would otherwise serve a stranger's model.
"""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, as a command line or a request names it."""

    location: str
    """A path, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Return the source of `PATH_OR_ID[@REVISION]`; an existing path may have an @ in it."""
        location, at, revision = text.rpartition("@")
        if not at or not location or not revision or Path(text).exists():
            return cls(text)
        return cls(location, revision)

    @property
    def path(self) -> Path:
        """The location as a path."""
        return Path(self.location)

    @property
    def name(self) -> str:
        """Name of the model if none is given: its folder's, or the id without the owner."""
        return self.path.name if self.is_hub_id else self.path.resolve().name

    @property
    def is_hub_id(self) -> bool:
        """Whether this is a model of the hub and not a path."""
        if not HUB_ID.fullmatch(self.location) or _exists(self.path) or _exists(self.path.parent):
            return False
        return self.revision is not None or self.path.parent.name not in LOCAL_FOLDERS

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a hub id, or the folder of a checkpoint without a manifest."""
        return self.is_hub_id or is_checkpoint(self.path)

    def folder(self) -> Path:
        """Return the source's folder; a hub id is downloaded into the hub's own cache.

        Raises BadUsage for a path with a revision, Unavailable if a hub id cannot be downloaded.
        """
        if self.is_hub_id:
            if self.revision is None and (similar := _similar_folder(self.path)) is not None:
                raise Unavailable(
                    f"{self.location} does not exist; did you mean {similar}? If it is a hub id,"
                    f" write {self.location}@main."
                )
            return download(self.location, self.revision)
        if self.revision is not None:
            raise BadUsage(
                f"{self.location} is not a hub id, so it has no revision {self.revision!r};"
                " revisions are for hub ids, as in owner/model@main."
            )
        return self.path


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds files of a checkpoint, and no artifact."""
    if _exists(folder / MANIFEST):
        return False
    return any(_exists(folder / name) for name in CHECKPOINT_FILES)


def download(hub_id: str, revision: str | None) -> Path:
    """Download a checkpoint from Hugging Face's hub and return its folder.

    What the hub's own cache holds is not downloaded again, and suffices where the hub cannot be
    reached. Raises Unavailable.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import snapshot_download

    # Subfolders hold other checkpoints or other formats.
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(HUB_PATTERNS),
        "ignore_patterns": ["*/*"],
    }
    # A commit never changes, so what the cache holds of it needs no look at the hub.
    if revision is not None and COMMIT.fullmatch(revision):
        with contextlib.suppress(OSError):
            cached = Path(snapshot_download(hub_id, local_files_only=True, **options))
            # A download that was interrupted leaves a part.
            if _is_complete(cached):
                return cached
    try:
        return Path(snapshot_download(hub_id, **options))
    except Exception as error:  # The library raises many kinds, some of requests and some its own.
        reason = getattr(error, "server_message", None) or first_line(error)
        raise Unavailable(
            f"{hub_id} is no folder, and it could not be downloaded from Hugging Face's hub:"
            f" {reason} Check the name; a private or gated model needs HF_TOKEN."
        ) from None


def _is_complete(folder: Path) -> bool:
    """Return whether a folder has a configuration, all its weights and a tokenizer."""
    names = {path.name for path in folder.iterdir()}
    if SHARDS in names:
        try:
            weights = set(json.loads((folder / SHARDS).read_bytes())["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return False
    else:
        weights = {WEIGHTS}
    has_tokenizer = bool(names & TOKENIZERS)
    return "config.json" in names and weights <= names and has_tokenizer


def _similar_folder(path: Path) -> Path | None:
    """Return a folder with almost the same path, for a path that may be misspelt."""
    for parent in get_close_matches(path.parent.name, _folders(Path()), cutoff=0.7):
        for child in get_close_matches(path.name, _folders(Path(parent)), n=1, cutoff=0.7):
            return Path(parent, child)
    return None


def _folders(directory: Path) -> list[str]:
    try:
        return [child.name for child in directory.iterdir() if child.is_dir()]
    except OSError:
        return []


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # Not readable, or no file can have such a name.
        return False
