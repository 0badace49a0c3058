"""
Chooses what to run: by what the artifact holds, what passed its gate, and what this host can do.

Asked for by name, a variant or runtime is in use or it is an error; only `auto` looks further.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from service import cpus
from service.artifact import Artifact
from service.runtimes import Runtime, RuntimeUnavailable

# Fastest first, among those for the CPU.
PREFERENCE = ("cpu-int8", "cpu-bf16", "cpu-fp32")


@dataclass(frozen=True)
class Choice:
    variant: str
    runtime: str
    why: str


def choose(artifact: Artifact, variant: str = "auto", runtime: str = "auto", cpuinfo: Path = Path("/proc/cpuinfo")) -> Choice:
    """The variant and runtime to use and the reason; RuntimeUnavailable if there is none."""
    variants = artifact.manifest.variants
    if variant != "auto":
        if variant not in variants:
            raise RuntimeUnavailable(
                f"{artifact.directory} holds no variant {variant!r}; it holds {', '.join(variants)}."
            )
        return Choice(variant, _runtime_for(artifact, variant, runtime), "asked for by name")
    reasons, native = [], cpus.native_precisions(cpuinfo)
    if runtime == "auto" and not _installed("openvino"):
        runtime = "onnxruntime"
    for candidate in PREFERENCE:
        if candidate not in variants:
            continue
        gate, precision = variants[candidate].gate, variants[candidate].precision
        if gate.status != "passed":
            reasons.append(f"{candidate}: {gate.reason}")
        elif precision not in native:
            reasons.append(f"{candidate}: this CPU has no instructions for {precision} ({', '.join(cpus.NATIVE[precision])})")
        elif runtime == "onnxruntime" and not _portable(artifact, candidate):
            reasons.append(f"{candidate}: not for ONNX Runtime")
        else:
            why = f"the fastest this CPU can run; passed over {'; '.join(reasons)}" if reasons else "the fastest held"
            return Choice(candidate, _runtime_for(artifact, candidate, runtime), why)
    raise RuntimeUnavailable(f"{artifact.directory} holds nothing this host can run ({'; '.join(reasons)}).")


def load(artifact: Artifact, choice: Choice, threads: int) -> Runtime:
    variant = artifact.manifest.variants[choice.variant]
    model = artifact.path(variant.files[0])
    if choice.runtime == "openvino":
        from service.runtimes.openvino import OpenVinoRuntime

        return OpenVinoRuntime(model, variant.precision, threads)
    from service.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(model, variant.precision, threads)


def _runtime_for(artifact: Artifact, variant: str, runtime: str) -> str:
    if runtime == "auto":
        if _installed("openvino"):
            return "openvino"
        runtime = "onnxruntime"
    if runtime == "onnxruntime" and not _portable(artifact, variant):
        raise RuntimeUnavailable(f"ONNX Runtime cannot run {variant}; it runs cpu-fp32. Install openvino or choose that.")
    if not _installed(runtime):
        raise RuntimeUnavailable(f"{runtime} was asked for and is not installed; pip install {runtime}.")
    return runtime


def _portable(artifact: Artifact, variant: str) -> bool:
    held = artifact.manifest.variants[variant]
    return held.precision == "f32" and held.files[0].endswith(".onnx")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
