"""
What a verdict is about: its sentence, and its scope in a few lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proof.plans.plan import CLAIMABLE, Level, Plan, Role
from proof.verdict.failures import describe_failures
from proof.verdict.schema import (
    Outcome,
    Scope,
    ServedModel,
    Verdict,
    describe_statistic,
    format_interval,
    metric_label,
)

ENGINE_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "cuda": ("onnxruntime-gpu", "onnxruntime"),
    "tensorrt": ("onnxruntime-gpu", "onnxruntime"),
}
"""Packages that an engine may come in, by the name of its runtime."""


def build_scope(
    plan: Plan, environment: Mapping[str, Any], tokens: tuple[int, int] | None
) -> Scope:
    """Return the scope of a run; `environment` is the content of environment.json."""
    server = _table(environment.get("server"))
    models = _table(server.get("models"))
    served: dict[str, ServedModel] = {}
    for role in _ROLES:
        arm = plan.arms[plan.indices(role)[0]]
        if arm.name in models:
            served[role] = describe_served(_table(models[arm.name]), environment)
    return Scope(
        reference=plan.arms[plan.indices("reference")[0]].name,
        candidate=plan.arms[plan.indices("candidate")[0]].name,
        claimed={level.name: _claimed(level) for level in plan.judged_levels},
        not_claimed={level.name: _not_claimed(level) for level in plan.judged_levels},
        widest_margin=max(margin for level in plan.judged_levels for _, _, margin in level.claimed),
        tokens=tokens,
        served=served,
        service_version=_text(server.get("version")),
        own_files=_have_own_files(plan),
    )


_ROLES: tuple[Role, ...] = ("reference", "candidate")


def describe_served(model: Mapping[str, Any], environment: Mapping[str, Any]) -> ServedModel:
    """Return how a model of /info was served; `environment` holds the releases of packages."""
    packs = model.get("packs")
    runtime = _text(model.get("runtime"))
    engines = _table(_table(environment.get("server")).get("engines"))
    packages = engines or _table(environment.get("packages"))
    versions = (_text(packages.get(name)) for name in ENGINE_PACKAGES.get(runtime or "", ()))
    return ServedModel(
        variant=_text(model.get("variant")),
        precision=_text(model.get("precision")),
        runtime=runtime,
        engine_version=next((version for version in versions if version), None),
        packs=packs if isinstance(packs, bool) else None,
    )


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _claimed(level: Level) -> dict[str, list[str]]:
    statistics: dict[str, list[str]] = {}
    for metric, name, _ in level.claimed:
        statistics.setdefault(metric, []).append(name)
    return statistics


def _not_claimed(level: Level) -> dict[str, list[str]]:
    """Return what could have been claimed at a level and was not, by metric."""
    left_out = {
        metric: [name for name in names if name not in level.margins.get(metric, {})]
        for metric, names in CLAIMABLE[level.kind].items()
    }
    return {metric: names for metric, names in left_out.items() if names}


def _have_own_files(plan: Plan) -> bool | None:
    if not plan.starts_servers:
        return None
    return all(len({plan.arms[i].artifact for i in plan.indices(role)}) > 1 for role in _ROLES)


def write_sentence(verdict: Verdict) -> str:
    """Return what a verdict says, in a sentence that names what was claimed."""
    scope = verdict.scope
    verb = _POSITIVE.get(verdict.verdict)
    if scope is not None and verdict.verdict == "invalid":
        return _invalid_sentence(verdict)
    if scope is not None and verdict.verdict == "inconclusive":
        return _inconclusive_sentence(verdict, scope) + _undecided_gates(verdict)
    if scope is None or verb is None:
        return sentence_of_version_2(verdict)
    margins = [item.margin for level in verdict.levels.values() for item in level.statistics]
    narrowest = f"±{100 * min(margins):.3g} %"
    widest = f"±{100 * scope.widest_margin:.3g} %"
    within = narrowest if narrowest == widest else f"{narrowest} to {widest}"
    return (
        f"{scope.candidate} {verb} {scope.reference} in {_by_level(scope.claimed)}, within {within}"
        f" ({_fewest_restarts(verdict)} restarts)."
    )


def earlier_sentence(verdict: Verdict) -> str:
    """Return the sentence as the first judges of schema 3 wrote it."""
    if verdict.verdict in _POSITIVE:
        return write_sentence(verdict)
    return sentence_of_version_2(verdict) + _undecided_gates(verdict)


def _invalid_sentence(verdict: Verdict) -> str:
    """Return why a run supports no claim, level by level."""
    reasons = [
        f"at {name} {describe_failures(level.breached)}"
        for name, level in verdict.levels.items()
        if level.verdict == "invalid"
    ]
    return f"This run supports no claim: {'; '.join(reasons)}."


def _inconclusive_sentence(verdict: Verdict, scope: Scope) -> str:
    """Return how many statistics are decided, and the first that is not."""
    items = [
        (name, item)
        for name, level in verdict.levels.items()
        if level.verdict == "inconclusive"
        for item in level.statistics
    ]
    undecided = [
        (name, item)
        for name, item in items
        if describe_statistic(item, verdict.claim) not in _DECIDED
    ]
    beginning = (
        f"Undecided after {_fewest_restarts(verdict)} restarts whether {scope.candidate} is as fast"
        f" as {scope.reference}"
    )
    if not undecided:
        return f"{beginning}: more restarts or longer ones would decide."
    name, item = undecided[0]
    return (
        f"{beginning}: {len(items) - len(undecided)} of {len(items)} statistics are within their"
        f" margins, and {metric_label(item.metric)} {item.statistic} at {name}"
        f" ({format_interval(item.interval)}) is not within ±{100 * item.margin:.3g} %. More"
        " restarts or longer ones would decide."
    )


def _undecided_gates(verdict: Verdict) -> str:
    """Return which gates cannot tell, as a further sentence of an inconclusive verdict."""
    gates = [
        f"{gate.name} ({name})"
        for name, level in verdict.levels.items()
        for gate in level.gates
        if gate.undecided and level.verdict == verdict.verdict == "inconclusive"
    ]
    return f" Gates that cannot tell: {'; '.join(gates)}." if gates else ""


_DECIDED = ("equivalent", "not slower")
_POSITIVE: Mapping[Outcome, str] = {
    "equivalent": "is as fast as",
    "not-slower": "is not slower than",
}


def sentence_of_version_2(verdict: Verdict) -> str:
    """Return the sentence of a verdict as judges of schema 2 wrote it."""
    scope = verdict.scope
    if scope is None:
        return verdict.sentence
    worst, levels = verdict.verdict, verdict.levels
    if worst in _POSITIVE:
        return (
            f"{scope.candidate} {_POSITIVE[worst]} {scope.reference}, within every margin claimed"
            f" ({_fewest_restarts(verdict)} restarts)."
        )
    names = [name for name, level in levels.items() if level.verdict == worst]
    at_levels = f" at {' and '.join(names)}" if len(levels) > 1 else ""
    if worst == "not-equivalent":
        direction = "/".join(sorted({levels[name].direction or "" for name in names}))
        # Two models that do the same work cannot differ in speed.
        doubt = (
            " Where both do the same work, that shows a broken instrument."
            if direction == "faster"
            else ""
        )
        return (
            f"{scope.candidate} is {direction} than {scope.reference} by more than a claimed margin"
            f"{at_levels}.{doubt}"
        )
    if worst == "invalid":
        breached = dict.fromkeys(gate for name in names for gate in levels[name].breached)
        return f"This run shows nothing{at_levels}, for it breached: {'; '.join(breached)}."
    return (
        f"{_fewest_restarts(verdict)} restarts do not decide{at_levels} whether"
        f" {scope.candidate} is as fast as {scope.reference}; more restarts or longer ones would."
    )


def _fewest_restarts(verdict: Verdict) -> int:
    return min(level.restarts_kept for level in verdict.levels.values())


def _by_level(statistics: Mapping[str, Mapping[str, list[str]]]) -> str:
    """Return statistics in words: "p50 and mean of inference at unloaded"."""
    parts = []
    for level, by_metric in statistics.items():
        metrics: dict[str, list[str]] = {}
        for metric, names in by_metric.items():
            metrics.setdefault(_listed(names), []).append(metric_label(metric))
        phrases = [f"{names} of {_listed(labels)}" for names, labels in metrics.items()]
        if phrases:
            parts.append(f"{_listed(phrases)} at {level}")
    return "; ".join(parts)


def _listed(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def describe_scope(scope: Scope) -> Iterator[str]:
    """Yield what was measured and what was not claimed, as lines without an end."""
    margin = f"widest margin ±{100 * scope.widest_margin:.3g} %"
    yield f"claimed: {_by_level(scope.claimed)}; {margin}"
    yield f"not claimed: {_by_level(scope.not_claimed) or 'nothing else'}; no other level or load"
    yield from (f"measured: {line}" for line in _measured(scope))


def _measured(scope: Scope) -> Iterator[str]:
    served = {role: describe_model(model) for role, model in scope.served.items()}
    if len(set(served.values())) == 1:
        yield next(iter(served.values()))
    else:
        yield from (f"{role}: {words}" for role, words in served.items())
    if not served:
        yield "variant, precision, engine and packing are unknown"
    fewest, most = scope.tokens or (0, 0)
    lengths = f"{fewest} to {most} tokens" if scope.tokens else "an unknown number of tokens"
    yield f"texts of {lengths}, drbert-serve {scope.service_version or 'of an unknown version'}"
    if scope.own_files is not None:
        yield (
            "each copy of a model from a folder of its own"
            if scope.own_files
            else "both copies of a model from one folder: these two files on this boot"
        )


def describe_model(model: ServedModel) -> str:
    """Return how a model was served, in words; what is unknown is said to be."""
    packing = {True: "packed rows", False: "a row for each text", None: "packing unknown"}
    engine = (
        f"{model.runtime or 'an unknown engine'} {model.engine_version or 'of unknown release'}"
    )
    return (
        f"{model.variant or 'an unknown variant'} in {model.precision or 'unknown precision'} by"
        f" {engine}, {packing[model.packs]}"
    )
