"""The number of usable processors, with fake cgroups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.host import cpus

AFFINITY = 8


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(AFFINITY)))


def usable(folder: Path, membership: str = "0::/\n", **files: str) -> int:
    """Return the number of usable processors with these cgroup files.

    `files` are below the mount; two underscores stand for a slash. `membership` is the content of
    /proc/self/cgroup.
    """
    mount = folder / "mount"
    for name, text in files.items():
        *folders, last = name.split("__")
        path = mount.joinpath(
            *folders, last.replace("_", ".", 1) if last != "cpu_max" else "cpu.max"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    mount.mkdir(exist_ok=True)
    (folder / "membership").write_text(membership)
    return cpus.usable(mount, folder / "membership")


@pytest.mark.parametrize(
    ("limit", "processors"),
    [
        ("150000 100000", 1),
        ("400000 100000", 4),
        ("20000 100000", 1),
        ("1600000 100000", AFFINITY),
        ("max 100000", AFFINITY),
        ("?", AFFINITY),
    ],
)
def test_the_second_versions_quota(limit: str, processors: int, tmp_path: Path) -> None:
    assert usable(tmp_path, cpu_max=f"{limit}\n") == processors


@pytest.mark.parametrize(
    ("limit_us", "processors"), [("20000", 1), ("300000", 3), ("-1", AFFINITY)]
)
def test_the_first_versions_quota(limit_us: str, processors: int, tmp_path: Path) -> None:
    membership = "4:memory:/\n3:cpu,cpuacct:/\n"
    assert (
        usable(
            tmp_path, membership, cpu__cpu_cfs_quota_us=limit_us, cpu__cpu_cfs_period_us="100000"
        )
        == processors
    )


@pytest.mark.parametrize(
    ("second", "first", "processors"),
    [("200000", "300000", 2), ("max", "300000", 3), ("400000", "-1", 4)],
)
def test_where_both_versions_are_mounted_the_smaller_quota_counts(
    second: str, first: str, processors: int, tmp_path: Path
) -> None:
    membership = "3:cpu,cpuacct:/\n0::/\n"
    assert (
        usable(
            tmp_path,
            membership,
            cpu_max=f"{second} 100000",
            cpu__cpu_cfs_quota_us=first,
            cpu__cpu_cfs_period_us="100000",
        )
        == processors
    )


def test_the_smallest_quota_of_nested_cgroups_counts(tmp_path: Path) -> None:
    membership = "0::/system.slice/drbert.service\n"
    assert usable(tmp_path, membership, system_slice__cpu_max="500000 100000") == AFFINITY, (
        "the quota is that of another cgroup"
    )
    (tmp_path / "mount/system.slice/drbert.service").mkdir(parents=True)
    (tmp_path / "mount/system.slice/cpu.max").write_text("300000 100000\n")
    (tmp_path / "mount/system.slice/drbert.service/cpu.max").write_text("200000 100000\n")
    assert cpus.usable(tmp_path / "mount", tmp_path / "membership") == 2
    (tmp_path / "mount/system.slice/drbert.service/cpu.max").write_text("max 100000\n")
    assert cpus.usable(tmp_path / "mount", tmp_path / "membership") == 3


def test_the_first_versions_quota_of_a_service_is_found_below_the_mount(tmp_path: Path) -> None:
    folder = tmp_path / "mount/cpu/docker/abc"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("250000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable(tmp_path, "3:cpu,cpuacct:/docker/abc\n") == 2


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpus.usable(tmp_path / "none", tmp_path / "nothing") == AFFINITY
