"""
Loads one model: chooses its variant, builds its engine, warms it up and checks its answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from command import BadInput, CommandError
from service import self_check
from service.artifact import Artifact
from service.classifier import Classifier
from service.errors import ServiceError
from service.host import cpus, memory
from service.runtimes.auto import ON_A_GPU, Choice, choose, load
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
    rejected: dict[str, str] = {}
    while True:
        choice = choose(artifact, options.variant, options.runtime, rejected=rejected)
        gate = artifact.manifest.variants[choice.variant].gate
        if gate.status in ("failed", "ungated"):
            log.warning(
                "a variant is served that did not pass its accuracy gate",
                extra={"model": name, "variant": choice.variant, "why": gate.reason},
            )
        try:
            return _load_variant(name, artifact, choice, options, stopping)
        except self_check.AnswersDiffer as error:
            if options.variant != "auto":
                raise
            log.error(
                "a variant failed its self-check",
                exc_info=error.__cause__,
                extra={"model": name, "variant": choice.variant, "why": str(error)},
            )
            rejected[choice.variant] = str(error)


def _load_variant(
    name: str,
    artifact: Artifact,
    choice: Choice,
    options: LoadOptions,
    stopping: Callable[[], bool],
) -> Engine:
    started = time.monotonic()
    try:
        classifier = Classifier(
            artifact,
            load(artifact, choice, options.threads, options.gpu),
            options.max_batch_size,
            options.max_batch_tokens,
        )
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
