"""
Fine-tunes a pretrained encoder into a classifier; the pretraining decoder is carried along
untouched.

    python -m training.finetune --encoder build/training/drbert-mini/checkpoint --task sst2 --data
        DIR --out DIR

The loop is transformers' Trainer. The last epoch is kept, whatever the development set says of
it, so what is reported there was not selected on it.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
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
from training.attention import transformers_name
from training.card import write_card
from training.checkpoint import (
    DECODER_PREFIX,
    contiguous,
    copy_tokenizer,
    read_checkpoint,
    write_json,
)
from training.metrics import Answers, majority, measure
from training.pretrain import autocast, choose_precision, device_name
from training.tasks import TASKS, Example, Task, read_examples, task_named


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: BERT's, with a learning rate for small models."""

    epochs: int
    batch_size: int = 32
    learning_rate: float = 3e-4
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    dropout: float = 0.1
    seed: int = 0


def finetune(
    encoder: Path,
    task: Task,
    data: Path,
    out: Path,
    recipe: Recipe,
    precision: str = "auto",
    limit: int | None = None,
) -> dict[str, float]:
    """Trains a classifier on top of `encoder`, writes it to `out` as fp16 safetensors with a model
    card, and returns its measures.

    `precision` is pretraining's (bf16 autocast where `auto` finds it native); the measures are
    fp32's. `out`/predictions.json holds what it answered on the development set. Nothing is written
    before the end.
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
    train, dev = (read_examples(task, data, split)[:limit] for split in ("train", "dev"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder)
    tokenizer.model_max_length = min(task.max_tokens, described["max_position_embeddings"])

    torch.manual_seed(recipe.seed)
    model = build_classifier(described, tensors, task, names, recipe.dropout)
    steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = ClassifierTrainer(
            model,
            training_arguments(recipe, steps, scratch),
            train_dataset=encode(tokenizer, train, task),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.precision = choose_precision(precision, trainer.args.device)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(out.name))
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if not np.isfinite(losses).all():
            raise BadInput(
                f"The loss became {losses[int(np.flatnonzero(~np.isfinite(losses))[0])]}; lower"
                f" learning_rate ({recipe.learning_rate})."
            )
        # What is written is what is measured: the weights go through fp16 first.
        model.half().float()
        answers = answer(trainer.predict(encode(tokenizer, dev, task)).predictions, task)
    if not np.isfinite(answers).all():
        raise BadInput(
            f"The classifier answers {answers[~np.isfinite(answers)][0]} in fp16; lower"
            f" learning_rate ({recipe.learning_rate})."
        )
    labels = np.array([example.label for example in dev], float)
    measures = measure(task.metrics, answers, labels)

    with atomic_directory(out) as directory:
        save_classifier(model, described, tensors, encoder, directory)
        write_json(
            directory / "predictions.json",
            {
                "task": task.name,
                "split": "dev",
                "answers": answers.tolist(),
                "labels": labels.tolist(),
                "majority": majority(np.array([example.label for example in train])),
            },
        )
        write_json(
            directory / "training.json",
            {
                "pretraining": json.loads((encoder / "training.json").read_text(encoding="utf-8")),
                "finetuning": {
                    "task": task.name,
                    "source": task.source,
                    "examples": len(train),
                    "steps": steps,
                    **asdict(recipe),
                    "seconds": round(seconds, 1),
                    "training_loss_last_100": float(np.mean(losses[-100:])),
                    "dev_examples": len(dev),
                    "dev_in_torch": measures,
                    "device": device_name(next(model.parameters()).device),
                    "threads": torch.get_num_threads(),
                    "precision": trainer.precision,
                    "versions": {
                        "torch": torch.__version__,
                        "transformers": transformers.__version__,
                        "python": platform.python_version(),
                    },
                },
            },
        )
        write_card(directory, name=out.name)
    said = ", ".join(f"{name} {value:.4f}" for name, value in measures.items())
    print(f"{out}: {steps:,} steps in {seconds:,.0f} s, dev {said} ({len(dev)} examples)")
    return measures


class ClassifierTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, but that it trains in our `precision` and answers in fp32, in the
    order it was asked.
    """

    precision = "fp32"

    def compute_loss(self, model: PreTrainedModel, *arguments: Any, **others: Any) -> Any:
        with autocast(self.precision if model.training else "fp32", self.args.device):
            return super().compute_loss(model, *arguments, **others)

    def _get_eval_sampler(self, eval_dataset: Sized) -> SequentialSampler:
        # transformers' own groups by length there too, and forgets what stood where.
        return SequentialSampler(eval_dataset)


