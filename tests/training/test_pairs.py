"""Designs are compared by pairs of runs that begin alike, and the page says what that shows."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from command import BadInput
from tests.training.factories import TEXT, write_probe_tasks
from training import pairs, pairs_page
from training.experiment import main, read_toml
from training.pairs import (
    ACCURACY,
    MEASURED,
    READ_OUT,
    Beginning,
    PairedExperiment,
    Record,
    Unit,
    append_record,
    begin,
    begun_pairs,
    check_pair,
    measure,
    planned_units,
    read_paired,
    read_records,
    remaining,
    run_pairs,
)
from training.readout import ReadOut

EXPERIMENT = """
kind = "pairs"
reference = "none"
longer = "none-longer"
claim = "drbert"
control = "convbert"
question = "What is the decoder worth?"
notes = "Earlier: nothing."
[optimisation]
steps = 6
checkpoint_every = 3
average = 2
[arm]
none = { config = "tiny-none.toml", pairs = 2 }
none-longer = { config = "tiny-none.toml", pairs = 1, steps_factor = 1.5 }
drbert = { config = "tiny-drbert.toml", pairs = 2 }
retro = { config = "tiny-retro.toml", pairs = 1 }
convbert = { config = "tiny-convbert-drbert.toml", pairs = 1 }
"""


def read(path: Path, text: str = EXPERIMENT) -> PairedExperiment:
    path.write_text(text)
    return read_paired(path, read_toml(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_probe_tasks(tmp_path_factory.mktemp("data"))
    for shard in TEXT.glob("*.gz"):
        shutil.copy(shard, folder)
    return folder


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml, and out, in which all of it is done."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.readout.ReadOut", lambda: ReadOut(steps=2, warmup_steps=1))
        experiment = read(folder / "small.toml")
        run_pairs(experiment, data, folder / "out", folder / "out/units.csv")
    return folder


def record(arm: str, pair: int, loss: float = 5.0, machine: str = "m") -> Record:
    measured = {**dict.fromkeys(MEASURED, 0.5), READ_OUT: loss, ACCURACY: 0.5 + loss / 1000}
    run = dict.fromkeys(pairs.RUN_COLUMNS, "1")
    return Record(arm, pair, Beginning(machine, "c", "b", "w", "s"), run, measured)


def test_every_unit_has_a_row_and_is_not_run_again(
    done: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(pairs, "pretrain", never)
    experiment = read_paired(done / "small.toml", read_toml(done / "small.toml"))
    run_pairs(experiment, data, done / "out", done / "out/units.csv")
    records = read_records(done / "out/units.csv")
    assert [(each.arm, each.pair) for each in records] == [
        ("none", 1),
        ("none-longer", 1),
        ("drbert", 1),
        ("retro", 1),
        ("convbert", 1),
        ("none", 2),
        ("drbert", 2),
    ]
    assert [each.run["steps"] for each in records] == ["6", "9", *["6"] * 5]
    assert not list((done / "out").glob("pretraining/*/progress"))
    assert remaining(experiment, done / "out", records) == "7 units are done and 0 are left."


def test_the_runs_of_a_pair_begin_with_the_same_weights_text_and_masks(done: Path) -> None:
    records = read_records(done / "out/units.csv")
    begun = begun_pairs(done / "out", records)
    first, second = begun[1], begun[2]
    assert len({each.batch for each in first.values()}) == 1
    assert first["none"].weights == first["drbert"].weights == first["retro"].weights
    assert first["convbert"].weights != first["none"].weights
    assert second["none"].weights == second["drbert"].weights != first["none"].weights
    assert second["none"].batch == second["drbert"].batch != first["none"].batch
    # training.json, which pretraining wrote by itself, says the same.
    for each in records:
        folder = done / f"out/pretraining/{each.arm}-{each.pair}/checkpoint"
        summary = json.loads((folder / "training.json").read_text())
        assert summary["first_step"] == {
            "weights": each.beginning.weights,
            "batch": each.beginning.batch,
        }


def test_parts_that_were_measured_before_an_interruption_are_kept(
    done: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_paired(done / "small.toml", read_toml(done / "small.toml"))
    units = planned_units(experiment, {}, pairs.this_machine(experiment))
    unit = next(unit for unit in units if unit.name == "drbert-1")
    out = tmp_path / "out"
    shutil.copytree(done / "out/pretraining", out / "pretraining")
    path = unit.folder(out) / "measured.json"
    measured = json.loads(path.read_text())
    kept = {name: value for name, value in measured.items() if "sst2" not in name}
    path.write_text(json.dumps(kept | {READ_OUT: 1.25}))
    again = measure(unit, begin(unit, data, out), data, out)
    [before] = [each for each in read_records(done / "out/units.csv") if each.arm == "drbert"][:1]
    assert again.measured[READ_OUT] == 1.25
    assert again.measured["sst2 logistic cls"] == before.measured["sst2 logistic cls"]


def test_a_pair_that_was_begun_on_another_machine_is_replaced_by_another(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")
    elsewhere = [record("none", 1, machine="x"), record("drbert", 1, machine="x")]
    begun = begun_pairs(tmp_path, elsewhere)
    units = [unit.name for unit in planned_units(experiment, begun, "m")]
    assert units == ["none-2", "none-longer-2", "drbert-2", "retro-2", "convbert-2"]
    text = remaining(experiment, tmp_path, elsewhere)
    assert text == "2 units are done and 5 are left, which take one process some 0.6 hours."
    assert len(list(planned_units(experiment, begun, "x"))) == 7
    # A pair that lacks the arm there does not count for it, and the reference goes with it.
    begun = begun_pairs(tmp_path, elsewhere[:1])
    units = [unit.name for unit in planned_units(experiment, begun, "m")]
    assert units[-2:] == ["none-3", "drbert-3"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corpus": "corpus-other"}, "on the text corpus-other, and --data holds corpus-"),
        ({"batch": "other"}, "with another first batch than 'drbert' has"),
        ({"weights": "other"}, "with other first weights than 'drbert' has"),
    ],
)
def test_a_pair_that_was_begun_otherwise_is_refused(
    done: Path, data: Path, change: dict[str, str], words: str
) -> None:
    unit = Unit("drbert", 1, read(done / "small.toml").arms[2].config)
    records = read_records(done / "out/units.csv")
    beginning = begun_pairs(done / "out", records)[1]["drbert"]
    other = {1: {"none": dataclasses.replace(beginning, **change)}}
    check_pair(unit, beginning, {1: {"none": beginning}})
    with pytest.raises(BadInput, match=f"Pair 1 was begun by 'none' {words}"):
        check_pair(unit, beginning, other)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('claim = "drbert"', 'claim = "bert"', "claim 'bert' is no arm; the arms are none, none-"),
        ('reference = "none"', 'reference = ""', "reference '' is no arm"),
        (
            '"tiny-retro.toml", pairs = 1',
            '"retro-mini.toml", pairs = 1, steps_factor = 100',
            "arm 'retro' has an encoder of 4 layers of 256, and 'none' one of 2 layers of 32",
        ),
        ("pairs = 2", "pairs = 0", r"\[arm.none\] pairs = 0 must be at least 1"),
        ("average = 2", "average = 3", "average = 3 is more than the 2 saves of 6 steps"),
        ("[arm]", "[arms]", "unknown key 'arms'"),
    ],
)
def test_an_experiment_that_cannot_work_is_refused(
    tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        read(tmp_path / "bad.toml", EXPERIMENT.replace(before, after))


def test_an_encoder_of_another_size_is_not_measured(done: Path, data: Path) -> None:
    arm = read(done / "small.toml").arms[0]
    larger = arm.config.model_copy(
        update={"encoder": arm.config.encoder.model_copy(update={"layers": 3})}
    )
    beginning = Beginning("m", "c", "b", "w", "s")
    with pytest.raises(BadInput, match="none-1 has an encoder of 2 layers of 32, and the experim"):
        measure(Unit("none", 1, larger), beginning, data, done / "out")


def test_rows_of_another_version_are_refused(tmp_path: Path) -> None:
    append_record(tmp_path / "units.csv", record("none", 1))
    append_record(tmp_path / "units.csv", record("drbert", 1, loss=4.5))
    first, second = read_records(tmp_path / "units.csv")
    assert (first, second) == (record("none", 1), record("drbert", 1, loss=4.5))
    text = (tmp_path / "units.csv").read_text()
    (tmp_path / "units.csv").write_text(text.replace("flops", "work", 1))
    with pytest.raises(BadInput, match="has other columns"):
        read_records(tmp_path / "units.csv")


def test_the_report_is_made_from_the_rows_alone(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(done / "out/units.csv", tmp_path)
    arguments = [str(done / "small.toml"), "--records", str(tmp_path / "units.csv"), "--report"]
    assert main([*arguments, str(tmp_path / "RESULTS.md")]) == 0
    assert "7 runs" in capsys.readouterr().out
    page = (tmp_path / "RESULTS.md").read_text()
    assert page.index("drbert`'s claim at this scale") < page.index("effects.svg")
    assert page.index("effects.svg") < page.index("| convbert | none | 1 |")
    assert page.index("| convbert | none | 1 |") < page.index("## Method")
    assert "| drbert | none-longer | 1 |" in page
    assert "`retro` has 1 pairs" in page
    assert page.endswith("Earlier: nothing.\n")
    assert (tmp_path / "results/small/effects.svg").read_text().startswith("<?xml")


def test_the_sentences_say_what_the_intervals_support(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")
    steps = [0.0, 0.01, -0.01, 0.02, -0.02, 0.012]

    def records(drbert: float, convbert: float) -> list[Record]:
        rows = [record("none", pair, 5.0) for pair in range(6)]
        rows += [record("none-longer", pair, 4.9 + steps[pair]) for pair in range(6)]
        rows += [record("drbert", pair, 5.0 + drbert + steps[pair]) for pair in range(6)]
        return rows + [record("convbert", pair, 5.0 + convbert + steps[pair]) for pair in range(6)]

    claim, control, *_ = pairs_page.verdicts(experiment, records(0.0, -0.3))
    assert "no effect on read-out loss is shown, +0.002 (-0.014 to +0.018) nats; a gain" in claim
    assert "a gain above 0.014 nats is excluded" in claim
    assert "At equal work, against `none-longer`: read-out loss is worse, +0.100" in claim
    assert "is detected: -0.298 (-0.314 to -0.282) nats" in control
    claim, control, *_ = pairs_page.verdicts(experiment, records(-0.1, 0.0))
    assert "read-out loss is better, -0.098 (-0.114 to -0.082) nats" in claim
    assert "is **not** detected, so nothing is shown" in control


def test_the_power_of_an_experiment_follows_from_a_pilots_rows(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in range(1, 7):
        append_record(tmp_path / "pilot.csv", record("none", pair, 5.0))
        append_record(tmp_path / "pilot.csv", record("drbert", pair, 5.0 + 0.01 * (-1) ** pair))
    assert main([str(done / "small.toml"), "--power", str(tmp_path / "pilot.csv")]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines(), delimiter="|"))
    cells = [cell.strip() for cell in rows[3]]
    assert cells[1:6] == ["read-out loss, nats", "drbert", "6", "0.011 (0.007 to 0.027)", "2"]


@pytest.mark.parametrize(
    "options",
    [["--report", "x.md"], ["--records", "x.csv"], ["--data", "x", "--records", "x.csv"]],
)
def test_what_a_command_lacks_is_said(
    done: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BaseException, match="needed"):
        main([str(done / "small.toml"), *options])
