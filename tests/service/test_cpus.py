from __future__ import annotations

import os
from pathlib import Path

from service import cpus


def test_a_quota_below_the_affinity_decides(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpus.usable(tmp_path) == 1


def test_without_a_quota_the_affinity_decides(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpus.usable(tmp_path) == len(os.sched_getaffinity(0))


def test_less_than_one_processor_is_still_one_thread(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("20000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpus.usable(tmp_path) == 1
