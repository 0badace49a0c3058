from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proof.evidence.gates import restart_breach
from proof.evidence.store import UNKNOWN, read_columns
from proof.plans.plan_file import read_plan
from tests.proof.factories import write_evidence


def breach_of(
    folder: Path,
    requests: int | None = None,
    share: float = 0.2,
    throttled_us: int = 0,
    gpu_slowed: str = "",
    **changes: Any,
) -> str:
    def change(row: dict[str, Any]) -> None:
        for name, value in changes.items():
            row[name] = value(row) if callable(value) else value

    write_evidence(folder, restarts=4, change=change, sealed=False)
    rows = read_columns(folder / "rows/000.csv")
    expected = {"unloaded": requests or len(rows["status"])}
    return restart_breach(
        read_plan(folder / "plan.toml"), rows, expected, share, throttled_us, gpu_slowed
    )


def test_a_quiet_restart_has_no_breach(tmp_path: Path) -> None:
    assert breach_of(tmp_path / "run") == ""


def test_of_several_failed_requests_the_first_one_scheduled_is_named(
    tmp_path: Path,
) -> None:
    write_evidence(
        tmp_path / "run",
        restarts=4,
        change=lambda row: row.update(status=503 if row["block_id"] in (9, 12) else 200),
        sealed=False,
    )
    path = tmp_path / "run/rows/000.csv"
    head, *lines = path.read_text().splitlines(keepends=True)
    expected = {"unloaded": len(lines)}
    plan = read_plan(tmp_path / "run/plan.toml")
    before = restart_breach(plan, read_columns(path), expected, 0.2, 0)
    path.write_text(head + "".join(reversed(lines)))
    assert "(unloaded.0.0.9.0)" in before
    assert restart_breach(plan, read_columns(path), expected, 0.2, 0) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": lambda row: 503 if row["block_id"] == 9 else 200}, "without a good answer"),
        ({"inference_us": 0.0}, "no inference time is known"),
        (
            {"first_of_shape": lambda row: int(row["block_id"] == 9 and row["slice_id"] == 0)},
            "measured requests ran in a batch of a new shape",
        ),
        ({"total_us": 1e6}, "took less than its server says"),
        ({"instance": lambda row: f"i{row['slice_id']}"}, "changed within the restart"),
        ({"scheduled_ns": lambda row: row["sent_ns"] - 300_000}, "requests went out 300 µs late"),
        (
            {"scheduled_ns": lambda row: row["sent_ns"] - (60_000 if row["arm"] == "bert" else 0)},
            "apart in lag",
        ),
        ({"throttled_us": 5}, "throttled for 5 µs"),
        ({"gpu_slowed": "heat power"}, "a GPU was slowed down by heat and power"),
        ({"share": 0.61}, "used 61% of a core"),
        ({"share": UNKNOWN}, "used of its core is not known"),
        ({"queue_us": 1e5}, "are more than its whole"),
        ({"requests": 9999}, "of 9999 requests were sent"),
    ],
)
def test_a_breach_is_reported_with_its_number(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in breach_of(tmp_path / "run", **changes)
