"""
How fast is pretraining by the processor's peak, and what does each decoder design add to a step?

    python -m benchmarks training --data DIR --out benchmarks/training.md

The matrix products of a step, forward and backward, are recorded while it runs and then run again
alone, with the same shapes and strides. Their time by that of the whole step is the share of the
peak. Every round measures every design once, so that noise meets all of them; the table has the
ratios within a round.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import pages
from command import Parser
from training.config import Config, read_config
from training.corpus import Corpus, prepare
from training.model import build_model
from training.pretrain import autocast, build_optimiser, choose_precision, forward, masked_batch
from training.rng import make_rng

CONFIGS = (
    "bert-mini",
    "plain-mini",
    "gua-mini",
    "mix-mini",
    "drbert-mini",
    "emd-mini",
    "mae-mini",
    "electra-mini",
    "convbert-mini",
)
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
CPU = torch.device("cpu")


class RecordProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records every matrix product within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., Tensor], list[Tensor]]] = []
        """Each product with random operands of the recorded shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in PRODUCTS:
            self.calls.append(
                (func, [_random_like(value) for value in args if isinstance(value, Tensor)])
            )
        return func(*args, **(kwargs or {}))


def _random_like(tensor: Tensor) -> Tensor:
    """Return random numbers in a tensor's shape, strides and precision."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).normal_(0, 0.02)


@dataclass
class Run:
    """A pretraining config, ready to be stepped."""

    name: str
    config: Config
    corpus: Corpus
    precision: str

    def __post_init__(self) -> None:
        self.model = build_model(self.config, self.corpus.vocabulary)
        self.optimiser = build_optimiser(self.model, self.config.optimisation)
        self.number = 0
        # Attention's products are visible only in its plain form.
        with RecordProducts() as products, sdpa_kernel(SDPBackend.MATH):
            self._backward()
        self.products = products.calls
        self.optimiser.zero_grad()

    def _backward(self) -> None:
        masked = masked_batch(self.corpus, self.config, self.number)
        with autocast(self.precision, CPU):
            forward(self.model, masked, make_rng(0, "benchmark", self.number), CPU)[
                "loss"
            ].backward()  # type: ignore[no-untyped-call]

    def step(self) -> tuple[float, float]:
        """Run one training step; return its seconds and those it spent on data."""
        began = time.perf_counter()
        masked = masked_batch(self.corpus, self.config, self.number)
        loaded = time.perf_counter()
        with autocast(self.precision, CPU):
            losses = forward(self.model, masked, make_rng(0, "benchmark", self.number), CPU)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimisation.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        losses["loss"].item()
        self.number += 1
        return time.perf_counter() - began, loaded - began

    @torch.no_grad()
    def multiply(self) -> float:
        """Run the step's matrix products alone; return their seconds."""
        began = time.perf_counter()
        for func, operands in self.products:
            func(*operands)
        return time.perf_counter() - began


def main(arguments: Sequence[str]) -> int:
    """Measure the steps of all configs and print the table."""
    parser = Parser(
        prog="python -m benchmarks training",
        description=(
            "Measure pretraining steps by their matrix products, and designs by no decoder."
        ),
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder below which the configs' text lies"
    )
    parser.add_argument(
        "--configs",
        nargs="+",
        default=CONFIGS,
        help="names in training/configs, the reference first",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = [prepare_run(name, options.data, Path(folder)) for name in options.configs]
        rows = measure(runs, options.rounds)
    text = table(runs, rows)
    print(text)
    if options.out is not None:
        # The page must not name private paths.
        words = ["DATA" if word == str(options.data) else word for word in arguments]
        command = shlex.join(["python", "-m", "benchmarks", "training", *words])
        pages.write(options.out, "Pretraining steps", command, text)
    return 0


def prepare_run(name: str, data: Path, corpus_folder: Path) -> Run:
    """Return the run of a config; its corpus is prepared in `corpus_folder`."""
    config = read_config(Path("training/configs") / f"{name}.toml")
    return Run(
        name,
        config,
        prepare(config.data, data, corpus_folder),
        choose_precision(config.optimisation.precision, CPU),
    )


def measure(runs: Sequence[Run], rounds: int) -> np.ndarray:
    """Return (rounds, runs, 3) seconds: of a step, of its data, of its matrix products alone.

    The first round, in which caches fill, is dropped.
    """
    rows = np.zeros((rounds + 1, len(runs), 3))
    for number in range(rounds + 1):
        # Every other round backwards, so that drift within a round favours no config.
        for i in range(len(runs))[:: 1 if number % 2 else -1]:
            rows[number, i, :2], rows[number, i, 2] = runs[i].step(), runs[i].multiply()
    return rows[1:]


def table(runs: Sequence[Run], rows: np.ndarray) -> str:
    """Return the Markdown table of what `measure` returned."""
    lines = [
        (
            f"One step of every config a round, {len(rows)} rounds, {torch.get_num_threads()}"
            f" thread(s), {runs[0].precision}. Medians; in brackets the quartiles of the rounds'"
            " ratios."
        ),
        "",
        (
            f"| config | step, ms | tokens/s | by {runs[0].name}'s step | matrix products alone, by"
            " the step | data, by the step |"
        ),
        "|---|--:|--:|--:|--:|--:|",
    ]
    for i, run in enumerate(runs):
        step, data, products = rows[:, i].T
        tokens = run.config.optimisation.batch_size * run.config.data.sequence_length
        lines.append(
            f"| {run.name} | {np.median(step) * 1000:.0f} | {tokens / np.median(step):,.0f} |"
            f" {_ratio(step / rows[:, 0, 0])} | {_ratio(products / step)} |"
            f" {np.median(data / step):.2%} |"
        )
    return "\n".join(lines)


def _ratio(values: np.ndarray) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
