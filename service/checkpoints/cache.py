"""
Artifacts of exported checkpoints, by digest, in one folder.

    $XDG_CACHE_HOME/drbert-serve/artifacts/DIGEST

One process exports at a time: the folder is locked, and a second process waits and then takes what
the first one made. Export puts an artifact in its place when it is complete, so a folder that is
there is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from command import Unavailable
from service.artifact import Artifact, ArtifactError, ArtifactUnreadable, read_artifact
from service.checkpoints.digest import export_digest
from service.checkpoints.exporter import ExportOptions, run_export
from service.checkpoints.source import ModelSource, is_checkpoint
from service.host.cache_folder import cache_folder

log = logging.getLogger(__name__)

REMEDY = "set DRBERT_ARTIFACT_CACHE to a folder that can be written"


class CheckpointCache:
    """Opens models: artifacts as they are, and checkpoints by way of their cached artifacts."""

    def __init__(self, folder: Path | None = None) -> None:
        self._given_folder = folder
        self._sources: dict[Path, tuple[str, ExportOptions]] = {}

    def fetch(self, source: str, options: ExportOptions | None = None) -> Artifact:
        """Return the verified artifact of `PATH_OR_ID[@REVISION]`.

        A checkpoint is exported with `options` unless the cache has its artifact. Raises
        ArtifactError for an artifact that cannot be used, and BadInput, BadUsage or Unavailable for
        a checkpoint that cannot be exported.
        """
        options = options or ExportOptions()
        folder = ModelSource.parse(source).folder()
        if not is_checkpoint(folder):
            return read_artifact(folder)
        artifact = self._exported(folder, options)
        self._sources[artifact.directory] = source, options
        return artifact

    def fetch_again(self, artifact: Artifact) -> Artifact:
        """Open what an artifact was opened as: its folder, or the checkpoint that it is of.

        A checkpoint that was saved again since is exported again, with the same options.
        """
        unchanged = str(artifact.directory), ExportOptions()
        return self.fetch(*self._sources.get(artifact.directory, unchanged))

    def _exported(self, checkpoint: Path, options: ExportOptions) -> Artifact:
        folder = self._given_folder or default_folder()
        digest = export_digest(checkpoint, options)
        target = folder / digest
        if (cached := _read_cached(target)) is not None:
            return cached
        with _locked(folder):
            # Another process may have exported it meanwhile.
            if (cached := _read_cached(target)) is not None:
                return cached
            _remove_abandoned_drafts(folder)
            shutil.rmtree(target, ignore_errors=True)
            run_export(checkpoint, target, options)
            if export_digest(checkpoint, options) != digest:
                shutil.rmtree(target, ignore_errors=True)
                raise Unavailable(
                    f"{checkpoint} was changed while it was exported; start again when it is"
                    " written."
                )
        return read_artifact(target)


def default_folder() -> Path:
    """Return the folder of cached artifacts in the user's cache; raises Unavailable."""
    try:
        return cache_folder("artifacts")
    except RuntimeError:  # a user without a home
        raise Unavailable(f"There is no home folder for cached artifacts; {REMEDY}.") from None


def _read_cached(target: Path) -> Artifact | None:
    """Return a cached artifact, or None if there is none or it was changed."""
    if not target.exists():
        return None
    try:
        return read_artifact(target)
    except ArtifactUnreadable:
        raise
    except ArtifactError as error:
        log.warning("a cached artifact is made again", extra={"why": str(error)})
        return None


def _remove_abandoned_drafts(folder: Path) -> None:
    """Remove what killed exports left, of any checkpoint; a draft that is in use is locked."""
    for draft in folder.glob(".*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is missing; wait for another holder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(
            f"{folder} for exported artifacts cannot be made ({error.strerror}); {REMEDY}."
        ) from None
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
