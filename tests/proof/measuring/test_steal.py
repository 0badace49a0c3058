from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proof.measuring import steal
from proof.measuring.steal import stolen_share, wait_for_calm


def test_a_restart_waits_until_little_is_stolen() -> None:
    shares: Iterator[float] = iter([0.4, 0.05, 0.01])
    wait_for_calm(600, lambda: next(shares), pause_s=0)
    assert list(shares) == []


def test_it_does_not_wait_longer_than_it_may() -> None:
    probes = 0

    def never() -> float:
        nonlocal probes
        probes += 1
        return 1.0

    assert wait_for_calm(0.01, never, pause_s=1) >= 0.01
    assert probes == 2
    assert wait_for_calm(0, never) == 0
    assert probes == 2


def test_it_does_not_wait_where_the_system_does_not_count_steal() -> None:
    assert wait_for_calm(600, lambda: None) < 600


def test_the_share_is_of_the_time_in_which_there_was_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"
    #                         user nice system idle iowait irq softirq steal guest guest_nice
    stat.write_text(
        "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 100 0 20 9000 0 0 0 50 0 0\ncpu1 500 0 0 0 0 0 0 900 0 0\n"
    )
    monkeypatch.setattr(steal, "STAT", stat)
    monkeypatch.setattr(
        steal, "SPIN", f"open({str(stat)!r}, 'w').write('cpu0 150 10 40 9500 0 0 0 70 0 0')"
    )
    assert stolen_share({0}) == pytest.approx(20 / (80 + 20))
    assert stolen_share({7}) is None
    stat.unlink()
    assert stolen_share({0}) is None
