"""
Fine-tunes a pretrained encoder into a classifier; the pretraining decoder stays in the file.

    drbert-finetune --encoder build/training/drbert-mini/checkpoint --task sst2 \\
        --data DIR --out DIR

The loop is transformers' Trainer. The last epoch is always the result, so the reported metrics were
not selected on the development set.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from atomic import atomic_directory
from command import BadInput, Parser, Unavailable, finish
from training import convbert
from training.card import write_card
from training.checkpoint import (
    DECODER_PREFIX,
    contiguous,
    copy_tokenizer,
    library_versions,
    read_checkpoint,
    write_json,
)
from training.frozen import family_config, load_encoder
from training.metrics import Predictions, compute_metrics, majority_label
from training.pretrain import autocast, choose_precision, device_name
from training.tasks import TASKS, Example, Task, find_task, read_examples


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of fine-tuning: BERT's, with a learning rate for small models."""

    epochs: int
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    """The share of all steps in which the learning rate rises."""
    weight_decay: float = 0.01
    dropout: float = 0.1
    seed: int = 0
    freeze_encoder: bool = False
    """Whether only the head is trained, pooler included; classifiers then share their encoder."""


def finetune(
    encoder: Path,
    task: Task,
    data: Path,
    out: Path,
    recipe: Recipe,
    precision: str = "auto",
) -> dict[str, float]:
    """Train a classifier on top of `encoder`, write it to `out`, and return its metrics.

    The weights are written as fp16 safetensors, with a model card. `out`/predictions.json holds the
    predictions on the development set. Training runs in `precision`: bf16 autocast, fp32, or `auto`
    for bf16 where it is native. Metrics are computed in fp32. Nothing is written before the end.
    """
    described, tensors = read_checkpoint(encoder)
    if not (encoder / "training.json").is_file():
        raise Unavailable(
            f"{encoder} has no training.json, which the model card is written from; name a"
            " checkpoint of training.pretrain."
        )
    if out.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty; remove it or give another --out.")
    names = task.class_names(data)
    train, dev = (read_examples(task, data, split) for split in ("train", "dev"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    tokenizer.model_max_length = min(task.max_tokens, described["max_position_embeddings"])

    torch.manual_seed(recipe.seed)
    model = build_classifier(described, tensors, task, names, recipe.dropout)
    if recipe.freeze_encoder:
        freeze_encoder(model)
    steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = ClassifierTrainer(
            model,
            training_arguments(recipe, steps, scratch),
            train_dataset=tokenize(tokenizer, train, task),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.precision = choose_precision(precision, trainer.args.device)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(out.name))
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        losses = check_losses(trainer.state.log_history, recipe)
        # The weights are rounded to fp16 before they are measured, because fp16 is what is written.
        model.half().float()
        logits = trainer.predict(tokenize(tokenizer, dev, task)).predictions

    predictions = predict(logits, task)
    if not np.isfinite(predictions).all():
        raise BadInput(
            f"The classifier predicts {predictions[~np.isfinite(predictions)][0]} in fp16; lower"
            f" learning_rate ({recipe.learning_rate})."
        )
    labels = np.array([example.label for example in dev], float)
    metrics = compute_metrics(task.metrics, predictions, labels)
    summary = {
        "task": task.name,
        "source": task.source,
        "examples": len(train),
        "steps": steps,
        **asdict(recipe),
        "seconds": round(seconds, 1),
        "training_loss_last_100": float(np.mean(losses[-100:])),
        "dev_examples": len(dev),
        "dev_in_torch": metrics,
        "device": device_name(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "versions": library_versions(),
    }
    pretraining = json.loads((encoder / "training.json").read_text(encoding="utf-8"))
    with atomic_directory(out) as draft:
        save_classifier(model, described, tensors, encoder, draft)
        write_json(
            draft / "predictions.json",
            {
                "task": task.name,
                "split": "dev",
                "answers": predictions.tolist(),
                "labels": labels.tolist(),
                "majority": majority_label(np.array([example.label for example in train])),
            },
        )
        write_json(draft / "training.json", {"pretraining": pretraining, "finetuning": summary})
        write_card(draft, name=out.name)
    listed = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    print(f"{out}: {steps:,} steps in {seconds:,.0f} s, dev {listed} ({len(dev)} examples)")
    return metrics


def check_losses(log_history: Sequence[dict[str, float]], recipe: Recipe) -> list[float]:
    """Return the training loss of every step, in nats; BadInput if one is not finite."""
    losses = [entry["loss"] for entry in log_history if "loss" in entry]
    for loss in losses:
        if not math.isfinite(loss):
            raise BadInput(f"The loss became {loss}; lower learning_rate ({recipe.learning_rate}).")
    return losses


class ClassifierTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer that trains in `precision`, and predicts in fp32 and in order."""

    precision = "fp32"

    def compute_loss(self, model: PreTrainedModel, *arguments: Any, **others: Any) -> Any:
        """Return the loss, computed in `precision` while training and in fp32 otherwise."""
        with autocast(self.precision if model.training else "fp32", self.args.device):
            return super().compute_loss(model, *arguments, **others)

    def _get_eval_sampler(self, eval_dataset: Sized) -> SequentialSampler:
        # transformers groups by length here too, and does not restore the order of the examples.
        return SequentialSampler(eval_dataset)


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar with the run's name and loss on it, not a printed line a step."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        """Put the run's name on the bar."""
        super().on_train_begin(*arguments, **others)
        self.training_bar.set_description(self._name)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Put the loss of a step on the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


def training_arguments(recipe: Recipe, steps: int, scratch: str) -> TrainingArguments:
    """Return BERT's settings: AdamW, linear warm-up and decay, clipping at 1.

    Batches group texts of similar length.
    """
    grouping: dict[str, Any] = {"group_by_length": True}
    if "group_by_length" not in {field.name for field in fields(TrainingArguments)}:
        grouping = {"train_sampling_strategy": "group_by_length"}  # its name in transformers 5
    settings = TrainingArguments(
        output_dir=scratch,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=max(1, round(recipe.warmup_share * steps)),
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
        **grouping,
    )
    if settings.n_gpu > 1:
        # transformers would multiply batch_size by the number of GPUs.
        settings._n_gpu = 1
    return settings


def build_classifier(
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    task: Task,
    labels: Sequence[str],
    dropout: float,
) -> PreTrainedModel:
    """Return the family's classifier with the checkpoint's encoder and a new head."""
    changes = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "classifier_dropout": dropout,
    }
    if task.kind == "regression":
        changes["problem_type"] = "regression"
    model = AutoModelForSequenceClassification.from_config(family_config(described, changes))
    load_encoder(model.base_model, model.base_model_prefix, tensors)
    if model.config.model_type == "convbert":
        convbert.patch_attention(model.base_model)
    return model


def freeze_encoder(model: PreTrainedModel) -> None:
    """Exclude the encoder's weights from training; those of a pooler belong to the head."""
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad = name.startswith("pooler.")


def save_classifier(
    model: PreTrainedModel,
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    encoder: Path,
    directory: Path,
) -> None:
    """Write a classifier with fp16 weights, its tokenizer and the encoder's pretraining decoder."""
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "torch_dtype": "float16"}
    weights = {name: tensor.half() for name, tensor in contiguous(model.state_dict()).items()}
    if "pretraining_decoder" in described:
        config["pretraining_decoder"] = described["pretraining_decoder"]
        weights |= {
            name: tensor.half()
            for name, tensor in tensors.items()
            if name.startswith(DECODER_PREFIX)
        }
    write_json(directory / "config.json", config)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(encoder, directory, config["max_position_embeddings"])


def tokenize(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], task: Task
) -> list[dict[str, Any]]:
    """Return what the Trainer reads of each example: token ids, segments, mask and label."""
    texts = [example.text for example in examples]
    pairs = [example.text_pair for example in examples]
    encoded = tokenizer(texts, None if None in pairs else pairs, truncation=True)
    rows = []
    for i, example in enumerate(examples):
        row = {name: encoded[name][i] for name in encoded}
        row["labels"] = example.label if task.kind == "regression" else int(example.label)
        rows.append(row)
    return rows


