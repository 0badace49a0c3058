"""An experiment resumes, shares its work between processes and reports every seed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from command import BadInput
from tests.training.factories import TEXT, write_task
from training import experiment, results
from training.experiment import Experiment, collect_records, main, read_experiment, run_experiment
from training.locks import lock_unit
from training.tasks import find_task

EXPERIMENT = """
tasks = ["sst2", "stsb"]
finetuning_seeds = [0, 1]
reference = "none"
[epochs]
sst2 = 1
stsb = 1
[pretraining]
none = { config = "tiny-none.toml", seeds = [1, 2] }
drbert = { config = "tiny-drbert.toml", seeds = [1] }
electra = { config = "tiny-electra.toml", seeds = [1] }
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_task(tmp_path_factory.mktemp("data"))
    for shard in TEXT.glob("*.gz"):
        shutil.copy(shard, folder)
    return folder


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(experiment file, folder in which all of it is done)"""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "small.toml").write_text(EXPERIMENT)
    assert (
        main([str(folder / "small.toml"), "--data", str(data), "--out", str(folder / "out")]) == 0
    )
    return folder / "small.toml", folder / "out"


def read(path: Path, text: str = EXPERIMENT) -> Experiment:
    path.write_text(text)
    return read_experiment(path)


def test_units_that_are_done_are_skipped(
    done: tuple[Path, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(experiment, "pretrain", never)
    monkeypatch.setattr(experiment, "finetune", never)
    run_experiment(read_experiment(done[0]), data, done[1])
    pretrained, finetuned = collect_records(read_experiment(done[0]), done[1])
    assert (len(pretrained), len(finetuned)) == (4, 16)


def test_a_unit_that_another_process_has_locked_is_skipped(
    done: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = read_experiment(done[0])
    with (
        lock_unit(out, plan.pretrainings[0].name) as locked,
        lock_unit(out, plan.pretrainings[0].name) as again,
    ):
        assert (locked, again) == (True, False)
        assert not experiment._finetune(plan.finetunings[0], data, out)
    with lock_unit(out, plan.pretrainings[0].name) as locked:
        assert locked


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("stsb = 1", "stsb = 2", "none-1-stsb-0 was trained with another recipe"),
        (
            'drbert = { config = "tiny-drbert.toml"',
            'drbert = { config = "tiny-plain.toml"',
            "drbert-1 was trained with another config",
        ),
    ],
)
def test_results_of_another_recipe_are_not_mixed_in(
    done: tuple[Path, Path], data: Path, tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        run_experiment(read(tmp_path / "e.toml", EXPERIMENT.replace(before, after)), data, done[1])


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("reference", "referenze", "unknown key 'referenze'"),
        (
            'reference = "none"',
            'reference = "bert"',
            "reference 'bert' is unknown; known are none, drbert",
        ),
        ('"sst2", ', '"sst3", ', "Unknown task 'sst3'"),
        ("tasks", "[", "is not TOML"),
        ("stsb = 1", "rte = 1", "rte is not one of the tasks, sst2, stsb"),
        ('", seeds = [1] }', '" }', r"\[pretraining\.\w+\] missing key 'seeds'"),
        ("[epochs]", "steps = 0\n[epochs]", "steps = 0 must be at least 1"),
        ("[epochs]", 'steps = "4"\n[epochs]', "steps = '4' is not of type int"),
    ],
)
def test_a_wrong_experiment_is_refused_by_name(
    tmp_path: Path, before: str, after: str, words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        read(tmp_path / "e.toml", EXPERIMENT.replace(before, after, 1))


def test_an_experiment_may_give_every_design_the_same_steps(tmp_path: Path) -> None:
    default, budgeted = (
        read(tmp_path / "e.toml", EXPERIMENT.replace("[epochs]", f"{steps}[epochs]"))
        for steps in ("", "steps = 7\n")
    )
    assert {p.config.optimisation.steps for p in budgeted.pretrainings} == {7}
    assert all(p.config.optimisation.steps != 7 for p in default.pretrainings)


def test_the_report_lists_every_seed(done: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    assert (
        main(
            [
                str(done[0]),
                "--data",
                str(data),
                "--out",
                str(done[1]),
                "--report",
                str(tmp_path / "RESULTS.md"),
            ]
        )
        == 0
    )
    text = (tmp_path / "RESULTS.md").read_text()
    for encoder in ("none, seed 1", "none, seed 2", "drbert, seed 1", "electra, seed 1"):
        assert f"| {encoder} |" in text
    assert "not yet" not in text
    assert "Not complete" not in text
    assert "| drbert, seed 1 | none, seed 1 |" in text
    assert "`drbert` against `none`" in text
    rows = list(
        csv.DictReader((tmp_path / "results/small/finetuning.csv").read_text().splitlines())
    )
    assert len(rows) == 8 * (1 + 2)  # sst2 has one measure, stsb two
    drawn = (tmp_path / "results/small/losses.svg").read_text()
    assert "replaced-token detection" in drawn
    assert "<svg" in drawn


def test_a_report_of_half_an_experiment_says_so(
    done: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(done[1], tmp_path / "out")
    shutil.rmtree(tmp_path / "out/finetuning/none-1-sst2-0")
    assert (
        main(
            [
                str(done[0]),
                "--data",
                str(data),
                "--out",
                str(tmp_path / "out"),
                "--report",
                str(tmp_path / "RESULTS.md"),
            ]
        )
        == 0
    )
    assert (
        "**Not complete:** 15 of 16 classifiers are done." in (tmp_path / "RESULTS.md").read_text()
    )


def runs(design: str, seed: int, *values: float, task: str = "sst2") -> list[results.Record]:
    return [
        {
            "design": design,
            "pretraining_seed": seed,
            "task": task,
            "seed": i,
            "measures": {"accuracy": value},
        }
        for i, value in enumerate(values)
    ]


def test_a_difference_within_the_spread_of_pretraining_seeds_is_none() -> None:
    tasks = [find_task("sst2")]
    noisy = runs("none", 1, 0.70) + runs("none", 2, 0.74) + runs("drbert", 1, 0.76)
    assert results.conclusion(tasks, "none", noisy)[-1].endswith("no difference detected.")
    # t of one degree of freedom is 12.7: only what is far beyond the spread is detected.
    assert results.conclusion(tasks, "none", noisy)[0].startswith(
        "The mean over the tasks and the fine-tuning seeds 0 varies"
    )
    calm = runs("none", 1, 0.700) + runs("none", 2, 0.701) + runs("drbert", 1, 0.76)
    assert results.conclusion(tasks, "none", calm)[-1].endswith("better.")
    assert results.conclusion(tasks, "none", runs("none", 1, 0.7) + runs("drbert", 1, 0.9)) == [
        "Too few runs are done to compare the designs."
    ]


def test_differences_are_paired_by_fine_tuning_seed() -> None:
    both = runs("none", 1, 0.70, 0.80, 0.75) + runs("drbert", 1, 0.71, 0.81)
    assert results.differences(
        find_task("sst2"), ("drbert", 1), ("none", 1), both
    ) == pytest.approx({0: 0.01, 1: 0.01})


def test_encoders_are_compared_over_the_seeds_that_all_of_them_have() -> None:
    tasks = [find_task("sst2")]
    done = (
        runs("none", 1, 0.70, 0.70, 0.90)
        + runs("none", 2, 0.70, 0.70)
        + runs("drbert", 1, 0.71, 0.71)
    )
    assert results.conclusion(tasks, "none", done)[-1].startswith(
        "- `drbert` against `none`: +0.0100"
    )


def test_an_encoder_with_constant_predictions_is_named() -> None:
    answers = {
        "answers": np.array([1.0, 1.0, 1.0, 1.0]),
        "labels": np.array([1.0, 1.0, 0.0, 0.0]),
        "majority": 1.0,
    }
    finetuned = [
        {
            "design": "none",
            "pretraining_seed": 1,
            "task": "sst2",
            "seed": 0,
            "measures": {"accuracy": 0.5},
            **answers,
        }
    ]
    lines = results.task_table([find_task("sst2")], [{"design": "none", "seed": 1}], finetuned)
    assert (
        lines[-1]
        == "The same prediction for every example, so nothing was learned: sst2 after none, seed"
        " 1 (1 of 1 runs)."
    )
    assert any(line.startswith("No difference to the majority label detected") for line in lines)


def test_the_report_ends_with_earlier_experiments(
    done: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.toml").write_text('history = "Once, in vain."\n' + EXPERIMENT)
    assert (
        main(
            [
                str(tmp_path / "small.toml"),
                "--data",
                str(data),
                "--out",
                str(done[1]),
                "--report",
                str(tmp_path / "RESULTS.md"),
            ]
        )
        == 0
    )
    assert (
        (tmp_path / "RESULTS.md").read_text().endswith("## Earlier experiments\n\nOnce, in vain.\n")
    )
