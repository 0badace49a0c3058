"""
The service on an NVIDIA GPU, in stages that run alone; meant for nine minutes on one of H100's
class, and not yet run on any.

    python -m benchmarks gpu --out benchmarks/GPU.md                 all stages, where everything is
                                                                     installed
    python -m benchmarks gpu --stages engine,offline                 some
    python -m benchmarks gpu --calibrate h100.json                   measures the grid of shapes;
                                                                     DRBERT_GPU_SHAPES_FILE=h100.json
    python -m benchmarks gpu --pack build/gpu                        on a machine without a GPU:
                                                                     what another one without a
    python -m benchmarks gpu --models build/gpu --out GPU.md         network needs (under 1 MB), and
                                                                     what is run there
    python -m benchmarks gpu --rehearse                              everything but the GPU: a tiny
                                                                     model on the CPU's provider

Weights are random: time depends on none of them.
"""

from __future__ import annotations

import shlex
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.gpu import engine, rig, serving, torch_side, twins
from benchmarks.gpu.rig import Rig
from benchmarks.harness.findings import Findings, Table, markdown, read, write
from benchmarks.harness.texts import TEXTS, read_lines
from command import BadUsage, CommandError, Parser, Unavailable
from service.host import gpus

STAGES: dict[str, Callable[[Rig], Findings]] = {
    "providers": engine.providers,
    "engine": engine.latency,
    "offline": engine.offline,
    "torch": torch_side.measure,
    "serving": serving.measure,
    "twins": twins.measure,
}


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m benchmarks gpu", description="Measure the service on an NVIDIA GPU."
    )
    parser.add_argument(
        "--stages",
        default=",".join(STAGES),
        help="some of them, commas in between (default: %(default)s)",
    )
    parser.add_argument(
        "--models", type=Path, help="skeletons that --pack made; without, models are exported here"
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="DIR",
        help="make skeletons for a machine without a network, and measure nothing",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="measure the grid of shapes for DRBERT_GPU_SHAPES_FILE, and nothing else",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=TEXTS,
        help="texts to send, one a line (default: some that come along)",
    )
    parser.add_argument(
        "--out", type=Path, help="write a Markdown page and its numbers as JSON, after each stage"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out holds already and measure the rest"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run on the CPU with a tiny model: shows that the stages work, and no figure of a GPU",
    )
    given = parser.parse_args(arguments)
    size = "tiny" if given.rehearse else "base"
    stages = given.stages.split(",")
    for name in stages:
        if name not in STAGES:
            raise BadUsage(f"Unknown stage {name!r}; known are {', '.join(STAGES)}.")
    if given.pack is not None:
        rig.pack(given.pack, size)
        return 0
    if not given.rehearse and not gpus.visible():
        raise Unavailable(
            f"python -m benchmarks gpu needs an NVIDIA GPU: {gpus.why_none()}. --pack prepares a"
            " run elsewhere, --rehearse shows the stages on the CPU."
        )
    with tempfile.TemporaryDirectory() as folder:
        texts = read_lines(given.texts, 2000)
        made = rig.build(
            Path(folder),
            given.models,
            size,
            texts,
            given.rehearse,
            None if given.out is None else given.out.parent / "gpu-evidence",
        )
        if given.calibrate is not None:
            print(markdown(engine.calibrate(made, given.calibrate)))
            return 0
        done = (
            {one.name: one for one in read(given.out) if one.name in STAGES and one.tables}
            if given.resume and given.out is not None
            else {}
        )
        return _run(
            stages,
            made,
            given.out,
            done,
            shlex.join(["python", "-m", "benchmarks", "gpu", *arguments]),
        )


def _run(
    stages: Sequence[str], made: Rig, out: Path | None, done: dict[str, Findings], command: str
) -> int:
    found, failed = dict(done), []
    for name in stages:
        try:
            if name not in found:
                found[name] = STAGES[name](made)
        except CommandError as error:
            failed.append(name)
            found[name] = Findings(name, f"Not measured: {error}", [])
        except Exception as error:
            # Time on a GPU is dear: what one stage stumbles over must not cost the others.
            traceback.print_exc()
            failed.append(name)
            found[name] = Findings(name, f"Not measured: {type(error).__name__}: {error}", [])
        print(markdown(found[name]), flush=True)
        if out is not None:
            write(out, command, [_where(made), *(found[name] for name in STAGES if name in found)])
    if failed:
        raise Unavailable(f"Not measured: {', '.join(failed)}; the page says why.")
    return 0


def _where(made: Rig) -> Findings:
    """The GPU, for the page's head."""
    rows = [
        [gpu.name, gpu.compute_capability, f"{gpu.memory_bytes / 2**30:.0f} GiB"]
        for gpu in gpus.visible()
    ]
    what = (
        "A rehearsal on the CPU, with a tiny model: no figure of a GPU."
        if made.rehearsal
        else f"{made.size}: random weights, cuda-fp16."
    )
    return Findings(
        "where",
        what,
        [Table("", ("GPU", "compute capability", "memory"), rows, made.versions())],
        (),
        {"versions": made.versions()},
    )
