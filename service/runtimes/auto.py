"""
Chooses a variant and a runtime, by the artifact's variants, their accuracy gates and this host.

A variant or runtime that is requested by name is used, or the start fails. Only `auto` tries
others, and it reports each one that it passed over. On a host with a GPU and a variant for it,
`auto` does not fall back to the CPU because something is missing: that fails too. Where two
engines can run an artifact, the faster one is found by measuring: service/loading/engine_rates.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from command import how_to_install
from service.artifact import Artifact, UnquantizedPrecision, Variant
from service.host import cpus, gpus
from service.runtimes import Runtime, RuntimeUnavailable
from service.runtimes.cuda import DEFAULT_GPU_OPTIONS, GpuOptions
from service.runtimes.onnxruntime import missing_requirement

PREFERENCE = (
    "tensorrt-fp16",
    "cuda-fp16",
    "cpu-int8",
    "cpu-bf16",
    "cpu-int8-ort",
    "cpu-fp32",
)
"""Variants of one engine in the order in which `auto` tries them, fastest first. cpu-int8-ort is
the only one that OpenVINO does not run.
"""
ON_A_GPU = ("tensorrt", "cuda")
"""Runtimes that need a GPU."""
_MISSING = f"onnxruntime is not installed; {how_to_install('portable')}"
LAST_ON_A_GPU = "cuda-fp16"
"""The last variant in PREFERENCE that needs a GPU."""


class EngineRate(BaseModel):
    """How fast an engine ran a variant on this host."""

    model_config = ConfigDict(frozen=True)

    variant: str
    runtime: str
    alone_ms: float = Field(gt=0)
    """Milliseconds of a short text alone."""
    texts_per_s: float = Field(gt=0)
    """Short texts a second, where several wait."""

    @property
    def pace(self) -> float:
        """Return the geometric mean of the texts a second, alone and where several wait."""
        return math.sqrt(1e3 / self.alone_ms * self.texts_per_s)

    def __str__(self) -> str:
        return (
            f"{self.variant} by {self.runtime} {self.texts_per_s:,.0f} texts/s, and a text alone in"
            f" {self.alone_ms:.2g} ms"
        )


@dataclass(frozen=True)
class Choice:
    """A variant and the runtime that runs it."""

    variant: str
    """Name of the variant in the manifest."""
    runtime: str
    """Name of the runtime: openvino, onnxruntime, cuda or tensorrt."""
    reason: str
    """Why this variant was chosen, in words."""
    rates: tuple[EngineRate, ...] = ()
    """The rates of the engines that `auto` measured, the usual one's first."""


@dataclass(frozen=True)
class Host:
    """The capabilities of this host, by which a variant is chosen."""

    cpuinfo: Path = Path("/proc/cpuinfo")
    """The file that lists the processor's instructions."""
    missing_requirement: Callable[[str], str | None] = missing_requirement
    """Return what is missing to run models by "cuda" or "tensorrt"; None if nothing is."""
    has_gpu: bool = field(default_factory=lambda: bool(gpus.visible()))
    """Whether CUDA would use a GPU."""


def choose(
    artifact: Artifact,
    variant: str = "auto",
    runtime: str = "auto",
    host: Host | None = None,
    rejected: Mapping[tuple[str, str], str] = {},
) -> Choice:
    """Return the variant and the runtime to use, with the reason, by what is known beforehand.

    `auto` also passes over the variants and runtimes in `rejected`, which maps each pair to the
    reason of an earlier failure. Raises RuntimeUnavailable if this host can run no
    variant, or not the one requested.
    """
    variants, host = artifact.manifest.variants, host or Host()
    if variant != "auto":
        if variant not in variants:
            raise RuntimeUnavailable(
                f"{artifact.directory} holds no variant {variant!r}; it holds"
                f" {', '.join(variants)}. `drbert-export --variants` builds others, and"
                " `drbert-serve CHECKPOINT --gate TEXTS` builds cpu-int8."
            )
        return Choice(
            variant, _runtime_for(variant, variants[variant], runtime, host), "asked for by name"
        )
    return _choose_fastest(artifact, runtime, host, rejected)