class Progress(ProgressCallback):  # type: ignore[misc]
    """transformers' progress bar, with the run's name and its loss on it instead of a line a step
    below it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def on_train_begin(self, *arguments: Any, **others: Any) -> None:
        super().on_train_begin(*arguments, **others)
        self.training_bar.set_description(self._name)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)


def training_arguments(recipe: Recipe, steps: int, scratch: str) -> TrainingArguments:
    """BERT's: AdamW, linear warm-up and decay, clipping at 1; batches of neighbours in length."""
    # Renamed in transformers 5.
    old = "group_by_length" in {field.name for field in fields(TrainingArguments)}
    grouped: dict[str, Any] = (
        {"group_by_length": True} if old else {"train_sampling_strategy": "group_by_length"}
    )
    told = TrainingArguments(
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
        **grouped,
    )
    if told.n_gpu > 1:
        # transformers would take batch_size for that of each GPU, and several times as large a step
        told._n_gpu = 1
    return told


def build_classifier(
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    task: Task,
    labels: Sequence[str],
    dropout: float,
) -> PreTrainedModel:
    """The family's classifier with the checkpoint's encoder and a fresh head."""
    known = {
        k: v
        for k, v in described.items()
        if k not in ("pretraining_decoder", "architectures", "torch_dtype", "dtype")
    }
    config = AutoConfig.for_model(
        **{
            **known,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": (
                "regression" if task.kind == "regression" else "single_label_classification"
            ),
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "classifier_dropout": dropout,
            # transformers refuses the others' models by that name where they know no other
            # attention than their own.
            **(
                {"attn_implementation": transformers_name()}
                if known["model_type"] == "bert"
                else {}
            ),
        }
    )
    model = AutoModelForSequenceClassification.from_config(config)
    prefix = f"{model.base_model_prefix}."
    encoder = {
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    unplaced = model.base_model.load_state_dict(encoder, strict=False)
    wrong = [
        n for n in unplaced.missing_keys if not n.startswith("pooler.")
    ] + unplaced.unexpected_keys
    if wrong:
        raise BadInput(f"The encoder's tensors do not fit its config.json: {wrong[0]}.")
    if config.model_type == "convbert":
        convbert.mend(model.base_model)
    return model


def save_classifier(
    model: PreTrainedModel,
    described: dict[str, Any],
    tensors: dict[str, Tensor],
    encoder: Path,
    directory: Path,
) -> None:
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "torch_dtype": "float16"}
    weights = {name: tensor.half() for name, tensor in contiguous(model.state_dict()).items()}
    if "pretraining_decoder" in described:
        config["pretraining_decoder"] = described["pretraining_decoder"]
        weights |= {
            name: t.half() for name, t in tensors.items() if name.startswith(DECODER_PREFIX)
        }
    write_json(directory / "config.json", config)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(encoder, directory, config["max_position_embeddings"])


def encode(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], task: Task
) -> list[dict[str, Any]]:
    """What the Trainer reads: token ids, segments and mask of each text or pair, and its label."""
    pairs = [example.text_pair for example in examples]
    encoded = tokenizer(
        [example.text for example in examples], None if None in pairs else pairs, truncation=True
    )
    return [
        {
            **{name: encoded[name][i] for name in encoded},
            "labels": example.label if task.kind == "regression" else int(example.label),
        }
        for i, example in enumerate(examples)
    ]


def answer(logits: Any, task: Task) -> Answers:
    """Classes' numbers or scores (N) from logits (N, C)."""
    scores = np.asarray(logits, float)
    return scores[:, 0] if task.kind == "regression" else scores.argmax(axis=1).astype(float)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m training.finetune", description="Fine-tune an encoder into a classifier."
    )
    parser.add_argument(
        "--encoder", type=Path, required=True, help="a checkpoint of training.pretrain"
    )
    parser.add_argument(
        "--task", default="sst2", help=f"the labelled task: {', '.join(TASKS)} (default: sst2)"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the task's folder"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the classifier goes")
    parser.add_argument("--epochs", type=int, help="(default: the task's)")
    for field in fields(Recipe)[1:]:
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
        help="of the matrix products while training (default: bf16 where it is native)",
    )
    parser.add_argument(
        "--threads", type=int, help="processor threads to use (default: torch's choice)"
    )
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    task = task_named(given.task)
    told = {field.name: getattr(given, field.name) for field in fields(Recipe)}
    finetune(
        given.encoder,
        task,
        given.data,
        given.out,
        Recipe(**{**told, "epochs": given.epochs or task.epochs}),
        given.precision,
    )
    return 0


def run() -> None:
    """The console script drbert-finetune."""
    finish(main)


if __name__ == "__main__":
    run()
