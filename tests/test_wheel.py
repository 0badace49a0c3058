"""The built wheel is complete, and its scripts work in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOT_COPIED = {".git", ".hypothesis", ".venv", "artifacts", "build", "evidence", "models"}
"""Folders of the repository's root that a build does not read; proof/evidence is a package."""
GENERATED = ("*.egg-info", ".*_cache", "__pycache__")
TYPED_PACKAGES = ("client", "export", "graphs", "proof", "service", "training")
PACKAGES = (*TYPED_PACKAGES, "loadtests")
NOT_INSTALLED = {"training/RESULTS.md", "training/results"}
"""What the packages' folders hold for readers of the repository only."""
SCRIPTS = (
    "drbert-serve",
    "drbert-classify",
    "drbert-compare",
    "drbert-export",
    "drbert-prove",
    "drbert-pretrain",
    "drbert-finetune",
    "drbert-evaluate",
    "drbert-experiment",
    "drbert-curves",
)
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


def build_wheel(source: Path, folder: Path) -> Path:
    """Build the wheel of a source folder or a source distribution; return its path."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, because setuptools writes into the folder that it builds from."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns(*GENERATED)
    for path in Path().iterdir():
        if path.name in NOT_COPIED | ignore(".", [path.name]):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from the copy."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-c", BUILD_SDIST, str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    [archive] = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the copy."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's packages, and its scripts under bin."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture(params=["an empty folder", "a folder with packages of the same names"])
def working_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of a user; packages in it have our names and cannot be imported."""
    if request.param != "an empty folder":
        for name in PACKAGES:
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise ImportError('not ours')\n")
    return tmp_path


def run(command: list[str], site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the wheel's packages on the path."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_works_in_any_folder(script: str, site: Path, working_directory: Path) -> None:
    done = run([sys.executable, str(site / "bin" / script), "--help"], site, working_directory)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_load_generator_is_in_the_wheel_and_imports_our_own_packages(
    site: Path, working_directory: Path
) -> None:
    locust = [sys.executable, "-P", "-m", "locust", "-f", str(site / "loadtests"), "--headless"]
    command = [*locust, "--host", "http://127.0.0.1:9", "--run-time", "1s"]
    done = run(command, site, working_directory)
    # It connects, to a port where nobody listens, after it has imported everything.
    assert "did not answer: Connection refused" in done.stderr, done.stderr
    assert "ImportError" not in done.stderr


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert set(package_files()) - names == set()
    assert {f"{package}/py.typed" for package in TYPED_PACKAGES} <= names
    assert {"atomic.py", "command.py", "proof/reports/style.css"} <= names


def package_files() -> Iterator[str]:
    """Yield the paths of all files that the packages need."""
    for package in PACKAGES:
        for path in Path(package).rglob("*"):
            is_for_readers = {str(path), *map(str, path.parents)} & NOT_INSTALLED
            if path.is_file() and "__pycache__" not in path.parts and not is_for_readers:
                yield path.as_posix()


def test_nothing_for_contributors_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist() if "/" in name}
    [metadata] = [folder for folder in folders if folder.endswith(".dist-info")]
    assert folders == {*PACKAGES, metadata}


def test_the_source_distribution_builds_the_same_wheel(
    sdist: Path, wheel: Path, tmp_path: Path
) -> None:
    rebuilt = build_wheel(sdist, tmp_path)
    assert rebuilt.name == wheel.name
    with zipfile.ZipFile(rebuilt) as archive, zipfile.ZipFile(wheel) as expected:
        assert sorted(archive.namelist()) == sorted(expected.namelist())
        for name in expected.namelist():
            assert archive.read(name) == expected.read(name), name


def test_the_source_distribution_holds_no_part_of_the_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        folders = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert not folders & {"tests", "benchmarks"}
    assert "service" in folders
