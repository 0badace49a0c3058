"""
Turns what an experiment left behind into tables: every seed, intervals, and what they allow to say.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from training import curves
from training.metrics import above, paired
from training.tasks import Task

Record = dict[str, Any]
Encoder = tuple[str, int]
"""Design and pretraining seed."""

NOTES = """\
Losses of different designs are of different kinds, so a lower one is not a better encoder: `mix` \
and `drbert` are read through their
random mix, `mae` never sees the masked positions' random words, `emd` is told positions once \
more, and `rtd` is another objective
(generator's cross-entropy plus 50 × detector's). "Without context" is about the loss of a model \
that ignores neighbours: it knows how
frequent words are in the training text, and what stands at the predicted position, which is the \
word itself one time in ten (`mae`:
the frequencies alone; `rtd`: its generator's loss, and in brackets what that is without \
context). Equal tokens are not equal work:
the column PFLOPs holds the matrix products of all steps.
Minutes are those of the clock, on a machine that may have done other things meanwhile; they \
compare no designs (`python -m benchmarks training` does)."""


def of_pretraining(design: str, seed: int, folder: Path) -> Record:
    """What one pretraining cost and where its loss ended."""
    told = read_json(folder / "checkpoint/training.json")
    without, parts = told["loss_without_context"], told["held_out_parts"]
    return {
        "design": design,
        "seed": seed,
        "objective": told["config"]["objective"]["name"],
        "tokens": told["tokens"],
        "steps": told["steps"],
        "flops": told["flops"],
        "minutes": round(told["seconds"] / 60, 1),
        "held_out_loss": round(told["held_out_loss"], 4),
        "generator_loss": round(parts["generator_loss"], 4) if parts else None,
        "loss_without_context": round(without, 4),
        "precision": told["precision"],
        "device": told["device"],
        "threads": told["threads"],
        "folder": folder,
    }


def of_finetuning(design: str, pretraining_seed: int, folder: Path) -> Record:
    """How one classifier did on its development set."""
    told, answered = (
        read_json(folder / "training.json")["finetuning"],
        read_json(folder / "predictions.json"),
    )
    return {
        "design": design,
        "pretraining_seed": pretraining_seed,
        "task": told["task"],
        "seed": told["seed"],
        "epochs": told["epochs"],
        "precision": told["precision"],
        "minutes": round(told["seconds"] / 60, 1),
        "measures": told["dev_in_torch"],
        **{key: np.array(answered[key], float) for key in ("answers", "labels", "majority")},
    }


def write(
    report: Path,
    experiment: Path,
    history: str,
    reference: str,
    tasks: Sequence[Task],
    planned: int,
    pretrained: Sequence[Record],
    finetuned: Sequence[Record],
) -> None:
    """The report on `planned` classifiers, and in a folder of the experiment's name beside it
    pretraining.csv, finetuning.csv and losses.svg.
    """
    beside = report.parent / "results" / experiment.stem
    beside.mkdir(parents=True, exist_ok=True)
    write_csv(
        beside / "pretraining.csv",
        [{k: v for k, v in record.items() if k != "folder"} for record in pretrained],
    )
    write_csv(
        beside / "finetuning.csv",
        [
            {
                **{k: v for k, v in record.items() if not isinstance(v, dict | np.ndarray)},
                "measure": name,
                "value": round(value, 5),
            }
            for record in finetuned
            for name, value in record["measures"].items()
        ],
    )
    draw(pretrained, beside / "losses.svg")
    folder = f"results/{experiment.stem}"
    report.write_text(
        "\n".join(
            [
                "# What the decoders are worth",
                "",
                (
                    f"Made by `python -m training.experiment training/experiments/{experiment.name}"
                    f" --data DATA --out OUT`, and `--report {report.name}` with the same."
                ),
                (
                    f"Every run is in [pretraining.csv]({folder}/pretraining.csv) and"
                    f" [finetuning.csv]({folder}/finetuning.csv)."
                ),
                "",
                *(
                    []
                    if len(finetuned) == planned
                    else [
                        f"**Not complete:** {len(finetuned)} of {planned} classifiers are done.",
                        "",
                    ]
                ),
                "## What it says",
                "",
                *conclusion(tasks, reference, finetuned),
                "",
                "## Pretraining",
                "",
                *table_of_pretraining(pretrained, reference),
                "",
                NOTES,
                "",
                f"![losses]({folder}/losses.svg)",
                "",
                "## Fine-tuning",
                "",
                *table_of_tasks(tasks, pretrained, finetuned),
                "",
                "## Against the reference",
                "",
                *table_of_differences(tasks, reference, finetuned),
                "",
                *(["## What was done before", "", history.strip(), ""] if history else []),
            ]
        ),
        encoding="utf-8",
    )


def table_of_pretraining(pretrained: Sequence[Record], reference: str) -> list[str]:
    lines = [
        (
            "| design | seed | tokens | steps | PFLOPs | minutes | held-out loss, nats | without"
            " context | on |"
        ),
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    return lines + [
        f"| {r['design']} | {r['seed']} | {r['tokens']:,} | {r['steps']:,} |"
        f" {r['flops'] / 1e15:.2f} | {r['minutes']:.0f} |"
        f" {r['held_out_loss']:.3f}{' (rtd)' if r['objective'] == 'rtd' else ''} |"
        f" {_without_context(r)} | {r['threads']} thread(s), {r['device']}, {r['precision']} |"
        for r in sorted(
            pretrained, key=lambda r: (r["design"] != reference, r["design"], r["seed"])
        )
    ]


def _without_context(record: Record) -> str:
    level = f"{record['loss_without_context']:.3f}"
    return (
        level
        if record["generator_loss"] is None
        else f"generator {record['generator_loss']:.3f} ({level})"
    )


def table_of_tasks(
    tasks: Sequence[Task], pretrained: Sequence[Record], finetuned: Sequence[Record]
) -> list[str]:
    """Mean ± standard deviation over the fine-tuning seeds of each encoder, and how far above the
    majority that is.
    """
    lines = [
        (
            "Mean ± standard deviation over the fine-tuning seeds (their number where it is not the"
            " same everywhere). In brackets the 95 % bootstrap"
        ),
        (
            "interval, over the development examples, of the difference to the majority's answer;"
            " bold where it lies above 0. The intervals are"
        ),
        "not corrected for their number.",
        "",
        "| encoder | " + " | ".join(f"{task.name} ({task.metrics[0]})" for task in tasks) + " |",
        "|---|" + "--:|" * len(tasks),
    ]
    most = max(
        (len(_of(finetuned, (e["design"], e["seed"]), task)) for e in pretrained for task in tasks),
        default=0,
    )
    untold: list[str] = []
    below: list[str] = []
    constant: list[str] = []
    for encoder in pretrained:
        cells = []
        for task in tasks:
            runs, who = (
                _of(finetuned, (encoder["design"], encoder["seed"]), task),
                f"{task.name} after {encoder['design']}, seed {encoder['seed']}",
            )
            cell, low, high = _cell(task, runs, most)
            cells.append(cell)
            if low <= 0:
                (below if high < 0 else untold).append(who)
            same = sum(len(set(run["answers"].tolist())) == 1 for run in runs)
            if same:
                constant.append(f"{who} ({same} of {len(runs)} runs)")
        lines.append(f"| {encoder['design']}, seed {encoder['seed']} | {' | '.join(cells)} |")
    for said, which in (
        (
            "Not told apart from the majority, for want of learning or of development examples",
            untold,
        ),
        ("Below the majority", below),
        ("One and the same answer to everything: nothing was learned there", constant),
    ):
        lines += ["", f"{said}: {'; '.join(which)}."] if which else []
    return lines


def _cell(task: Task, runs: Sequence[Record], most: int) -> tuple[str, float, float]:
    """What the table says, and the interval of the difference to the majority; infinite bounds
    where nothing is known.
    """
    if not runs:
        return "not yet", math.inf, math.inf
    name = task.metrics[0]
    values = [run["measures"][name] for run in runs]
    low, high = above(
        name, np.array([run["answers"] for run in runs]), runs[0]["majority"], runs[0]["labels"]
    )
    mean = f"{np.mean(values):.3f}" + (
        f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    )
    number = f" (n = {len(runs)})" if len(runs) < most else ""
    return f"{f'**{mean}**' if low > 0 else mean}{number} [{low:+.3f}, {high:+.3f}]", low, high


def table_of_differences(
    tasks: Sequence[Task], reference: str, finetuned: Sequence[Record]
) -> list[str]:
    """Each encoder against the reference of its own pretraining seed, fine-tuning seed by
    fine-tuning seed.
    """
    encoders = list(dict.fromkeys((r["design"], r["pretraining_seed"]) for r in finetuned))
    references = [encoder for encoder in encoders if encoder[0] == reference]
    lines = [
        (
            "Difference to the reference of the same pretraining seed, paired by fine-tuning seed,"
            " with Student's 95 % interval. A design that differs in"
        ),
        (
            "the decoder alone shares first weights, text and masks with it; another encoder or"
            " objective shares the text's order alone. The"
        ),
        (
            "reference's own further seeds are set against its first: that is what the seed does."
            " An interval knows the seeds of fine-tuning only, so"
        ),
        (
            "more than one in twenty of them excludes 0 by chance: what a design is worth is said"
            " above."
        ),
        "",
        "| encoder | against | " + " | ".join(task.name for task in tasks) + " | mean over tasks |",
        "|---|---|" + "--:|" * (len(tasks) + 1),
    ]
    for encoder in encoders:
        against = references[0] if encoder in references[1:] else (reference, encoder[1])
        if encoder == against or against not in references:
            continue
        each = [differences(task, encoder, against, finetuned) for task in tasks]
        seeds = set.intersection(*(set(of_task) for of_task in each))
        whole = [float(np.mean([of_task[seed] for of_task in each])) for seed in sorted(seeds)]
        cells = [
            _difference(values) for values in (*(list(of_task.values()) for of_task in each), whole)
        ]
        lines.append(
            f"| {encoder[0]}, seed {encoder[1]} | {against[0]}, seed {against[1]} |"
            f" {' | '.join(cells)} |"
        )
    return lines


def differences(
    task: Task, encoder: Encoder, reference: Encoder, finetuned: Sequence[Record]
) -> dict[int, float]:
    """Difference of the task's first measure by fine-tuning seed, for every seed that both have."""
    ours, theirs = (
        {r["seed"]: r["measures"][task.metrics[0]] for r in _of(finetuned, who, task)}
        for who in (encoder, reference)
    )
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def _of(finetuned: Sequence[Record], encoder: Encoder, task: Task) -> list[Record]:
    return [
        r
        for r in finetuned
        if (r["design"], r["pretraining_seed"], r["task"]) == (*encoder, task.name)
    ]


def _difference(values: Sequence[float]) -> str:
    if not values:
        return "not yet"
    mean, low, high = paired(np.array(values))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if math.isfinite(low) else f"{mean:+.3f}"


def conclusion(tasks: Sequence[Task], reference: str, finetuned: Sequence[Record]) -> list[str]:
    """What the designs are worth, by the spread between pretraining seeds of one design.

    Student's t with the pooled variance of the designs that were pretrained more than once,
    Bonferroni over the designs that are judged. Encoders are compared over the fine-tuning seeds
    that all of them have on every task; one that has none yet is left out.
    """
    seeds, means = _means_by_design(tasks, finetuned)
    again = {design: values for design, values in means.items() if len(values) > 1}
    freedom = sum(len(values) - 1 for values in again.values())
    judged = sorted(design for design in means if design != reference)
    if reference not in means or not freedom or not judged:
        return ["Too little is done to say what a design is worth."]
    squares = sum(np.var(values, ddof=1) * (len(values) - 1) for values in again.values())
    spread = math.sqrt(squares / freedom)
    quantile = float(stats.t.ppf(1 - 0.05 / (2 * len(judged)), freedom))
    lines = [
        (
            "The mean over the tasks and the fine-tuning seeds"
            f" {', '.join(map(str, sorted(seeds)))} moves, between pretraining seeds of one design,"
            " by a standard deviation of"
        ),
        (
            f"{spread:.4f} ({freedom} degree(s) of freedom, from {', '.join(sorted(again))}; taken"
            f" to be the same for all). At 95 % for the {len(judged)} designs together"
        ),
        f"(t = {quantile:.1f}), on these development examples:",
        "",
    ]
    base = means[reference]
    for design in judged:
        difference = float(np.mean(means[design]) - np.mean(base))
        margin = quantile * spread * math.sqrt(1 / len(means[design]) + 1 / len(base))
        if abs(difference) <= margin:
            verdict = "no difference can be told"
        else:
            verdict = "better" if difference > 0 else "worse"
        lines.append(
            f"- `{design}` against `{reference}`: {difference:+.4f} ({difference - margin:+.4f} to"
            f" {difference + margin:+.4f}): {verdict}."
        )
    return lines


def _means_by_design(
    tasks: Sequence[Task], finetuned: Sequence[Record]
) -> tuple[set[int], dict[str, list[float]]]:
    """Return the fine-tuning seeds that all encoders have, and each design's means over them.

    A mean is of one encoder, over the tasks' first metrics. An encoder without a seed that it has
    on every task is left out.
    """
    common: dict[tuple[str, int], set[int]] = {}
    for encoder in dict.fromkeys((run["design"], run["pretraining_seed"]) for run in finetuned):
        by_task = [{run["seed"] for run in _of(finetuned, encoder, task)} for task in tasks]
        if seeds_of_all_tasks := set.intersection(*by_task):
            common[encoder] = seeds_of_all_tasks
    if not common:
        return set(), {}
    seeds = set.intersection(*common.values())
    means: dict[str, list[float]] = {}
    for encoder in common if seeds else ():
        scores = [
            run["measures"][task.metrics[0]]
            for task in tasks
            for run in _of(finetuned, encoder, task)
            if run["seed"] in seeds
        ]
        means.setdefault(encoder[0], []).append(float(np.mean(scores)))
    return seeds, means


def draw(pretrained: Sequence[Record], out: Path) -> None:
    panels: dict[str, dict[str, list[Path]]] = {}
    for record in pretrained:
        title = {"mlm": "masked language modelling", "rtd": "replaced-token detection"}[
            record["objective"]
        ]
        panels.setdefault(title, {}).setdefault(record["design"], []).append(record["folder"])
    if panels:
        curves.draw(panels, out)


def write_csv(path: Path, rows: Sequence[Record]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        if rows:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
