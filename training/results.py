"""
Reports an experiment: tables with every seed, confidence intervals, and the conclusions they allow.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from training import curves
from training.metrics import bootstrap_gain, paired_interval
from training.tasks import Task

Record = dict[str, Any]
Encoder = tuple[str, int]
"""Design and pretraining seed."""

LOSS_NAMES = {"mlm": "masked language modelling", "rtd": "replaced-token detection"}

LOSS_NOTES = """\
Losses of different designs are of different kinds, so a lower one is not a better encoder. `mix` \
and `drbert` are measured through their
random mix, `mae` never reads the masked positions' random words, `emd` reads positions once more, \
and `rtd` is another objective
(generator's cross-entropy plus 50 × detector's). "Without context" is about the loss of a model \
that ignores neighbours. It knows how
frequent words are in the training text, and what stands at the predicted position, which is the \
word itself one time in ten (`mae`:
the frequencies alone; `rtd`: its generator's loss, with that of a generator without context in \
brackets). Equal tokens are not equal work:
the column PFLOPs holds the matrix products of all steps.
Minutes are wall-clock time on a machine that may have done other work; they do not compare \
designs (`python -m benchmarks training` does)."""

GAIN_NOTES = """\
Mean ± standard deviation over the fine-tuning seeds (with their number if it differs between \
cells). In brackets the 95 % bootstrap
interval, over the development examples, of the gain over always predicting the majority label; \
bold if it is above 0. The intervals are
not corrected for their number."""

DIFFERENCE_NOTES = """\
Difference to the reference of the same pretraining seed, paired by fine-tuning seed, with \
Student's 95 % interval. A design that differs in
the decoder alone shares initial weights, text and masks with the reference; another encoder or \
objective shares only the text's order. The
reference's other seeds are compared with its first, which shows the effect of the seed. An \
interval covers the seeds of fine-tuning only, so
more than one in twenty of them excludes 0 by chance. The conclusion above covers pretraining \
seeds."""


def pretraining_record(design: str, seed: int, folder: Path) -> Record:
    """Return the cost and the final losses of one pretraining."""
    summary = read_json(folder / "checkpoint/training.json")
    parts = summary["held_out_parts"]
    return {
        "design": design,
        "seed": seed,
        "objective": summary["config"]["objective"]["name"],
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "flops": summary["flops"],
        "minutes": round(summary["seconds"] / 60, 1),
        "held_out_loss": round(summary["held_out_loss"], 4),
        "generator_loss": round(parts["generator_loss"], 4) if "generator_loss" in parts else None,
        "loss_without_context": round(summary["loss_without_context"], 4),
        "precision": summary["precision"],
        "device": summary["device"],
        "threads": summary["threads"],
        "folder": folder,
    }


def finetuning_record(design: str, pretraining_seed: int, folder: Path) -> Record:
    """Return the metrics and the predictions of one classifier on its development set."""
    summary = read_json(folder / "training.json")["finetuning"]
    predictions = read_json(folder / "predictions.json")
    return {
        "design": design,
        "pretraining_seed": pretraining_seed,
        "task": summary["task"],
        "seed": summary["seed"],
        "epochs": summary["epochs"],
        "precision": summary["precision"],
        "minutes": round(summary["seconds"] / 60, 1),
        "measures": summary["dev_in_torch"],
        **{key: np.array(predictions[key], float) for key in ("answers", "labels", "majority")},
    }


@dataclass(frozen=True)
class Report:
    """What a report is written from."""

    experiment: Path
    """The experiment's TOML file."""
    history: str
    """What was tried before, in Markdown; may be empty."""
    reference: str
    """The design that the others are compared with."""
    tasks: Sequence[Task]
    planned: int
    """Number of classifiers that the experiment trains in all."""
    pretrained: Sequence[Record]
    finetuned: Sequence[Record]

    def write(self, path: Path) -> None:
        """Write the report to `path`.

        pretraining.csv, finetuning.csv and losses.svg go to results/NAME in the same folder, where
        NAME is the experiment's.
        """
        folder = path.parent / "results" / self.experiment.stem
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "pretraining.csv", [_without_folder(run) for run in self.pretrained])
        metrics = [row for run in self.finetuned for row in _rows_by_metric(run)]
        write_csv(folder / "finetuning.csv", metrics)
        draw_losses(self.pretrained, folder / "losses.svg")
        path.write_text("\n".join(self.lines(path.name)), encoding="utf-8")

    def lines(self, name: str) -> list[str]:
        """Return the report's lines of Markdown; `name` is its file's."""
        folder = f"results/{self.experiment.stem}"
        lines = [
            "# Comparison of pretraining decoders",
            "",
            (
                "Made by `drbert-experiment"
                f" training/experiments/{self.experiment.name} --data DATA --out OUT`, and"
                f" `--report {name}` with the same options."
            ),
            (
                f"Every run is in [pretraining.csv]({folder}/pretraining.csv) and"
                f" [finetuning.csv]({folder}/finetuning.csv)."
            ),
            "",
        ]
        if len(self.finetuned) != self.planned:
            done = f"{len(self.finetuned)} of {self.planned} classifiers are done."
            lines += [f"**Not complete:** {done}", ""]
        lines += ["## Conclusion", ""]
        lines += [*conclusion(self.tasks, self.reference, self.finetuned), ""]
        lines += ["## Pretraining", ""]
        lines += [*pretraining_table(self.pretrained, self.reference), ""]
        lines += [LOSS_NOTES, "", f"![losses]({folder}/losses.svg)", ""]
        lines += ["## Fine-tuning", ""]
        lines += [*task_table(self.tasks, self.pretrained, self.finetuned), ""]
        lines += ["## Differences to the reference", ""]
        lines += [*difference_table(self.tasks, self.reference, self.finetuned), ""]
        if self.history:
            lines += ["## Earlier experiments", "", self.history.strip(), ""]
        return lines


