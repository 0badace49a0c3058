"""
Count the instructions of two artifacts, each in two processes (A/A), batch by batch.

    plain process of each: what it loads, tokens, answers → two counted processes of each → Work
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from command import INTERRUPTED, BadInput, Unavailable
from proof.work.schema import (
    DEFAULT_MARGIN,
    SCHEMA_VERSION,
    CountedArtifact,
    Measurement,
    Work,
    decide,
)
from proof.work.workload import (
    Loading,
    Method,
    Workload,
    WorkloadFailed,
    choose_method,
    method_version,
    running,
)
from service.artifact import Artifact, read_artifact

DEFAULT_VARIANT = "cpu-fp32"
COPIES = 2
"""Processes of each artifact."""
TEXT = "a charming and often affecting journey through the past that never loses its way "
"""Text of the default batches, repeated and cut to so many tokens."""
SHARES = (0.1, 0.5, 0.9)
"""Which texts of a file are counted: those at these shares of all, sorted by length."""
MOST_PROCESSES = 4
MOST_REPETITIONS = 100
PACKAGES = ("openvino", "onnxruntime", "numpy", "tokenizers")
TOLERANCES = {"f32": 0.01, "bf16": 0.5, "i8": 0.5}
"""Largest difference of a logit from a plain process, by precision. It detects code that does not
run as it should; it does not measure accuracy.
"""


@dataclass(frozen=True)
class Sizes:
    """Batches that are counted, and how often."""

    lengths: tuple[int, ...]
    """Tokens of the texts, special tokens included."""
    batch_tokens: int
    """Tokens of a batch of several texts, as many as fit."""
    instructions: int
    """Batches are repeated until so many are counted. Two threads wake each other in every run,
    which takes a few thousand instructions, not always the same number.
    """


DEFAULT_SIZES: dict[Method, Sizes] = {
    "counters": Sizes((8, 32, 128), batch_tokens=512, instructions=10**9),
    # Valgrind takes 0.1 to 0.2 s for a token of a mini model.
    "valgrind": Sizes((8, 32, 64), batch_tokens=64, instructions=20 * 10**6),
}
QUICK_SIZES: dict[Method, Sizes] = {
    "counters": Sizes((8, 32), batch_tokens=128, instructions=10**9),
    "valgrind": Sizes((8,), batch_tokens=32, instructions=20 * 10**6),
}


@dataclass(frozen=True)
class CountOptions:
    """What is counted, and how."""

    variant: str = DEFAULT_VARIANT
    runtime: str = "auto"
    method: str = "auto"
    margin: float = DEFAULT_MARGIN
    lengths: tuple[int, ...] = ()
    """Tokens of the texts; empty: as many as the method affords."""
    texts: Path | None = None
    """File with one text on each line; None: a text of ours."""
    quick: bool = False


@dataclass(frozen=True)
class Batch:
    """Copies of one text."""

    text: str
    max_tokens: int | None
    """Tokens to which the text is cut; None: those that the model reads."""
    copies: int

    def prepare(self, workload: Workload) -> dict[str, Any]:
        """Let a workload make the batch and run it once."""
        return workload.prepare(self.text, self.max_tokens, self.copies)


def count_work(first: Path, second: Path, options: CountOptions) -> Work:
    """Count both artifacts and return the verdict with everything that it follows from.

    Raise Unavailable if nothing here can count, BadInput if an artifact cannot be counted.
    """
    artifacts = read_artifact(first), read_artifact(second)
    for artifact in artifacts:
        _check_countable(artifact, options.variant)
    method = choose_method(options.method)
    loadings = [_loading(artifact, options, method) for artifact in artifacts]
    texts = None if options.texts is None else _read_texts(options.texts)
    sizes = (QUICK_SIZES if options.quick else DEFAULT_SIZES)[method]
    loaded, batches, answers = _look(loadings, texts, options.lengths or sizes.lengths, sizes)
    counts = _count_copies(loadings, method, batches, answers, sizes.instructions)
    for artifact in artifacts:
        artifact.check_unchanged()
    measurements = [
        Measurement(
            batch=_name(answers[0][i]["tokens"], batch.copies),
            texts=batch.copies,
            tokens=(answers[0][i]["tokens"], answers[1][i]["tokens"]),
            instructions=(
                [copy[i] for copy in counts[:COPIES]],
                [copy[i] for copy in counts[COPIES:]],
            ),
        )
        for i, batch in enumerate(batches)
    ]
    names = _names(first, second)
    return Work(
        schema_version=SCHEMA_VERSION,
        verdict=decide(measurements, options.margin),
        margin=options.margin,
        method=method,
        method_version=method_version(method),
        threads=1,
        artifacts=(
            _describe(names[0], artifacts[0], loaded[0]),
            _describe(names[1], artifacts[1], loaded[1]),
        ),
        measurements=measurements,
        processor=loaded[0]["processor"],
        system=platform.platform(),
        python=platform.python_version(),
        packages=_versions(),
    )


def _check_countable(artifact: Artifact, name: str) -> None:
    variant = artifact.manifest.variants.get(name)
    if variant is None:
        raise BadInput(
            f"{artifact.directory} holds no variant {name!r}; it holds"
            f" {', '.join(artifact.manifest.variants)}."
        )
    if variant.runtime in ("cuda", "tensorrt"):
        raise BadInput(
            f"{name} runs on a GPU, whose instructions cannot be counted; pass --variant cpu-fp32."
        )


def _loading(artifact: Artifact, options: CountOptions, method: Method) -> Loading:
    precision = artifact.manifest.variants[options.variant].precision
    if method == "valgrind" and precision == "bf16":
        raise Unavailable(
            f"{options.variant} needs hardware counters: the processor that Valgrind emulates has"
            " no instructions for bf16. Pass --variant cpu-fp32."
        )
    unquantized = "f32" if method == "valgrind" and precision == "i8" else None
    return Loading(artifact.directory, options.variant, options.runtime, unquantized)


def _read_texts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8.") from None
    texts = sorted((line for line in lines if line.strip()), key=len)
    if not texts:
        raise BadInput(f"{path} holds no text; give a file with one text on each line.")
    return texts


def _look(
    loadings: Sequence[Loading], texts: list[str] | None, lengths: Sequence[int], sizes: Sizes
) -> tuple[list[dict[str, Any]], list[Batch], list[list[dict[str, Any]]]]:
    """Return what each artifact loads, the batches, and each artifact's answers to them."""
    with running(loadings[0], None) as first, running(loadings[1], None) as second:
        pair = first, second
        loaded = [workload.loaded for workload in pair]
        most = min(each["max_tokens"] for each in loaded)
        if texts is None:
            fitting = [length for length in lengths if length <= most] or [most]
            singles = [Batch(TEXT * length, length, 1) for length in sorted(set(fitting))]
        else:
            chosen = [texts[int(share * len(texts))] for share in SHARES]
            singles = [Batch(text, None, 1) for text in dict.fromkeys(chosen)]
        batches = []
        for single in singles:
            tokens = max(single.prepare(workload)["tokens"] for workload in pair)
            batches.append(single)
            copies = sizes.batch_tokens // tokens
            if copies > 1:
                batches.append(Batch(single.text, single.max_tokens, copies))
        answers = [[batch.prepare(workload) for batch in batches] for workload in pair]
    return loaded, batches, answers