def candidates(
    artifact: Artifact,
    variant: str = "auto",
    runtime: str = "auto",
    host: Host | None = None,
    rejected: Mapping[tuple[str, str], str] = {},
) -> list[Choice]:
    """Return what `choose` returns, and the best that the other engine for the CPU can run.

    The second is missing for a variant or a runtime that is requested by name, and on a GPU. Raises
    RuntimeUnavailable as `choose` does.
    """
    choices, failure = [], None
    try:
        choices.append(choose(artifact, variant, runtime, host, rejected))
    except RuntimeUnavailable as error:
        # Unless OpenVINO was rejected, what cannot be chosen is missing, or is a GPU's.
        if not rejected or any(engine != "openvino" for _, engine in rejected):
            raise
        failure = error
    is_open = variant == runtime == "auto"
    if is_open and (not choices or choices[0].runtime == "openvino"):
        with contextlib.suppress(RuntimeUnavailable):
            choices.append(choose(artifact, variant, "onnxruntime", host, rejected))
    if failure is None:
        return choices
    if not choices:
        raise failure
    failures = "; ".join(f"{name}: {reason}" for (name, _), reason in rejected.items())
    return [replace(choices[0], reason=f"what OpenVINO cannot run; passed over {failures}")]


def _choose_fastest(
    artifact: Artifact, runtime: str, host: Host, rejected: Mapping[tuple[str, str], str]
) -> Choice:
    """Return the first variant in PREFERENCE that `auto` may choose."""
    variants = artifact.manifest.variants
    passed_over: list[str] = []
    native = cpus.native_precisions(host.cpuinfo)
    for name in PREFERENCE:
        variant = variants.get(name)
        if variant is None:
            continue
        rejection = _rejection_reason(variant, runtime, native, host)
        if rejection is None:
            engine = _runtime_for(name, variant, runtime, host)
            rejection = rejected.get((name, engine))
        if rejection is None:
            reason = "the fastest variant in the artifact"
            if passed_over:
                device = "this CPU" if name.startswith("cpu") else "this GPU"
                reason = (
                    f"the fastest that {device} can run and that passed its gate; passed over"
                    f" {'; '.join(passed_over)}"
                )
            return Choice(name, engine, reason)
        passed_over.append(f"{name}: {rejection}")
        is_last_on_gpu = name == LAST_ON_A_GPU and host.has_gpu and runtime == "auto"
        if is_last_on_gpu and variant.gate.status == "passed":
            raise RuntimeUnavailable(
                f"There is a GPU, and {name} cannot be run: {rejection}. To run on the CPU instead,"
                " pass --variant cpu-fp32."
            )
    raise _nothing_runs(artifact, runtime, passed_over)


def _nothing_runs(artifact: Artifact, runtime: str, passed_over: list[str]) -> RuntimeUnavailable:
    """Return the error for an artifact without a variant that this host can run."""
    variants = artifact.manifest.variants
    if runtime in ON_A_GPU and not any(each.runtime == runtime for each in variants.values()):
        return RuntimeUnavailable(
            f"{artifact.directory} holds nothing for {runtime}, only {', '.join(variants)}; "
            f"export it with --variants cpu-fp32,{runtime}-fp16, or leave DRBERT_RUNTIME out."
        )
    by_runtime = "" if runtime == "auto" else f" by {runtime}"
    details = "; ".join(passed_over) or f"its variants are {', '.join(variants)}"
    return RuntimeUnavailable(
        f"{artifact.directory} holds nothing that this host can run{by_runtime} ({details})."
    )


