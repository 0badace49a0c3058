"""
Artifacts of exported checkpoints, by digest, in one folder.

    $XDG_CACHE_HOME/drbert-serve/artifacts/DIGEST

One process exports at a time: the folder is locked, and a second process waits and then takes what
the first one made. Export puts an artifact in its place when it is complete, so a folder that is
there is whole.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.artifact import Artifact, ArtifactError, read_artifact
from service.checkpoints.digest import export_digest
from service.checkpoints.exporter import ExportOptions, run_export
from service.checkpoints.source import ModelSource, is_checkpoint

log = logging.getLogger(__name__)


class CheckpointCache:
    """Opens models: artifacts as they are, and checkpoints by way of their cached artifacts."""

    def __init__(self, folder: Path | None = None, options: ExportOptions | None = None) -> None:
        self._folder = default_folder() if folder is None else folder
        self._options = options or ExportOptions()
        self._sources: dict[Path, str] = {}

    def open(self, source: str) -> Artifact:
        """Return the verified artifact of `PATH_OR_ID[@REVISION]`.

        A checkpoint is exported unless the cache has its artifact. Raises ArtifactError for an
        artifact that cannot be used, and BadInput, BadUsage or Unavailable for a checkpoint that
        cannot be exported.
        """
        folder = ModelSource.parse(source).folder()
        if not is_checkpoint(folder):
            return read_artifact(folder)
        artifact = self._exported(folder)
        self._sources[artifact.directory] = source
        return artifact

    def source_of(self, artifact: Artifact) -> str:
        """Return what an artifact was opened as: its folder, or the checkpoint that it is of."""
        return self._sources.get(artifact.directory, str(artifact.directory))

    def _exported(self, checkpoint: Path) -> Artifact:
        target = self._folder / export_digest(checkpoint, self._options)
        if (cached := _read_cached(target)) is not None:
            return cached
        with _locked(self._folder):
            # Another process may have exported it meanwhile.
            if (cached := _read_cached(target)) is not None:
                return cached
            shutil.rmtree(target, ignore_errors=True)
            run_export(checkpoint, target, self._options)
        return read_artifact(target)


def default_folder() -> Path:
    """Return the folder of cached artifacts in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "drbert-serve" / "artifacts"


def _read_cached(target: Path) -> Artifact | None:
    """Return a cached artifact, or None if there is none or it was changed."""
    if not target.exists():
        return None
    try:
        return read_artifact(target)
    except ArtifactError as error:
        log.warning("a cached artifact is made again", extra={"why": str(error)})
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing; wait for another holder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that exports", extra={"folder": str(folder)})
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
