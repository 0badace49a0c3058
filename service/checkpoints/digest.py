"""
The digest of an export: equal digests mean that the cached artifact is what an export would make.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.artifact import ARTIFACT_BYTES
from service.checkpoints.exporter import ExportOptions
from service.host import cpus
from service.host.files import hash_regular

SUFFIXES = frozenset({".json", ".model", ".onnx", ".safetensors"})
TEXT_FILES = frozenset({"merges.txt", "vocab.txt"})
"""Files of a checkpoint that export reads: weights, configuration and tokenizer."""
LOGS = frozenset(
    {"all_results.json", "eval_results.json", "evaluation.json", "test_results.json"}
    | {"train_results.json", "trainer_state.json", "training.json"}
)
"""Files in which trainers and evaluations keep their results next to a checkpoint."""
EXPORTER_PACKAGES = ("export", "graphs")
"""Packages whose code decides what an artifact holds."""


def export_digest(checkpoint: Path, options: ExportOptions) -> str:
    """Return 32 digits that name the export of a checkpoint's folder with these options.

    They change with the checkpoint's weights, configuration and tokenizer, with the options and the
    files that these name, and with the exporter's code.
    """
    parts = {
        "checkpoint": _hashes(_checkpoint_files(checkpoint)),
        "options": options.values(),
        "texts": _hashes(options.files()),
        "exporter": exporter_version(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def exporter_version() -> str:
    """Return a digest of the exporter's code."""
    digest = hashlib.sha256()
    for package in EXPORTER_PACKAGES:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(place).rglob("*")):
                if path.suffix in (".py", ".txt"):
                    digest.update(f"{package}/{path.relative_to(place).as_posix()}\n".encode())
                    digest.update(path.read_bytes())
    return digest.hexdigest()


def _checkpoint_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if (path.suffix in SUFFIXES or path.name in TEXT_FILES)
        and path.name not in LOGS
        and not path.is_dir()
    )


def _hashes(paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Return name and SHA-256 of each file."""
    paths = list(paths)
    with ThreadPoolExecutor(cpus.usable(), thread_name_prefix="sha256") as hashing:
        digests = hashing.map(lambda path: hash_regular(path, ARTIFACT_BYTES)[0], paths)
        return [(path.name, digest) for path, digest in zip(paths, digests, strict=True)]
