"""
Judges a sealed run from its folder alone.

    equivalent       every claimed 90 % interval lies inside its margin
    not-equivalent   some claimed interval, corrected for their number, lies wholly outside
    inconclusive     neither; also too few restarts. Never rounded up.
    invalid          a gate failed: the run could not have shown what it claims
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from command import CommandError
from proof.evidence import Refused, Start, check_manifest, read_requests, read_starts
from proof.gates import ENDED_EARLY, MOST_DROPPED, Gate, restart_breach
from proof.plan import FEWEST_RESTARTS, METRICS, STATISTICS, Plan, Role, read_plan
from proof.statistics import Estimate, adjusted_contrast, plain_contrast, slope, statistic

SCHEMA_VERSION = 1
EXIT_CODES = {"equivalent": 0, "not-slower": 0, "not-equivalent": 1, "inconclusive": 2, "invalid": 3}

RESTART_COLUMNS = (
    "level", "restart", "arm", "load_position", "metric", "statistic", "requests", "microseconds", "log",
)

# The two-sided confidence that two one-sided 5 % tests amount to.
CONFIDENCE = 0.90


@dataclass(frozen=True)
class Samples:
    """Latencies in microseconds by (restart, arm), and where each arm was loaded."""

    restarts: tuple[int, ...]
    latencies: dict[str, dict[tuple[int, int], npt.NDArray[np.float64]]]
    closing: dict[str, dict[tuple[int, int], npt.NDArray[np.float64]]]
    positions: npt.NDArray[np.int64]
    """(K, arms)"""

    def log_statistics(self, metric: str, name: str, arms: list[int], closing: bool = False) -> npt.NDArray[np.float64]:
        """log of a statistic, (K, arms)."""
        cells = (self.closing if closing else self.latencies)[metric]
        return np.log([[statistic(name, cells[r, a]) for a in arms] for r in self.restarts])


def judge(folder: Path, sealed: bool = True) -> dict[str, Any]:
    """The verdict on the evidence in `folder`; Refused if it cannot be trusted.

    With `sealed`, every byte is first checked against MANIFEST.sha256 and restarts.csv
    against the rows.
    """
    if not folder.is_dir():
        raise Refused(f"{folder} does not exist.")
    if sealed:
        check_manifest(folder)
    plan = read_sealed_plan(folder)
    starts = read_starts(folder)
    samples = read_samples(folder, plan, starts)
    if sealed:
        _check_restarts(folder, plan, samples)
    return _verdict(plan, starts, samples) | {"run": _read_run(folder)}


def read_sealed_plan(folder: Path) -> Plan:
    """The plan of a run with the texts beside it; Refused if it cannot be read."""
    try:
        return dataclasses.replace(read_plan(folder / "plan.toml"), texts=folder / "texts.txt")
    except CommandError as error:
        raise Refused(f"{folder}: {error}") from None


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{folder / 'run.json'} cannot be read: {error}.") from None
    return run


def read_samples(folder: Path, plan: Plan, starts: list[Start]) -> Samples:
    table = read_requests(folder)
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    order = np.lexsort((column["place"], column["tuple"], column["restart"]))
    column = {name: values[order] for name, values in column.items()}
    _check_rows(folder, plan, starts, column)
    _check_starts(folder, plan, starts, column)
    kept = [start for start in starts if not start.dropped]
    names = [arm.name for arm in plan.arms]
    microseconds = {
        "end_to_end": (column["done_ns"] - column["sent_ns"]) / 1000,
        "inference": column["inference_us"],
    }

    def cells(block: int, metric: str) -> dict[tuple[int, int], npt.NDArray[np.float64]]:
        chosen = column["slice"] == block
        found = {}
        for start in kept:
            here = chosen & (column["restart"] == start.restart)
            for a, name in enumerate(names):
                found[start.restart, a] = microseconds[metric][here & (column["arm"] == name)]
        return found

    positions = np.array([[start.load_order.split().index(name) for name in names] for start in kept], np.int64)
    return Samples(
        tuple(start.restart for start in kept),
        {metric: cells(0, metric) for metric in METRICS}, {metric: cells(1, metric) for metric in METRICS},
        positions.reshape(len(kept), len(names)),
    )


def _check_rows(folder: Path, plan: Plan, starts: list[Start], column: dict[str, Any]) -> None:
    """Refuses rows that cannot have come from this plan, or from any clock."""
    runs = np.unique(column["run"])
    for run in runs:
        if not str(run).endswith(plan.digest[:16]):
            raise Refused(f"{folder}: rows of run {run} were made under another plan than plan.toml ({plan.digest[:16]}).")
    if len(runs) != 1:
        raise Refused(f"{folder}: its rows come from {len(runs)} runs, {runs[0]} and {runs[1]} among them.")
    if set(np.unique(column["level"])) != {plan.level.name}:
        raise Refused(f"{folder}: rows of another level than {plan.level.name}.")
    for name in ("tokenize_us", "queue_us", "inference_us", "total_us"):
        if not np.isfinite(column[name]).all():
            raise Refused(f"{folder}: column {name} holds NaN or infinity.")
        if (column[name] < 0).any():
            raise Refused(f"{folder}: column {name} holds a negative time.")
    if (column["done_ns"] < column["sent_ns"]).any() or (column["sent_ns"] < column["scheduled_ns"]).any():
        raise Refused(f"{folder}: a row's times run backward (scheduled ≤ sent ≤ done is due).")
    if len(np.unique(column["request_id"])) != len(column["request_id"]):
        raise Refused(f"{folder}: a request_id occurs twice.")
    known = {arm.name for arm in plan.arms}
    present = set(np.unique(column["arm"]))
    for name in sorted(known - present):
        raise Refused(f"{folder}: arm {name} has no rows.")
    for name in sorted(present - known):
        raise Refused(f"{folder}: rows name an arm {name} that the plan has not.")
    unknown = set(np.unique(column["restart"]).tolist()) - {start.restart for start in starts}
    if unknown:
        raise Refused(f"{folder}: restart {min(unknown)} has rows and no line in starts.csv.")


def _check_starts(folder: Path, plan: Plan, starts: list[Start], column: dict[str, Any]) -> None:
    """Refuses a start that was kept or dropped against the gates, or whose rows are not the plan's schedule."""
    try:
        texts = plan.read_texts()
    except CommandError as error:
        raise Refused(f"{folder}: {error}") from None
    chars = np.array([len(text) for text in texts])
    names = [arm.name for arm in plan.arms]
    kept = 0
    for start in starts:
        here = {name: values[column["restart"] == start.restart] for name, values in column.items()}
        where = f"{folder}: restart {start.restart}"
        if start.slot != kept:
            raise Refused(f"{where} took slot {start.slot} of the load orders, {kept} was next.")
        if start.load_order.split() != [names[i] for i in plan.load_order(start.slot)]:
            raise Refused(f"{where} was loaded as {start.load_order}, which is not the plan's order.")
        schedule = list(plan.schedule(start.slot, len(texts)))
        breach = restart_breach(plan, here, len(schedule), start.generator_cpu_share, start.throttled_us)
        early = start.dropped in ENDED_EARLY and len(here["status"]) < len(schedule)
        if breach != start.dropped and not early:
            raise Refused(f"{where} is {_fate(start.dropped)}, its rows say: {_fate(breach)}.")
        if start.dropped:
            continue
        kept += 1
        due = {
            "slice": np.array([s.slice for s in schedule]), "tuple": np.array([s.tuple for s in schedule]),
            "place": np.array([s.place for s in schedule]), "arm": np.array([names[s.arm] for s in schedule]),
            "text_id": np.array([s.text for s in schedule]), "chars": chars[[s.text for s in schedule]],
            "load_position": np.array([start.load_order.split().index(names[s.arm]) for s in schedule]),
            "instance": np.array([start.instance] * len(schedule)),
        }
        for name, wanted in due.items():
            if not (here[name] == wanted).all():
                row = int(np.flatnonzero(here[name] != wanted)[0])
                raise Refused(f"{where}: request {here['request_id'][row]} has {name} {here[name][row]}, the plan {wanted[row]}.")
        if (here["sent_ns"][1:] < here["done_ns"][:-1]).any():
            raise Refused(f"{where}: a request was sent before the one before it was answered.")
    if kept > plan.level.restarts:
        raise Refused(f"{folder}: {kept} restarts count, the plan has {plan.level.restarts}.")


