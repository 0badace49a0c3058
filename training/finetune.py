"""
Fine-tunes a pretrained encoder into a classifier; the pretraining decoder is carried along untouched.

    python -m training.finetune --encoder build/training/drbert-mini/checkpoint --task sst2 --data DIR --out DIR

The last epoch is kept, whatever the development set says of it, so the accuracy reported
there was not selected on it.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from command import BadInput, Parser, Unavailable, finish
from training.card import write_card
from training.checkpoint import (
    DECODER_PREFIX,
    contiguous,
    copy_tokenizer,
    read_checkpoint,
    write_json,
    written_whole,
)
from training.pretrain import device_name, parameter_groups
from training.tasks import Example, Task, read_examples, task_named

Encoded = list[tuple[list[int], int]]


def finetune(
    encoder: Path, task: Task, data: Path, out: Path, *,
    epochs: int = 3, batch_size: int = 32, learning_rate: float = 3e-4, dropout: float = 0.1, seed: int = 0,
    limit: int | None = None,
) -> None:
    """Trains a classifier on top of `encoder` and writes it to `out` as fp16 safetensors with a model card."""
    described, tensors = read_checkpoint(encoder)
    if not (encoder / "training.json").is_file():
        raise Unavailable(f"{encoder} has no training.json, which the model card is written from; name a checkpoint of training.pretrain.")
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; remove it or give another --out.")
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(min(task.max_tokens, described["max_position_embeddings"]))
    train = encode(tokenizer, read_examples(task, data, "train")[:limit])
    dev = encode(tokenizer, read_examples(task, data, "dev")[:limit])

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    model = build_classifier(described, tensors, task, dropout).to(device)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.01), lr=learning_rate, fused=True)
    steps = epochs * math.ceil(len(train) / batch_size)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )

    model.train()
    losses: list[float] = []
    started = time.monotonic()
    with tqdm(total=steps, desc=out.name, unit="step", mininterval=2) as bar:
        for epoch in range(epochs):
            for ids, mask, labels in batches(train, batch_size, random.Random(f"{seed}-{epoch}")):
                loss = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                optimiser.zero_grad()
                losses.append(loss.item())
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.3f}", refresh=False)
    seconds = time.monotonic() - started

    # What is written is what is measured: the weights go through fp16 first.
    model.half().float().eval()
    accuracy = measure_accuracy(model, dev, device)
    with written_whole(out) as directory:
        save_classifier(model, described, tensors, encoder, directory)
        write_json(directory / "training.json", {
            "pretraining": json.loads((encoder / "training.json").read_text()),
            "finetuning": {
                "task": task.name, "source": task.source, "examples": len(train), "epochs": epochs, "steps": steps,
                "batch_size": batch_size, "learning_rate": learning_rate, "dropout": dropout, "seed": seed,
                "seconds": round(seconds, 1), "training_loss_last_100": sum(losses[-100:]) / len(losses[-100:]),
                "dev_examples": len(dev), "dev_accuracy_in_torch": accuracy,
                "device": device_name(device), "threads": torch.get_num_threads(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
            },
        })
        write_card(directory, name=out.name)
    print(f"{out}: {steps:,} steps in {seconds:,.0f} s, dev accuracy {accuracy:.4f} ({len(dev)} sentences)")


def build_classifier(
    described: dict[str, object], tensors: dict[str, Tensor], task: Task, dropout: float
) -> BertForSequenceClassification:
    known = {k: v for k, v in described.items() if k not in ("pretraining_decoder", "architectures")}
    config = BertConfig.from_dict({
        **known,
        "id2label": dict(enumerate(task.labels)), "label2id": {label: i for i, label in enumerate(task.labels)},
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": dropout,
    })
    model = BertForSequenceClassification(config)
    encoder = {name.removeprefix("bert."): t for name, t in tensors.items() if name.startswith("bert.")}
    unplaced = model.bert.load_state_dict(encoder, strict=False)
    wrong = [n for n in unplaced.missing_keys if not n.startswith("pooler.")] + unplaced.unexpected_keys
    if wrong:
        raise BadInput(f"The encoder's tensors do not fit its config.json: {wrong[0]}.")
    return model


def save_classifier(
    model: nn.Module, described: dict[str, object], tensors: dict[str, Tensor], encoder: Path, directory: Path
) -> None:
    config = model.config.to_dict()                                        # type: ignore[union-attr, operator]
    config |= {"architectures": ["BertForSequenceClassification"], "torch_dtype": "float16"}
    weights = {name: tensor.half() for name, tensor in contiguous(model.state_dict()).items()}
    if "pretraining_decoder" in described:
        config["pretraining_decoder"] = described["pretraining_decoder"]
        weights |= {name: t.half() for name, t in tensors.items() if name.startswith(DECODER_PREFIX)}
    write_json(directory / "config.json", config)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(encoder, directory, config["max_position_embeddings"])


def encode(tokenizer: Tokenizer, examples: Sequence[Example]) -> Encoded:
    encodings = tokenizer.encode_batch([example.text for example in examples])
    return [(encoding.ids, example.label) for encoding, example in zip(encodings, examples, strict=True)]


def batches(
    examples: Encoded, batch_size: int, shuffle: random.Random | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Right-padded batches of neighbours in length: ids (B, L), mask (B, L), labels (B)."""
    order = list(range(len(examples)))
    if shuffle:
        shuffle.shuffle(order)
    # Sorted within windows of many batches: little padding, and still a random order.
    window = batch_size * 64 if shuffle else len(order)
    grouped = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: len(examples[i][0]))
        grouped += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    if shuffle:
        shuffle.shuffle(grouped)
    for members in grouped:
        width = max(len(examples[i][0]) for i in members)
        ids = torch.tensor([examples[i][0] + [0] * (width - len(examples[i][0])) for i in members])
        mask = torch.tensor([[1] * len(examples[i][0]) + [0] * (width - len(examples[i][0])) for i in members])
        yield ids, mask, torch.tensor([examples[i][1] for i in members])


@torch.no_grad()
def measure_accuracy(model: nn.Module, examples: Encoded, device: torch.device) -> float:
    right = 0
    for ids, mask, labels in batches(examples, 64):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        right += int((logits.argmax(1).cpu() == labels).sum())
    return right / len(examples)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m training.finetune", description="Fine-tune an encoder into a classifier.")
    parser.add_argument("--encoder", type=Path, required=True, help="a checkpoint of training.pretrain")
    parser.add_argument("--task", default="sst2", help="the labelled task (default: sst2)")
    parser.add_argument("--data", type=Path, required=True, help="the folder that holds <task>/train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, required=True, help="where the classifier goes")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="processor threads to use (default: torch's choice)")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    finetune(
        given.encoder, task_named(given.task), given.data, given.out,
        epochs=given.epochs, batch_size=given.batch_size, learning_rate=given.learning_rate, seed=given.seed,
    )
    return 0


def run() -> None:
    """The console script drbert-finetune."""
    finish(main)


if __name__ == "__main__":
    run()
