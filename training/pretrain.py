"""
Pretrains a BERT encoder by masked language modelling, with or without a decoder that is thrown away later.

    python -m training.pretrain training/configs/bert-mini.toml --data DIR --out build/training/bert-mini
    python -m training.pretrain training/configs/drbert-mini.toml --data DIR --out build/training/drbert-mini

One loop, from top to bottom. Data order, masks and the decoder's randomness are functions of
the seed and the step alone, so a run that was stopped and resumed ends with the same weights.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from command import BadInput, Parser, finish
from training.checkpoint import load_progress, read_progress, save_pretrained, save_progress, write_json, written_whole
from training.config import Config, Optimisation, read_config
from training.corpus import Corpus, prepare
from training.masking import Masked, mask_tokens
from training.model import PretrainingModel

HELD_OUT_SEQUENCES = 512


def pretrain(config: Config, data: Path, out: Path, resume: bool = False) -> None:
    """Trains as `config` says and leaves a Hugging Face checkpoint, decoder and all, in `out`/checkpoint."""
    run = config.optimisation
    if not resume and out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; give --resume to go on with it, or another --out.")
    corpus = prepare(config.data, data, beside=out.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PretrainingModel(config, corpus.vocabulary_size).to(device)
    optimiser = build_optimiser(model, run)
    precision = choose_precision(run.precision, device)
    # What the same weights at the end depend on; a resumed run must be told the same.
    told = {
        "config": config.as_dict(), "corpus": corpus.directory.name, "precision": precision,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }

    out.mkdir(parents=True, exist_ok=True)
    step, seconds, held_out, saved = 0, 0.0, None, out / "progress"
    if resume and saved.exists():
        progress = read_progress(saved)
        for what, now in told.items():
            if progress[what] != now:
                raise BadInput(f"{out} was begun with another {what}; go on with the one it was begun with, or give another --out.")
        load_progress(saved, model, optimiser)
        step, seconds = progress["step"], progress["seconds"]
    started = time.monotonic() - seconds
    model.train()
    with Log(out / "log.csv", keep_before=step) as log, tqdm(
        total=run.steps, initial=step, desc=out.name, unit="step", mininterval=2
    ) as bar:
        while step < run.steps:
            rate = learning_rate(step, run)
            for group in optimiser.param_groups:
                group["lr"] = rate
            masked = mask_tokens(
                corpus.batch(step, run.batch_size, run.seed), run.mask_rate, corpus.vocabulary_size,
                np.random.default_rng([run.seed, step]),
            )
            torch.manual_seed(run.seed + step)                       # dropout, where there is any
            with autocast(precision, device):
                loss = masked_loss(model, masked, generator_of(run.seed, step), device)
            loss.backward()                                          # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), run.clip_norm)
            optimiser.step()
            optimiser.zero_grad()
            if not math.isfinite(loss.item()):
                raise BadInput(f"The loss is {loss.item()} at step {step}; lower peak_learning_rate ({run.peak_learning_rate}).")

            step += 1
            tokens = step * run.batch_size * config.data.sequence_length
            seconds = time.monotonic() - started
            due = step % run.checkpoint_every == 0 or step == run.steps
            held_out = held_out_loss(model, corpus, run, device) if due else None
            log.add(step, tokens, seconds, rate, loss.item(), held_out)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens_s=f"{tokens / seconds:,.0f}", refresh=False)
            if due:
                log.flush()
                save_progress(saved, model, optimiser, {"step": step, "seconds": seconds, **told})
        recent = log.mean_loss(100)

    final = held_out_loss(model, corpus, run, device) if held_out is None else held_out
    summary = {
        "config": config.as_dict(), "steps": step, "tokens": step * run.batch_size * config.data.sequence_length,
        "seconds": round(seconds, 1), "precision": precision, "device": device_name(device), "threads": torch.get_num_threads(),
        "training_loss_last_100": recent, "held_out_loss": final,
        "held_out_sequences": min(HELD_OUT_SEQUENCES, len(corpus.held_out) // (config.data.sequence_length - 2)),
        "sources": json.loads((corpus.directory / "sources.json").read_text()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    with written_whole(out / "checkpoint") as directory:
        save_pretrained(model, config, corpus.directory, directory)
        write_json(directory / "training.json", summary)
    print(f"{out / 'checkpoint'}: {summary['tokens']:,} tokens in {seconds:,.0f} s, held-out loss {summary['held_out_loss']:.3f}")


def masked_loss(model: PretrainingModel, masked: Masked, generator: torch.Generator, device: torch.device) -> Tensor:
    """Mean cross-entropy over the predicted positions, in nats."""
    inputs, positions = torch.from_numpy(masked.inputs).to(device), torch.from_numpy(masked.positions).to(device)
    scores = model(inputs, positions, generator)                                       # (B, K, V)
    return F.cross_entropy(scores.flatten(0, 1).float(), torch.from_numpy(masked.targets).to(device).flatten())


@torch.no_grad()
def held_out_loss(model: PretrainingModel, corpus: Corpus, run: Optimisation, device: torch.device) -> float:
    """The loss on unseen text, through the whole model as it is trained; the masks are the same at every call."""
    model.eval()
    losses = []
    for i, ids in enumerate(corpus.held_out_batches(run.batch_size, max(1, HELD_OUT_SEQUENCES // run.batch_size))):
        masked = mask_tokens(ids, run.mask_rate, corpus.vocabulary_size, np.random.default_rng([7, i]))
        losses.append(masked_loss(model, masked, generator_of(7, i), device).item())
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, run: Optimisation) -> float:
    """Linear warm-up, then linear decay to zero."""
    if step < run.warmup_steps:
        return run.peak_learning_rate * (step + 1) / run.warmup_steps
    return run.peak_learning_rate * (run.steps - step) / max(1, run.steps - run.warmup_steps)


def build_optimiser(model: nn.Module, run: Optimisation) -> torch.optim.AdamW:
    """AdamW as RoBERTa set it (arXiv 1907.11692)."""
    return torch.optim.AdamW(parameter_groups(model, run.weight_decay), lr=run.peak_learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and LayerNorms do not, as in BERT."""
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def choose_precision(asked: str, device: torch.device) -> str:
    """bf16 where `auto` finds it native: on processors that emulate it, it is slower than fp32."""
    if asked != "auto":
        return asked
    cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cuda" or cpu else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def generator_of(seed: int, step: int) -> torch.Generator:
    """The decoder's dice for one step; they live on the CPU so that every device throws the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else processor_name()


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


class Log:
    """log.csv: a row a step; rows of steps that a resumed run repeats are dropped first."""

    def __init__(self, path: Path, keep_before: int) -> None:
        kept = []
        if keep_before and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in list(csv.reader(file))[1:] if int(row[0]) <= keep_before]
        self._losses = [float(row[4]) for row in kept]
        self._file = path.open("w", newline="")
        self._rows = csv.writer(self._file, lineterminator="\n")
        self._rows.writerow(["step", "tokens", "seconds", "learning_rate", "loss", "held_out_loss"])
        self._rows.writerows(kept)

    def add(self, step: int, tokens: int, seconds: float, rate: float, loss: float, held_out: float | None) -> None:
        self._losses.append(loss)
        self._rows.writerow([step, tokens, f"{seconds:.2f}", f"{rate:.3e}", f"{loss:.5f}", "" if held_out is None else f"{held_out:.5f}"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def flush(self) -> None:
        self._file.flush()

    def mean_loss(self, last: int) -> float:
        recent = self._losses[-last:]
        return sum(recent) / len(recent)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m training.pretrain", description="Pretrain an encoder, with or without a decoder.")
    parser.add_argument("config", type=Path, help="a TOML file, see training/configs")
    parser.add_argument("--data", type=Path, required=True, help="the folder that the config's text is below")
    parser.add_argument("--out", type=Path, required=True, help="where the run's log, progress and checkpoint go")
    parser.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    parser.add_argument("--threads", type=int, help="processor threads to use (default: torch's choice)")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    pretrain(read_config(given.config), given.data, given.out, given.resume)
    return 0


def run() -> None:
    """The console script drbert-pretrain."""
    finish(main)


if __name__ == "__main__":
    run()