def _fate(dropped: str) -> str:
    return f"dropped ({dropped})" if dropped else "counted"


def restart_table(plan: Plan, samples: Samples) -> list[dict[str, Any]]:
    """restarts.csv: one line a restart, arm, metric and statistic; the verdict follows from it by hand."""
    arms = plan.claimed_arms
    table: list[dict[str, Any]] = []
    if not samples.restarts:
        return table
    for metric in METRICS:
        for name in STATISTICS:
            y = samples.log_statistics(metric, name, arms)
            for i, restart in enumerate(samples.restarts):
                for j, a in enumerate(arms):
                    table.append({
                        "level": plan.level.name, "restart": restart, "arm": plan.arms[a].name,
                        "load_position": int(samples.positions[i, a]), "metric": metric, "statistic": name,
                        "requests": len(samples.latencies[metric][restart, a]),
                        "microseconds": repr(float(np.exp(y[i, j]))), "log": repr(float(y[i, j])),
                    })
    return table


def _check_restarts(folder: Path, plan: Plan, samples: Samples) -> None:
    import csv

    path = folder / "restarts.csv"
    try:
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
    except OSError:
        raise Refused(f"{folder} has no restarts.csv.") from None
    due = restart_table(plan, samples)
    if len(found) != len(due):
        raise Refused(f"{path} has {len(found)} lines, the rows give {len(due)}.")
    for has, wants in zip(found, due, strict=True):
        same = all(has.get(k) == str(v) for k, v in wants.items() if k not in ("microseconds", "log"))
        if not same or not (_close(has.get("log"), wants["log"]) and _close(has.get("microseconds"), wants["microseconds"])):
            raise Refused(f"{path} does not follow from the rows: restart {wants['restart']}, {wants['arm']}, {wants['metric']} {wants['statistic']}.")


