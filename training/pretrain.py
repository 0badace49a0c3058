"""
Pretrains an encoder by masked language modelling or replaced-token detection, with or without a
decoder that is thrown away later.

    python -m training.pretrain training/configs/bert-mini.toml --data DIR --out
        build/training/bert-mini
    python -m training.pretrain training/configs/drbert-mini.toml --data DIR --out
        build/training/drbert-mini
    accelerate launch --num_processes 8 -m training.pretrain CONFIG --data DIR --out DIR    #
        several GPUs, or hosts

One loop, from top to bottom. Data order, masks and the decoder's randomness are functions of
the seed and the step alone, so a run that was stopped and resumed ends with the same weights.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from atomic import atomic_directory, recover_directory
from command import BadInput, Parser, Unavailable, finish
from training.checkpoint import (
    load_progress,
    read_progress,
    save_pretrained,
    save_progress,
    write_json,
)
from training.config import Config, Optimisation, read_config
from training.corpus import Corpus, prepare
from training.masking import FATES, Fates, Ids, Masked, loss_without_context, mask_tokens
from training.model import Losses, PretrainingModel, build_model
from training.rng import dice, seed_of

HELD_OUT_SEQUENCES = 512


def pretrain(
    config: Config, data: Path, out: Path, resume: bool = False, tensorboard: bool = False
) -> None:
    """Trains as `config` says and leaves a Hugging Face checkpoint, decoder and all, in
    `out`/checkpoint.

    What `out`/log.csv holds is written for TensorBoard too, to `out`/tensorboard, if that is asked
    for. BadInput or Unavailable if the text, the folder or the loss is not usable;
    KeyboardInterrupt after SIGINT or SIGTERM, when `resume` goes on from the last step that was
    made.
    """
    run, length = config.optimisation, config.data.sequence_length
    if not resume and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; give --resume to go on with it, or another --out.")
    accelerator = accelerate()
    parts = Parts(
        run.batch_size, accelerator.num_processes, accelerator.process_index, run.accumulate
    )
    device, writes = accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():
        corpus = prepare(config.data, data, beside=out.parent)
    model = build_model(config, corpus.vocabulary).to(device)
    optimiser = build_optimiser(model, run)
    precision = choose_precision(run.precision, device)
    # What the same weights at the end depend on; a resumed run must be told the same.
    told = {
        "config": config.as_dict(),
        "corpus": corpus.directory.name,
        "precision": precision,
        "processes": accelerator.num_processes,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }

    out.mkdir(parents=True, exist_ok=True)
    saved, held_out = out / "progress", None
    step, seconds = restore(accelerator, saved, model, optimiser, told) if resume else (0, 0.0)
    trained, stepper = accelerator.prepare(model, optimiser)
    started = time.monotonic() - seconds
    model.train()
    with (
        Log(
            out / "log.csv" if writes else None,
            model.parts,
            step,
            out / "tensorboard" if tensorboard and writes else None,
        ) as log,
        signals_wait() as stop,
        tqdm(
            total=run.steps,
            initial=step,
            desc=out.name,
            unit="step",
            mininterval=2,
            disable=not writes,
        ) as bar,
    ):
        while step < run.steps:
            rate = learning_rate(step, run)
            for group in optimiser.param_groups:
                group["lr"] = rate
            masked = masked_batch(corpus, config, step)
            losses: dict[str, float] = {}
            for number, rows, last in parts:
                torch.manual_seed(seed_of(run.seed, "dropout", step, number))
                with contextlib.nullcontext() if last else accelerator.no_sync(trained):
                    with autocast(precision, device):
                        found = forward(
                            trained,
                            masked.part(rows),
                            dice(run.seed, "decoder", step, number),
                            device,
                        )
                    accelerator.backward(found["loss"] / run.accumulate)
                for name, loss in found.items():
                    losses[name] = losses.get(name, 0.0) + loss.item() / run.accumulate
            losses = mean_over_processes(accelerator, losses)
            norm = float(accelerator.clip_grad_norm_(trained.parameters(), run.clip_norm))
            for what, value in (("loss", losses["loss"]), ("gradient's norm", norm)):
                if not math.isfinite(value):
                    raise BadInput(
                        f"The {what} is {value} at step {step}; lower peak_learning_rate"
                        f" ({run.peak_learning_rate})."
                    )
            stepper.step()
            stepper.zero_grad()

            step += 1
            tokens, seconds = step * run.batch_size * length, time.monotonic() - started
            due = step % run.checkpoint_every == 0 or step == run.steps
            held_out = held_out_losses(model, corpus, config, device) if due and writes else None
            log.add(step, tokens, seconds, rate, losses, held_out["loss"] if held_out else None)
            bar.update()
            bar.set_postfix(
                loss=f"{losses['loss']:.3f}", tokens_s=f"{tokens / seconds:,.0f}", refresh=False
            )
            stopping = any_process(accelerator, stop())
            if (due or stopping) and writes:
                log.flush()
                save_progress(saved, model, optimiser, {"step": step, "seconds": seconds, **told})
            if stopping and step < run.steps:
                accelerator.wait_for_everyone()
                if writes:
                    tqdm.write(
                        f"{out} stops after step {step:,} of {run.steps:,}; --resume goes on from"
                        " there."
                    )
                raise KeyboardInterrupt

    if writes:
        final = held_out_losses(model, corpus, config, device) if held_out is None else held_out
        flops = step * step_flops(model, corpus, config, parts, device)
        with atomic_directory(out / "checkpoint") as directory:
            save_pretrained(model, config, corpus.directory, directory)
            write_json(
                directory / "training.json",
                {
                    **told,
                    "device": device_name(device),
                    "steps": step,
                    "tokens": step * run.batch_size * length,
                    "flops": flops,
                    "seconds": round(seconds, 1),
                    "training_loss_last_100": log.mean_loss(100),
                    "held_out_loss": final["loss"],
                    "held_out_parts": {part: final[part] for part in model.parts},
                    "loss_without_context": without_context(corpus, config),
                    "held_out_sequences": sum(
                        len(masked.inputs) for masked in held_out_batches(corpus, config)
                    ),
                    "sources": json.loads(
                        (corpus.directory / "sources.json").read_text(encoding="utf-8")
                    ),
                    "versions": {
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                        "python": platform.python_version(),
                    },
                },
            )
        print(
            f"{out / 'checkpoint'}: {step * run.batch_size * length:,} tokens in {seconds:,.0f} s,"
            f" held-out loss {final['loss']:.3f}"
        )
    accelerator.wait_for_everyone()


def accelerate() -> Accelerator:
    """The processes of this run; precision and accumulation are the config's, whatever the launcher
    was told.
    """
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise BadInput(
            f"{launched} processes were launched and {accelerator.num_processes} train together;"
            " without GPUs set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def restore(
    accelerator: Accelerator,
    saved: Path,
    model: PretrainingModel,
    optimiser: torch.optim.Optimizer,
    told: Mapping[str, Any],
) -> tuple[int, float]:
    """Puts the saved progress in place, if there is any: the steps made and the seconds they
    took.
    """
    if accelerator.is_main_process:
        recover_directory(saved)
    accelerator.wait_for_everyone()
    step, seconds = 0, 0.0
    if saved.exists():
        progress = read_progress(saved)
        for what, now in told.items():
            before = progress.get(what)
            if before != now:
                raise BadInput(
                    f"{saved.parent} was begun with another {what}, {difference(before, now)}; go"
                    " on with the one it was begun with, or give another --out."
                )
        load_progress(saved, model, optimiser)
        step, seconds = progress["step"], progress["seconds"]
    if any_process(accelerator, step != first_process_says(accelerator, step)):
        raise BadInput(
            f"The processes find different progress in {saved.parent}; it must be one folder,"
            " shared by all hosts."
        )
    return step, seconds


def difference(before: Any, now: Any) -> str:
    """The first thing that differs, by name where it is within tables."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        return f"{name} {difference(before.get(name), now.get(name))}"
    return f"{before!r} and not {now!r}"


