"""The files of a run while it grows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from proof.evidence.store import RestartRecord, append_start, read_starts


def test_a_run_that_was_begun_before_a_fact_was_told_goes_on_without_it(tmp_path: Path) -> None:
    start = RestartRecord(
        restart=0,
        slot=0,
        load_order="bert drbert",
        instance="i",
        seconds=1.0,
        generator_cpu_share=0.1,
        throttled_us=0,
        dropped="",
        gpu_slowed="",
    )
    append_start(tmp_path, start)
    path = tmp_path / "starts.csv"
    path.write_text(
        "".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines())
    )
    append_start(tmp_path, replace(start, restart=1, gpu_slowed="heat"))
    assert read_starts(tmp_path) == [start, replace(start, restart=1)]