def _close(found: str | None, due: str) -> bool:
    try:
        return math.isclose(float(found or "nan"), float(due), rel_tol=1e-9, abs_tol=1e-9)
    except ValueError:
        return False


def first_difference(before: Any, after: Any, where: str = "verdict") -> str | None:
    """The first place where two verdicts differ; floats may by 1e-9, for they are recomputed."""
    if isinstance(before, dict) and isinstance(after, dict):
        if before.keys() != after.keys():
            return f"{where}: {', '.join(sorted(before.keys() ^ after.keys()))}"
        parts = [(before[key], after[key], f"{where}.{key}") for key in before]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        parts = [(b, a, f"{where}[{i}]") for i, (b, a) in enumerate(zip(before, after, strict=True))]
    elif isinstance(before, float) and isinstance(after, int | float):
        return None if math.isclose(before, after, rel_tol=1e-9, abs_tol=1e-9) else where
    else:
        return None if before == after else where
    return next((found for part in parts if (found := first_difference(*part))), None)


def _verdict(plan: Plan, starts: list[Start], samples: Samples) -> dict[str, Any]:
    claimed = plan.level.claimed
    kept = len(samples.restarts)
    judged: list[dict[str, Any]] = []
    gates: list[Gate] = [_dropped_gate(starts)]
    if kept >= 4:
        judged = [_judge_statistic(plan, samples, metric, name, margin, len(claimed)) for metric, name, margin in claimed]
        gates += _same_model_gates(plan, samples) + _trend_gate(plan, samples)
    control = _judge_control(plan, samples) if kept >= 4 else []
    if control:
        # As everywhere: one statistic wholly beyond its margin, corrected for their number, is enough.
        seen = any(item["not_equivalent"] for item in control)
        gates.append(Gate("the control is told apart", seen, "; ".join(item["sentence"] for item in control)))
    level = _level_verdict(plan, judged, gates, kept)
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": level["verdict"],
        "sentence": _sentence(plan, level, kept),
        "claim": plan.claim,
        "plan": {"name": plan.name, "digest": plan.digest},
        "levels": {plan.level.name: level | {
            "restarts_planned": plan.level.restarts, "restarts_kept": kept, "restarts_dropped": len(starts) - kept,
            "tuples": plan.level.tuples, "statistics": judged, "control": control,
            "gates": [{"name": g.name, "passed": g.passed, "found": g.found} for g in gates],
        }},
    }


