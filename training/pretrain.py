"""
Pretrains an encoder by masked language modelling or replaced-token detection, with or without a
pretraining decoder.

    drbert-pretrain training/configs/bert-mini.toml --data DIR \\
        --out build/training/bert-mini
    drbert-pretrain training/configs/drbert-mini.toml --data DIR \\
        --out build/training/drbert-mini
    accelerate launch --num_processes 8 -m training.pretrain CONFIG --data DIR --out DIR

The last form trains on several GPUs or hosts. Data order, masks and the decoder's random numbers
are functions of the seed and the step alone, so a run that was stopped and resumed ends with the
same weights.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from atomic import atomic_directory, recover_directory
from command import BadInput, Parser, Unavailable, finish, how_to_install
from training.checkpoint import (
    WeightSum,
    library_versions,
    load_progress,
    read_progress,
    save_pretrained,
    save_progress,
    write_json,
)
from training.config import Config, Optimisation, read_config, with_defaults
from training.corpus import Corpus, prepare
from training.losses import Losses
from training.masking import (
    MASKING_SPLITS,
    Ids,
    MaskedBatch,
    MaskingSplit,
    loss_without_context,
    mask_tokens,
)
from training.model import PretrainingModel, build_model
from training.rng import derive_seed, make_rng

HELD_OUT_SEQUENCES = 512
"""Number of sequences that the held-out loss is measured on."""


@dataclass(frozen=True)
class FirstStep:
    """Digests of what a run begins with; runs of a pair begin with the same."""

    weights: str
    """SHA-256 of the encoder's first weights, without a decoder or an output layer."""
    batch: str
    """SHA-256 of the first step's ids, positions and targets."""

    @classmethod
    def of(cls, model: PretrainingModel, batch: MaskedBatch) -> FirstStep:
        """Return the digests of a model that is not yet trained, and of its first batch."""
        weights, masked = hashlib.sha256(), hashlib.sha256()
        for name, weight in model.encoder.state_dict().items():
            weights.update(name.encode())
            weights.update(weight.detach().cpu().contiguous().numpy().tobytes())
        for ids in (batch.inputs, batch.positions, batch.targets):
            masked.update(np.ascontiguousarray(ids).tobytes())
        return cls(weights.hexdigest(), masked.hexdigest())


