"""
Chooses what to run: by what the artifact holds, what passed its gate, and what this host can do.

Asked for by name, a variant or runtime is in use or it is an error; only `auto` looks further, and
says what it passed over. Where there is a GPU and a variant for it, `auto` never ends on the CPU
because something is missing: that is an error too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service.artifact import Artifact, Rest, Variant
from service.host import cpus, gpus
from service.runtimes import Runtime, RuntimeUnavailable
from service.runtimes.cuda import AS_IT_COMES, GpuOptions
from service.runtimes.onnxruntime import lacks

# Fastest first.
PREFERENCE = ("tensorrt-fp16", "cuda-fp16", "cpu-int8", "cpu-bf16", "cpu-fp32")
ON_A_GPU = ("tensorrt", "cuda")
LAST_ON_A_GPU = "cuda-fp16"


@dataclass(frozen=True)
class Choice:
    variant: str
    runtime: str
    why: str


@dataclass(frozen=True)
class Host:
    """What this host can do."""

    cpuinfo: Path = Path("/proc/cpuinfo")
    lacks: Callable[[str], str | None] = lacks
    """What is missing to run models by "cuda" or "tensorrt"; None if they can be."""
    has_gpu: bool = field(default_factory=lambda: bool(gpus.visible()))


def choose(
    artifact: Artifact,
    variant: str = "auto",
    runtime: str = "auto",
    host: Host | None = None,
    rejected: Mapping[str, str] = {},
) -> Choice:
    """The variant and runtime to use and the reason; RuntimeUnavailable if there is none.

    `auto` also passes over the variants in `rejected`, each with the reason that it was tried and
    rejected for.
    """
    variants, host = artifact.manifest.variants, host or Host()
    if variant != "auto":
        if variant not in variants:
            raise RuntimeUnavailable(
                f"{artifact.directory} holds no variant {variant!r}; it holds"
                f" {', '.join(variants)}."
            )
        return Choice(
            variant, _runtime_for(variant, variants[variant], runtime, host), "asked for by name"
        )
    passed_over: list[str] = []
    native = cpus.native_precisions(host.cpuinfo)
    for candidate in PREFERENCE:
        if candidate not in variants:
            continue
        reason = rejected.get(candidate) or _against(
            candidate, variants[candidate], runtime, native, host
        )
        if reason is None:
            on = "this CPU" if candidate.startswith("cpu") else "this GPU"
            why = (
                f"the fastest {on} can run; passed over {'; '.join(passed_over)}"
                if passed_over
                else "the fastest held"
            )
            return Choice(
                candidate, _runtime_for(candidate, variants[candidate], runtime, host), why
            )
        passed_over.append(f"{candidate}: {reason}")
        if (
            candidate == LAST_ON_A_GPU
            and host.has_gpu
            and runtime == "auto"
            and variants[candidate].gate.status == "passed"
        ):
            raise RuntimeUnavailable(
                f"There is a GPU, and {candidate} cannot be run: {reason}. To run on the CPU all"
                " the same, say so: --variant cpu-fp32."
            )
    if runtime in ON_A_GPU and not any(held.runtime == runtime for held in variants.values()):
        raise RuntimeUnavailable(
            f"{artifact.directory} holds nothing for {runtime}, only {', '.join(variants)}; "
            f"export it with --variants cpu-fp32,{runtime}-fp16, or leave DRBERT_RUNTIME out."
        )
    raise RuntimeUnavailable(
        f"{artifact.directory} holds nothing that this host can"
        f" run{'' if runtime == 'auto' else f' by {runtime}'}"
        f" ({'; '.join(passed_over) or 'its variants are ' + ', '.join(variants)})."
    )


def load(
    artifact: Artifact,
    choice: Choice,
    threads: int,
    gpu: GpuOptions = AS_IT_COMES,
    rest: Rest | None = None,
) -> Runtime:
    """The runtime of that choice; RuntimeUnavailable if it would be anything else.

    `rest` is the lowest precision for what an int8 graph does not quantise, by default that in
    which the variant was verified.
    """
    manifest = artifact.manifest
    variant = manifest.variants[choice.variant]
    model = artifact.path(variant.files[0])
    if choice.runtime == "openvino":
        from service.runtimes.openvino import OpenVinoRuntime
        from service.runtimes.packed import FAMILIES

        packs = manifest.padding_safe and manifest.family in FAMILIES
        return OpenVinoRuntime(
            model, variant.precision, threads, rest or variant.lowest_rest, packs
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


def _against(name: str, variant: Variant, runtime: str, native: set[str], host: Host) -> str | None:
    """Why `auto` does not take a variant; None if it does."""
    if not variant.gate.is_open:
        return variant.gate.reason
    if variant.runtime in ON_A_GPU:
        return (
            f"{runtime} was asked for"
            if runtime not in ("auto", variant.runtime)
            else host.lacks(variant.runtime)
        )
    if runtime in ON_A_GPU:
        return f"{runtime} was asked for"
    if variant.precision not in native:
        return (
            f"this CPU has no instructions for {variant.precision}"
            f" ({', '.join(cpus.NATIVE[variant.precision])})"
        )
    if _for_the_cpu(runtime) == "onnxruntime" and not _portable(variant):
        return "not for ONNX Runtime"
    return None


def _runtime_for(name: str, variant: Variant, runtime: str, host: Host) -> str:
    if variant.runtime in ON_A_GPU:
        if runtime not in ("auto", variant.runtime):
            raise RuntimeUnavailable(
                f"{name} runs by {variant.runtime}, and {runtime} was asked for; leave"
                " DRBERT_RUNTIME out or choose another --variant."
            )
        if (reason := host.lacks(variant.runtime)) is not None:
            raise RuntimeUnavailable(f"{name} cannot be run here: {reason}.")
        return variant.runtime
    if runtime in ON_A_GPU:
        raise RuntimeUnavailable(
            f"{name} is for the CPU, and {runtime} was asked for; export {runtime}-fp16 and choose"
            " that, or leave DRBERT_RUNTIME out."
        )
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
    return variant.precision == "f32" and variant.files[0].endswith(".onnx")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