def _contrast(plan: Plan, weights: dict[int, float]) -> npt.NDArray[np.float64]:
    return np.array([weights.get(a, 0.0) for a in plan.claimed_arms])


def _judge_statistic(plan: Plan, samples: Samples, metric: str, name: str, margin: float, claimed: int) -> dict[str, Any]:
    arms = plan.claimed_arms
    contrast = _contrast(plan, dict.fromkeys(plan.indices("reference"), -0.5) | dict.fromkeys(plan.indices("candidate"), 0.5))
    y = samples.log_statistics(metric, name, arms)
    estimate = adjusted_contrast(y, samples.positions[:, arms], contrast)
    low, high = estimate.interval(CONFIDENCE)
    strict_low, strict_high = estimate.interval(1 - 2 * 0.05 / claimed)
    bound = math.log1p(margin)
    direction = "slower" if strict_low > bound else "faster" if strict_high < -bound else None
    reference = float(np.exp(y[:, [arms.index(a) for a in plan.indices("reference")]].mean()))
    return {
        "metric": metric, "statistic": name, "margin": margin, "ratio": estimate.ratio,
        "interval": [math.exp(low), math.exp(high)], "strict_interval": [math.exp(strict_low), math.exp(strict_high)],
        "reference_us": reference, "restart_ratios": np.exp(y @ contrast).tolist(),
        "not_slower": high < bound, "equivalent": -bound < low and high < bound, "outside": direction,
    }


def _judge_control(plan: Plan, samples: Samples) -> list[dict[str, Any]]:
    """The kept decoder against the references, over the closing blocks; it must be told apart."""
    found = []
    for a in plan.indices("control"):
        for name in ("p50", "mean"):
            y = samples.log_statistics("inference", name, [*plan.indices("reference"), a], closing=True)
            estimate: Estimate = plain_contrast(y[:, -1] - y[:, :-1].mean(axis=1))
            low, high = estimate.interval(CONFIDENCE)
            strict_low, _ = estimate.interval(1 - 2 * 0.05 / 2)
            bound = math.log1p(plan.level.tightest_margin)
            item = {
                "arm": plan.arms[a].name, "metric": "inference", "statistic": name, "margin": plan.level.tightest_margin,
                "ratio": estimate.ratio, "interval": [math.exp(low), math.exp(high)], "not_equivalent": strict_low > bound,
                "restart_ratios": np.exp(y[:, -1] - y[:, :-1].mean(axis=1)).tolist(),
            }
            item["sentence"] = (
                f"{item['arm']} inference {name}: {_percent(estimate.ratio)} ({_percent(math.exp(low))} to {_percent(math.exp(high))}), "
                + ("not equivalent" if item["not_equivalent"] else "undecided")
            )
            found.append(item)
    return found


def _dropped_gate(starts: list[Start]) -> Gate:
    dropped = [start for start in starts if start.dropped]
    share = len(dropped) / max(1, len(starts))
    return Gate("few restarts dropped", share <= MOST_DROPPED, f"{len(dropped)} of {len(starts)} (at most {MOST_DROPPED:.0%})")


def _same_model_gates(plan: Plan, samples: Samples) -> list[Gate]:
    """A/A: two loads of one file. Biased if an interval lies wholly outside half the margin."""
    gates = []
    roles: tuple[Role, ...] = ("reference", "candidate")
    for role in roles:
        first, second = plan.indices(role)
        worst, passed = "", True
        largest = -1.0
        for metric, name, margin in plan.level.claimed:
            y = samples.log_statistics(metric, name, plan.claimed_arms)
            estimate = adjusted_contrast(y, samples.positions[:, plan.claimed_arms], _contrast(plan, {first: -1.0, second: 1.0}))
            low, high = estimate.interval(CONFIDENCE)
            half = math.log1p(margin / 2)
            outside = low > half or high < -half
            passed = passed and not outside
            if outside or abs(estimate.delta) / half > largest:
                largest = math.inf if outside else abs(estimate.delta) / half
                worst = f"{metric.replace('_', ' ')} {name}: {_percent(estimate.ratio)} ({_percent(math.exp(low))} to {_percent(math.exp(high))}), half margin {margin / 2:.1%}"
        gates.append(Gate(f"A/A: {plan.arms[first].name} and {plan.arms[second].name} are not biased", passed, f"furthest {worst}"))
    return gates


