"""
Which engine is the fastest here? A few batches by each say so.

That depends on the processor: OpenVINO is fast in int8 only with instructions for it, and ONNX
Runtime also without. The result is kept in the user's cache folder, so that the next start does not
measure again. It is kept by the graph and not by the weights, so two models of one graph get the
same engine.

    $XDG_CACHE_HOME/drbert-serve/engines/KEY.json
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from command import installed_version
from service.artifact import Artifact
from service.classifier import Classifier
from service.host import cpus, memory
from service.host.cache_folder import cache_folder
from service.runtimes.auto import Choice, EngineRate

log = logging.getLogger(__name__)

ALONE_TOKENS = 16
"""Tokens of the text that is run alone."""
TOGETHER_TOKENS = (8, 24, 12, 40)
"""Tokens of the texts that wait together, and are run in the batches of the service."""
MOST_REPEATS = 8
"""How often those texts wait at most."""
TOGETHER_S = 0.1
"""About how long they take at most, by the time of a text alone."""
MIN_ROUNDS, ROUNDS_S = 3, 0.3
"""Each engine is measured so often in turn, and for about so long."""
BUDGET_S = 1.0
"""After so long no further round begins, also if there were fewer."""
RUNS_A_TURN = 3
"""An engine runs so often before it is the other one's turn: the first runs find cold caches."""
LEAST_GAIN = 1.1
"""How much faster another engine must be than the usual one, to be chosen."""
MEMORY_FACTOR = 5
"""Bytes of free memory for each byte of weights, with which two engines are loaded at once."""

Build = Callable[[Choice], Classifier]
"""Loads a choice."""


class Measurement(BaseModel):
    """The rates of engines, and when they were measured."""

    model_config = ConfigDict(frozen=True)

    date: str
    rates: tuple[EngineRate, ...]


_of_this_process: dict[str, Measurement] = {}
"""Measurements by key, for models that are loaded later where nothing can be written."""


def choose_fastest(
    artifact: Artifact,
    choices: Sequence[Choice],
    conditions: Mapping[str, object],
    build: Build,
    is_serving: bool = False,
) -> tuple[Choice, Classifier | None]:
    """Return the fastest of the choices, with the rates; and its engine if it is loaded already.

    The first choice is the usual one. Another one must be faster by LEAST_GAIN. Without enough
    memory for two engines, and if another one cannot be loaded, the usual one is taken.
    `conditions` are the settings that the rates depend on. While the service answers requests
    nothing is measured: the rates would be those of a busy machine, and they are kept.
    """
    key = _key(artifact, choices, conditions)
    if (measured := _recall(key, choices)) is not None:
        return decide(choices, measured), None
    if is_serving:
        return _unmeasured(choices[0], "the service answered requests meanwhile"), None
    variants = artifact.manifest.variants
    weight_bytes = sum(variants[choice.variant].weight_bytes for choice in choices)
    if memory.available_bytes() < MEMORY_FACTOR * weight_bytes:
        return _unmeasured(choices[0], "there is too little memory to load two engines"), None
    began = time.perf_counter()
    classifiers: list[Classifier] = []
    try:
        classifiers += (build(choice) for choice in choices)
        rates = measure(choices, classifiers)
    # Whatever it is, loading the usual engine alone will raise it again, or do without. A panic of
    # Rust, as of the tokenizer's, is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        log.warning(
            "an engine cannot be measured",
            exc_info=error,
            extra={"artifact": str(artifact.directory)},
        )
        usual = _unmeasured(choices[0], f"{type(error).__name__} while measuring")
        return usual, next(iter(classifiers), None)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    measured = _keep(key, Measurement(date=today, rates=tuple(rates)), choices)
    choice = decide(choices, measured)
    log.info(
        "engines were measured",
        extra={
            "artifact": str(artifact.directory),
            "rates": [rate.model_dump() for rate in measured.rates],
            "chosen": f"{choice.variant} by {choice.runtime}",
            "seconds": round(time.perf_counter() - began, 3),
        },
    )
    return choice, classifiers[_names(choices).index((choice.variant, choice.runtime))]


def decide(choices: Sequence[Choice], measured: Measurement) -> Choice:
    """Return the choice whose rates are best, with the rates and the reason."""
    usual, *others = measured.rates
    best = max(others, key=lambda rate: rate.pace)
    rates = f"measured on {measured.date}: {'; '.join(map(str, measured.rates))}"
    if best.pace > LEAST_GAIN * usual.pace:
        faster = choices[measured.rates.index(best)]
        reason = f"faster than {usual.variant} by {usual.runtime}; {rates}"
        return replace(faster, reason=reason, rates=measured.rates)
    return replace(choices[0], reason=f"{choices[0].reason}; {rates}", rates=measured.rates)


