"""Designs are compared by pairs of runs that begin alike, and the page says what that shows."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from command import BadInput, BadUsage, Unavailable
from tests.training.factories import TEXT, write_probe_tasks, write_text
from training import pairs
from training.experiment import main, read_toml
from training.pair_records import (
    ACCURACY,
    MEASURED,
    READ_OUT,
    Beginning,
    Cost,
    Record,
    append_record,
    check_records,
    read_records,
)
from training.pairs import beginning_of, machine, measure, records_of, remaining, run_pairs
from training.pairs_file import PairedExperiment, Unit, planned_units, read_paired
from training.pairs_page import Page
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
QUICK = ReadOut(steps=2, batch_size=8, warmup_steps=1)


@pytest.fixture(autouse=True)
def quick_read_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.readout.ReadOut", lambda: QUICK)


def read(path: Path, text: str = EXPERIMENT) -> PairedExperiment:
    path.write_text(text)
    return read_paired(path, read_toml(path))


def write_data(folder: Path) -> Path:
    write_probe_tasks(folder)
    for shard in TEXT.glob("*.gz"):
        shutil.copy(shard, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml and small.csv, and out, in which all of it is done."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("training.readout.ReadOut", lambda: QUICK)
        run_pairs(read(folder / "small.toml"), data, folder / "out", folder / "small.csv")
    return folder


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """A copy of `done`, to change."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def record(arm: str, pair: int, loss: float = 5.0, machine: str = "m") -> Record:
    measured = {**dict.fromkeys(MEASURED, 0.5), READ_OUT: loss, ACCURACY: 0.5 - loss / 1000}
    beginning = Beginning(machine, "corpus", "tasks", f"batch {pair}", "weights", "bert", arm)
    flops = 130 if arm in ("none-longer", "drbert") else 100
    return Record(arm, pair, beginning, Cost(6, 600, flops, 1.0, 0.5, 5.0), measured)


def never(*_: object) -> None:
    raise AssertionError("trained again")


def test_every_unit_has_a_row_and_is_not_run_again(
    done: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pairs, "pretrain", never)
    experiment = read_paired(done / "small.toml", read_toml(done / "small.toml"))
    run_pairs(experiment, data, done / "out", done / "small.csv")
    assert capsys.readouterr().out == "7 units are done and 0 are left.\n"
    records = records_of(experiment, read_records(done / "small.csv"))
    assert [(each.arm, each.pair) for each in records] == [
        ("none", 1),
        ("none-longer", 1),
        ("drbert", 1),
        ("retro", 1),
        ("convbert", 1),
        ("none", 2),
        ("drbert", 2),
    ]
    assert [each.cost.steps for each in records] == [6, 9, 6, 6, 6, 6, 6]
    assert not list((done / "out").glob("pretraining/*/progress"))


def test_the_runs_of_a_pair_begin_with_the_same_weights_text_and_masks(done: Path) -> None:
    records = read_records(done / "small.csv")
    first, second = (
        {each.arm: each.beginning for each in records if each.pair == pair} for pair in (1, 2)
    )
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


def test_a_run_that_was_killed_continues_and_keeps_what_was_measured(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_paired(copied / "small.toml", read_toml(copied / "small.toml"))
    rows = (copied / "small.csv").read_text().splitlines(keepends=True)
    [before] = [each for each in read_records(copied / "small.csv") if each.arm == "retro"]
    # Killed before its row was written, and while it was measured.
    (copied / "small.csv").write_text("".join(row for row in rows if not row.startswith("retro")))
    [path] = (copied / "out/pretraining/retro-1").glob("measured-*.json")
    measured = json.loads(path.read_text())
    kept = {name: value for name, value in measured.items() if "sst2" not in name}
    path.write_text(json.dumps(kept | {READ_OUT: 1.25}))
    monkeypatch.setattr(pairs, "pretrain", never)
    run_pairs(experiment, data, copied / "out", copied / "small.csv")
    after = read_records(copied / "small.csv")[-1]
    assert (after.arm, after.beginning) == ("retro", before.beginning)
    assert after.measured[READ_OUT] == 1.25
    assert after.measured["sst2 logistic cls"] == before.measured["sst2 logistic cls"]


def _run(folder: Path, data: Path) -> None:
    experiment = read_paired(folder / "small.toml", read_toml(folder / "small.toml"))
    run_pairs(experiment, data, folder / "out", folder / "small.csv")


def test_two_processes_share_the_units_of_one_folder(data: Path, tmp_path: Path) -> None:
    text = """
kind = "pairs"
reference = "none"
[arm]
none = { config = "tiny-none.toml", pairs = 1 }
drbert = { config = "tiny-drbert.toml", pairs = 1 }
"""
    experiment = read(tmp_path / "two.toml", text)
    command = [sys.executable, "-m", "training.experiment", str(tmp_path / "two.toml")]
    command += ["--data", str(data), "--out", str(tmp_path / "out"), "--threads", "1"]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(300) for process in processes] == [0, 0]
    records = records_of(experiment, read_records(tmp_path / "out/two.csv"))
    assert sorted(each.arm for each in records) == ["drbert", "none"]


