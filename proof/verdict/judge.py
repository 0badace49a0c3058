"""
The judge: decides on a sealed run from its folder alone.

    equivalent       every claimed 90 % interval lies inside its margin
    not-slower       the same of its upper end, where non-inferiority is claimed
    not-equivalent   a claimed interval, corrected for their number, lies wholly outside
    inconclusive     neither, or too few restarts; never rounded up
    invalid          a gate failed: the run could not have shown what it claims

    check_manifest → audit (rows against plan) → readings → judge_level for each → the worst of them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proof.evidence.audit import (
    audit_rows,
    check_documents,
    check_identity,
    check_restarts,
    loaded_models,
    read_json,
    read_sealed_plan,
)
from proof.evidence.gates import MOST_DROPPED
from proof.evidence.observed import Observed
from proof.evidence.readings import Readings, collect_readings
from proof.evidence.statistics import (
    lag_one_autocorrelation,
    plain_contrast,
    sign_flip_p,
)
from proof.evidence.store import EvidenceRejected, RestartRecord, check_manifest, read_starts
from proof.evidence.text_ratios import FurthestText, TextRatios
from proof.plans.claim_digest import digest_claim
from proof.plans.plan import ADJUSTED, Level, Plan, Role
from proof.verdict import schema
from proof.verdict.contrasts import CONFIDENCE, contrast_of, corrected_confidence, ratio_interval
from proof.verdict.controls import control_gates, delayed_controls, kept_decoder_controls
from proof.verdict.outcome import level_outcome, worst_outcome
from proof.verdict.run_gates import answer_gates, cache_gates
from proof.verdict.schema import (
    SCHEMA_VERSION,
    Contrast,
    Control,
    Gate,
    LevelVerdict,
    PlanName,
    RunName,
    Statistic,
    Verdict,
    format_interval,
    format_percent,
    metric_label,
    read_run,
)
from proof.verdict.scope import build_scope, write_sentence
from proof.work.sealed import check_sealed

A_A_FALSE_ALARM = 0.02
"""Schedule 2: largest probability that noise alone fails the A/A gates of a level."""
UNADJUSTED_CONFIDENCE = 0.99
"""Confidence of the unadjusted interval that must hold the adjusted estimate."""
DRIFT_CONFIDENCE = 0.99
"""Confidence of the interval of the drift within restarts."""
FEWEST_FOR_INTERVAL = 4
"""Fewest restarts for which intervals are estimated."""


def judge_run(folder: Path) -> Verdict:
    """Return the verdict on the sealed evidence in `folder`, recomputed from its rows.

    Raise EvidenceRejected if the evidence cannot be trusted.
    """
    if not folder.is_dir():
        raise EvidenceRejected(f"{folder} does not exist.")
    check_manifest(folder)
    check_documents(folder)
    plan, starts = read_sealed_plan(folder), read_starts(folder)
    check_identity(folder, plan)
    observed = Observed(folder, plan)
    lines = audit_rows(folder, plan, starts, observed.add)
    check_restarts(folder, lines)
    counted = sum(not start.dropped for start in starts)
    check_sealed(plan, folder, is_complete=counted >= plan.restarts)
    return judge_lines(folder, plan, starts, lines, observed)


def judge_lines(
    folder: Path,
    plan: Plan,
    starts: Sequence[RestartRecord],
    lines: Sequence[Mapping[str, Any]],
    observed: Observed,
) -> Verdict:
    """Return the verdict that follows from the lines of restarts.csv and from what was observed."""
    run = read_run(folder / "run.json", plan.digest)
    _check_claim(folder, plan, run)
    readings = {level.name: collect_readings(plan, level, lines) for level in plan.levels}
    # Gates of the whole run: one that fails makes every level invalid.
    gates = [*answer_gates(observed.answers.result()), *cache_gates(plan, readings)]
    levels = {
        level.name: judge_level(plan, level, readings[level.name], starts, gates).model_copy(
            update={
                "texts": _describe_texts(observed.texts, level),
                "busy_share": _describe_load(readings[level.name]),
            }
        )
        for level in plan.judged_levels
    }
    verdict = Verdict(
        schema_version=SCHEMA_VERSION,
        verdict=worst_outcome(levels),
        sentence="",
        claim=plan.claim,
        plan=PlanName(name=plan.name, digest=plan.digest),
        run=run,
        levels=levels,
        scope=build_scope(plan, read_json(folder / "environment.json"), observed.texts.tokens),
    )
    return verdict.model_copy(update={"sentence": write_sentence(verdict)})


def _check_claim(folder: Path, plan: Plan, run: RunName) -> None:
    """Reject a run.json that counts the runs of another claim."""
    if run.claim_digest is None:
        return
    models = loaded_models(folder) if plan.starts_servers else {}
    artifacts = {name: str(model.get("digest")) for name, model in models.items()}
    expected = digest_claim(plan, artifacts, plan.texts.read_bytes())
    if run.claim_digest != expected:
        raise EvidenceRejected(
            f"{folder / 'run.json'} counts runs of another claim ({run.claim_digest[:16]}) than the"
            f" plan's on what was loaded ({expected[:16]})."
        )


def _describe_load(readings: Readings) -> schema.BusyShare | None:
    shares = readings.busy_shares
    if not len(shares):
        return None
    mean, least, most = float(shares[:, 0].mean()), float(shares[:, 1].min()), shares[:, 2].max()
    return schema.BusyShare(mean=mean, least=least, most=float(most))


def _describe_texts(texts: TextRatios, level: Level) -> schema.LevelTexts | None:
    ratios = texts.of_level(level.name)
    if ratios is None:
        return None

    def furthest(text: FurthestText) -> schema.FurthestText:
        return schema.FurthestText(
            ratio=math.exp(text.median),
            text_id=text.text_id,
            tokens=text.tokens,
            trend=None if text.trend is None else math.exp(text.trend),
        )

    return schema.LevelTexts(
        texts=ratios.texts,
        candidate=furthest(ratios.candidate),
        same_model=furthest(ratios.same_model),
    )


def judge_level(
    plan: Plan,
    level: Level,
    readings: Readings,
    starts: Sequence[RestartRecord],
    run_gates: Sequence[Gate] = (),
) -> LevelVerdict:
    """Return one level's verdict, with everything that it rests on."""
    counted = len(readings.restarts)
    gates = [_dropped_gate(starts), *run_gates]
    statistics: list[Statistic] = []
    same_model: list[Contrast] = []
    controls: list[Control] = []
    if counted >= FEWEST_FOR_INTERVAL:
        statistics = [
            _statistic(plan, level, readings, metric, name, margin)
            for metric, name, margin in level.claimed
        ]
        for role in ("reference", "candidate"):
            contrasts = _same_model(plan, level, readings, role)
            same_model += contrasts
            gates.append(_same_model_gate(plan, role, contrasts))
        controls = delayed_controls(plan, level, readings)
        controls += kept_decoder_controls(plan, level, readings)
        gates += control_gates(plan, controls) + _drift_gate(level, readings)
        gates += _adjustment_gates(plan, level, readings, statistics)
    breached = [gate.name for gate in gates if not gate.passed]
    outside = {item.outside for item in statistics if item.outside}
    if plan.claim == "non-inferiority":
        # A faster candidate does not contradict this claim.
        outside -= {"faster"}
    not_slower = bool(statistics) and all(item.not_slower for item in statistics)
    equivalent = bool(statistics) and all(item.equivalent for item in statistics)
    level_verdict = LevelVerdict(
        verdict="inconclusive",
        not_slower=not_slower,
        equivalent=equivalent,
        direction="/".join(sorted(outside)) or None,
        breached=breached,
        restarts_planned=plan.restarts,
        restarts_kept=counted,
        restarts_dropped=len(starts) - counted,
        statistics=statistics,
        same_model=same_model,
        controls=controls,
        gates=gates,
    )
    return level_verdict.model_copy(update={"verdict": level_outcome(level_verdict, plan.claim)})


