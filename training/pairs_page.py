"""
Reports a paired experiment: sentences, a picture and a table first, then the method.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atomic import write_text_atomic
from training import probes
from training.effects import (
    Effect,
    detectable,
    deviation_interval,
    effect,
    holm,
    interval_half_width,
)
from training.pair_records import ACCURACY, READ_OUT, Record
from training.pairs_file import PairedExperiment
from training.readout import ReadOut

SIGNIFICANT = 0.05
EQUAL_WORK = 0.05
"""Largest relative difference in work of arms that are compared at equal work."""


@dataclass(frozen=True)
class Scale:
    """How a measurement is shown."""

    title: str
    unit: str
    factor: float
    digits: int
    is_loss: bool
    """Whether less is better."""
    aim: float
    """The half-width of an interval that the experiment aims at, in the measurement's own unit."""

    def number(self, value: float) -> str:
        """Return a difference with its sign."""
        return f"{value * self.factor:+.{self.digits}f}"

    def size(self, value: float) -> str:
        """Return the size of a difference, with its unit."""
        return f"{abs(value) * self.factor:.{self.digits}f} {self.unit}"

    def interval(self, of: Effect) -> str:
        """Return a mean with its interval, if it has one."""
        if not of.pairs:
            return "not yet"
        mean, low, high = of.interval
        if of.pairs == 1:
            return self.number(mean)
        return f"{self.number(mean)} ({self.number(low)} to {self.number(high)})"

    def gain(self, difference: float) -> float:
        """Return a difference with the sign by which more is better."""
        return -difference if self.is_loss else difference


SCALES = {
    READ_OUT: Scale("read-out loss", "nats", 1, 3, is_loss=True, aim=0.02),
    ACCURACY: Scale("probe accuracy", "points", 100, 2, is_loss=False, aim=0.01),
}
"""The two measurements that decide, by name."""
OF_PROBE = Scale("", "points", 100, 1, is_loss=False, aim=0.01)


