"""The Dockerfile as it stands; tests/k8s/test_image.py builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_the_dockerfile_has_nothing_that_hadolint_minds() -> None:
    done = subprocess.run([Path(sys.executable).with_name("hadolint"), "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_file_that_changes_often_does_not_fetch_the_requirements_again() -> None:
    """In the Dockerfile the requirements are installed before the sources are copied."""
    steps = [line for line in Path("Dockerfile").read_text().splitlines() if line.startswith(("COPY", "RUN", "FROM"))]
    first = next(i for i, step in enumerate(steps) if "requirements.txt" in step and step.startswith("RUN"))
    assert first < steps.index("COPY . .")


@pytest.mark.parametrize("extra", ["gpu", "gpu,tracing"])
def test_extras_are_told_to_pip_as_pyproject_states_them(extra: str) -> None:
    said = subprocess.run([sys.executable, "k8s/requirements.py", extra], capture_output=True, text=True, check=True).stdout
    assert "onnxruntime-gpu[cuda,cudnn]" in said
    assert "openvino" in said
    assert "torch" not in said


def test_an_extra_that_is_not_there_is_named() -> None:
    done = subprocess.run([sys.executable, "k8s/requirements.py", "cuda"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "pyproject.toml has no extra cuda" in done.stderr
