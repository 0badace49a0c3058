"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.artifact import Artifact
from tests.factories import write_artifact

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may depend on which engine happens to be the faster one.
os.environ.setdefault("DRBERT_MEASURE_ENGINES", "false")

# What a module of tests imports, directly or by other modules of tests, says what it needs.
NEEDS = {
    "torch": {"torch", "transformers", "accelerate", "datasets", "export", "training"},
    "process": {"subprocess", "multiprocessing", "playwright", "locust", "psutil"},
}
FOLLOWED = ("tests", "benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="only tests that need no torch and start no process"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--quick") and collection_path.suffix == ".py" and needs(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with what its module needs: `pytest -m "not torch"` leaves those out."""
    for item in items:
        for name in needs(item.path):
            item.add_marker(name)


@functools.cache
def needs(module: Path) -> frozenset[str]:
    """Return the markers of NEEDS for a module of tests."""
    imported = frozenset(imports(module, frozenset()))
    packages = {name.partition(".")[0] for name in imported}
    return frozenset(marker for marker, heavy in NEEDS.items() if packages & heavy)


def imports(module: Path, seen: frozenset[Path]) -> Iterator[str]:
    """Yield the modules that a module imports, and those that modules of FOLLOWED import there."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(name), names=names):
                yield name
                paths = [Path(name.replace(".", "/") + ".py")]
                paths += [Path(name.replace(".", "/"), f"{alias.name}.py") for alias in names]
                for path in paths:
                    if name.startswith(FOLLOWED) and path.is_file() and path not in seen:
                        yield from imports(path, seen | {path})


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "reviews")
