"""The Dockerfile as text; tests/k8s/test_image.py builds it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


def test_hadolint_reports_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_change_of_a_source_file_does_not_fetch_the_requirements_again() -> None:
    """The requirements are installed in a layer before the one that copies the sources."""
    steps = [
        line
        for line in Path("Dockerfile").read_text().splitlines()
        if line.startswith(("COPY", "RUN", "FROM"))
    ]
    first = next(
        i for i, step in enumerate(steps) if "requirements.txt" in step and step.startswith("RUN")
    )
    assert first < steps.index("COPY . .")


@pytest.mark.parametrize("extra", ["gpu", "gpu,tracing"])
def test_the_requirements_of_extras_are_printed_for_pip(extra: str) -> None:
    printed = subprocess.run(
        [sys.executable, "k8s/requirements.py", extra], capture_output=True, text=True, check=True
    ).stdout
    assert "onnxruntime-gpu[cuda,cudnn]" in printed
    assert "openvino" in printed
    assert "torch" not in printed


def test_no_image_keeps_a_package_for_telemetry() -> None:
    """A step that installs OpenVINO installs its telemetry too.

    The same step removes it, because each layer stays in the image.
    """
    installing = [
        step for step in steps("RUN") if "requirements.txt" in step and "install.sh" in step
    ]
    assert len(installing) == 2
    for step in installing:
        assert (
            "uninstall --yes openvino-telemetry"
            in step.partition("--requirement requirements.txt")[2]
        )


def test_the_base_is_named_by_a_release_and_perhaps_a_digest() -> None:
    base = re.search(r"^ARG BASE=(\S+)$", Path("Dockerfile").read_text(), re.M)
    assert base
    assert re.fullmatch(r"debian:[a-z]+-slim(@sha256:[0-9a-f]{64})?", base[1])
    others = {words.split()[1] for words in steps("FROM")} - {
        words.split()[-1] for words in steps("FROM") if " AS " in words
    }
    assert others == {"${BASE}"}, "every image is built on BASE"


@pytest.mark.parametrize("pinned_before", [False, True])
@pytest.mark.parametrize(
    ("digest", "pins"), [(f"sha256:{'a1' * 32}", True), ("sha256:a1", False), ("", False)]
)
def test_the_base_is_pinned_only_to_a_digest_from_the_registry(
    tmp_path: Path, digest: str, pins: bool, pinned_before: bool
) -> None:
    before = re.sub(
        r"^(ARG BASE=[^@\n]+).*$",
        rf"\1@sha256:{'0' * 64}" if pinned_before else r"\1",
        Path("Dockerfile").read_text(),
        flags=re.M,
    )
    (tmp_path / "Dockerfile").write_text(before)
    # The real skopeo needs a registry.
    (tmp_path / "skopeo").write_text(
        '#!/bin/sh\n[ "$5" = docker://docker.io/library/debian:bookworm-slim ] && echo'
        f' "{digest}"\n'
    )
    (tmp_path / "skopeo").chmod(0o755)
    script = Path("k8s/pin_base.sh").resolve()
    done = subprocess.run(
        ["sh", script],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = (tmp_path / "Dockerfile").read_text()
    assert (done.returncode == 0) == pins, done.stderr
    expected = (
        re.sub(r"^ARG BASE=([^@\n]+).*$", rf"ARG BASE=\1@{digest}", before, flags=re.M)
        if pins
        else before
    )
    assert after == expected


def steps(name: str) -> list[str]:
    """Return the instructions of a kind in the Dockerfile, each on one line."""
    text = Path("Dockerfile").read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith(f"{name} ")]


def test_an_unknown_extra_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "k8s/requirements.py", "cuda"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "pyproject.toml has no extra cuda" in done.stderr
