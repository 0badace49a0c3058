"""
Reports a paired experiment: one sentence, one picture and one table first, then the method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training import probes
from training.effects import (
    Effect,
    detectable,
    deviation_interval,
    effect,
    holm,
    interval_half_width,
)
from training.pairs import ACCURACY, READ_OUT, PairedExperiment, Record
from training.readout import ReadOut


@dataclass(frozen=True)
class Scale:
    """How a measurement is shown."""

    title: str
    unit: str
    factor: float
    digits: int
    is_loss: bool
    """Whether less is better."""
    limit: float
    """The half-width of an interval that the experiment aims at, in the measurement's own unit."""

    def number(self, value: float) -> str:
        """Return a difference with its sign."""
        return f"{value * self.factor:+.{self.digits}f}"

    def interval(self, of: Effect) -> str:
        """Return a mean with its interval."""
        mean, low, high = of.interval
        if of.pairs < 2:
            return self.number(mean) if of.pairs else "not yet"
        return f"{self.number(mean)} ({self.number(low)} to {self.number(high)})"


SCALES = {
    READ_OUT: Scale("read-out loss", "nats", 1, 3, is_loss=True, limit=0.02),
    ACCURACY: Scale("probe accuracy", "points", 100, 2, is_loss=False, limit=0.01),
}
"""The two measurements that decide, by name."""
SIGNIFICANT = 0.05
OF_PROBE = Scale("", "points", 100, 1, is_loss=False, limit=0.01)


def write(experiment: PairedExperiment, records: Sequence[Record], path: Path) -> None:
    """Write the report to `path`, and its picture to results/NAME in the same folder.

    NAME is the experiment's.
    """
    folder = path.parent / "results" / experiment.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    draw(experiment, records, folder / "effects.svg")
    path.write_text("\n".join(lines(experiment, records)) + "\n", encoding="utf-8")


