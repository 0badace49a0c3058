"""Fixtures that more than one file of tests uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.artifact import Artifact
from tests.worlds import write_artifact

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "reviews")