class Parts:
    """Which rows of a batch this process computes, part by part; a part's number does not depend on
    who computes it.
    """

    def __init__(self, batch_size: int, processes: int, process: int, accumulate: int) -> None:
        self.count = processes * accumulate
        if batch_size % self.count:
            raise BadInput(
                f"batch_size {batch_size} is no multiple of {processes} processes × accumulate"
                f" {accumulate}."
            )
        self._rows, self._own = (
            batch_size // self.count,
            range(process * accumulate, (process + 1) * accumulate),
        )

    def __iter__(self) -> Iterator[tuple[int, slice, bool]]:
        """(number, rows, whether it is this process's last)."""
        return ((part, self.rows(part), part == self._own[-1]) for part in self._own)

    def rows(self, part: int) -> slice:
        return slice(part * self._rows, (part + 1) * self._rows)


def masked_batch(corpus: Corpus, config: Config, step: int) -> Masked:
    """The whole batch of one step, for all processes: a function of seed and step alone."""
    run = config.optimisation
    return mask(
        corpus,
        config,
        corpus.batch(step, run.batch_size, run.seed),
        np.random.default_rng([run.seed, step]),
    )


def mask(corpus: Corpus, config: Config, ids: Ids, rng: np.random.Generator) -> Masked:
    told = config.objective
    return mask_tokens(
        ids,
        told.mask_rate,
        corpus.vocabulary,
        rng,
        fates=FATES[told.name],
        whole_words=told.whole_words,
    )


