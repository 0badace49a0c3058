"""From the noise of an A/A run to a plan that can show what it claims."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command import BadInput, BadUsage
from proof.commands import main
from proof.evidence.store import write_manifest
from proof.plans.plan import Level, Plan
from proof.plans.plan_file import read_plan, to_toml
from proof.sizing.pilot import Pilot, read_pilot
from proof.sizing.power import size_plan
from tests.proof.factories import LEVELS, write_evidence, write_plan

COPIES = ("bert", "bert-again", "drbert", "drbert-again")


def write_pilot(folder: Path, digests: tuple[str, ...] = ("a",) * 4, **how: object) -> Path:
    write_evidence(
        folder,
        **(
            {
                "restarts": 12,
                "noise": 0.05,
                "control": False,
                "levels": ("unloaded", "switchback-50"),
            }
            | how
        ),
    )
    models = {name: {"digest": digest} for name, digest in zip(COPIES, digests, strict=True)}
    (folder / "environment.json").write_text(json.dumps({"server": {"models": models}}))
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Pilot:
    return read_pilot(write_pilot(tmp_path_factory.mktemp("pilot") / "run"))


def test_a_pilot_estimates_position_effect_noise_and_gain(pilot: Pilot) -> None:
    noise = pilot.levels["unloaded"].noise["inference", "p50"]
    # The worlds' own: 1 % to −0.5 % by load position, 5 % from request to request.
    assert noise.position_effect == pytest.approx(0.015, abs=0.008)
    assert noise.w == pytest.approx(
        0.05 * 1.25, rel=0.35
    )  # a median is 1.25 times as noisy as a mean; the contrast as one arm
    assert noise.instance_sd < 0.01
    assert abs(noise.autocorrelation) < 0.2
    assert noise.reference_us == pytest.approx(1100, rel=0.1)
    # No queue in these worlds, so nothing is multiplied, and a gain is never below 1.
    assert pilot.levels["switchback-50"].noise["end_to_end", "p50"].gain == pytest.approx(
        1.0, abs=0.1
    )
    assert pilot.levels["unloaded"].noise["inference", "p50"].gain is None


def test_slices_that_differ_in_speed_are_a_matter_of_how_many_sets_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    speeds: dict[tuple[int, int], float] = {}

    def at_its_slices_speed(row: dict[str, Any]) -> None:
        speed = speeds.setdefault(
            (row["restart"], row["slice_id"]), 2 * math.exp(0.1 * rng.standard_normal())
        )
        row["done_ns"] = row["sent_ns"] + int((row["done_ns"] - row["sent_ns"]) * speed)

    monkeypatch.setitem(
        LEVELS,
        "switchback-50",
        LEVELS["switchback-50"].replace("slice_requests = 300", "slice_requests = 300\nsets = 6"),
    )
    folder = write_pilot(tmp_path / "run", levels=("switchback-50",), change=at_its_slices_speed)
    noise = read_pilot(folder).levels["switchback-50"].noise["end_to_end", "p50"]
    # Ten percent a slice, four slices a contrast and set: all of it is within, and more sets take
    # it away.
    assert noise.w / math.sqrt(6 * 300) == pytest.approx(0.1 / math.sqrt(6), rel=0.3)
    assert noise.instance_sd < 0.02


def claiming(folder: Path, margins: dict[str, dict[str, float]]) -> Plan:
    plan = write_plan(folder, control=False)
    return dataclasses.replace(
        plan, levels=(Level("unloaded", "unloaded", tuples=32, margins=margins),)
    )


def test_tighter_margins_cost_more_and_what_cannot_be_afforded_is_refused(
    pilot: Pilot, tmp_path: Path
) -> None:
    wide, cheap = size_plan(pilot, claiming(tmp_path, {"inference": {"p50": 0.05}}), 0.8, 1e9)
    tight, dear = size_plan(
        pilot, claiming(tmp_path, {"inference": {"p50": 0.008, "mean": 0.008}}), 0.8, 1e9
    )
    assert cheap.minutes < dear.minutes
    assert wide.restarts * wide.levels[0].tuples < tight.restarts * tight.levels[0].tuples
    assert min(cheap.power, dear.power) >= 0.8
    assert dear.power_at_quarter < dear.power
    with pytest.raises(
        BadInput, match=r"needs \d+ minutes; 0 can be spent. What is hardest to show is unloaded"
    ):
        size_plan(pilot, claiming(tmp_path, {"inference": {"p50": 0.01}}), 0.8, 0.01)
    with pytest.raises(BadInput, match=r"which give a power of .* only"):
        size_plan(pilot, claiming(tmp_path, {"inference": {"p50": 0.0005}}), 0.8, 1e9)


def test_a_floor_in_microseconds_widens_a_margin_that_is_tighter(
    pilot: Pilot, tmp_path: Path
) -> None:
    plan, _ = size_plan(
        pilot, claiming(tmp_path, {"inference": {"p50": 0.01}}), 0.8, 1e9, floor_us=33.0
    )
    assert plan.levels[0].margins["inference"]["p50"] == pytest.approx(0.03, rel=0.1)


def test_a_sized_plan_is_written_once_next_to_its_pilot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence, template, out = (
        write_pilot(tmp_path / "pilot"),
        write_plan(tmp_path / "template", control=False),
        tmp_path / "sized.toml",
    )
    arguments = [
        "plan",
        str(evidence),
        "--template",
        str(template.path),
        "--out",
        str(out),
        "--minutes",
        "100000",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "position effect" in printed
    assert "power" in printed.splitlines()[-1]
    plan = read_plan(out)
    assert plan.restarts % 4 == 0
    assert plan.levels[0].tuples % 64 == 0
    assert json.loads(plan.pilot_path.read_text())["restarts"] == 12
    with pytest.raises(BadUsage, match="a plan is not overwritten"):
        main(arguments)


def written_and_read(plan: Plan, path: Path) -> Plan:
    """Write a plan as a file, and return what is read from it under the same path and digest."""
    path.write_text(to_toml(plan, "A comment\nof two lines"), encoding="utf-8")
    return dataclasses.replace(read_plan(path), path=plan.path, digest=plan.digest)


def test_a_plan_is_the_same_after_it_was_written(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, levels=("unloaded", "mixed-50", "switchback-50", "capacity"))
    plan = dataclasses.replace(
        plan, settings={"DRBERT_WARM_UP_S": "0.3"}, server_cpus=(0,), restart_command='say "hello"'
    )
    assert written_and_read(plan, tmp_path / "again.toml") == plan
    assert (tmp_path / "again.toml").read_text().startswith("# A comment\n# of two lines\n")


@pytest.mark.parametrize("name", ["plan 🙂", "größer", 'a "quoted" \\ one', "with spaces"])
def test_a_plan_may_have_any_name(name: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(write_plan(tmp_path), name=name)
    assert written_and_read(plan, tmp_path / "again.toml") == plan


def test_a_run_of_two_models_or_of_too_few_restarts_is_no_pilot(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is no A/A run: its arms load 2 different artifacts"):
        read_pilot(write_pilot(tmp_path / "two", digests=("a", "a", "b", "b")))
    with pytest.raises(BadInput, match="holds 8 restarts that count; a pilot needs 12"):
        read_pilot(write_pilot(tmp_path / "few", restarts=8, levels=("unloaded",)))
    with pytest.raises(BadInput, match="does not say what every arm had loaded"):
        read_pilot(write_evidence(tmp_path / "unknown", restarts=12, control=False))


def test_a_published_pilot_follows_from_its_evidence_byte_by_byte() -> None:
    published = Path("evidence/published")
    pilot = read_pilot(published / "same-base")
    assert pilot.to_json() == (published / "twins-base" / "pilot.json").read_text()


@pytest.fixture(scope="module")
def newer_pilot(tmp_path_factory: pytest.TempPathFactory) -> Pilot:
    folder = tmp_path_factory.mktemp("newer") / "run"
    levels = ("mixed-50-busy", "short-slices")
    return read_pilot(write_pilot(folder, levels=levels, schedule_version=2, noise=0.02))


def newer_template(folder: Path) -> Plan:
    return write_plan(
        folder, control=False, levels=("mixed-50-busy", "short-slices"), schedule_version=2
    )


def test_a_pilot_of_short_slices_finds_beta_gain_and_the_engines_busy_share(
    newer_pilot: Pilot,
) -> None:
    level = newer_pilot.levels["switchback-50"]
    adjusted, plain = (
        level.noise[metric, "mean"] for metric in ("end_to_end_adjusted", "end_to_end")
    )
    # In these worlds latency is the computing time, times the dilation of its slice.
    assert adjusted.beta == pytest.approx(1.0, abs=0.05)
    assert adjusted.w < plain.w / 3
    assert adjusted.gain == pytest.approx(1.0, abs=0.02)
    assert level.busy_share == pytest.approx(0.5, abs=0.06)
    assert level.noise["dilation", "mean"].gain is None


def test_a_plan_of_short_slices_takes_rate_beta_and_gain_from_its_pilot(
    newer_pilot: Pilot, tmp_path: Path
) -> None:
    template = dataclasses.replace(newer_template(tmp_path), capacity_per_s=0.0)
    sized, _ = size_plan(newer_pilot, template, 0.8, math.inf)
    level = sized.level("switchback-50")
    assert level.rate_per_s == 400.0
    assert level.betas["end_to_end_adjusted"]["mean"] == pytest.approx(1.0, abs=0.05)
    assert set(level.gains) == {"end_to_end", "end_to_end_adjusted"}
    assert json.loads(newer_pilot.to_json())["levels"]["switchback-50"]["rate_per_s"] == 400.0
    path = tmp_path / "sized.toml"
    path.write_text(to_toml(sized, "sized"))
    assert read_plan(path).level("switchback-50").betas == level.betas


def test_a_pilot_of_another_schedule_or_another_load_is_refused(
    newer_pilot: Pilot, tmp_path: Path
) -> None:
    template = newer_template(tmp_path)
    with pytest.raises(BadInput, match="has schedule_version 1, its pilot 2"):
        size_plan(newer_pilot, dataclasses.replace(template, schedule_version=1), 0.8, math.inf)
    busy = dataclasses.replace(newer_pilot.levels["switchback-50"], busy_share=0.7)
    levels = {**newer_pilot.levels, "switchback-50": busy}
    with pytest.raises(BadInput, match=r"kept the engine busy for 70% of level switchback-50"):
        size_plan(dataclasses.replace(newer_pilot, levels=levels), template, 0.8, math.inf)