def _statistic(
    plan: Plan, level: Level, readings: Readings, metric: str, name: str, margin: float
) -> Statistic:
    """Return a claimed statistic: the mean log of the candidates minus that of the references."""
    references = plan.indices("reference")
    weights = dict.fromkeys(references, -0.5) | dict.fromkeys(plan.indices("candidate"), 0.5)
    key = ("plain", metric, name)
    estimate, differences = contrast_of(readings, key, plan.claimed_arms, weights)
    bound = math.log1p(margin)
    low, high = estimate.interval(CONFIDENCE)
    strict_confidence = corrected_confidence(len(level.claimed))
    strict_low, strict_high = estimate.interval(strict_confidence)
    return Statistic(
        metric=metric,
        statistic=name,
        margin=margin,
        ratio=estimate.ratio,
        interval=ratio_interval(estimate, CONFIDENCE),
        strict_interval=ratio_interval(estimate, strict_confidence),
        gain=level.gains.get(metric, {}).get(name, 1.0),
        reference_us=float(np.exp(readings.logs[key][:, references].mean())),
        restart_ratios=np.exp(differences).tolist(),
        not_slower=high < bound,
        equivalent=-bound < low and high < bound,
        sign_flip_p=sign_flip_p(differences, bound),
        outside="slower" if strict_low > bound else "faster" if strict_high < -bound else None,
        autocorrelation=lag_one_autocorrelation(differences),
    )


