"""The files of a run: what is written, and what earlier versions wrote."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proof.commands import main
from proof.evidence.store import (
    ROW_FIELDS,
    EvidenceRejected,
    Requests,
    RestartRecord,
    append_start,
    read_columns,
    read_starts,
    seal,
    write_manifest,
)
from proof.measuring.run import finish_run
from proof.verdict.judge import judge_run
from tests.proof.factories import write_evidence

OLD_NAMES = {"slice_id": "slice", "block_id": "tuple", "position": "place"}
"""Columns that had other names until schema 3 of the rows."""


def with_old_columns(requests: Path) -> None:
    """Write a sealed run's rows as versions before schema 3 wrote them."""
    table = pq.read_table(requests)
    names = [OLD_NAMES.get(name, name) for name in table.column_names]
    pq.write_table(table.rename_columns(names).replace_schema_metadata(None), requests)


def measurements(folder: Path) -> pa.Table:
    """Return a run's rows without its name, which holds the digest of its plan."""
    return pq.read_table(folder / "requests.parquet").drop_columns("run")


def with_old_header(rows: Path) -> None:
    """Give a restart's CSV file the header that versions before schema 3 wrote."""
    _, _, lines = rows.read_text().partition("\n")
    header = ",".join(OLD_NAMES.get(name, name) for name in ROW_FIELDS)
    rows.write_text(f"{header}\n{lines}")


def test_a_run_that_was_begun_before_a_fact_was_recorded_is_resumed_without_it(
    tmp_path: Path,
) -> None:
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


def test_new_evidence_has_the_columns_of_schema_4(tmp_path: Path) -> None:
    write_evidence(tmp_path / "sealed")
    sealed = pq.read_schema(tmp_path / "sealed" / "requests.parquet")
    assert tuple(sealed.names) == ROW_FIELDS
    assert {"slice_id", "block_id", "position"} < set(ROW_FIELDS)
    assert not set(OLD_NAMES.values()) & set(ROW_FIELDS)
    assert sealed.metadata[b"rows_schema_version"] == b"4"
    write_evidence(tmp_path / "growing", sealed=False)
    with (tmp_path / "growing/rows/000.csv").open() as file:
        assert tuple(next(csv.reader(file))) == ROW_FIELDS


def test_evidence_with_the_old_columns_is_judged_alike(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run", levels=("unloaded", "switchback-50"))
    before = judge_run(folder)
    with_old_columns(folder / "requests.parquet")
    write_manifest(folder)
    assert judge_run(folder) == before
    assert set(Requests(folder).of(0)) == set(ROW_FIELDS)


def test_a_run_that_was_begun_with_the_old_columns_is_sealed_with_the_new_ones(
    tmp_path: Path,
) -> None:
    whole = write_evidence(tmp_path / "whole")
    folder = write_evidence(tmp_path / "run", sealed=False)
    for rows in (folder / "rows").glob("00[0-4].csv"):
        with_old_header(rows)
    assert set(read_columns(folder / "rows/000.csv")) == set(ROW_FIELDS)
    verdict = finish_run(folder)
    assert verdict.levels == judge_run(whole).levels
    assert measurements(folder) == measurements(whole)


def test_a_sealed_run_with_the_old_columns_takes_further_rows(tmp_path: Path) -> None:
    whole = write_evidence(tmp_path / "whole")
    folder = write_evidence(tmp_path / "run", sealed=False)
    later = folder / "rows/007.csv"
    later.rename(folder / "later.csv")
    seal(folder)
    with_old_columns(folder / "requests.parquet")
    (folder / "rows").mkdir()
    (folder / "later.csv").rename(later)
    finish_run(folder)
    assert measurements(folder) == measurements(whole)


def test_rows_of_a_newer_schema_are_rejected_by_its_number(tmp_path: Path) -> None:
    folder = write_evidence(tmp_path / "run")
    table = pq.read_table(folder / "requests.parquet")
    newer = table.replace_schema_metadata({"rows_schema_version": "5"})
    pq.write_table(newer, folder / "requests.parquet")
    write_manifest(folder)
    with pytest.raises(EvidenceRejected, match=r"rows have schema 5.* reads up to 4"):
        main(["judge", str(folder)])
