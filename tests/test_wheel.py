"""The console scripts work from the built wheel, next to packages that are named as ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "artifacts",
    "evidence",
    "*.egg-info",
    ".*_cache",
    "__pycache__",
)
PACKAGES = ("client", "export", "graphs", "proof", "service", "training")
SCRIPTS = (
    "drbert-serve",
    "drbert-classify",
    "drbert-export",
    "drbert-prove",
    "drbert-pretrain",
    "drbert-finetune",
)


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, because setuptools writes into what it builds from."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(".", source, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    [made] = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's packages, and its scripts under bin."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder of somebody's own, whose packages have our names and cannot be imported."""
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    return tmp_path


def run(
    command: list[str], site: Path, folder: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), **more}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_works_beside_packages_of_the_same_names(
    script: str, site: Path, elsewhere: Path
) -> None:
    done = run([sys.executable, str(site / "bin" / script), "--help"], site, elsewhere)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_load_generator_is_in_the_wheel_and_imports_our_own_packages(
    site: Path, elsewhere: Path
) -> None:
    locust = [sys.executable, "-P", "-m", "locust", "-f", str(site / "loadtests"), "--headless"]
    done = run([*locust, "--host", "http://127.0.0.1:9", "--run-time", "1s"], site, elsewhere)
    # Nobody listens there, which it finds out once it has imported everything.
    assert "Connection refused" in done.stderr, done.stderr
    assert "ImportError" not in done.stderr


def test_what_is_for_contributors_is_not_in_it_and_types_are(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert not folders & {"tests", "benchmarks", "k8s", "examples"}
    typed = {f"{package}/py.typed" for package in PACKAGES}
    data = {
        "loadtests/locustfile.py",
        "proof/reports/style.css",
        "proof/reports/templates/macros.html.j2",
        "proof/reports/templates/report.html.j2",
    }
    assert data | typed <= set(names)