def measure(choices: Sequence[Choice], classifiers: Sequence[Classifier]) -> list[EngineRate]:
    """Return the rates of loaded engines, measured in turn; the fastest of several times counts."""
    limit = classifiers[0].manifest.max_tokens
    alone = [min(ALONE_TOKENS, limit)]
    for classifier in classifiers:
        _seconds(classifier, alone)
    few = [min(tokens, limit) for tokens in TOGETHER_TOKENS]
    few_s = max(_seconds(each, alone) for each in classifiers) * sum(few) / sum(alone)
    repeats = int(TOGETHER_S / few_s) if few_s else MOST_REPEATS
    together = few * min(MOST_REPEATS, max(1, repeats))
    for classifier in classifiers:
        _seconds(classifier, together)
    # For each engine its fastest time of one text, and of all.
    fastest = [[float("inf")] * 2 for _ in classifiers]
    began, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - began < ROUNDS_S:
        if rounds and time.perf_counter() - began > BUDGET_S:
            break
        rounds += 1
        for times, classifier in zip(fastest, classifiers, strict=True):
            for _ in range(RUNS_A_TURN):
                times[0] = min(times[0], _seconds(classifier, alone))
                times[1] = min(times[1], _seconds(classifier, together))
    return [
        EngineRate(
            variant=choice.variant,
            runtime=choice.runtime,
            alone_ms=round(of_one * 1e3, 3),
            texts_per_s=round(len(together) / of_all, 1),
        )
        for choice, (of_one, of_all) in zip(choices, fastest, strict=True)
    ]


def _seconds(classifier: Classifier, tokens: Sequence[int]) -> float:
    """Return the seconds of texts of these token counts, in the batches of the service."""
    batches = [
        classifier.padding([tokens[index] for index in indices])
        for indices in classifier.batches(tokens)
    ]
    began = time.perf_counter()
    for batch in batches:
        classifier.predict(batch)
    return time.perf_counter() - began


def _unmeasured(choice: Choice, reason: str) -> Choice:
    return replace(choice, reason=f"{choice.reason}; not measured, {reason}")


def _names(choices: Sequence[Choice | EngineRate]) -> list[tuple[str, str]]:
    return [(each.variant, each.runtime) for each in choices]


def _key(artifact: Artifact, choices: Sequence[Choice], conditions: Mapping[str, object]) -> str:
    """Return a digest of what the rates depend on."""
    manifest = artifact.manifest
    variants = [manifest.variants[choice.variant] for choice in choices]
    described = {
        "engines": _names(choices),
        "graphs": [(each.encoder_digest, each.head_digest) for each in variants],
        "precisions": [each.lowest_unquantized_precision for each in variants],
        "packs": manifest.can_pack,
        "versions": [installed_version(), *(_version(choice.runtime) for choice in choices)],
        "processor": [cpus.describe(), cpus.model_numbers()],
        "conditions": dict(conditions),
    }
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _version(engine: str) -> str:
    for package in (engine, f"{engine}-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return "unknown"


def _file(key: str) -> Path | None:
    """Return the file of a measurement; None for a user without a home folder."""
    with contextlib.suppress(RuntimeError):
        return cache_folder("engines") / f"{key}.json"
    return None


def _recall(key: str, choices: Sequence[Choice]) -> Measurement | None:
    """Return a measurement of these choices; None if there is none that can be read."""
    file = _file(key)
    measured = _of_this_process.get(key)
    with contextlib.suppress(OSError, ValueError):  # pydantic's error is a ValueError
        if file is not None:
            measured = Measurement.model_validate_json(file.read_text(encoding="utf-8"))
    if measured is None or _names(measured.rates) != _names(choices):
        return None
    return measured


def _keep(key: str, measured: Measurement, choices: Sequence[Choice]) -> Measurement:
    """Keep a measurement, and return the one that counts.

    That is the first one, if two processes measure at the same time. Where nothing can be written,
    it is kept for this process.
    """
    _of_this_process[key] = measured
    file = _file(key)
    if file is None:
        return measured
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as draft:
            draft.write(measured.model_dump_json())
            draft.flush()
            if _recall(key, choices) == measured:  # Nobody's file, or one that cannot be read.
                file.unlink(missing_ok=True)
            os.link(draft.name, file)
    return _recall(key, choices) or measured