def _count_copies(
    loadings: Sequence[Loading],
    method: Method,
    batches: Sequence[Batch],
    answers: Sequence[Sequence[dict[str, Any]]],
    instructions: int,
) -> list[list[float]]:
    """Return instructions for one text: of each batch, in each copy of the first, then second."""
    workloads: list[Workload] = []
    stopping = threading.Event()
    with tqdm(total=len(loadings) * COPIES * len(batches), desc="work", unit="count") as bar:

        def count(index: int) -> list[float]:
            with running(loadings[index], method) as workload:
                workloads.append(workload)
                if stopping.is_set():  # it was loading when the others were killed
                    raise WorkloadFailed("The count was stopped.", INTERRUPTED)
                return _count_batches(workload, batches, answers[index], instructions, bar.update)

        processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(processes) as pool:
            # The artifacts take turns, so that with few processors both are counted alike.
            jobs = {
                (index, copy): pool.submit(count, index)
                for copy in range(COPIES)
                for index in range(len(loadings))
            }
            try:
                wait(jobs.values(), return_when=FIRST_EXCEPTION)
                failed = [job for job in jobs.values() if job.done() and job.exception()]
                if failed:
                    failed[0].result()
            except BaseException:
                stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for workload in workloads:
                    workload.kill()
                raise
    return [jobs[index, copy].result() for index in range(len(loadings)) for copy in range(COPIES)]


def _count_batches(
    workload: Workload,
    batches: Sequence[Batch],
    answers: Sequence[dict[str, Any]],
    instructions: int,
    advance: Callable[[], object],
) -> list[float]:
    counts: list[float] = []
    if workload.count(0) <= 0:
        raise Unavailable("The counter did not count.")
    for batch, expected in zip(batches, answers, strict=True):
        answer = batch.prepare(workload)
        _check_answer(workload, answer, expected)
        # Asking for runs takes some instructions itself.
        idle = workload.count(0)
        single = max(1, workload.count(1) - idle)
        repetitions = max(1, min(MOST_REPETITIONS, instructions // single))
        total = single if repetitions == 1 else max(1, workload.count(repetitions) - idle)
        counts.append(total / repetitions / batch.copies)
        advance()
    return counts


def _check_answer(workload: Workload, answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise WorkloadFailed if a counted process computes something else than a plain one."""
    tolerance = TOLERANCES[workload.loaded["precision"]]
    pairs = zip(answer["logits"], expected["logits"], strict=True)
    difference = max(
        abs(left - right) for one, other in pairs for left, right in zip(one, other, strict=True)
    )
    if answer["tokens"] != expected["tokens"] or difference > tolerance:
        raise WorkloadFailed(
            f"The counted process answers otherwise than a plain one: a logit differs by"
            f" {difference:.2g}; its counts mean nothing.",
            Unavailable.exit_code,
        )


def _name(tokens: int, copies: int) -> str:
    return f"{tokens} tokens alone" if copies == 1 else f"{copies} texts of {tokens} tokens"


def _names(first: Path, second: Path) -> tuple[str, str]:
    names = first.resolve().name, second.resolve().name
    return names if names[0] != names[1] else (str(first), str(second))


def _describe(name: str, artifact: Artifact, loaded: dict[str, Any]) -> CountedArtifact:
    variant = artifact.manifest.variants[loaded["variant"]]
    return CountedArtifact(
        name=name,
        digest=artifact.digest,
        variant=loaded["variant"],
        runtime=loaded["runtime"],
        precision=loaded["precision"],
        computes_in=loaded["computes_in"],
        packs=loaded["packs"],
        encoder_digest=variant.encoder_digest,
        head_digest=variant.head_digest,
    )


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