def _same_model(plan: Plan, level: Level, readings: Readings, role: Role) -> list[Contrast]:
    """Return A/A: the second load of a model over the first, for each claimed statistic.

    All are reported; only a bias beyond half the margin fails the gate. In schedule 2 the interval
    for that is corrected for the number of contrasts: where noise is much larger than the margin,
    one in ten 90 % intervals would lie beyond it by chance.
    """
    first, second = plan.indices(role)
    weights = {first: -1.0, second: 1.0}
    bias_confidence = CONFIDENCE
    if plan.schedule_version > 1:
        bias_confidence = 1 - A_A_FALSE_ALARM / (2 * len(level.claimed))
    contrasts = []
    for metric, name, margin in level.claimed:
        key = ("plain", metric, name)
        estimate, differences = contrast_of(readings, key, plan.claimed_arms, weights)
        low, high = estimate.interval(CONFIDENCE)
        bias_low, bias_high = estimate.interval(bias_confidence)
        bound = math.log1p(margin)
        contrasts.append(
            Contrast(
                arms=(plan.arms[first].name, plan.arms[second].name),
                metric=metric,
                statistic=name,
                margin=margin,
                ratio=estimate.ratio,
                interval=ratio_interval(estimate, CONFIDENCE),
                restart_ratios=np.exp(differences).tolist(),
                equivalent=-bound < low and high < bound,
                biased=bias_low > bound / 2 or bias_high < -bound / 2,
            )
        )
    return contrasts


def _same_model_gate(plan: Plan, role: Role, contrasts: Sequence[Contrast]) -> Gate:
    furthest = max(
        contrasts, key=lambda c: (c.biased, abs(math.log(c.ratio)) / math.log1p(c.margin))
    )
    first, second = furthest.arms
    return Gate(
        name=f"A/A: {first} and {second} are not biased",
        passed=not any(contrast.biased for contrast in contrasts),
        measured=(
            f"furthest {metric_label(furthest.metric)} {furthest.statistic}:"
            f" {format_percent(furthest.ratio)} ({format_interval(furthest.interval)}), may not lie"
            f" wholly beyond ±{math.expm1(math.log1p(furthest.margin) / 2):.1%}"
        ),
    )


def _drift_gate(level: Level, readings: Readings) -> list[Gate]:
    """Return the gate against a drift of the ratio between two copies of one model.

    Such a drift comes from the instrument. A drift that all copies share cancels out.
    """
    if not len(readings.drift):
        return []
    low, high = plain_contrast(readings.drift).interval(DRIFT_CONFIDENCE)
    mean = float(readings.drift.mean())
    half_margin = math.log1p(level.tightest_margin) / 2
    drifts = (low > 0 or high < 0) and abs(mean) > half_margin
    ratios = math.exp(low), math.exp(high)
    return [
        Gate(
            name="no drift of the ratio within restarts",
            passed=not drifts,
            measured=(
                f"{format_percent(math.exp(mean))} over a restart (99 %: {format_interval(ratios)})"
            ),
        )
    ]


def _adjustment_gates(
    plan: Plan, level: Level, readings: Readings, statistics: Sequence[Statistic]
) -> list[Gate]:
    """Return the gates of each adjusted statistic: the adjustment may not move the estimate.

    It takes noise away. An estimate without it has a wider interval, which holds the adjusted one.
    """
    references = plan.indices("reference")
    weights = dict.fromkeys(references, -0.5) | dict.fromkeys(plan.indices("candidate"), 0.5)
    gates = []
    for item in statistics:
        if item.metric != ADJUSTED:
            continue
        key = ("plain", "end_to_end", item.statistic)
        estimate, _ = contrast_of(readings, key, plan.claimed_arms, weights)
        interval = ratio_interval(estimate, UNADJUSTED_CONFIDENCE)
        gates.append(
            Gate(
                name=f"end to end {item.statistic} agrees with and without the adjustment",
                passed=interval[0] <= item.ratio <= interval[1],
                measured=(
                    f"adjusted {format_percent(item.ratio)}; without"
                    f" {format_percent(estimate.ratio)} (99 %: {format_interval(interval)})"
                ),
            )
        )
    return gates


def _dropped_gate(starts: Sequence[RestartRecord]) -> Gate:
    dropped = sum(bool(start.dropped) for start in starts)
    return Gate(
        name="few restarts dropped",
        passed=dropped / max(1, len(starts)) <= MOST_DROPPED,
        measured=f"{dropped} of {len(starts)} (at most {MOST_DROPPED:.0%})",
    )
