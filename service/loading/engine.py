"""
Loads one model: chooses its variant, builds its engine, warms it up and checks its answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from command import BadInput, CommandError
from service import self_check
from service.artifact import Artifact
from service.classifier import Classifier
from service.errors import ServiceError
from service.host import cpus, memory
from service.loading import engine_rates
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import ON_A_GPU, Choice, candidates, load
from service.runtimes.cuda import GpuOptions
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """What the settings and the command line say about every model that is loaded."""

    variant: str
    """A variant's name, or `auto`: the fastest one that answers here as where it was exported."""
    runtime: str
    threads: int
    max_batch_size: int | None
    max_batch_tokens: int | None
    warm_up_s: float
    warm_up_max_tokens: int | None
    gpu: GpuOptions
    measure_engines: bool
    """Whether `auto` measures, where two engines can run the artifact."""
    is_serving: bool = False
    """Whether the service answers requests while the model is loaded."""

    @classmethod
    def from_settings(cls, settings: Settings, variant: str) -> LoadOptions:
        """Return the options of a process with these settings."""
        mib = settings.gpu_memory_mib
        return cls(
            variant=variant,
            runtime=settings.runtime,
            threads=settings.threads or cpus.usable(),
            max_batch_size=settings.max_batch_size,
            max_batch_tokens=settings.max_batch_tokens,
            warm_up_s=settings.warm_up_s,
            warm_up_max_tokens=settings.warm_up_max_tokens,
            gpu=GpuOptions(
                memory_bytes=None if mib is None else mib * 2**20,
                shapes_file=settings.gpu_shapes_file,
                cache=settings.gpu_cache,
                graphs=settings.gpu_graphs,
            ),
            measure_engines=settings.measure_engines,
        )


@dataclass(frozen=True)
class Engine:
    """A classifier that is ready to answer, and how it was chosen."""

    choice: Choice
    classifier: Classifier
    agreement: self_check.Agreement | None
    """With the answers of the exporting host; None if the artifact holds none."""


def load_engine(
    name: str, artifact: Artifact, options: LoadOptions, stopping: Callable[[], bool]
) -> Engine:
    """Return an artifact's engine, warm and checked.

    With `auto`, a variant that fails its self-check is passed over for the next one. `stopping`
    ends the warm-up early. Raises BadInput if the artifact cannot be loaded, NotEnoughMemory, and
    AnswersDiffer if the variant that was asked for fails its self-check.
    """
    rejected: dict[tuple[str, str], str] = {}
    while True:
        choice, classifier = _choose(artifact, options, rejected)
        gate = artifact.manifest.variants[choice.variant].gate
        if gate.status in ("failed", "ungated"):
            log.warning(
                "a variant is served that did not pass its accuracy gate",
                extra={"model": name, "variant": choice.variant, "why": gate.reason},
            )
        try:
            return _load_variant(name, artifact, choice, classifier, options, stopping)
        except RuntimeUnavailable as error:
            answers_differ = isinstance(error, self_check.AnswersDiffer)
            # Another engine than the usual one was measured by an earlier start, and may be gone.
            may_be_gone = bool(choice.rates) and choice.runtime != choice.rates[0].runtime
            if options.variant != "auto" or not (answers_differ or may_be_gone):
                raise
            log.error(
                "a variant failed its self-check" if answers_differ else "an engine cannot be used",
                exc_info=error.__cause__,
                extra={"model": name, "variant": choice.variant, "why": str(error)},
            )
            rejected[choice.variant, choice.runtime] = str(error)


def _choose(
    artifact: Artifact, options: LoadOptions, rejected: Mapping[tuple[str, str], str]
) -> tuple[Choice, Classifier | None]:
    """Return what to load, and its classifier if it was measured and is loaded already."""
    choices = candidates(artifact, options.variant, options.runtime, rejected=rejected)
    if len(choices) == 1 or not options.measure_engines:
        return choices[0], None

    def build(choice: Choice) -> Classifier:
        return _build(artifact, choice, options)

    conditions = {
        "threads": options.threads,
        "max_batch_size": options.max_batch_size,
        "max_batch_tokens": options.max_batch_tokens,
    }
    return engine_rates.choose_fastest(artifact, choices, conditions, build, options.is_serving)


def _build(artifact: Artifact, choice: Choice, options: LoadOptions) -> Classifier:
    return Classifier(
        artifact,
        load(artifact, choice, options.threads, options.gpu),
        options.max_batch_size,
        options.max_batch_tokens,
    )


def _load_variant(
    name: str,
    artifact: Artifact,
    choice: Choice,
    classifier: Classifier | None,
    options: LoadOptions,
    stopping: Callable[[], bool],
) -> Engine:
    started = time.monotonic()
    try:
        classifier = classifier or _build(artifact, choice, options)
        artifact.check_unchanged()
        loaded = time.monotonic()
        # The check comes first, because a wrong engine need not be warm. But the memory of a GPU
        # is laid out by the largest shape, so there the warm-up comes first.
        warm_up_first = classifier.shapes.grid.warm_up_all
        agreement = None if warm_up_first else self_check.check(classifier, choice.variant)
        shapes = classifier.warm_up(options.warm_up_s, stopping, options.warm_up_max_tokens)
        if warm_up_first:
            agreement = self_check.check(classifier, choice.variant)
        # Again: a file that is mapped into memory may be read as late as now.
        artifact.check_unchanged()
    except BaseException as error:  # a panic of Rust, as of the tokenizer's, is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise _explained(name, artifact, choice, error) from error
    log.info(
        "model ready",
        extra={
            "model": name,
            "artifact": str(artifact.directory),
            "variant": choice.variant,
            "runtime": choice.runtime,
            "why": choice.reason,
            "threads": options.threads,
            "load_s": round(loaded - started, 3),
            "warm_up_s": round(time.monotonic() - loaded, 3),
            "shapes": shapes,
        },
    )
    if agreement is None:
        log.warning(
            "this artifact holds no self-check, so it is not known whether this processor computes"
            " it correctly; export it again",
            extra={"model": name},
        )
    return Engine(choice, classifier, agreement)


def _explained(
    name: str, artifact: Artifact, choice: Choice, error: BaseException
) -> BaseException:
    """Return the error to raise for one that loading raised."""
    if choice.runtime not in ON_A_GPU and memory.ran_out(error):
        weight_bytes = artifact.manifest.variants[choice.variant].weight_bytes
        return memory.not_enough(name, choice.variant, weight_bytes, error)
    if isinstance(error, CommandError | ServiceError):
        return error
    # A digest shows that a file is unchanged, not that an engine or a tokenizer can use it. What
    # these raise is of any type.
    return BadInput(
        f"{artifact.directory} cannot be loaded ({type(error).__name__}: {error}); export it again."
    )