@dataclass(frozen=True)
class Page:
    """A report."""

    experiment: PairedExperiment
    records: Sequence[Record]
    """All of the experiment's arms and pairs."""
    records_path: Path

    def write(self, path: Path) -> None:
        """Write the report to `path`, and its picture to results/NAME in the same folder.

        NAME is the experiment's.
        """
        picture = path.parent / "results" / self.experiment.path.stem / "effects.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        self.draw(picture)
        write_text_atomic(path, "\n".join(self.lines(path, picture)) + "\n")

    def lines(self, path: Path, picture: Path) -> list[str]:
        """Return the report's lines of Markdown; links lead from `path`."""
        return [
            "# What pretraining decoders are worth",
            "",
            *self.progress(),
            *self.verdicts(),
            "",
            f"![effects with intervals]({_link(path, picture)})",
            "",
            *self.effect_table(),
            "",
            "## Method",
            "",
            *self.method(path),
            "",
            "## Each probe",
            "",
            *self.probe_table(),
            "",
            "## Cost",
            "",
            *self.cost_table(),
            *(["", self.experiment.notes.strip()] if self.experiment.notes else []),
        ]

    def effect(self, arm: str, against: str, measurement: str) -> Effect:
        """Return an effect."""
        return effect(self.records, arm, against, measurement)

    def work(self, arm: str, against: str) -> float | None:
        """Return the work of an arm's run by that of another one; None if one has no run."""
        flops = [
            [record.cost.flops for record in self.records if record.arm == name]
            for name in (arm, against)
        ]
        return fmean(flops[0]) / fmean(flops[1]) if all(flops) else None

    def progress(self) -> list[str]:
        """Return how many runs are done, if some are missing."""
        counts = {
            arm.name: sum(record.arm == arm.name for record in self.records)
            for arm in self.experiment.arms
        }
        short = [
            f"{counts[arm.name]} of {arm.pairs} of `{arm.name}`"
            for arm in self.experiment.arms
            if counts[arm.name] < arm.pairs
        ]
        return [f"**Not complete.** Done are {', '.join(short)}.", ""] if short else []

    # The verdict.

    def verdicts(self) -> list[str]:
        """Return a list of sentences: the claim, the positive control, and the other designs."""
        experiment = self.experiment
        sentences = []
        if experiment.claim:
            claim = experiment.claim
            finding = self.findings(claim, experiment.reference)
            sentences.append(
                f"**`{claim}` at this scale, against `{experiment.reference}` on as many tokens:"
                f" {finding}.**"
            )
            if claim in self.at_equal_work():
                finding = self.findings(claim, experiment.longer)
                sentences.append(
                    f"`{claim}` against `{experiment.longer}`, with as much work: {finding}."
                )
        if experiment.control:
            sentences.append(self._control_sentence())
        sentences += [
            f"`{arm}`: {self.findings(arm, experiment.reference)}."
            for arm in experiment.designs
            if arm != experiment.claim
        ]
        return [f"- {sentence}" for sentence in sentences]

    def at_equal_work(self) -> list[str]:
        """Return the designs whose work is that of the longer arm."""
        if not self.experiment.longer:
            return []
        works = {arm: self.work(arm, self.experiment.longer) for arm in self.experiment.designs}
        return [
            arm for arm, work in works.items() if work is not None and abs(work - 1) <= EQUAL_WORK
        ]

    def _control_sentence(self) -> str:
        control, reference = self.experiment.control, self.experiment.reference
        texts, are_detected = [], []
        for name, scale in SCALES.items():
            of = self.effect(control, reference, name)
            if of.pairs < 2:
                return f"Positive control: `{control}` is not measured yet."
            _, low, high = of.interval
            is_detected = min(scale.gain(low), scale.gain(high)) > 0
            words = "better" if is_detected else "**not** shown to be better"
            texts.append(f"{scale.title} is {words}, {scale.interval(of)} {scale.unit}")
            are_detected.append(is_detected)
        ending = "" if all(are_detected) else " Where it is not detected, this page shows nothing."
        return (
            f"Positive control, `{control}`, whose encoder is known to be better:"
            f" {'; '.join(texts)}.{ending}"
        )

    def findings(self, arm: str, against: str) -> str:
        """Return what the effects of a design show, in words."""
        texts = []
        for name, scale in SCALES.items():
            of = self.effect(arm, against, name)
            texts.append(_finding(of, self.adjusted(name, against).get(arm, 1.0), scale))
        return "; ".join(texts)

    def adjusted(self, measurement: str, against: str) -> dict[str, float]:
        """Return the p-values of the designs, adjusted by Holm for their number.

        A design without two pairs has the p-value 1.
        """
        is_longer = against == self.experiment.longer
        arms = self.at_equal_work() if is_longer else self.experiment.designs
        p_values = [self.effect(arm, against, measurement).p_value for arm in arms]
        return dict(zip(arms, holm(p_values), strict=True))

    # Tables.

    def effect_table(self) -> list[str]:
        """Return the table of effects, the control first, at equal tokens and at equal work."""
        experiment = self.experiment
        columns = " | ".join(f"{scale.title}, {scale.unit} | p" for scale in SCALES.values())
        text = [
            f"| arm | against | work, of the other's | pairs | {columns} |",
            "|---|---|--:|--:|" + "--:|--:|" * len(SCALES),
        ]
        singles = [name for name in (experiment.control, experiment.longer) if name]
        rows = [(arm, experiment.reference) for arm in (*singles, *experiment.designs)]
        rows += [(arm, experiment.longer) for arm in self.at_equal_work()]
        for arm, against in rows:
            cells = []
            for name, scale in SCALES.items():
                of = self.effect(arm, against, name)
                p_value = of.p_value
                if arm in experiment.designs:
                    p_value = self.adjusted(name, against)[arm]
                cells += [scale.interval(of), _p_text(p_value) if of.pairs > 1 else ""]
            work = self.work(arm, against)
            pairs = self.effect(arm, against, READ_OUT).pairs
            text.append(
                f"| {arm} | {against} | {'' if work is None else f'{work:.2f}'} | {pairs} |"
                f" {' | '.join(cells)} |"
            )
        return [*text, "", *self._table_notes()]

    def _table_notes(self) -> list[str]:
        notes = [
            "Differences within pairs. A lower read-out loss is better, a higher accuracy is"
            " better. Intervals are Student's, of 95 %, each for one comparison. The p-values of"
            " designs are adjusted for the number of designs (Holm), for each measurement alone; a"
            f" design is called better or worse if p is below {SIGNIFICANT}."
        ]
        if self.experiment.longer:
            notes.append(
                f"`{self.experiment.longer}` is `{self.experiment.reference}` with more steps."
                " Designs whose work is the same within"
                f" {EQUAL_WORK:.0%} are compared with it too."
            )
        return notes

    def probe_table(self) -> list[str]:
        """Return the table of each probe's effect, in points; STS-B's is 100 times Spearman's ρ."""
        reference = self.experiment.reference
        arms = [arm.name for arm in self.experiment.arms if arm.name != reference]
        text = [
            f"Differences to `{reference}` in points, with 95 % intervals, each for one comparison;"
            f" of {probes.COMPARED} 100 times Spearman's correlation.",
            "",
            f"| probe | {reference} | {' | '.join(arms)} |",
            "|---|--:|" + "--:|" * len(arms),
        ]
        for name in probes.names():
            values = [each.measured[name] for each in self.records if each.arm == reference]
            mean = f"{100 * fmean(values):.1f}" if values else ""
            cells = [OF_PROBE.interval(self.effect(arm, reference, name)) for arm in arms]
            text.append(f"| {name} | {mean} | {' | '.join(cells)} |")
        return text

    def cost_table(self) -> list[str]:
        """Return what each arm costs, and where it ran."""
        text = [
            "| arm | runs | tokens | work, of the reference's | minutes | read-out loss, nats |"
            " probe accuracy | on |",
            "|---|--:|--:|--:|--:|--:|--:|---|",
        ]
        for arm in self.experiment.arms:
            runs = [each for each in self.records if each.arm == arm.name]
            work = self.work(arm.name, self.experiment.reference)
            if not runs or work is None:
                continue
            minutes = fmean(each.cost.minutes for each in runs)
            loss, accuracy = (
                fmean(each.measured[name] for each in runs) for name in (READ_OUT, ACCURACY)
            )
            machines = "; ".join(sorted({each.beginning.machine for each in runs}))
            text.append(
                f"| {arm.name} | {len(runs)} | {runs[0].cost.tokens:,} | {work:.2f} |"
                f" {minutes:.0f} | {loss:.3f} | {accuracy:.1%} | {machines} |"
            )
        note = "Minutes are wall-clock time, on a machine that may have done other work."
        return [*text, "", note]

    # The method.

    def method(self, path: Path) -> list[str]:
        """Return how the effects were measured; links lead from `path`."""
        recipe = ReadOut()
        records = _link(path, self.records_path)
        command = f"drbert-experiment training/experiments/{self.experiment.path.name}"
        lines = [
            self.experiment.question.strip(),
            "",
            f"Made by `{command} --records {self.records_path.name} --data DATA --out OUT`, and"
            f" with `--report {path.name}` in place of the last two options. Every run is a row of"
            f" [{self.records_path.name}]({records}).",
            "",
            "- **Pairs.** The runs of a pair share the seed: the order of the text, the masks and,"
            " for encoders of one kind, the first weights. Each row has digests of them. A pair is"
            " on one kind of machine.",
            "- **Read-out loss.** The encoder is frozen, its decoder left out. A new output layer"
            f" of masked language modelling is trained for {recipe.steps} steps, with one seed for"
            " all encoders. The loss is on held-out text, in nats a masked token."
            + self._note_of_mae(),
            "- **Probes.** Logistic regression and nearest neighbours"
            f" ({probes.NEIGHBOURS}) on frozen states: the mean over the tokens, and [CLS]. Probe"
            " accuracy is the mean of all accuracies of logistic regression. Only the examples are"
            " drawn at random, and they are the same for all encoders.",
        ]
        wanted = self.wanted_pairs()
        return [*lines, f"- **Precision.** {wanted}"] if wanted else lines

    def _note_of_mae(self) -> str:
        names = [
            f"`{arm.name}`" for arm in self.experiment.arms if arm.config.decoder.design == "mae"
        ]
        if not names:
            return ""
        return f" The encoder of {', '.join(names)} has never read a [MASK] before."

    def wanted_pairs(self) -> str:
        """Return how many pairs the arms need whose intervals are wider than the aim, if any."""
        short = []
        for arm in (each.name for each in self.experiment.arms):
            if arm == self.experiment.reference:
                continue
            effects = {name: self.effect(arm, self.experiment.reference, name) for name in SCALES}
            if any(of.pairs < 2 for of in effects.values()):
                continue
            if any(of.half_width <= SCALES[name].aim for name, of in effects.items()):
                continue
            pairs = min(of.pairs_for(SCALES[name].aim) for name, of in effects.items())
            short.append(f"`{arm}` would need {pairs} pairs")
        if not short:
            return ""
        aims = " or ".join(f"±{scale.size(scale.aim)}" for scale in SCALES.values())
        return (
            f"Intervals of {aims} are aimed at. By the spread of its differences,"
            f" {'; '.join(short)}."
        )

    # The picture.

    def draw(self, out: Path) -> None:
        """Draw the effects with their intervals as an SVG, a panel for each measurement."""
        mpl.rcParams["svg.hashsalt"] = "effects"  # the same numbers give the same file
        experiment = self.experiment
        singles = [name for name in (experiment.control, experiment.longer) if name]
        rows = [*singles, *experiment.designs]
        figure = Figure(figsize=(11, 1.4 + 0.42 * len(rows)), layout="constrained")
        all_axes = figure.subplots(1, len(SCALES), sharey=True)
        for axes, (name, scale) in zip(all_axes, SCALES.items(), strict=True):
            _draw_panel(axes, scale, [self.effect(arm, experiment.reference, name) for arm in rows])
        figure.savefig(out, format="svg", metadata={"Date": None})