def predict(logits: Any, task: Task) -> Predictions:
    """Return class numbers or scores (N) from logits (N, C)."""
    scores: Predictions = np.asarray(logits, float)
    return scores[:, 0] if task.kind == "regression" else scores.argmax(axis=1).astype(float)


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = Parser(prog="drbert-finetune", description="Fine-tune an encoder into a classifier.")
    parser.add_argument(
        "--encoder", type=Path, required=True, help="a checkpoint of training.pretrain"
    )
    parser.add_argument(
        "--task", default="sst2", help=f"the labelled task: {', '.join(TASKS)} (default: sst2)"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the task's folder"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write the classifier to"
    )
    parser.add_argument("--epochs", type=int, help="number of epochs (default: the task's)")
    parser.add_argument(
        "--freeze-encoder",
        action="store_true",
        help="train the head only, so that several classifiers can share one encoder",
    )
    numbers = [field for field in fields(Recipe)[1:] if not isinstance(field.default, bool)]
    for field in numbers:
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"(default: {field.default})",
        )
    parser.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="precision of the matrix products in training (default: bf16 where it is native)",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    task = find_task(options.task)
    recipe = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    recipe["epochs"] = options.epochs or task.epochs
    finetune(
        options.encoder,
        task,
        options.data,
        options.out,
        Recipe(**recipe),
        options.precision,
    )
    return 0


def run() -> None:
    """Run the console script drbert-finetune."""
    finish(main)


if __name__ == "__main__":
    run()
