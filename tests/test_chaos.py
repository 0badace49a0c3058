"""The runner of `make chaos`: its table is complete, and a long run can be resumed.

The scenarios themselves are not run here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from command import BadUsage, CommandError
from tests.chaos import __main__ as chaos
from tests.chaos.caller import Outcomes
from tests.chaos.scenarios import Row, make_row, trends


def responses(**statuses: int) -> Outcomes:
    """Return a record of responses: responses(_200=10) holds ten with status 200."""
    record = Outcomes()
    for name, count in statuses.items():
        record.statuses[int(name.removeprefix("_"))] = count
    return record


def test_a_stopped_run_is_resumed_and_a_broken_scenario_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def scenario(name: str, holds: bool, lost: int = 0) -> Row:
        ran.append(name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return make_row(name, "somehow", responses(_200=10), lost, "nothing to see", holds)

    plan = {"kill": lambda: scenario("kill", True), "reload": lambda: scenario("reload", False, 3)}
    monkeypatch.setattr(chaos, "plan", lambda long: plan)
    out = tmp_path / "page.md"
    with pytest.raises(KeyboardInterrupt):
        chaos.main(["--out", str(out)])
    with pytest.raises(CommandError, match="Broken: reload"):
        chaos.main(["--out", str(out), "--resume"])
    assert ran == ["kill", "reload", "reload"]
    page = out.read_text()
    assert "| accepted requests lost | 0 | 3 | **missed** |" in page
    assert "| kill | somehow | 10 | 0 | 0 | nothing to see |" in page
    assert page.count("python -m tests.chaos") == 1
    assert "somehow" in capsys.readouterr().out


def test_a_request_without_an_end_breaks_a_scenario_whatever_else_held() -> None:
    hung = responses(_200=5)
    hung.count(0, 60.0)
    assert not make_row("x", "y", hung, 0, "", holds=True).holds
    assert hung.requests == 6


def test_an_unknown_scenario_lists_the_known_ones() -> None:
    with pytest.raises(BadUsage, match="there are schemas, half requests, overload"):
        chaos.main(["--only", "nothing"])


def test_a_leak_is_distinguished_from_an_occasional_page() -> None:
    when = [30.0 * i for i in range(1, 61)]
    flat = [(at, 340_000_000, 0.05) for at in when]
    assert trends(flat, 1800)[0] == (0.0, 0.0, 0.0)
    pages = [
        (at, 340_000_000 + 4096 * (i > 20) + 4096 * (i > 35) + 4096 * (i > 50), 0.05)
        for i, at in enumerate(when)
    ]
    growth, low, high = trends(pages, 1800)[0]
    assert low == 0 < growth < high < 0.02
    leak = [(at, 340_000_000 + 4096 * i, 0.05) for i, at in enumerate(when)]
    growth, low, high = trends(leak, 1800)[0]
    assert 0 < low == pytest.approx(growth) == pytest.approx(high)
    jump = [(at, 340_000_000 + 5_000_000 * (i > 30), 0.05) for i, at in enumerate(when)]
    assert trends(jump, 1800)[0][0] > 1, "a single jump counts in full"