@dataclass(frozen=True)
class Run:
    """What one process of a pretraining run works with."""

    config: Config
    corpus: Corpus
    accelerator: Accelerator
    model: PretrainingModel
    optimiser: torch.optim.AdamW
    precision: str
    """Precision of the matrix products: bf16 or fp32."""
    micro_batches: MicroBatches
    """The rows of each batch that this process computes."""
    first_step: FirstStep
    """What the run begins with."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.accelerator.device  # type: ignore[no-any-return]

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log, the progress and the checkpoint."""
        return bool(self.accelerator.is_main_process)

    def tokens(self, steps: int) -> int:
        """Return the number of tokens that all processes train on in so many steps."""
        return steps * self.config.optimisation.batch_size * self.config.data.sequence_length

    def fingerprint(self) -> dict[str, Any]:
        """Return what the final weights depend on; a run resumes only with the same fingerprint."""
        return {
            "config": self.config.as_dict(),
            "corpus": self.corpus.directory.name,
            "precision": self.precision,
            "processes": self.accelerator.num_processes,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def pretrain(
    config: Config, data: Path, out: Path, resume: bool = False, tensorboard: bool = False
) -> None:
    """Train a model as `config` describes and write a Hugging Face checkpoint to `out`/checkpoint.

    The checkpoint includes the decoder. `out`/log.csv has a row a step; with `tensorboard`,
    `out`/tensorboard has the same. Raises BadInput or Unavailable if the text, the folder or the
    loss is not usable. Raises KeyboardInterrupt after SIGINT or SIGTERM; `resume` then continues
    from the last step.
    """
    if not resume and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; give --resume to continue it, or another --out.")
    run = set_up(config, data, corpora=out.parent)
    settings, accelerator, model, optimiser = (
        config.optimisation,
        run.accelerator,
        run.model,
        run.optimiser,
    )
    fingerprint = run.fingerprint()
    progress = out / "progress"
    out.mkdir(parents=True, exist_ok=True)
    step, seconds = restore(run, progress, fingerprint) if resume else (0, 0.0)
    weights = WeightSum.load(progress) if step else WeightSum()
    trained, stepper = accelerator.prepare(model, optimiser)
    started = time.monotonic() - seconds
    held_out: dict[str, float] | None = None
    model.train()
    with (
        open_log(run, out, step, tensorboard) as log,
        defer_signals() as stop_requested,
        progress_bar(run, out.name, step) as bar,
    ):
        while step < settings.steps:
            rate = learning_rate(step, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate

            # Forward and backward by micro-batch; processes exchange gradients in the last one.
            batch = masked_batch(run.corpus, config, step)
            losses: dict[str, float] = {}
            for number, rows, is_last in run.micro_batches:
                torch.manual_seed(derive_seed(settings.seed, "dropout", step, number))
                rng = make_rng(settings.seed, "decoder", step, number)
                with contextlib.nullcontext() if is_last else accelerator.no_sync(trained):
                    with autocast(run.precision, run.device):
                        part_losses = forward(trained, batch.part(rows), rng, run.device)
                    accelerator.backward(part_losses["loss"] / settings.accumulate)
                for name, loss in part_losses.items():
                    losses[name] = losses.get(name, 0.0) + loss.item() / settings.accumulate
            losses = mean_over_processes(accelerator, losses)
            norm = float(accelerator.clip_grad_norm_(trained.parameters(), settings.clip_norm))
            check_finite({"loss": losses["loss"], "gradient's norm": norm}, step, settings)
            stepper.step()
            stepper.zero_grad()

            # Evaluate, log and save.
            step += 1
            seconds = time.monotonic() - started
            is_checkpoint = step % settings.checkpoint_every == 0 or step == settings.steps
            held_out = held_out_losses(run) if is_checkpoint and run.is_main else None
            later_saves = math.ceil((settings.steps - step) / settings.checkpoint_every)
            if is_checkpoint and run.is_main and 1 < settings.average > later_saves:
                weights.add(model)
            log.add(step, run.tokens(step), seconds, rate, losses, held_out)
            bar.update()
            tokens_per_second = run.tokens(step) / seconds
            bar.set_postfix(
                loss=f"{losses['loss']:.3f}", tokens_s=f"{tokens_per_second:,.0f}", refresh=False
            )
            stopping = any_process(accelerator, stop_requested())
            if (is_checkpoint or stopping) and run.is_main:
                log.flush()
                state = {"step": step, "seconds": seconds, **fingerprint}
                save_progress(progress, model, optimiser, weights, state)
            if stopping and step < settings.steps:
                accelerator.wait_for_everyone()
                if run.is_main:
                    tqdm.write(
                        f"{out}: stopped after step {step:,} of {settings.steps:,}; --resume"
                        " continues from there."
                    )
                raise KeyboardInterrupt

    if run.is_main:
        if settings.average > 1:
            weights.load_mean(model)
            held_out = None
        # A run that is resumed after its last step has not measured it either.
        final = held_out_losses(run) if held_out is None else held_out
        summary = {**fingerprint, **summarise(run, step, seconds, log.mean_loss(100), final)}
        write_checkpoint(out / "checkpoint", run, summary)
        print(
            f"{out / 'checkpoint'}: {run.tokens(step):,} tokens in {seconds:,.0f} s,"
            f" held-out loss {final['loss']:.3f}"
        )
    accelerator.wait_for_everyone()


def set_up(config: Config, data: Path, corpora: Path) -> Run:
    """Return the run of this process, with new weights; its corpus is in the folder `corpora`."""
    accelerator = start_accelerator()
    micro_batches = MicroBatches(
        config.optimisation.batch_size,
        accelerator.num_processes,
        accelerator.process_index,
        config.optimisation.accumulate,
    )
    with accelerator.main_process_first():
        corpus = prepare(config.data, data, corpora)
    model = build_model(config, corpus.vocabulary)
    first_step = FirstStep.of(model, masked_batch(corpus, config, 0))
    model = model.to(accelerator.device)
    return Run(
        first_step=first_step,
        config=config,
        corpus=corpus,
        accelerator=accelerator,
        model=model,
        optimiser=build_optimiser(model, config.optimisation),
        precision=choose_precision(config.optimisation.precision, accelerator.device),
        micro_batches=micro_batches,
    )


def start_accelerator() -> Accelerator:
    """Join the processes of this run.

    Precision and accumulation are the config's, whatever the launcher's options say.
    """
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise BadInput(
            f"{launched} processes were launched and {accelerator.num_processes} train together;"
            " without GPUs set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def restore(run: Run, progress: Path, fingerprint: Mapping[str, Any]) -> tuple[int, float]:
    """Load the saved progress, if any, and return the steps that it holds and their seconds.

    Raises BadInput if the run was started with another fingerprint.
    """
    if run.is_main:
        recover_directory(progress)
    run.accelerator.wait_for_everyone()
    step, seconds = 0, 0.0
    if progress.exists():
        state = read_progress(progress)
        state["config"] = with_defaults(state["config"])
        for key, value in fingerprint.items():
            if state.get(key) != value:
                raise BadInput(
                    f"{progress.parent} was started with another {key},"
                    f" {difference(state.get(key), value)}; resume with the same {key}, or give"
                    " another --out."
                )
        load_progress(progress, run.model, run.optimiser)
        step, seconds = state["step"], state["seconds"]
    if any_process(run.accelerator, step != main_process_step(run.accelerator, step)):
        raise BadInput(
            f"The processes find different progress in {progress.parent}; it must be one folder,"
            " shared by all hosts."
        )
    return step, seconds


def difference(before: Any, now: Any) -> str:
    """Return the first difference of two values; within tables it is named by its keys."""
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
        return f"{name} {difference(before.get(name), now.get(name))}"
    return f"{before!r} and not {now!r}"


class MicroBatches:
    """The rows of a batch that one process computes, in micro-batches.

    A micro-batch's number does not depend on the process that computes it. Raises BadInput if the
    batch cannot be divided evenly.
    """

    def __init__(self, batch_size: int, processes: int, process: int, accumulate: int) -> None:
        self.count = processes * accumulate
        if batch_size % self.count:
            raise BadInput(
                f"batch_size {batch_size} is not a multiple of {processes} processes × accumulate"
                f" {accumulate}."
            )
        self._size = batch_size // self.count
        self._numbers = range(process * accumulate, (process + 1) * accumulate)

    def __iter__(self) -> Iterator[tuple[int, slice, bool]]:
        """Yield (number, rows, whether it is this process's last)."""
        for number in self._numbers:
            yield number, self.rows(number), number == self._numbers[-1]

    def rows(self, number: int) -> slice:
        """Return the rows of a micro-batch."""
        return slice(number * self._size, (number + 1) * self._size)


def masked_batch(corpus: Corpus, config: Config, step: int) -> MaskedBatch:
    """Return the batch of one step for all processes: a function of seed and step alone."""
    settings = config.optimisation
    ids = corpus.batch(step, settings.batch_size, settings.seed)
    return mask(corpus, config, ids, np.random.default_rng([settings.seed, step]))


def mask(corpus: Corpus, config: Config, ids: Ids, rng: np.random.Generator) -> MaskedBatch:
    """Return the sequences `ids` (B, L), masked as the config's objective masks."""
    return mask_tokens(
        ids,
        config.objective.mask_rate,
        corpus.vocabulary,
        rng,
        split=MASKING_SPLITS[config.objective.name],
        whole_words=config.objective.whole_words,
    )


def forward(
    model: nn.Module, batch: MaskedBatch, rng: torch.Generator, device: torch.device
) -> Losses:
    """Return the model's losses in nats, each a mean over what it predicts."""
    inputs, positions, targets = (
        torch.from_numpy(ids).to(device) for ids in (batch.inputs, batch.positions, batch.targets)
    )
    losses: Losses = model(inputs, positions, targets, rng)
    return losses


def check_finite(values: Mapping[str, float], step: int, settings: Optimisation) -> None:
    """Raise BadInput if one of the named values is infinite or no number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise BadInput(
                f"The {name} is {value} at step {step}; lower peak_learning_rate"
                f" ({settings.peak_learning_rate})."
            )


@torch.no_grad()
def held_out_losses(run: Run) -> dict[str, float]:
    """Return the mean losses on held-out text, in nats, through the whole model as it is trained.

    Every call uses the same masks and random numbers, so that measurements are comparable.
    """
    run.model.eval()
    measured = [
        forward(run.model, batch, make_rng(7, "held out", number), run.device)
        for number, batch in enumerate(held_out_batches(run.corpus, run.config))
    ]
    run.model.train()
    return {
        name: sum(losses[name].item() for losses in measured) / len(measured)
        for name in measured[0]
    }


def held_out_batches(corpus: Corpus, config: Config) -> Iterator[MaskedBatch]:
    """Yield about HELD_OUT_SEQUENCES held-out sequences, a micro-batch's number at a time."""
    size = config.optimisation.batch_size // config.optimisation.accumulate
    count = max(1, HELD_OUT_SEQUENCES // size)
    for number, ids in enumerate(corpus.held_out_batches(size, count)):
        yield mask(corpus, config, ids, np.random.default_rng([7, number]))


def summarise(
    run: Run, step: int, seconds: float, training_loss: float, held_out: Mapping[str, float]
) -> dict[str, Any]:
    """Return what training.json records of a finished run in addition to its fingerprint."""
    sources = (run.corpus.directory / "sources.json").read_text(encoding="utf-8")
    return {
        "device": device_name(run.device),
        "first_step": asdict(run.first_step),
        "steps": step,
        "tokens": run.tokens(step),
        "flops": step * step_flops(run),
        "seconds": round(seconds, 1),
        "training_loss_last_100": training_loss,
        "held_out_loss": held_out["loss"],
        "held_out_parts": {part: held_out[part] for part in run.model.loss_parts},
        "loss_without_context": held_out_loss_without_context(run),
        "held_out_sequences": sum(
            len(batch.inputs) for batch in held_out_batches(run.corpus, run.config)
        ),
        "sources": json.loads(sources),
        "versions": library_versions(),
    }


def write_checkpoint(directory: Path, run: Run, summary: Mapping[str, Any]) -> None:
    """Write the pretrained model, its tokenizer and training.json, all or nothing."""
    with atomic_directory(directory) as draft:
        save_pretrained(run.model, run.config, run.corpus.directory, draft)
        write_json(draft / "training.json", summary)


def step_flops(run: Run) -> int:
    """Return the floating-point operations of one step's matrix products, forward and backward.

    They are counted while one micro-batch runs.
    """
    part = masked_batch(run.corpus, run.config, 0).part(run.micro_batches.rows(0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        forward(run.model, part, make_rng(0, "flops"), run.device)["loss"].backward()  # type: ignore[no-untyped-call]
    run.model.zero_grad()
    return int(counter.get_total_flops()) * run.micro_batches.count


def held_out_loss_without_context(run: Run) -> float:
    """Return the held-out loss, in nats, of a model that learned word frequencies and no context.

    Of replaced-token detection it is the generator's loss.
    """
    split = MASKING_SPLITS[run.config.objective.name]
    if run.config.decoder.design == "mae":
        # MAE-LM's encoder does not read what stands at a predicted position.
        split = MaskingSplit(masked=1.0, random=0.0)
    vocabulary = run.corpus.vocabulary
    targets = np.concatenate(
        [batch.targets.ravel() for batch in held_out_batches(run.corpus, run.config)]
    )
    training_counts, target_counts = (
        np.bincount(ids, minlength=len(vocabulary))[vocabulary.ordinary]
        for ids in (run.corpus.ids, targets)
    )
    return loss_without_context(split, training_counts, target_counts)


def mean_over_processes(accelerator: Accelerator, losses: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each loss over all processes."""
    if accelerator.num_processes == 1:
        return dict(losses)
    means: Tensor = accelerator.reduce(
        torch.tensor(list(losses.values()), device=accelerator.device), "mean"
    )
    return dict(zip(losses, means.tolist(), strict=True))


def any_process(accelerator: Accelerator, value: bool) -> bool:
    """Return whether `value` is true in any process, so that all stop after the same step."""
    if accelerator.num_processes == 1:
        return value
    flag = torch.tensor(float(value), device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())


def main_process_step(accelerator: Accelerator, step: int) -> int:
    """Return the main process's `step`."""
    if accelerator.num_processes == 1:
        return step
    return int(broadcast(torch.tensor(step, device=accelerator.device)).item())


@contextlib.contextmanager
def defer_signals() -> Iterator[Callable[[], bool]]:
    """Defer SIGINT and SIGTERM to the end of a step; the yielded function tells whether one came.

    A signal more than 3 s after the first is not deferred: a launcher repeats a signal at once, a
    person later.
    """
    received: list[float] = []

    def remember(_: int, __: object) -> None:
        if received and time.monotonic() - received[0] > 3:
            raise KeyboardInterrupt
        received.append(time.monotonic())

    if threading.current_thread() is not threading.main_thread():
        # Python handles signals in its main thread only.
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def progress_bar(run: Run, name: str, step: int) -> tqdm[Any]:
    """Return the run's progress bar at `step`; only the main process shows one."""
    return tqdm(
        total=run.config.optimisation.steps,
        initial=step,
        desc=name,
        unit="step",
        mininterval=2,
        disable=not run.is_main,
    )


class RateSchedule(Protocol):
    """What a learning rate is computed from."""

    @property
    def steps(self) -> int:
        """Number of steps."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which the rate rises."""
        ...

    @property
    def peak_learning_rate(self) -> float:
        """The rate at the end of the warm-up."""
        ...


def learning_rate(step: int, settings: RateSchedule) -> float:
    """Return the learning rate of a step: linear warm-up, then linear decay to zero."""
    peak = settings.peak_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    return peak * (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)


def build_optimiser(model: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """Return AdamW with eps 1e-6, as in BERT's, ELECTRA's and RoBERTa's releases."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.peak_learning_rate,
        betas=(0.9, settings.beta2),
        eps=1e-6,
        fused=True,
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Return the optimiser's groups: matrices decay, biases and LayerNorms do not, as in BERT."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("bias")
        (matrices if is_matrix else others).append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def choose_precision(precision: str, device: torch.device) -> str:
    """Return `precision`, or what `auto` stands for: bf16 if it is native, else fp32.

    Emulated bf16 is slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which matrix products have the given precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    return torch.cuda.get_device_name() if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """Return the processor's name as Linux reports it."""
    return _processor_facts().get("model name", platform.processor())


def processor_model() -> str:
    """Return the processor's name and the numbers of its model, which clouds hide from the name."""
    facts = _processor_facts()
    keys = ("cpu family", "model", "CPU implementer", "CPU part")
    numbers = [f"{key} {facts[key]}" for key in keys if key in facts]
    return ", ".join([processor_name(), *numbers])


def _processor_facts() -> dict[str, str]:
    """Return what Linux reports of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


class Log:
    """log.csv with a row a step, and the same for TensorBoard if there is a `board` folder.

    Rows of steps that a resumed run repeats are dropped first. Without a path the log only
    remembers losses.
    """

    def __init__(
        self,
        path: Path | None,
        loss_parts: Sequence[str],
        first_step: int,
        board: Path | None = None,
    ) -> None:
        self._board = None if board is None else open_board(board, first_step)
        self._loss_parts = loss_parts
        header = ["step", "tokens", "seconds", "learning_rate", "loss", "held_out_loss"]
        header += loss_parts
        rows = []
        if path is not None and first_step and path.exists():
            rows = read_rows(path, len(header), first_step)
        self._losses = [float(row[4]) for row in rows]
        self._file = open(os.devnull if path is None else path, "w", newline="", encoding="utf-8")  # noqa: SIM115 -- closed by __exit__
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerows([header, *rows])
        self.flush()

    def add(
        self,
        step: int,
        tokens: int,
        seconds: float,
        rate: float,
        losses: Mapping[str, float],
        held_out: Mapping[str, float] | None,
    ) -> None:
        """Write the row of a step; `held_out` are its held-out losses if they were measured."""
        self._losses.append(losses["loss"])
        self._rows.writerow(
            [
                step,
                tokens,
                f"{seconds:.2f}",
                f"{rate:.3e}",
                f"{losses['loss']:.5f}",
                "" if held_out is None else f"{held_out['loss']:.5f}",
                *(f"{losses[part]:.5f}" for part in self._loss_parts),
            ]
        )
        if self._board is not None:
            values = {"learning_rate": rate, **losses}
            if held_out is not None:
                values["held_out_loss"] = held_out["loss"]
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def flush(self) -> None:
        """Hand all rows to the operating system."""
        self._file.flush()

    def mean_loss(self, last: int) -> float:
        """Return the mean training loss of the last steps, in nats."""
        recent = self._losses[-last:]
        return sum(recent) / len(recent)


def open_log(run: Run, out: Path, step: int, tensorboard: bool) -> Log:
    """Open the log of a run that continues after `step`; only the main process writes files."""
    if not run.is_main:
        return Log(None, run.model.loss_parts, step)
    board = out / "tensorboard" if tensorboard else None
    return Log(out / "log.csv", run.model.loss_parts, step, board)


def read_rows(path: Path, columns: int, last_step: int) -> list[list[str]]:
    """Return the log's rows up to `last_step`.

    A killed process may have left half a row. It has fewer columns, or a later step.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [row for row in rows if len(row) == columns and int(row[0]) <= last_step]


def open_board(folder: Path, first_step: int) -> Any:
    """Return TensorBoard's writer, which hides what an earlier run wrote after `first_step`.

    Raises Unavailable if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise Unavailable(
            f"--tensorboard needs TensorBoard; {how_to_install('tensorboard')}."
        ) from None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = Parser(
        prog="drbert-pretrain",
        description="Pretrain an encoder, with or without a decoder.",
    )
    parser.add_argument("config", type=Path, help="a TOML file, see training/configs")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the config's text"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the folder to write log, progress and checkpoint to",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out from its last save"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also log for TensorBoard, to the folder tensorboard in --out",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    pretrain(
        read_config(options.config), options.data, options.out, options.resume, options.tensorboard
    )
    return 0


def run() -> None:
    """Run the console script drbert-pretrain."""
    finish(main)


if __name__ == "__main__":
    run()
