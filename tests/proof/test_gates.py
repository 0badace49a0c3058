from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proof.evidence import Row, read_rows
from proof.gates import restart_breach
from proof.plan import Plan, read_plan
from tests.proof.worlds import write_evidence


def measured(folder: Path, **changes: Any) -> tuple[Plan, list[Row]]:
    def change(row: dict[str, Any]) -> None:
        for name, value in changes.items():
            row[name] = value(row) if callable(value) else value

    write_evidence(folder, restarts=4, change=change, sealed=False)
    return read_plan(folder / "plan.toml"), read_rows(folder / "rows/000.csv")


def test_a_quiet_restart_has_no_breach(tmp_path: Path) -> None:
    plan, rows = measured(tmp_path / "run")
    assert restart_breach(plan, rows, generator_cpu_share=0.2, throttled_us=0) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": lambda row: 503 if row["tuple"] == 9 else 200}, "without a good answer"),
        ({"total_us": 1e6}, "took less than its server says"),
        ({"instance": lambda row: f"i{row['slice']}"}, "the server changed within the restart"),
        ({"scheduled_ns": lambda row: row["sent_ns"] - 300_000}, "requests went out 300 µs late"),
        ({"scheduled_ns": lambda row: row["sent_ns"] - (60_000 if row["arm"] == "bert" else 0)}, "apart in lag"),
    ],
)
def test_a_breach_is_told_with_its_number(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    plan, rows = measured(tmp_path / "run", **changes)
    assert words in restart_breach(plan, rows, generator_cpu_share=0.2, throttled_us=0)


def test_throttling_a_busy_generator_and_missing_rows_are_breaches(tmp_path: Path) -> None:
    plan, rows = measured(tmp_path / "run")
    assert "throttled for 5 µs" in restart_breach(plan, rows, 0.2, 5)
    assert "used 61% of a core" in restart_breach(plan, rows, 0.61, 0)
    assert f"{len(rows) - 1} of {len(rows)} requests were sent" in restart_breach(plan, rows[:-1], 0.2, 0)
