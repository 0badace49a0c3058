"""
The service on an NVIDIA GPU, in stages that can run alone.

All stages together are planned for nine minutes on a GPU of the H100's class; they have not yet run
on one.

    python -m benchmarks gpu --out benchmarks/GPU.md           all stages, where everything is
                                                               installed
    python -m benchmarks gpu --stages engine,offline           some of them
    python -m benchmarks gpu --calibrate h100.json             measure the grid of shapes for
                                                               DRBERT_GPU_TABLE=h100.json
    python -m benchmarks gpu --pack build/gpu                  on a machine without a GPU: write
                                                               weightless models (under 1 MB)
    python -m benchmarks gpu --models build/gpu --out GPU.md   on a GPU without a network: use them
    python -m benchmarks gpu --dry-run                         everything but the GPU: a tiny model
                                                               on the CPU's provider

Weights are random, because the time does not depend on them.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import engine, gpu_setup, serving, torch_side, twins
from benchmarks.gpu.gpu_setup import GpuSetup
from benchmarks.harness.findings import Findings, Table, markdown, read, write
from benchmarks.harness.texts import TEXTS, read_texts
from command import BadUsage, CommandError, Parser, Unavailable
from service.host import gpus

STAGES: dict[str, Callable[[GpuSetup], Findings]] = {
    "providers": engine.providers,
    "engine": engine.latency,
    "offline": engine.offline,
    "torch": torch_side.measure,
    "serving": serving.measure,
    "twins": twins.measure,
}


def main(arguments: Sequence[str]) -> int:
    """Run the chosen stages; raise Unavailable if one could not be measured."""
    options = _parser().parse_args(arguments)
    size = "tiny" if options.dry_run else "base"
    stages = options.stages.split(",")
    for name in stages:
        if name not in STAGES:
            raise BadUsage(f"Unknown stage {name!r}; known are {', '.join(STAGES)}.")
    if options.pack is not None:
        gpu_setup.pack(options.pack, size)
        return 0
    if not options.dry_run and not gpus.visible():
        raise Unavailable(
            f"python -m benchmarks gpu needs an NVIDIA GPU: {gpus.unavailable_reason()}. Prepare"
            " a run elsewhere with --pack, or try the stages on the CPU with --dry-run."
        )
    with tempfile.TemporaryDirectory() as folder:
        setup = gpu_setup.build(
            Path(folder),
            options.models,
            size,
            read_texts(options.texts, 2000),
            options.dry_run,
            None if options.out is None else options.out.parent / "gpu-evidence",
        )
        if options.calibrate is not None:
            print(markdown(engine.calibrate(setup, options.calibrate)))
            return 0
        stored: dict[str, Findings] = {}
        if options.resume and options.out is not None:
            for findings in read(options.out):
                if findings.name in STAGES and findings.tables:
                    stored[findings.name] = findings
        command = shlex.join(["python", "-m", "benchmarks", "gpu", *arguments])
        return _run(stages, setup, options.out, stored, command)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks gpu", description="Measure the service on an NVIDIA GPU."
    )
    parser.add_argument(
        "--stages",
        default=",".join(STAGES),
        help="comma-separated stages to run (default: %(default)s)",
    )
    parser.add_argument(
        "--models",
        type=Path,
        help="folder with the weightless models of --pack; without it, models are exported here",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="DIR",
        help="write weightless models for a machine without a network, and measure nothing",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure the grid of shapes for DRBERT_GPU_TABLE, and nothing else",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="file with the texts to send, one per line (default: bundled texts)",
    )
    parser.add_argument(
        "--out", type=Path, help="write a Markdown page and its numbers as JSON, after each stage"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the stages that --out already has and measure the rest",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="run a tiny model on the CPU: shows that the stages work, without figures of a GPU",
    )
    # The option's old name.
    parser.add_argument("--rehearse", dest="dry_run", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run(
    stages: Sequence[str],
    setup: GpuSetup,
    out: Path | None,
    stored: dict[str, Findings],
    command: str,
) -> int:
    """Run the stages that are not stored yet, and write the page after each."""
    results, failed = dict(stored), []
    for name in stages:
        try:
            if name not in results:
                results[name] = STAGES[name](setup)
        except CommandError as error:
            failed.append(name)
            results[name] = Findings(name, f"Not measured: {error}", [])
        except Exception as error:
            # Time on a GPU is expensive: a failure in one stage must not cost the others.
            traceback.print_exc()
            failed.append(name)
            results[name] = Findings(name, f"Not measured: {type(error).__name__}: {error}", [])
        print(markdown(results[name]), flush=True)
        if out is not None:
            ordered = [results[stage] for stage in STAGES if stage in results]
            write(out, command, [_describe(setup), *ordered])
    if failed:
        raise Unavailable(f"Not measured: {', '.join(failed)}; the page says why.")
    return 0


def _describe(setup: GpuSetup) -> Findings:
    """Return the head of the page: the GPUs, the model and the versions."""
    rows = [
        [gpu.name, gpu.compute_capability, f"{gpu.memory_bytes / 2**30:.0f} GiB"]
        for gpu in gpus.visible()
    ]
    summary = (
        "A dry run on the CPU with a tiny model: no figures of a GPU."
        if setup.dry_run
        else f"{setup.size}: random weights, cuda-fp16."
    )
    columns = ("GPU", "compute capability", "memory")
    versions = setup.versions()
    return Findings(
        "where", summary, [Table("", columns, rows, versions)], (), {"versions": versions}
    )
