"""
Writes report.html: one file, no network, the verdict first and everything it rests on below.

    verdict → levels → differences → restarts → deciles → distributions → along a restart →
    where the time goes → tables → gates → starts → same work? → where it ran → what it does not
        prove
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proof.evidence.audit import read_json, read_sealed_plan
from proof.evidence.statistics import Matrix, plain_contrast
from proof.evidence.store import Requests, RestartRecord, read_starts
from proof.plans.plan import Level, Plan, Role
from proof.reports import charts
from proof.reports.distributions import (
    DECILES,
    PARTS,
    PHASES,
    Portrait,
    portraits,
    shift,
    shown_metrics,
)
from proof.reports.drawing import Html, minus, percent, span, text
from proof.reports.page import (
    code,
    facts,
    figure,
    heading,
    legend,
    page,
    pairs,
    paragraph,
    section,
    table,
    word,
)
from proof.reports.report_environment import environment, same_work
from proof.verdict.schema import (
    Contrast,
    Control,
    LevelVerdict,
    Outcome,
    Statistic,
    Verdict,
    describe_statistic,
    metric_label,
)

CONFIDENCE = 0.90
TITLES: Mapping[Outcome, tuple[str, str, str]] = {
    "equivalent": ("Equivalent", "good", "Every claimed 90 % interval lies inside its margin."),
    "not-slower": (
        "Not slower",
        "good",
        "Every claimed 90 % interval ends below its margin; being faster was allowed.",
    ),
    "inconclusive": (
        "Inconclusive",
        "open",
        "The intervals are too wide or the restarts too few to decide. It is never rounded up.",
    ),
    "not-equivalent": (
        "Not equivalent",
        "bad",
        "A claimed interval, corrected for their number, lies wholly beyond its margin.",
    ),
    "invalid": ("Invalid", "bad", "A gate failed: this run could not have shown what it claims."),
}
# What a verdict looks like without its colour.
MARKS: Mapping[Outcome, str] = {
    "equivalent": "M7 12.5l3.5 3.5 7-8",
    "not-slower": "M7 12.5l3.5 3.5 7-8",
    "inconclusive": "M7 12h.1M12 12h.1M17 12h.1",
    "not-equivalent": "M6 9.5h12M6 14.5h12M15 6l-6 12",
    "invalid": "M8 8l8 8M16 8l-8 8",
}
SECTIONS = (
    ("differences", "Differences"),
    ("restarts", "Every restart"),
    ("deciles", "Deciles"),
    ("distributions", "Distributions"),
    ("along", "Along a restart"),
    ("phases", "Where the time goes"),
    ("numbers", "Numbers"),
    ("gates", "Gates"),
    ("starts", "Starts"),
    ("work", "Same work?"),
    ("environment", "Where it ran"),
    ("limits", "What this does not prove"),
    ("again", "Judge it again"),
)
# How far the eye can follow both tails, by how many requests were seen.
SHARES = (
    (20_000, (0.01, 0.1, 0.5, 0.9, 0.99, 0.999)),
    (1_000, (0.01, 0.1, 0.5, 0.9, 0.99)),
    (0, (0.1, 0.5, 0.9)),
)
CURVE_POINTS = 200

LIMITS = """This compares two models on one machine, at these loads, with these texts. It says \
nothing of other hardware, other lengths,
other load or colder caches, and nothing of the quality of the answers. Latencies of interleaved \
copies are colder than those of a service
of one model: compare them, do not quote them. Digests stop accidents and later edits, not an \
author who rewrites everything; therefore the
plan's digest is to be published before the run and the manifest's after it."""


@dataclass(frozen=True)
class _Run:
    """All that the sections are written from."""

    folder: Path
    verdict: Verdict
    plan: Plan
    starts: list[RestartRecord]
    portraits: Mapping[str, Portrait]

    def levels(self) -> Iterable[tuple[Level, LevelVerdict, Portrait]]:
        for level in self.plan.levels:
            if level.name in self.verdict.levels:
                yield level, self.verdict.levels[level.name], self.portraits[level.name]

    @property
    def kept(self) -> list[int]:
        return [start.restart for start in self.starts if not start.dropped]

    def arms(self, role: Role) -> list[str]:
        return [self.plan.arms[i].name for i in self.plan.indices(role)]


def write(folder: Path, verdict: Verdict, path: Path | None = None) -> Path:
    """Renders the report of a run into `path` (default: report.html in its folder)."""
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    run = _Run(folder, verdict, plan, starts, portraits(Requests(folder), plan, starts))
    path = path or folder / "report.html"
    bodies = (
        _differences(run),
        _restarts(run),
        _deciles(run),
        _distributions(run),
        _along(run),
        _phases(run),
        _numbers(run),
        _gates(run),
        _starts(run),
        [same_work(read_json(folder / "identity.json"), run.arms("control"))],
        [environment(read_json(folder / "environment.json"))],
        [paragraph(LIMITS, soft=False)],
        _again(run),
    )
    sections = [
        section(name, title, *body) for (name, title), body in zip(SECTIONS, bodies, strict=True)
    ]
    contents = Html(
        '<nav aria-label="Contents" class="small">'
        + "".join(f'<a href="#{name}">{text(title)}</a>' for name, title in SECTIONS)
        + "</nav>"
    )
    title = f"{plan.name}: {TITLES[verdict.verdict][0].lower()}"
    path.write_text(page(title, [_head(run), _levels(run), contents, *sections]), encoding="utf-8")
    return path


def _head(run: _Run) -> Html:
    """The verdict, its sentence and what the word means."""
    title, tone, meaning = TITLES[run.verdict.verdict]
    question = "as fast as" if run.verdict.claim == "equivalence" else "no slower than"
    entries = [
        ("claim", run.verdict.claim),
        (
            "run",
            f"{run.verdict.run.run}, number {run.verdict.run.number_for_this_plan} of this plan",
        ),
        ("plan", Html(f"{text(run.plan.name)}, {code(run.plan.digest)}")),
    ]
    if run.plan.pilot is not None:
        entries.append(("its pilot", code(run.plan.pilot)))
    return Html(
        f'<header><div class="verdict {tone}"><span class="soft small">Is'
        f" {text(run.arms('candidate')[0])} {question}"
        f' {text(run.arms("reference")[0])}?</span><h1><svg viewBox="0 0 24 24"'
        ' aria-hidden="true"><circle cx="12" cy="12" r="10.5" class="mark"/><path'
        f' d="{MARKS[run.verdict.verdict]}"'
        f' class="mark"/></svg>{title}</h1><p>{text(run.verdict.sentence)}</p><p class="soft'
        f' small">{meaning}</p></div>{facts(entries)}</header>'
    )


def _levels(run: _Run) -> Html:
    """A line a level; the run takes the worst verdict of them."""
    lines = []
    for level, found, portrait in run.levels():
        title, tone, _ = TITLES[found.verdict]
        dropped = f", {found.restarts_dropped} dropped" if found.restarts_dropped else ""
        failed = Html(
            f". Gates that failed: {word('; '.join(found.breached), 'wrong')}"
            if found.breached
            else ""
        )
        lines.append(
            f"<li><b>{text(level.name)}</b>: {word(title.lower(), tone)}, {found.restarts_kept} of"
            f" {found.restarts_planned} restarts{dropped}, "
            f'{portrait.requests:,} requests<p class="soft">{text(_how(level))}{failed}</p></li>'
        )
    return Html(f'<ul class="levels" aria-label="Levels">{"".join(lines)}</ul>')


def _how(level: Level) -> str:
    return {
        "unloaded": (
            "one request in flight, a pause after each answer; each text goes once to every copy"
        ),
        "mixed": (
            f"Poisson arrivals at {level.percent} % of the reference's capacity; each text goes"
            " once to every copy, and the server's inference time is judged"
        ),
        "switchback": (
            f"Poisson arrivals at {level.percent} % of the reference's capacity; slices of"
            f" {level.slice_requests:,} requests to one copy at a time, all with the same gaps and"
            " texts"
        ),
        "capacity": (
            f"{level.in_flight} in flight, slices of {level.slice_s:g} s to one copy at a time; how"
            " long a text takes is judged"
        ),
    }[level.kind]


def _differences(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "Candidate over reference. Line: 90 % interval. Mark: estimate. Shaded: the margin,"
            " claimed before the run. Not slower means that the line ends before the right edge of"
            " the shade, equivalent that it lies inside."
        ),
        legend(
            (
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="whisker reference"/><circle'
                        ' cx="15" cy="8" r="5" class="circle reference"/>'
                    ),
                    "inside",
                ),
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="whisker reference"/><circle'
                        ' cx="15" cy="8" r="5" class="ring reference"/>'
                    ),
                    "undecided",
                ),
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="whisker bad"/><polygon'
                        ' points="9,2 21,8 9,14" class="bad"/>'
                    ),
                    "outside, slower",
                ),
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="whisker bad"/><polygon'
                        ' points="21,2 9,8 21,14" class="bad"/>'
                    ),
                    "outside, faster",
                ),
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="whisker delayed"/><polygon'
                        ' points="15,2 21,8 15,14 9,8" class="delayed"/>'
                    ),
                    "a control, told apart",
                ),
                (
                    '<line x1="15" x2="15" y1="0" y2="16" class="expected"/>',
                    "what a control was made to be",
                ),
            )
        ),
    ]
    for level, found, _ in run.levels():
        parts.append(heading(f"{level.name}: {TITLES[found.verdict][0].lower()}"))
        if not found.statistics:
            parts.append(paragraph(f"{found.restarts_kept} restarts are too few for an interval."))
            continue
        rows = [
            charts.Interval(
                f"{metric_label(s.metric)} {s.statistic}",
                s.ratio,
                s.interval,
                s.margin,
                *_mark(s, run.verdict.claim),
            )
            for s in found.statistics
        ]
        parts.append(
            figure(
                f"{' and '.join(run.arms('candidate'))} over {' and '.join(run.arms('reference'))}",
                charts.forest(rows, f"Differences at {level.name}"),
            )
        )
        parts.append(pairs([*_control_figures(run, found), *_same_model_figures(found)]))
    return parts


def _mark(item: Statistic, claim: str) -> tuple[str, str]:
    if item.outside and not (claim == "non-inferiority" and item.outside == "faster"):
        return ("right" if item.outside == "slower" else "left"), "bad"
    return (
        "circle" if item.equivalent or (claim == "non-inferiority" and item.not_slower) else "ring"
    ), "reference"


def _same_model_mark(item: Contrast) -> tuple[str, str]:
    if item.biased:
        return ("right" if item.ratio > 1 else "left"), "bad"
    return ("circle" if item.equivalent else "ring"), "reference"


def _control_figures(run: _Run, found: LevelVerdict) -> Iterable[Html]:
    for arm in dict.fromkeys(control.arm for control in found.controls):
        mine = [control for control in found.controls if control.arm == arm]
        kind = "delayed" if arm in run.arms("delayed") else "control"
        rows = [
            charts.Interval(
                f"{metric_label(c.metric)} {c.statistic}",
                c.ratio,
                c.interval,
                c.margin,
                "diamond" if c.detected else "ring",
                kind,
                c.expected,
            )
            for c in mine
        ]
        yield figure(
            Html(f"Control {text(arm)}: {_told_apart(mine)}"),
            charts.forest(rows, f"Control {arm}", small=True, whole=True),
        )


def _told_apart(controls: list[Control]) -> Html:
    told = any(control.detected for control in controls)
    made = next(
        (f", made {percent(control.expected)}" for control in controls if control.expected), ""
    )
    return Html(f"{word('told apart', 'good') if told else word('not told apart', 'bad')}{made}")


def _same_model_figures(found: LevelVerdict) -> Iterable[Html]:
    for first, second in dict.fromkeys(contrast.arms for contrast in found.same_model):
        mine = [contrast for contrast in found.same_model if contrast.arms == (first, second)]
        rows = [
            charts.Interval(
                f"{metric_label(c.metric)} {c.statistic}",
                c.ratio,
                c.interval,
                c.margin,
                *_same_model_mark(c),
            )
            for c in mine
        ]
        said = word("biased", "bad") if any(c.biased for c in mine) else word("not biased", "good")
        yield figure(
            Html(f"A/A, one model loaded twice: {text(second)} over {text(first)}: {said}"),
            charts.forest(rows, f"A/A {second} over {first}", small=True),
        )


def _restarts(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "Candidate over reference, one dot a start of the server, the first on top. Upright"
            " line: the estimate. The interval above is Student's t over these dots, with the"
            " scatter that load order causes taken out. Shaded: the margin."
        )
    ]
    for level, found, _ in run.levels():
        rows = [
            charts.Strip(
                f"{metric_label(s.metric)} {s.statistic}", s.restart_ratios, s.ratio, s.margin
            )
            for s in found.statistics
            if s.restart_ratios
        ]
        if rows:
            # A restart counts at every level or at none.
            parts.append(
                figure(
                    Html(f"<b>{text(level.name)}</b>"),
                    charts.dots(rows, run.kept, f"Ratio of every restart at {level.name}"),
                )
            )
    return parts if len(parts) > 1 else [paragraph("Too few restarts.")]


def _deciles(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "Shift function: candidate over reference at each decile, with the same 90 % interval"
            " as above, for each decile alone. It shows whether fast and slow requests differ"
            " alike. Descriptive: no decile but those claimed above is judged. Shaded, for scale:"
            " the tightest margin claimed for that time."
        )
    ]
    figures = []
    for level, _, portrait in run.levels():
        for metric in shown_metrics(level):
            estimates = shift(run.plan, portrait, metric)
            if estimates:
                points = [
                    (
                        f"p{decile}",
                        e.ratio,
                        (math.exp(e.interval(CONFIDENCE)[0]), math.exp(e.interval(CONFIDENCE)[1])),
                    )
                    for decile, e in zip(DECILES, estimates, strict=True)
                ]
                figures.append(
                    figure(
                        _caption(level, metric),
                        charts.shift(
                            points,
                            _tightest(level, metric),
                            f"Shift function of {metric_label(metric)} at {level.name}",
                        ),
                    )
                )
    return (
        [*parts, pairs(figures)]
        if figures
        else [paragraph("Too few restarts, or no level at which single requests are judged.")]
    )


def _caption(level: Level, metric: str) -> Html:
    return Html(f"<b>{text(level.name)}</b>, {metric_label(metric)}")


def _tightest(level: Level, metric: str) -> float:
    return min(margin for m, _, margin in level.claimed if m == metric)


def _distributions(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "The share of requests answered within a time, all restarts that count together. Where"
            " one line hides the other, they agree. The scale is stretched at both ends, so that"
            " tails can be seen, and times are on a log scale. Restarts differ more than models do,"
            " so this shows shapes; it decides nothing."
        ),
        legend(
            (
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="broad reference"/><circle'
                        ' cx="15" cy="8" r="5" class="ring reference"/>'
                    ),
                    f"reference: {', '.join(run.arms('reference'))}",
                ),
                (
                    (
                        '<line x1="0" x2="30" y1="8" y2="8" class="dashed candidate"/><polygon'
                        ' points="15,4 19,8 15,12 11,8" class="candidate"/>'
                    ),
                    f"candidate: {', '.join(run.arms('candidate'))}",
                ),
            )
        ),
    ]
    figures = []
    for level, _, portrait in run.levels():
        for metric in shown_metrics(level):
            reference, candidate = (
                portrait.seen.get((role, metric)) for role in ("reference", "candidate")
            )
            if not reference or not candidate:
                continue
            shares = next(
                shares for enough, shares in SHARES if min(len(reference), len(candidate)) >= enough
            )
            points = _stretched(shares[0], shares[-1])
            first, second = (
                list(zip(points, of_role.quantiles(points), strict=True))
                for of_role in (reference, candidate)
            )
            figures.append(
                figure(
                    _caption(level, metric),
                    charts.distributions(
                        first,
                        second,
                        shares,
                        f"Distribution of {metric_label(metric)} at {level.name}",
                    ),
                )
            )
    return (
        [*parts, pairs(figures)]
        if figures
        else [paragraph("No level at which single requests are judged.")]
    )


def _stretched(low: float, high: float) -> list[float]:
    """Shares from one to the other, closer together at the ends."""
    begin, end = (math.log(share / (1 - share)) for share in (low, high))
    between = 1 / (1 + np.exp(-np.linspace(begin, end, CURVE_POINTS)))
    return [low, *between[1:-1].tolist(), high]


def _along(run: _Run) -> list[Html]:
    metric = "inference time" if run.plan.server_timing else "time end to end"
    again = run.arms("reference")
    parts = [
        paragraph(
            f"Mean ratio of {metric} in {PARTS} parts of a restart, mean of all restarts, with the"
            " 90 % interval of each part. Above, one model against itself: a drift there would be"
            " the instrument's own. Below, candidate over reference. Slices of one copy are not"
            " paired, so those levels are not shown. Shaded, for scale: the tightest margin."
        )
    ]
    for level, _, portrait in run.levels():
        if len(portrait.candidate) < 2:
            continue
        both = [_parts(kept) for kept in (portrait.same_model, portrait.candidate)]
        reach = max(
            abs(math.log(end))
            for points in both
            for _, interval in points
            for end in interval or (1.0,)
        )
        reach = max(
            min(reach, 8 * math.log1p(level.tightest_margin)),
            *(1.1 * abs(math.log(ratio)) for points in both for ratio, _ in points),
        )
        parts += [
            figure(
                Html(f"<b>{text(level.name)}</b>, {text(name)}"),
                charts.over_time(
                    points,
                    level.tightest_margin,
                    shape,
                    kind,
                    reach,
                    f"{name} along a restart at {level.name}",
                ),
            )
            for name, points, shape, kind in (
                (f"{again[1]} over {again[0]}", both[0], "circle", "reference"),
                ("candidate over reference", both[1], "diamond", "candidate"),
            )
        ]
    return (
        parts
        if len(parts) > 1
        else [paragraph("Too few restarts, or no level at which copies are interleaved.")]
    )


def _parts(restarts: list[Matrix]) -> list[tuple[float, tuple[float, float] | None]]:
    """Ratio and interval of each part of a restart."""
    points: list[tuple[float, tuple[float, float] | None]] = []
    for values in zip(*restarts, strict=False):
        low, high = plain_contrast(np.array(values)).interval(CONFIDENCE)
        points.append((math.exp(float(np.mean(values))), (math.exp(low), math.exp(high))))
    return points


def _phases(run: _Run) -> list[Html]:
    if not run.plan.server_timing:
        return [paragraph("These servers do not tell where a request's time went.")]
    parts = [
        paragraph(
            "Mean over the requests of each role. The rest is HTTP on both sides, the way between,"
            " and, under load, waiting to be read."
        ),
        legend(
            (f'<rect x="6" y="2" width="18" height="12" class="phase {phase}"/>', phase)
            for phase in PHASES
        ),
    ]
    for level, _, portrait in run.levels():
        rows = {
            f"{role}: {', '.join(run.arms(role))}": mine.mean_ms()
            for role, mine in portrait.phases.items()
        }
        if rows:
            parts.append(
                figure(
                    Html(f"<b>{text(level.name)}</b>"),
                    charts.phases(rows, f"Where the time goes at {level.name}"),
                )
            )
            parts.append(
                table(
                    f"Mean milliseconds at {level.name}",
                    ("", *next(iter(rows.values())), "end to end"),
                    [
                        (
                            role,
                            *(f"{ms:.3f}" for ms in phases.values()),
                            f"{sum(phases.values()):.3f}",
                        )
                        for role, phases in rows.items()
                    ],
                    numbers=range(1, 6),
                )
            )
    return parts if len(parts) > 2 else [paragraph("No requests count.")]


def _numbers(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "The reference's time is the geometric mean over restarts. Sign flip: a second opinion"
            " without a normal law, how likely so small a difference would be with the truth on the"
            " margin; small says equivalent."
        )
    ]
    for level, found, _ in run.levels():
        rows = [
            (
                f"{metric_label(s.metric)} {s.statistic}",
                f"{s.reference_us / 1000:.3f} ms",
                percent(s.ratio),
                span(*s.interval),
                _margin(s),
                f"{s.sign_flip_p:.3f}",
                word(describe_statistic(s, run.verdict.claim), _tone(s, run.verdict.claim)),
            )
            for s in found.statistics
        ]
        if rows:
            head = (
                "statistic",
                "reference",
                "difference",
                "90 % interval",
                "margin",
                "sign flip p",
                "reading",
            )
            parts.append(
                table(f"{level.name}: what is claimed", head, rows, numbers=(1, 2, 3, 4, 5))
            )
        if level.kind == "capacity" and found.statistics:
            parts.append(
                paragraph(
                    f"That is {1e6 / found.statistics[0].reference_us:,.1f} texts a second of one"
                    " reference."
                )
            )
        others = [
            (
                f"{c.arm}: {metric_label(c.metric)} {c.statistic}",
                percent(c.ratio),
                span(*c.interval),
                span(*c.wide_interval),
                percent(c.expected) if c.expected else "",
                word("told apart", "good") if c.detected else word("not told apart", "open"),
            )
            for c in found.controls
        ]
        if others:
            parts.append(
                table(
                    f"{level.name}: controls",
                    (
                        "control",
                        "difference",
                        "90 % interval",
                        "99.5 % interval",
                        "made",
                        "reading",
                    ),
                    others,
                    numbers=(1, 2, 3, 4),
                )
            )
        same = [
            (
                f"{c.arms[1]} over {c.arms[0]}: {metric_label(c.metric)} {c.statistic}",
                percent(c.ratio),
                span(*c.interval),
                (
                    word("biased", "bad")
                    if c.biased
                    else "equivalent"
                    if c.equivalent
                    else "undecided"
                ),
            )
            for c in found.same_model
        ]
        if same:
            parts.append(
                table(
                    f"{level.name}: one model loaded twice; required is only that it is not biased",
                    ("A/A", "difference", "90 % interval", "reading"),
                    same,
                    numbers=(1, 2),
                )
            )
    return parts if len(parts) > 1 else [paragraph("Too few restarts for any number.")]


def _margin(item: Statistic) -> str:
    gain = f" (gain {item.gain:.2f})" if item.gain != 1 else ""
    return f"±{100 * item.margin:.3g}%{gain}"


def _tone(item: Statistic, claim: str) -> str:
    mark, kind = _mark(item, claim)
    return "bad" if kind == "bad" else "good" if mark == "circle" else "open"


def _gates(run: _Run) -> list[Html]:
    parts = [
        paragraph(
            "What must hold for the measurement to count; none looks at the difference of candidate"
            " and reference."
        )
    ]
    for level, found, _ in run.levels():
        rows = [
            (
                word("holds", "good") if gate.passed else word("FAILED", "bad"),
                gate.name,
                _minus_signs(gate.found),
            )
            for gate in found.gates
        ]
        parts.append(table(f"Gates at {level.name}", ("", "gate", "found"), rows, kind="plain"))
    return parts


def _minus_signs(found: str) -> str:
    """Numbers in a sentence with real minus signs; hyphens in words stay."""
    return " ".join(
        minus(part) if part.lstrip("(").startswith("-") else part for part in found.split(" ")
    )


def _starts(run: _Run) -> list[Html]:
    dropped = [start for start in run.starts if start.dropped]
    lead = (
        "None was dropped."
        if not dropped
        else (
            f"{len(dropped)} of {len(run.starts)} do not count. Their rows are kept in the"
            " evidence, and each was repeated in its load order."
        )
    )
    rows = [
        (
            start.restart,
            word("dropped", "bad") if start.dropped else "counts",
            f"{start.seconds:.1f} s",
            f"{start.generator_cpu_share:.1%}",
            f"{start.throttled_us:,} µs",
            start.load_order.replace(" ", " → "),
            start.dropped,
        )
        for start in run.starts
    ]
    last = len(rows[0]) if dropped and rows else 6
    head = (
        "start",
        "",
        "took",
        "generator CPU",
        "throttled",
        "loaded in this order",
        "why it was dropped",
    )
    return [
        paragraph(lead),
        table(
            "Starts of the server",
            head[:last],
            [row[:last] for row in rows],
            numbers=(2, 3, 4),
            kind="wide",
        ),
    ]


def _again(run: _Run) -> list[Html]:
    return [
        paragraph(
            Html(
                "Everything here follows from the folder it lies in:"
                f" {code(f'python -m proof judge {run.folder.name}')} computes it again from every"
                " single request, refuses a changed byte, and ends with the same verdict. The"
                f" numbers of {code('restarts.csv')} are enough to check the intervals with a"
                " spreadsheet."
            ),
            soft=False,
        ),
        paragraph(
            Html(
                f"Run {run.verdict.run.number_for_this_plan} of plan {code(run.plan.digest)}. Every"
                f" run that was begun is listed in {code('evidence/index.json')}."
            )
        ),
    ]