def _trend_gate(plan: Plan, samples: Samples) -> list[Gate]:
    """A drift of the ratio between two copies of one model within restarts would be the instrument's own."""
    first, second = plan.indices("reference")
    cells = samples.latencies["inference"]
    slopes = np.array([slope(np.log(cells[r, second]) - np.log(cells[r, first])) for r in samples.restarts])
    low, high = plain_contrast(slopes).interval(0.99)
    half = math.log1p(plan.level.tightest_margin / 2)
    drifts = (low > 0 or high < 0) and abs(slopes.mean()) > half
    return [Gate(
        "no drift of the ratio within restarts", not drifts,
        f"{_percent(math.exp(float(slopes.mean())))} over a restart (99 %: {_percent(math.exp(low))} to {_percent(math.exp(high))})",
    )]


def _level_verdict(plan: Plan, judged: list[dict[str, Any]], gates: list[Gate], kept: int) -> dict[str, Any]:
    breached = [gate.name for gate in gates if not gate.passed]
    outside = {item["outside"] for item in judged if item["outside"]}
    if plan.claim == "non-inferiority":
        outside &= {"slower"}
    enough = kept >= FEWEST_RESTARTS and kept >= plan.level.restarts
    key, word = ("equivalent", "equivalent") if plan.claim == "equivalence" else ("not_slower", "not-slower")
    readings = {
        "not_slower": bool(judged) and all(item["not_slower"] for item in judged),
        "equivalent": bool(judged) and all(item["equivalent"] for item in judged),
    }
    if breached:
        verdict = "invalid"
    elif outside:
        verdict = "not-equivalent"
    elif readings[key] and enough:
        verdict = word
    else:
        verdict = "inconclusive"
    return {"verdict": verdict, "readings": readings, "direction": "/".join(sorted(outside)) or None, "breached": breached}


def _sentence(plan: Plan, level: dict[str, Any], kept: int) -> str:
    first, second = plan.arms[plan.indices("reference")[0]].name, plan.arms[plan.indices("candidate")[0]].name
    match level["verdict"]:
        case "equivalent":
            return f"{second} is as fast as {first}, within every margin claimed ({kept} restarts)."
        case "not-slower":
            return f"{second} is not slower than {first}, within every margin claimed ({kept} restarts)."
        case "not-equivalent":
            if level["direction"] == "faster":
                return f"{second} is faster than {first} by more than a claimed margin. Where both do the same work, that shows a broken instrument."
            return f"{second} is {level['direction']} than {first} by more than a claimed margin."
        case "invalid":
            return f"This run shows nothing: {'; '.join(level['breached'])}."
    return f"{kept} restarts do not decide whether {second} is as fast as {first}; more restarts or longer ones would."


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.2%}"


def reading(item: dict[str, Any], claim: str) -> str:
    """What one statistic says, in a word or two."""
    if item["equivalent"]:
        return "equivalent"
    if claim == "non-inferiority" and item["not_slower"]:
        return "not slower"
    return f"outside: {item['outside']}" if item["outside"] else "undecided"


def describe(verdict: dict[str, Any]) -> str:
    """The verdict in words, with every claimed interval; for a terminal."""
    lines = []
    for name, level in verdict["levels"].items():
        lines.append(f"level {name}: {level['restarts_kept']} restarts × {level['tuples']} texts to each of four arms, {level['restarts_dropped']} dropped")
        for item in level["statistics"]:
            low, high = item["interval"]
            word = reading(item, verdict["claim"])
            lines.append(
                f"  {item['metric']:<11} {item['statistic']:<5} {_percent(item['ratio']):>8}   90 % interval {_percent(low)} to {_percent(high)}"
                f"   margin ±{100 * item['margin']:g} %   {word}"
            )
        for item in level["control"]:
            lines.append(f"  control: {item['sentence']}")
        for gate in level["gates"]:
            lines.append(f"  gate {'ok  ' if gate['passed'] else 'FAIL'} {gate['name']}: {gate['found']}")
    lines.append(f"verdict: {verdict['verdict']}. {verdict['sentence']} (run {verdict['run']['number_for_this_plan']} of this plan)")
    return "\n".join(lines)