def load(
    artifact: Artifact,
    choice: Choice,
    threads: int,
    gpu: GpuOptions = DEFAULT_GPU_OPTIONS,
    unquantized_precision: UnquantizedPrecision | None = None,
    packs: bool = True,
) -> Runtime:
    """Return the runtime of a choice; RuntimeUnavailable if the engine would run anything else.

    `unquantized_precision` is the lowest precision for what an int8 graph does not quantize, by
    default the precision in which the variant was verified. Without `packs`, a row of a batch is
    always one text.
    """
    manifest = artifact.manifest
    variant = manifest.variants[choice.variant]
    model = artifact.path(variant.files[0])
    if choice.runtime == "openvino":
        from service.runtimes.openvino import OpenVinoRuntime

        lowest = unquantized_precision or variant.lowest_unquantized_precision
        return OpenVinoRuntime(
            model, variant.precision, threads, lowest, packs and manifest.can_pack
        )
    if choice.runtime == "cuda":
        from service.runtimes.cuda import CudaRuntime

        return CudaRuntime(model, len(manifest.labels), manifest.max_tokens, gpu)
    if choice.runtime == "tensorrt":
        from service.runtimes.tensorrt import TensorRtRuntime

        return TensorRtRuntime(
            model, len(manifest.labels), manifest.max_tokens, manifest.inputs, gpu
        )
    from service.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(model, variant.precision, threads)


def _rejection_reason(variant: Variant, runtime: str, native: set[str], host: Host) -> str | None:
    """Return why `auto` does not choose a variant; None if it may."""
    if not variant.gate.is_open:
        status = "failed its gate" if variant.gate.status == "failed" else variant.gate.status
        return f"{status}, {variant.gate.reason}"
    if variant.runtime in ON_A_GPU and runtime in ("auto", variant.runtime):
        return host.missing_requirement(variant.runtime)
    if variant.runtime in ON_A_GPU or runtime in ON_A_GPU:
        return f"{runtime} was asked for"
    if variant.runtime == "onnxruntime":
        if _for_the_cpu(runtime) != "onnxruntime":
            return "OpenVINO does not run it"
        return None if _installed("onnxruntime") else _MISSING
    if variant.precision not in native:
        return (
            f"this CPU has no instructions for {variant.precision}"
            f" ({', '.join(cpus.NATIVE[variant.precision])})"
        )
    if _for_the_cpu(runtime) == "onnxruntime" and not _portable(variant):
        return "not for ONNX Runtime"
    return None


def _runtime_for(name: str, variant: Variant, runtime: str, host: Host) -> str:
    """Return the runtime that runs a variant; RuntimeUnavailable if `runtime` cannot."""
    if variant.runtime in ON_A_GPU:
        if runtime not in ("auto", variant.runtime):
            raise RuntimeUnavailable(
                f"{name} runs by {variant.runtime}, and {runtime} was asked for; leave"
                " DRBERT_RUNTIME out or choose another --variant."
            )
        if (reason := host.missing_requirement(variant.runtime)) is not None:
            raise RuntimeUnavailable(f"{name} cannot be run here: {reason}.")
        return variant.runtime
    if runtime in ON_A_GPU:
        raise RuntimeUnavailable(
            f"{name} is for the CPU, and {runtime} was asked for; export {runtime}-fp16 and choose"
            " that, or leave DRBERT_RUNTIME out."
        )
    if variant.runtime == "onnxruntime":
        if runtime not in ("auto", "onnxruntime"):
            raise RuntimeUnavailable(
                f"{name} runs by ONNX Runtime, and {runtime} was asked for; leave DRBERT_RUNTIME"
                " out or choose another --variant."
            )
        if not _installed("onnxruntime"):
            raise RuntimeUnavailable(f"{name} cannot be run here: {_MISSING}.")
        return "onnxruntime"
    runtime = _for_the_cpu(runtime)
    if runtime == "onnxruntime" and not _portable(variant):
        raise RuntimeUnavailable(
            f"ONNX Runtime cannot run {name}; it runs cpu-fp32. Install openvino or choose that."
        )
    if not _installed(runtime):
        raise RuntimeUnavailable(
            f"{runtime} was asked for and is not installed; pip install {runtime}."
        )
    return runtime


def _for_the_cpu(runtime: str) -> str:
    if runtime == "auto":
        return "openvino" if _installed("openvino") else "onnxruntime"
    return runtime


def _portable(variant: Variant) -> bool:
    """Return whether ONNX Runtime runs the variant on the CPU too."""
    return variant.precision == "f32" and variant.files[0].endswith(".onnx")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
