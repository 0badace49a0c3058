"""constraints.txt locks every package that pyproject.toml can install, with its hashes."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT: dict[str, Any] = tomllib.loads(Path("pyproject.toml").read_text())
# The builds of torch differ by index and platform, so no hash fits all.
NOT_LOCKED = {"torch", "drbert-serve"}
# Lines that call pip, directly or by a variable or a script.
INSTALLS = re.compile(r"pip\b.* install |^\s+\S* ?\$\(PIP\) |install\.sh \S*python ")


def locked() -> dict[str, tuple[Version, list[str]]]:
    """Return the release and the hashes of each package."""
    packages: dict[str, tuple[Version, list[str]]] = {}
    text = re.sub(r"^#.*\n", "", Path("constraints.txt").read_text(), flags=re.M)
    for entry in re.split(r"(?<!\\)\n", text.strip()):
        requirement = Requirement(entry.partition(" \\\n")[0])
        [pin] = requirement.specifier
        assert pin.operator == "==", entry
        packages[canonicalize_name(requirement.name)] = (
            Version(pin.version),
            re.findall(r"--hash=(\S+)", entry),
        )
    return packages


LOCKED = locked()


def requirements() -> dict[str, list[Requirement]]:
    """Return what pyproject.toml requires, by the extra or the group that requires it."""
    project = PROJECT["project"]
    groups = {
        "": project["dependencies"],
        **project["optional-dependencies"],
        **PROJECT["dependency-groups"],
    }
    return {group: [Requirement(need) for need in needs] for group, needs in groups.items()}


def test_every_locked_package_has_sha256_hashes() -> None:
    assert len(LOCKED) > 100
    for name, (_, hashes) in LOCKED.items():
        assert hashes, f"{name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in hashes), name
        assert len(set(hashes)) == len(hashes), name


@pytest.mark.parametrize("group", requirements())
def test_the_ranges_of_pyproject_admit_the_locked_releases(group: str) -> None:
    for need in requirements()[group]:
        name = canonicalize_name(need.name)
        if name not in NOT_LOCKED:
            assert name in LOCKED, f"{need} is not locked; make lock"
            assert need.specifier.contains(LOCKED[name][0], prereleases=True), (
                f"{need}, and {LOCKED[name][0]} is locked; make lock"
            )


def test_the_requirements_of_every_package_are_locked() -> None:
    """Only installed packages are checked, which are all of this platform."""
    waiting = [need for needs in requirements().values() for need in needs]
    checked: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        if name in NOT_LOCKED or (name, frozenset(need.extras)) in checked:
            continue
        checked.add((name, frozenset(need.extras)))
        assert name in LOCKED, f"{need} is not locked; make lock"
        try:
            inner = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        environments = [{"extra": extra} for extra in need.extras or [""]]
        waiting += [
            each
            for each in map(Requirement, inner)
            if not each.marker or any(map(each.marker.evaluate, environments))
        ]
    assert len(checked) > 100


def test_the_service_requires_no_package_that_it_does_not_use() -> None:
    """The extra `standard` of uvicorn would add WebSockets, file watching and YAML."""
    needs = {str(canonicalize_name(need.name)): need for need in requirements()[""]}
    assert not needs["uvicorn"].extras
    assert needs["uvicorn"].specifier == Requirement("uvicorn==0.54.0").specifier, (
        "service/http/transport/protocol.py builds on its protocol class"
    )
    assert not {"websockets", "watchfiles"} & LOCKED.keys()


def test_an_extra_that_names_others_is_printed_as_their_requirements() -> None:
    printed = subprocess.run(
        [sys.executable, "k8s/requirements.py", "dev"], capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert not [line for line in printed if line.startswith("drbert-serve")]
    assert "locust>=2.47,<2.48" in printed
    assert "torch==2.13.0" in printed
    assert len(printed) == len(set(printed))


@pytest.mark.parametrize("path", ["Makefile", "Dockerfile", "examples/ci/verify-claim.yml"])
def test_every_installation_checks_the_hashes_of_its_packages(path: str) -> None:
    """torch is the exception.

    A folder, and a wheel that was built of one, have no hash and are installed alone.
    """
    text = Path(path).read_text().replace("\\\n", " ")
    lines = [
        line for line in text.splitlines() if not line.lstrip().startswith("#") and ":=" not in line
    ]
    steps = [step for line in lines for step in line.split("&&") if INSTALLS.search(step)]
    assert len(steps) >= 2
    for step in steps:
        hashed = re.search(r"--constraint (\.venv/)?constraints\.txt|--require-hashes", step)
        folder = re.search(r"""(^|[\s'"])\.(\[|['"\s]|$)|\.whl""", step)
        local = (
            folder
            and "--no-deps" in step
            and ("--no-build-isolation" in step or "--no-index" in step)
        )
        assert bool(hashed) != bool(local) or "torch==2.13.0" in step, step


@pytest.mark.parametrize("path", ["examples/ci/verify-claim.yml", ".github/workflows/check.yml"])
def test_a_workflow_names_actions_by_commit(path: str) -> None:
    used = re.findall(r"uses: (\S+)(.*)", Path(path).read_text())
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), (
            f"{action} names a tag, which moves"
        )
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action} does not name its release"


def test_the_workflow_only_calls_make_and_may_not_write() -> None:
    workflow = yaml.safe_load(Path(".github/workflows/check.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    [job] = workflow["jobs"].values()
    steps = [step["run"] for step in job["steps"] if "run" in step]
    assert steps == ["make check", "make test"]