def _without_folder(record: Record) -> Record:
    return {key: value for key, value in record.items() if key != "folder"}


def _rows_by_metric(record: Record) -> list[Record]:
    """Return a row for each metric of a classifier, without its predictions."""
    common = {
        key: value for key, value in record.items() if not isinstance(value, dict | np.ndarray)
    }
    return [
        {**common, "measure": name, "value": round(value, 5)}
        for name, value in record["measures"].items()
    ]


def pretraining_table(pretrained: Sequence[Record], reference: str) -> list[str]:
    """Return the table of all pretrainings, the reference first."""
    lines = [
        (
            "| design | seed | tokens | steps | PFLOPs | minutes | held-out loss, nats | without"
            " context | on |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    in_order = sorted(
        pretrained, key=lambda run: (run["design"] != reference, run["design"], run["seed"])
    )
    for run in in_order:
        kind = " (rtd)" if run["objective"] == "rtd" else ""
        lines.append(
            f"| {run['design']} | {run['seed']} | {run['tokens']:,} | {run['steps']:,} |"
            f" {run['flops'] / 1e15:.2f} | {run['minutes']:.0f} |"
            f" {run['held_out_loss']:.3f}{kind} | {_loss_without_context(run)} |"
            f" {run['threads']} thread(s), {run['device']}, {run['precision']} |"
        )
    return lines


def _loss_without_context(record: Record) -> str:
    level = f"{record['loss_without_context']:.3f}"
    if record["generator_loss"] is None:
        return level
    return f"generator {record['generator_loss']:.3f} ({level})"


def task_table(
    tasks: Sequence[Task], pretrained: Sequence[Record], finetuned: Sequence[Record]
) -> list[str]:
    """Return the table of all encoders' results by task, and lists of what was not learned."""
    lines = [
        *GAIN_NOTES.splitlines(),
        "",
        "| encoder | " + " | ".join(f"{task.name} ({task.metrics[0]})" for task in tasks) + " |",
        "|---|" + "--:|" * len(tasks),
    ]
    encoders = [(encoder["design"], encoder["seed"]) for encoder in pretrained]
    most = max(
        (len(_runs_of(finetuned, encoder, task)) for encoder in encoders for task in tasks),
        default=0,
    )
    undetected: list[str] = []
    worse: list[str] = []
    constant: list[str] = []
    for design, seed in encoders:
        cells = []
        for task in tasks:
            runs = _runs_of(finetuned, (design, seed), task)
            name = f"{task.name} after {design}, seed {seed}"
            cell, low, high = _gain_cell(task, runs, most)
            cells.append(cell)
            if high < 0:
                worse.append(name)
            elif low <= 0:
                undetected.append(name)
            same = sum(len(set(run["answers"].tolist())) == 1 for run in runs)
            if same:
                constant.append(f"{name} ({same} of {len(runs)} runs)")
        lines.append(f"| {design}, seed {seed} | {' | '.join(cells)} |")
    findings = {
        (
            "No difference to the majority label detected, for lack of learning or of development"
            " examples"
        ): undetected,
        "Worse than the majority label": worse,
        "The same prediction for every example, so nothing was learned": constant,
    }
    for finding, names in findings.items():
        if names:
            lines += ["", f"{finding}: {'; '.join(names)}."]
    return lines


def _gain_cell(task: Task, runs: Sequence[Record], most: int) -> tuple[str, float, float]:
    """Return a cell of the table, and the interval of the gain over the majority label.

    The interval's bounds are infinite if there are no runs.
    """
    if not runs:
        return "not yet", math.inf, math.inf
    name = task.metrics[0]
    values = [run["measures"][name] for run in runs]
    predictions = np.array([run["answers"] for run in runs])
    low, high = bootstrap_gain(name, predictions, runs[0]["majority"], runs[0]["labels"])
    mean = f"{np.mean(values):.3f}"
    if len(values) > 1:
        mean += f" ± {np.std(values, ddof=1):.3f}"
    if low > 0:
        mean = f"**{mean}**"
    number = f" (n = {len(runs)})" if len(runs) < most else ""
    return f"{mean}{number} [{low:+.3f}, {high:+.3f}]", low, high


def difference_table(
    tasks: Sequence[Task], reference: str, finetuned: Sequence[Record]
) -> list[str]:
    """Return the table of each encoder's differences to the reference of its pretraining seed.

    Differences are paired by fine-tuning seed.
    """
    encoders = list(dict.fromkeys((run["design"], run["pretraining_seed"]) for run in finetuned))
    references = [encoder for encoder in encoders if encoder[0] == reference]
    lines = [
        *DIFFERENCE_NOTES.splitlines(),
        "",
        "| encoder | against | " + " | ".join(task.name for task in tasks) + " | mean over tasks |",
        "|---|---|" + "--:|" * (len(tasks) + 1),
    ]
    for encoder in encoders:
        base = references[0] if encoder in references[1:] else (reference, encoder[1])
        if encoder == base or base not in references:
            continue
        by_task = [differences(task, encoder, base, finetuned) for task in tasks]
        seeds = sorted(set.intersection(*(set(by_seed) for by_seed in by_task)))
        means = [float(np.mean([by_seed[seed] for by_seed in by_task])) for seed in seeds]
        cells = [_difference_cell(list(by_seed.values())) for by_seed in by_task]
        cells.append(_difference_cell(means))
        lines.append(
            f"| {encoder[0]}, seed {encoder[1]} | {base[0]}, seed {base[1]} | {' | '.join(cells)} |"
        )
    return lines


def differences(
    task: Task, encoder: Encoder, reference: Encoder, finetuned: Sequence[Record]
) -> dict[int, float]:
    """Return the difference of the task's first metric for every fine-tuning seed of both."""
    scores, reference_scores = (
        {run["seed"]: run["measures"][task.metrics[0]] for run in _runs_of(finetuned, name, task)}
        for name in (encoder, reference)
    )
    seeds = sorted(scores.keys() & reference_scores.keys())
    return {seed: scores[seed] - reference_scores[seed] for seed in seeds}


def _runs_of(finetuned: Sequence[Record], encoder: Encoder, task: Task) -> list[Record]:
    identity = (*encoder, task.name)
    return [
        run
        for run in finetuned
        if (run["design"], run["pretraining_seed"], run["task"]) == identity
    ]


def _difference_cell(values: Sequence[float]) -> str:
    if not values:
        return "not yet"
    mean, low, high = paired_interval(np.array(values))
    if not math.isfinite(low):
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


@dataclass(frozen=True)
class Spread:
    """How far the mean of an encoder moves between pretraining seeds of one design."""

    deviation: float
    """The pooled standard deviation."""
    freedom: int
    """Its degrees of freedom."""
    designs: tuple[str, ...]
    """The designs that were pretrained more than once, from which it is estimated."""

    def margin(self, quantile: float, first: int, second: int) -> float:
        """Return the half-width of the interval of a difference of means of so many encoders."""
        return quantile * self.deviation * math.sqrt(1 / first + 1 / second)


def conclusion(tasks: Sequence[Task], reference: str, finetuned: Sequence[Record]) -> list[str]:
    """Return which designs differ from the reference, by the spread between pretraining seeds.

    Student's t with the pooled variance of the designs that were pretrained more than once,
    Bonferroni-corrected over the compared designs. Encoders are compared over the fine-tuning seeds
    that all of them have on every task; one that has none yet is left out.
    """
    seeds, means = _means_by_design(tasks, finetuned)
    spread = _pooled_spread(means)
    compared = sorted(design for design in means if design != reference)
    if reference not in means or spread is None or not compared:
        return ["Too few runs are done to compare the designs."]
    quantile = float(stats.t.ppf(1 - 0.05 / (2 * len(compared)), spread.freedom))
    lines = [
        (
            "The mean over the tasks and the fine-tuning seeds"
            f" {', '.join(map(str, sorted(seeds)))} varies, between pretraining seeds of one"
            " design, by a standard deviation of"
        ),
        (
            f"{spread.deviation:.4f} ({spread.freedom} degree(s) of freedom, from"
            f" {', '.join(spread.designs)}; assumed to be the same for all). At 95 % for the"
            f" {len(compared)} designs together"
        ),
        f"(t = {quantile:.1f}), on these development examples:",
        "",
    ]
    for design in compared:
        difference = float(np.mean(means[design]) - np.mean(means[reference]))
        margin = spread.margin(quantile, len(means[design]), len(means[reference]))
        lines.append(
            f"- `{design}` against `{reference}`: {difference:+.4f} ({difference - margin:+.4f} to"
            f" {difference + margin:+.4f}): {_verdict(difference, margin)}."
        )
    return lines


def _verdict(difference: float, margin: float) -> str:
    if abs(difference) <= margin:
        return "no difference detected"
    return "better" if difference > 0 else "worse"


def _pooled_spread(means: dict[str, list[float]]) -> Spread | None:
    """Return the spread between pretraining seeds; None if no design has two."""
    repeated = {design: values for design, values in means.items() if len(values) > 1}
    freedom = sum(len(values) - 1 for values in repeated.values())
    if not freedom:
        return None
    squares = sum(np.var(values, ddof=1) * (len(values) - 1) for values in repeated.values())
    return Spread(math.sqrt(squares / freedom), freedom, tuple(sorted(repeated)))


def _means_by_design(
    tasks: Sequence[Task], finetuned: Sequence[Record]
) -> tuple[set[int], dict[str, list[float]]]:
    """Return the fine-tuning seeds that all encoders have, and each design's means over them.

    A mean is of one encoder, over the tasks' first metrics. An encoder without a seed that it has
    on every task is left out.
    """
    common: dict[Encoder, set[int]] = {}
    for encoder in dict.fromkeys((run["design"], run["pretraining_seed"]) for run in finetuned):
        by_task = [{run["seed"] for run in _runs_of(finetuned, encoder, task)} for task in tasks]
        seeds_of_all_tasks = set.intersection(*by_task)
        if seeds_of_all_tasks:
            common[encoder] = seeds_of_all_tasks
    if not common:
        return set(), {}
    seeds = set.intersection(*common.values())
    if not seeds:
        return seeds, {}
    means: dict[str, list[float]] = {}
    for encoder in common:
        scores = [
            run["measures"][task.metrics[0]]
            for task in tasks
            for run in _runs_of(finetuned, encoder, task)
            if run["seed"] in seeds
        ]
        means.setdefault(encoder[0], []).append(float(np.mean(scores)))
    return seeds, means


def draw_losses(pretrained: Sequence[Record], out: Path) -> None:
    """Draw the losses of all pretrainings, if there are any, a panel for each objective."""
    panels: dict[str, dict[str, list[Path]]] = {}
    for record in pretrained:
        runs = panels.setdefault(LOSS_NAMES[record["objective"]], {})
        runs.setdefault(record["design"], []).append(record["folder"])
    if panels:
        curves.draw(panels, out)


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    """Write rows that have the first row's keys; an empty file if there are none."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