def lines(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    """Return the report's lines of Markdown."""
    name = experiment.path.stem
    return [
        "# What pretraining decoders are worth",
        "",
        *verdicts(experiment, records),
        "",
        f"![effects with intervals](results/{name}/effects.svg)",
        "",
        *effect_table(experiment, records),
        "",
        "## Method",
        "",
        *_method(experiment, records),
        "",
        "## Each probe",
        "",
        *probe_table(experiment, records),
        "",
        "## Cost",
        "",
        *cost_table(experiment, records),
        "",
        experiment.notes.strip(),
    ]


# The verdict.


def verdicts(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    """Return a list of sentences: the claim, the positive control, and the other designs."""
    of_design = {
        arm: "; ".join(_findings(experiment, records, arm, experiment.reference))
        for arm in designs(experiment)
    }
    sentences = []
    if experiment.claim:
        sentence = of_design.pop(experiment.claim)
        if experiment.longer:
            work = "; ".join(_findings(experiment, records, experiment.claim, experiment.longer))
            sentence += f". At equal work, against `{experiment.longer}`: {work}"
        sentences.append(f"**`{experiment.claim}`'s claim at this scale: {sentence}.**")
    if experiment.control:
        sentences.append(_control_sentence(experiment, records))
    sentences += [f"`{arm}`: {sentence}." for arm, sentence in of_design.items()]
    return [f"- {sentence}" for sentence in sentences]


def _control_sentence(experiment: PairedExperiment, records: Sequence[Record]) -> str:
    of = effect(records, experiment.control, experiment.reference, READ_OUT)
    seen = "is detected" if of.excludes_zero else "is **not** detected, so nothing is shown"
    return (
        f"Positive control: the effect of `{experiment.control}`, which is known to be large,"
        f" {seen}: {SCALES[READ_OUT].interval(of)} nats."
    )


def _findings(
    experiment: PairedExperiment, records: Sequence[Record], arm: str, against: str
) -> list[str]:
    """Return what the effects of a design show, in words."""
    names = designs(experiment)
    findings = []
    for name in SCALES:
        of_all = [effect(records, each, against, name) for each in names]
        number = names.index(arm)
        findings.append(_finding(of_all[number], _adjusted(of_all)[number]))
    return findings


def _finding(of: Effect, p_value: float) -> str:
    """Return what an effect shows: a gain, a loss, or how large a gain can be at most.

    `p_value` is adjusted; an effect is called one if it is below 0.05.
    """
    scale = SCALES[of.measurement]
    if of.pairs < 2:
        return f"{scale.title}: too few pairs are done"
    mean, low, high = of.interval
    best = low if scale.is_loss else high
    numbers = f"{scale.interval(of)} {scale.unit}"
    if p_value < SIGNIFICANT:
        is_better = (mean < 0) == scale.is_loss
        return f"{scale.title} is {'better' if is_better else 'worse'}, {numbers}"
    excluded = f"{abs(best) * scale.factor:.{scale.digits}f} {scale.unit}"
    return f"no effect on {scale.title} is shown, {numbers}; a gain above {excluded} is excluded"


def designs(experiment: PairedExperiment) -> list[str]:
    """Return the arms that are compared: all but the reference, the longer one and the control."""
    others = {experiment.reference, experiment.longer, experiment.control}
    return [arm.name for arm in experiment.arms if arm.name not in others]


# Tables.


def effect_table(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    """Return the table of effects, the control first, at equal tokens and at equal work."""
    text = [
        "| arm | against | pairs | "
        + " | ".join(f"{scale.title}, {scale.unit} | p" for scale in SCALES.values())
        + " |",
        "|---|---|--:|" + "--:|--:|" * len(SCALES),
    ]
    names = designs(experiment)
    singles = [name for name in (experiment.control, experiment.longer) if name]
    families = [([name], experiment.reference) for name in singles]
    families.append((names, experiment.reference))
    if experiment.longer:
        families.append((names, experiment.longer))
    for arms, against in families:
        cells: dict[str, list[str]] = {arm: [] for arm in arms}
        pairs = dict.fromkeys(arms, 0)
        for name, scale in SCALES.items():
            effects = [effect(records, arm, against, name) for arm in arms]
            for of, p_value in zip(effects, _adjusted(effects), strict=True):
                cells[of.arm] += [scale.interval(of), f"{p_value:.3f}"]
                pairs[of.arm] = of.pairs
        text += [f"| {arm} | {against} | {pairs[arm]} | {' | '.join(cells[arm])} |" for arm in arms]
    return [*text, "", *_notes_of_table(experiment)]


def _adjusted(effects: Sequence[Effect]) -> list[float]:
    """Return p-values, adjusted by Holm over the effects that have two pairs."""
    tested = [number for number, of in enumerate(effects) if of.pairs > 1]
    adjusted = dict(zip(tested, holm([effects[n].p_value for n in tested]), strict=True))
    return [adjusted.get(number, 1.0) for number in range(len(effects))]


def _notes_of_table(experiment: PairedExperiment) -> list[str]:
    notes = [
        "Differences within pairs, with Student's 95 % interval. A lower read-out loss is better, a"
        " higher accuracy is better. p is adjusted for the number of designs (Holm)."
    ]
    if experiment.longer:
        notes.append(
            f"`{experiment.longer}` is `{experiment.reference}` with more steps: next to it a"
            " design has to pay for the work of its decoder."
        )
    return notes


def probe_table(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    """Return the table of each probe's effect, in points; STS-B's is 100 times Spearman's ρ."""
    arms = [arm.name for arm in experiment.arms if arm.name != experiment.reference]
    text = [
        "Differences to the reference in points, with 95 % intervals that are not adjusted; of"
        f" `{probes.COMPARED}` 100 times Spearman's correlation.",
        "",
        f"| probe | {experiment.reference} | " + " | ".join(arms) + " |",
        "|---|--:|" + "--:|" * len(arms),
    ]
    for name in probes.names():
        values = [each.measured[name] for each in records if each.arm == experiment.reference]
        mean = f"{100 * fmean(values):.1f}" if values else ""
        cells = [
            OF_PROBE.interval(effect(records, arm, experiment.reference, name)) for arm in arms
        ]
        text.append(f"| {name} | {mean} | {' | '.join(cells)} |")
    return text


def cost_table(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    """Return what each arm costs, and where it ran."""
    text = [
        "| arm | runs | tokens | work, of the reference's | minutes | read-out loss, nats |"
        " probe accuracy | on |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    reference = [_number(each, "flops") for each in records if each.arm == experiment.reference]
    for arm in experiment.arms:
        runs = [each for each in records if each.arm == arm.name]
        if not runs or not reference:
            continue
        work = fmean(_number(each, "flops") for each in runs) / fmean(reference)
        minutes = fmean(_number(each, "minutes") for each in runs)
        machines = ", ".join(sorted({each.beginning.machine for each in runs}))
        text.append(
            f"| {arm.name} | {len(runs)} | {int(_number(runs[0], 'tokens')):,} | {work:.2f} |"
            f" {minutes:.0f} | {_mean(runs, READ_OUT):.3f} | {_mean(runs, ACCURACY):.1%} |"
            f" {machines} |"
        )
    text += [
        "",
        "Minutes are wall-clock time of one thread, on a machine that may have done other work.",
    ]
    return text


def _number(record: Record, column: str) -> float:
    return float(record.run[column])


def _mean(records: Iterable[Record], measurement: str) -> float:
    return fmean(record.measured[measurement] for record in records)


def _method(experiment: PairedExperiment, records: Sequence[Record]) -> list[str]:
    recipe = ReadOut()
    name = experiment.path.stem
    left = wanted_pairs(experiment, records)
    return [
        experiment.question.strip(),
        "",
        f"Made by `drbert-experiment training/experiments/{experiment.path.name} --records"
        f" training/results/{name}/units.csv --data DATA --out OUT`, and `--report"
        " training/RESULTS.md` in place of the last two options. Every run is a row of"
        f" [units.csv](results/{name}/units.csv).",
        "",
        "- **Pairs.** The runs of a pair share the seed: the encoder's first weights, the order of"
        " the text and the masks. Each row has digests of them. A pair is on one machine.",
        "- **Read-out loss.** The encoder is frozen, its decoder left out. A new output layer of"
        f" masked language modelling is trained for {recipe.steps} steps, with one seed for all;"
        " its loss on held-out text is in nats a masked token. `mae`'s encoder never read a [MASK]"
        " before, which counts against it here.",
        "- **Probes.** Logistic regression and the ten nearest neighbours on frozen states: the"
        " mean over the tokens, and [CLS]. Probe accuracy is the mean over tasks and poolings of"
        " logistic regression. Nothing is drawn at random but the training examples, which are the"
        " same for all.",
        *([f"- **Precision.** {left}"] if left else []),
    ]


def wanted_pairs(experiment: PairedExperiment, records: Sequence[Record]) -> str:
    """Return how many pairs the arms need whose intervals are wider than the aim; "" if none is."""
    short = []
    for arm in (each.name for each in experiment.arms if each.name != experiment.reference):
        effects = [effect(records, arm, experiment.reference, name) for name in SCALES]
        if effects[0].pairs < 2:
            short.append(f"`{arm}` has {effects[0].pairs} pairs")
            continue
        if any(of.half_width <= SCALES[of.measurement].limit for of in effects):
            continue
        pairs = min(of.pairs_for(SCALES[of.measurement].limit) for of in effects)
        short.append(f"`{arm}` needs {pairs} pairs and has {effects[0].pairs}")
    if not short:
        return ""
    return (
        "Intervals of ±0.02 nats or ±1 point are aimed at. By the deviations above,"
        f" {'; '.join(short)}."
    )


def power_table(experiment: PairedExperiment, pilot: Sequence[Record]) -> list[str]:
    """Return what the numbers of pairs can show, by the deviations of a pilot's pairs."""
    text = [
        "| measurement | arm | pilot's pairs | standard deviation | pairs | half-width | detected"
        " with 80 % |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for name, scale in SCALES.items():
        for arm in {each.arm: None for each in pilot}:
            of = effect(pilot, arm, experiment.reference, name)
            if arm == experiment.reference or of.pairs < 2:
                continue
            low, high = (scale.factor * end for end in deviation_interval(of.deviation, of.pairs))
            spread = f"{scale.factor * of.deviation:.3f} ({low:.3f} to {high:.3f})"
            for pairs in sorted({each.pairs for each in experiment.arms}):
                deviation = scale.factor * of.deviation
                text.append(
                    f"| {scale.title}, {scale.unit} | {arm} | {of.pairs} | {spread} | {pairs} |"
                    f" {interval_half_width(deviation, pairs):.3f} |"
                    f" {detectable(deviation, pairs):.3f} |"
                )
    return text


# The picture.


def draw(experiment: PairedExperiment, records: Sequence[Record], out: Path) -> None:
    """Draw the effects with their intervals as an SVG, a panel for each measurement."""
    mpl.rcParams["svg.hashsalt"] = "effects"  # the same numbers give the same file
    singles = [name for name in (experiment.control, experiment.longer) if name]
    rows = [*singles, *designs(experiment)]
    figure = Figure(figsize=(11, 1.4 + 0.42 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(SCALES), sharey=True)
    for axes, name in zip(all_axes, SCALES, strict=True):
        _draw_panel(axes, [effect(records, arm, experiment.reference, name) for arm in rows], rows)
    figure.savefig(out, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, effects: Sequence[Effect], rows: Sequence[str]) -> None:
    scale = SCALES[effects[0].measurement]
    for height, of in enumerate(reversed(effects)):
        if of.pairs < 2:
            continue
        mean, low, high = (scale.factor * value for value in of.interval)
        axes.plot([low, high], [height, height], color="#0072B2", linewidth=2)
        axes.plot([mean], [height], "o", color="#0072B2", markersize=6)
    axes.axvline(0, color="0.5", linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    better = "← better" if scale.is_loss else "better →"
    axes.set_xlabel(f"difference in {scale.title}, {scale.unit}   {better}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