def _finding(of: Effect, p_value: float, scale: Scale) -> str:
    """Return what an effect shows: a gain, a loss, or how large a gain can be at most.

    `p_value` is adjusted; an effect is called one if it is below SIGNIFICANT.
    """
    if of.pairs < 2:
        return f"{scale.title} is not measured yet"
    mean, low, high = of.interval
    numbers = f"{scale.interval(of)} {scale.unit}"
    if p_value < SIGNIFICANT:
        return f"{scale.title} is {'better' if scale.gain(mean) > 0 else 'worse'}, {numbers}"
    largest_gain = max(scale.gain(low), scale.gain(high))
    excluded = f"a gain above {scale.size(largest_gain)}" if largest_gain > 0 else "any gain"
    return f"no effect on {scale.title} is shown, {numbers}, and {excluded} is excluded"


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _link(path: Path, target: Path) -> str:
    return Path(os.path.relpath(target, path.parent)).as_posix()


def _draw_panel(axes: Axes, scale: Scale, effects: Sequence[Effect]) -> None:
    """Draw the effects from top to bottom."""
    for height, of in enumerate(reversed(effects)):
        if of.pairs < 2:
            continue
        mean, low, high = (scale.factor * value for value in of.interval)
        axes.plot([low, high], [height, height], color="#0072B2", linewidth=2)
        axes.plot([mean], [height], "o", color="#0072B2", markersize=6)
    axes.axvline(0, color="0.5", linewidth=1, zorder=0)
    axes.set_yticks(range(len(effects)), [of.arm for of in reversed(effects)])
    axes.set_ylim(-0.6, len(effects) - 0.4)
    better = "← better" if scale.is_loss else "better →"
    axes.set_xlabel(f"difference in {scale.title}, {scale.unit}   {better}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def power_table(experiment: PairedExperiment, pilot: Sequence[Record]) -> list[str]:
    """Return what the numbers of pairs can show, by the spread of a pilot's differences.

    The last column is for one of the designs, whose p-value is adjusted for their number.
    """
    designs = max(1, len(experiment.designs))
    text = [
        "| measurement | pilot's arm | its pairs | standard deviation (95 %) | pairs | half-width |"
        f" detected with 80 % | as one of {designs} designs |",
        "|---|---|--:|---|--:|--:|--:|--:|",
    ]
    arms = sorted({record.arm for record in pilot} - {experiment.reference})
    sizes = sorted({arm.pairs for arm in experiment.arms if arm.pairs > 1})
    for name, scale in SCALES.items():
        for arm in arms:
            of = effect(pilot, arm, experiment.reference, name)
            if of.pairs < 2:
                continue
            deviation = scale.factor * of.deviation
            low, high = deviation_interval(deviation, of.pairs)
            spread = f"{deviation:.3f} ({low:.3f} to {high:.3f})"
            text += [
                f"| {scale.title}, {scale.unit} | {arm} | {of.pairs} | {spread} | {pairs} |"
                f" {interval_half_width(deviation, pairs):.3f} |"
                f" {detectable(deviation, pairs):.3f} |"
                f" {detectable(deviation, pairs, alpha=0.05 / designs):.3f} |"
                for pairs in sizes
            ]
    return text