def forward(
    model: nn.Module, masked: Masked, dice: torch.Generator, device: torch.device
) -> Losses:
    """The model's losses in nats, each a mean over what it predicts."""
    inputs, positions, targets = (
        torch.from_numpy(ids).to(device)
        for ids in (masked.inputs, masked.positions, masked.targets)
    )
    losses: Losses = model(inputs, positions, targets, dice)
    return losses


@torch.no_grad()
def held_out_losses(
    model: PretrainingModel, corpus: Corpus, config: Config, device: torch.device
) -> dict[str, float]:
    """The losses on unseen text, through the whole model as it is trained; the masks are the same
    at every call.
    """
    model.eval()
    found = [
        forward(model, masked, dice(7, "held out", i), device)
        for i, masked in enumerate(held_out_batches(corpus, config))
    ]
    model.train()
    return {name: sum(losses[name].item() for losses in found) / len(found) for name in found[0]}


def held_out_batches(corpus: Corpus, config: Config) -> Iterator[Masked]:
    """Some HELD_OUT_SEQUENCES unseen sequences, in parts as large as a step's."""
    size = config.optimisation.batch_size // config.optimisation.accumulate
    for i, ids in enumerate(corpus.held_out_batches(size, max(1, HELD_OUT_SEQUENCES // size))):
        yield mask(corpus, config, ids, np.random.default_rng([7, i]))


def step_flops(
    model: PretrainingModel, corpus: Corpus, config: Config, parts: Parts, device: torch.device
) -> int:
    """Floating-point operations of one step's matrix products, forward and backward, counted while
    a part of it runs.
    """
    part = masked_batch(corpus, config, 0).part(parts.rows(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(model, part, dice(0, "flops"), device)["loss"].backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return int(counter.get_total_flops()) * parts.count


def without_context(corpus: Corpus, config: Config) -> float:
    """What the held-out loss would be, by the training text's frequencies, if nothing were learned
    from words' neighbours.

    Of replaced-token detection it is the generator's loss.
    """
    # MAE-LM's encoder is not shown what stands at a predicted position.
    fates = (
        Fates(hidden=1.0, random=0.0)
        if config.decoder.design == "mae"
        else FATES[config.objective.name]
    )
    targets = np.concatenate(
        [masked.targets.ravel() for masked in held_out_batches(corpus, config)]
    )
    seen, due = (
        np.bincount(ids, minlength=len(corpus.vocabulary))[corpus.vocabulary.ordinary]
        for ids in (corpus.ids, targets)
    )
    return loss_without_context(fates, seen, due)


def mean_over_processes(accelerator: Accelerator, losses: Mapping[str, float]) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return dict(losses)
    means: Tensor = accelerator.reduce(
        torch.tensor(list(losses.values()), device=accelerator.device), "mean"
    )
    return dict(zip(losses, means.tolist(), strict=True))


def any_process(accelerator: Accelerator, yes: bool) -> bool:
    """Whether one process says yes: all of them must leave the loop after the same step."""
    if accelerator.num_processes == 1:
        return yes
    return bool(
        accelerator.reduce(torch.tensor(float(yes), device=accelerator.device), "sum").item()
    )


def first_process_says(accelerator: Accelerator, step: int) -> int:
    return (
        step
        if accelerator.num_processes == 1
        else int(broadcast(torch.tensor(step, device=accelerator.device)).item())
    )


@contextlib.contextmanager
def signals_wait() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM wait for the end of a step; what is yielded says whether one came.

    One that comes seconds after the first does not wait: a launcher repeats a signal at once, a
    person later.
    """
    came: list[float] = []

    def remember(_: int, __: object) -> None:
        if came and time.monotonic() - came[0] > 3:
            raise KeyboardInterrupt
        came.append(time.monotonic())

    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python hears signals in its main thread only.
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def learning_rate(step: int, run: Optimisation) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < run.warmup_steps:
        return run.peak_learning_rate * (step + 1) / run.warmup_steps
    return run.peak_learning_rate * (run.steps - step) / max(1, run.steps - run.warmup_steps)


def build_optimiser(model: nn.Module, run: Optimisation) -> torch.optim.AdamW:
    """AdamW with decoupled decay of matrices, eps as in BERT's, ELECTRA's and RoBERTa's
    releases.
    """
    return torch.optim.AdamW(
        parameter_groups(model, run.weight_decay),
        lr=run.peak_learning_rate,
        betas=(0.9, run.beta2),
        eps=1e-6,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and LayerNorms do not, as in BERT."""
    matrices = {
        id(p) for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("bias")
    }
    return [
        {
            "params": [p for p in model.parameters() if id(p) in matrices],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in model.parameters() if id(p) not in matrices], "weight_decay": 0.0},
    ]


def choose_precision(asked: str, device: torch.device) -> str:
    """bf16 where `auto` finds it native: where it is emulated, it is slower than fp32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return (
        "bf16"
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        else "fp32"
    )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else processor_name()


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


class Log:
    """log.csv: a row a step; rows of steps that a resumed run repeats are dropped first. Without a
    path it only remembers.

    With a `board`, a folder, TensorBoard is told the same.
    """

    def __init__(
        self, path: Path | None, parts: Sequence[str], keep_before: int, board: Path | None = None
    ) -> None:
        self._board = None if board is None else open_board(board, keep_before)
        header, kept = (
            ["step", "tokens", "seconds", "learning_rate", "loss", "held_out_loss", *parts],
            [],
        )
        if path is not None and keep_before and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # A process that was killed may have left half a row, always beyond the step that is
                # resumed.
                kept = [
                    row
                    for row in list(csv.reader(file))[1:]
                    if len(row) == len(header) and int(row[0]) <= keep_before
                ]
        self._parts, self._losses = parts, [float(row[4]) for row in kept]
        self._file = open(os.devnull if path is None else path, "w", newline="", encoding="utf-8")  # noqa: SIM115 -- closed by __exit__
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerows([header, *kept])
        self.flush()

    def add(
        self,
        step: int,
        tokens: int,
        seconds: float,
        rate: float,
        losses: Mapping[str, float],
        held_out: float | None,
    ) -> None:
        self._losses.append(losses["loss"])
        self._rows.writerow(
            [
                step,
                tokens,
                f"{seconds:.2f}",
                f"{rate:.3e}",
                f"{losses['loss']:.5f}",
                "" if held_out is None else f"{held_out:.5f}",
                *(f"{losses[part]:.5f}" for part in self._parts),
            ]
        )
        if self._board is not None:
            for name, value in {
                "learning_rate": rate,
                **losses,
                **({} if held_out is None else {"held_out_loss": held_out}),
            }.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        self._file.flush()

    def mean_loss(self, last: int) -> float:
        recent = self._losses[-last:]
        return sum(recent) / len(recent)


def open_board(folder: Path, keep_before: int) -> Any:
    """TensorBoard's writer, which hides what it wrote of later steps; Unavailable without the
    package.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unavailable(
            "--tensorboard needs TensorBoard: pip install 'drbert-serve[tensorboard]'."
        ) from None
    return SummaryWriter(str(folder), purge_step=keep_before + 1)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m training.pretrain",
        description="Pretrain an encoder, with or without a decoder.",
    )
    parser.add_argument("config", type=Path, help="a TOML file, see training/configs")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that the config's text is below"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where the run's log, progress and checkpoint go"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where the run in --out stopped"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write the log for TensorBoard too, to tensorboard in --out",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    pretrain(read_config(given.config), given.data, given.out, given.resume, given.tensorboard)
    return 0


def run() -> None:
    """The console script drbert-pretrain."""
    finish(main)


if __name__ == "__main__":
    run()