def test_a_pair_that_was_begun_on_another_machine_is_replaced_by_another(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")

    def names(done: dict[int, dict[str, str]], begun: dict[int, dict[str, str]]) -> list[str]:
        return [unit.name for unit in planned_units(experiment, done, begun, "here")]

    elsewhere = {1: {"none": "there", "drbert": "there"}}
    others = ["none-2", "none-longer-2", "drbert-2", "retro-2", "convbert-2"]
    assert names(elsewhere, {}) == others
    # What was only begun there, or lacks the reference, does not count.
    assert names({}, elsewhere) == [*others, "none-3", "drbert-3"]
    assert names({1: {"drbert": "there"}}, {}) == [*others, "none-3", "drbert-3"]
    # No pair without the reference, also where it has enough of them.
    assert names({1: {"none": "there"}}, {})[-2:] == ["none-3", "drbert-3"]
    records = [record("none", 1, machine="there"), record("drbert", 1, machine="there")]
    assert remaining(experiment, tmp_path, records) == (
        "2 units are done and 5 are left, which take one process some 0.1 hours."
    )


def test_a_unit_of_a_pair_that_is_on_another_machine_is_not_begun(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_paired(copied / "small.toml", read_toml(copied / "small.toml"))
    rows = (copied / "small.csv").read_text().splitlines(keepends=True)
    (copied / "small.csv").write_text("".join(row for row in rows if not row.startswith("drbert")))
    # Planned here, and begun elsewhere meanwhile.
    monkeypatch.setattr(pairs, "machine", lambda _: "another")
    unit = experiment.unit(experiment.arms[2], 1)
    assert not pairs._begin(experiment, unit, data, copied / "out", copied / "small.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("machine", "'drbert' of pair 1 began with the machine other, and 'none' of pair 1 with"),
        ("corpus", "the text other, and 'none' of pair 1 with corpus-.*; give the same --data"),
        ("tasks", "the probes' files other, .*; give the same --data"),
        ("batch", "the first batch other, .*; their configs must have the same data"),
        ("weights", "the first weights other, .*; their encoders must have the same config"),
    ],
)
def test_runs_that_began_otherwise_are_not_compared(done: Path, change: str, words: str) -> None:
    first, *_ = records = read_records(done / "small.csv")
    check_records(records)
    other = dataclasses.replace(records[2].beginning, **{change: "other"})
    with pytest.raises(BadInput, match=words):
        check_records([first, dataclasses.replace(records[2], beginning=other)])


def test_another_text_is_refused_before_anything_is_trained(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (copied / "small.csv").read_text().splitlines(keepends=True)
    (copied / "small.csv").write_text("".join(rows[:3]))
    monkeypatch.setattr(pairs, "pretrain", never)
    other = tmp_path / "other"
    write_text(other, documents=50)
    write_probe_tasks(other)
    with pytest.raises(BadInput, match="'drbert' of pair 1 began with the text corpus-"):
        _run(copied, other)
    (tmp_path / "data").mkdir()
    changed = write_data(tmp_path / "data")
    table = changed / "banking77/train.csv"
    table.write_text(table.read_text() + "the dog slept,sleep\n")
    with pytest.raises(BadInput, match="'drbert' of pair 1 began with the probes' files"):
        _run(copied, changed)
    shutil.rmtree(changed / "ag_news")
    with pytest.raises(Unavailable, match="has no folder ag_news"):
        _run(copied, changed)


def test_a_finished_run_with_another_config_is_refused(copied: Path, data: Path) -> None:
    path = copied / "small.toml"
    path.write_text(EXPERIMENT.replace("average = 2", "average = 1"))
    with pytest.raises(BadInput, match=r"none-1 in .*small.csv was trained with another config"):
        _run(copied, data)
    (copied / "small.csv").unlink()
    shutil.rmtree(copied / "out/beginnings")
    with pytest.raises(BadInput, match="pretraining/none-1 was trained with another config"):
        _run(copied, data)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('claim = "drbert"', 'claim = "bert"', "claim 'bert' is no arm; the arms are none, none-"),
        ('claim = "drbert"', 'claim = "none"', "arm 'none' is both reference and claim"),
        ('reference = "none"', 'reference = ""', "reference '' is no arm"),
        (
            '"tiny-retro.toml", pairs = 1',
            '"retro-mini.toml", pairs = 1, steps_factor = 100',
            (
                "arm 'retro' has an encoder of 4 layers of 256 and 1024, and 'none' one of 2 layers"
                " of 32 and 64"
            ),
        ),
        ("pairs = 2", "pairs = 0", r"\[arm.none\] pairs = 0 must be at least 1"),
        (
            "average = 2",
            "average = 3",
            r"\[optimisation\], for arm 'none': average = 3 is more than the 2 saves of 6 steps",
        ),
        ("average = 2", "seed = 2", "seed cannot be set"),
        ("[arm]", "[arms]", "unknown key 'arms'"),
        ('kind = "pairs"', 'kind = "pair"', "kind 'pair' is unknown; known are pairs"),
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
    beginning = record("none", 1).beginning
    with pytest.raises(BadInput, match="none-1 has an encoder of 2 layers of 32 and 64, and the"):
        measure(Unit("none", 1, larger), beginning, data, done / "out")


def test_the_beginning_of_a_unit_is_the_same_each_time(done: Path, data: Path) -> None:
    experiment = read(done / "small.toml")
    unit = experiment.unit(experiment.arms[0], 2)
    here = machine(experiment)
    again = beginning_of(unit, here, data, done / "out")
    assert again == read_records(done / "small.csv")[5].beginning


def test_rows_that_cannot_be_read_are_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.touch()  # by a process that has not written its first row yet
    assert read_records(path) == []
    append_record(path, record("none", 1))
    with path.open("a") as file:
        file.write("drbert,1,m")  # what a full disk left of a row
    append_record(path, record("drbert", 1, loss=4.5))
    assert read_records(path) == [record("none", 1), record("drbert", 1, loss=4.5)]
    text = path.read_text()
    path.write_text(text.replace(",600,", ",many,", 1))
    with pytest.raises(BadInput, match=r"line 2: invalid literal .* 'many'; remove the line"):
        read_records(path)
    path.write_text(text.replace("flops", "work", 1))
    with pytest.raises(BadInput, match=r"other columns than this version writes \(flops, work\)"):
        read_records(path)
    path.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(BadInput, match="line 4 is a second row of 'none' in pair 1"):
        read_records(path)
    path.write_text(text + "none,2\n")
    with pytest.raises(BadInput, match=r"line 4: .* cells are needed"):
        read_records(path)


def test_rows_of_another_experiment_are_refused(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")
    for other in (record("mae", 1), record("none", 1001)):
        with pytest.raises(BadInput, match=r"which is not of .*small.toml"):
            records_of(experiment, [record("none", 1), other])


def test_the_report_is_made_from_the_rows_alone(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (done / "small.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/small.csv").write_text("".join(rows[:-1]))
    arguments = [str(done / "small.toml"), "--records", str(tmp_path / "rows/small.csv")]
    assert main([*arguments, "--report", str(tmp_path / "RESULTS.md")]) == 0
    assert "6 runs" in capsys.readouterr().out
    page = (tmp_path / "RESULTS.md").read_text()
    assert "**Not complete.** Done are 1 of 2 of `drbert`." in page
    order = [
        page.index(part)
        for part in (
            "`drbert` at this scale, against `none`",
            "(results/small/effects.svg)",
            "| convbert | none | ",
            "## Method",
            "[small.csv](rows/small.csv)",
        )
    ]
    assert order == sorted(order)
    assert page.endswith("Earlier: nothing.\n")
    assert (tmp_path / "results/small/effects.svg").read_text().startswith("<?xml")


def test_a_report_without_a_run_says_so(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")
    with pytest.raises(Unavailable, match=r"missing.csv does not exist"):
        main([str(tmp_path / "small.toml"), "--records", "missing.csv", "--report", "r.md"])
    Page(experiment, [], tmp_path / "small.csv").write(tmp_path / "RESULTS.md")
    page = (tmp_path / "RESULTS.md").read_text()
    assert "0 of 2 of `none`" in page
    assert "`convbert` is not measured yet." in page


STEPS = (0.0, 0.01, -0.01, 0.02, -0.02, 0.012)


def six_pairs(drbert: float, convbert: float) -> list[Record]:
    rows = [record("none", pair, 5.0) for pair in range(1, 7)]
    for arm, shift in (("none-longer", -0.1), ("drbert", drbert), ("convbert", convbert)):
        rows += [record(arm, pair, 5.0 + shift + STEPS[pair - 1]) for pair in range(1, 7)]
    return rows


def test_the_sentences_say_what_the_intervals_support(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")

    def verdicts(drbert: float, convbert: float) -> list[str]:
        return Page(experiment, six_pairs(drbert, convbert), tmp_path / "rows.csv").verdicts()

    claim, work, control, *_ = verdicts(0.0, -0.3)
    assert "no effect on read-out loss is shown, +0.002 (-0.014 to +0.018) nats, and a" in claim
    assert "a gain above 0.014 nats is excluded" in claim
    assert "against `none-longer`, with as much work: read-out loss is worse, +0.100" in work
    assert "read-out loss is better, -0.298 (-0.314 to -0.282) nats" in control
    assert "nothing" not in control
    claim, _, control, *_ = verdicts(-0.1, 0.3)  # a control that is worse is not detected
    assert "read-out loss is better, -0.098 (-0.114 to -0.082) nats" in claim
    assert "**not** shown to be better" in control
    assert "this page shows nothing" in control
    claim, *_ = verdicts(0.017, -0.3)  # an interval above 0, and a p-value that is adjusted
    assert "no effect on read-out loss is shown, +0.019 (+0.003 to +0.035) nats, and any" in claim


def test_p_values_are_adjusted_for_all_designs_and_equal_work_is_equal(tmp_path: Path) -> None:
    experiment = read(tmp_path / "small.toml")
    page = Page(experiment, six_pairs(0.017, 0.3), tmp_path / "rows.csv")
    alone = page.effect("drbert", "none", READ_OUT).p_value
    assert page.adjusted(READ_OUT, "none") == {"drbert": pytest.approx(2 * alone), "retro": 1.0}
    assert page.at_equal_work() == ["drbert"]
    assert page.work("drbert", "none") == pytest.approx(1.3)
    table = page.effect_table()
    assert any(row.startswith("| drbert | none-longer | 1.00 | 6 |") for row in table)
    assert any(row.startswith("| retro | none |  | 0 | not yet |  |") for row in table)
    retro = [record("retro", pair) for pair in range(1, 7)]
    page = Page(experiment, [*six_pairs(0.017, 0.3), *retro], tmp_path / "rows.csv")
    assert page.at_equal_work() == ["drbert"]


def test_the_power_of_an_experiment_follows_from_a_pilots_rows(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pair in range(1, 7):
        append_record(tmp_path / "pilot.csv", record("none", pair, 5.0))
        append_record(tmp_path / "pilot.csv", record("drbert", pair, 5.0 + 0.01 * (-1) ** pair))
    assert main([str(done / "small.toml"), "--power", str(tmp_path / "pilot.csv")]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines(), delimiter="|"))
    assert [cell.strip() for cell in rows[2]][1:9] == [
        "read-out loss, nats",
        "drbert",
        "6",
        "0.011 (0.007 to 0.027)",
        "2",
        "0.098",
        "0.127",
        "0.253",
    ]
    with pytest.raises(Unavailable, match=r"typo.csv does not exist"):
        main([str(done / "small.toml"), "--power", str(tmp_path / "typo.csv")])


@pytest.mark.parametrize(
    "options",
    [["--report", "x.md"], ["--records", "x.csv"], ["--data", "x", "--records", "x.csv"]],
)
def test_what_a_command_lacks_is_said(done: Path, options: list[str]) -> None:
    with pytest.raises(BadUsage, match="needed"):
        main([str(done / "small.toml"), *options])
