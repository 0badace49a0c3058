"""
Measures what an encoder's frozen states tell about texts, without fine-tuning and without chance.

Each text becomes the state of [CLS] or the mean over its tokens' states. Regularised logistic
regression and the nearest neighbours predict its label; the cosine of two texts is compared with
how alike people call them. Nothing is drawn at random but the examples, which are the same for all
encoders.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from command import Unavailable
from training.frozen import FrozenEncoder
from training.metrics import METRICS
from training.tasks import Example, Task, find_task, read_examples

States = npt.NDArray[np.float32]
"""(N, D), a state for each text."""

COMPARED = "stsb"
TASKS = ("clinc150", "banking77", "ag_news", "sst2", COMPARED)
POOLINGS = ("mean", "cls")
MOST_EXAMPLES = 8_000
"""Examples of a task's training and of its development set; of more, so many are drawn."""
NEIGHBOURS = 10
INVERSE_REGULARISATION = 0.1
"""scikit-learn's C, on standardised states."""
BATCH_SIZE = 64


def names(task: str | None = None) -> tuple[str, ...]:
    """Return the names of what is measured, of one task or of all: "TASK METHOD POOLING"."""
    if task is None:
        return tuple(name for each in TASKS for name in names(each))
    methods = ("cosine",) if task == COMPARED else ("logistic", "neighbours")
    return tuple(f"{task} {method} {pooling}" for method in methods for pooling in POOLINGS)


def probe(encoder: FrozenEncoder, data: Path, task: str) -> dict[str, float]:
    """Return what the encoder's states tell about a task's texts, by name.

    It is an accuracy for `logistic` and `neighbours`, and Spearman's correlation for `cosine`.
    Raises Unavailable or BadInput if the task's files cannot be read.
    """
    if task == COMPARED:
        return {f"{task} cosine {key}": value for key, value in similarity(encoder, data).items()}
    read = find_task(task)
    train, dev = (_draw(read_examples(read, data, split)) for split in ("train", "dev"))
    accuracies = _accuracies(encoder, read, train, dev)
    return {f"{task} {name}": value for name, value in accuracies.items()}


def digest(data: Path) -> str:
    """Return a SHA-256 of all files of all tasks; Unavailable if a task has no folder."""
    described = hashlib.sha256()
    for task in TASKS:
        if not (data / task).is_dir():
            raise Unavailable(
                f"{data} has no folder {task}; --data names the folder that holds the tasks."
            )
        for path in sorted(path for path in (data / task).rglob("*") if path.is_file()):
            described.update(f"{path.relative_to(data)}\n".encode())
            described.update(hashlib.sha256(path.read_bytes()).digest())
    return described.hexdigest()


def mean_accuracy(measured: Mapping[str, float]) -> float:
    """Return the mean of all accuracies of logistic regression: the one number of an encoder."""
    return float(np.mean([value for name, value in measured.items() if " logistic " in name]))


def _draw(examples: list[Example]) -> list[Example]:
    if len(examples) <= MOST_EXAMPLES:
        return examples
    chosen = np.random.default_rng(0).choice(len(examples), MOST_EXAMPLES, replace=False)
    return [examples[number] for number in np.sort(chosen)]


def _accuracies(
    encoder: FrozenEncoder, task: Task, train: Sequence[Example], dev: Sequence[Example]
) -> dict[str, float]:
    """Return the accuracy on `dev` by "METHOD POOLING"."""
    labels, expected = (
        np.array([example.label for example in part]).astype(int) for part in (train, dev)
    )
    known, questions = (
        pooled_states(encoder, _texts(part), task.max_tokens) for part in (train, dev)
    )
    accuracies = {}
    for pooling in POOLINGS:
        methods = {
            "logistic": make_pipeline(
                StandardScaler(),
                LogisticRegression(C=INVERSE_REGULARISATION, tol=1e-3, max_iter=2_000),
            ),
            "neighbours": KNeighborsClassifier(
                min(NEIGHBOURS, len(train)), metric="cosine", weights="distance"
            ),
        }
        for name, method in methods.items():
            method.fit(known[pooling], labels)
            answers = method.predict(questions[pooling])
            accuracies[f"{name} {pooling}"] = float(np.mean(answers == expected))
    return accuracies


def similarity(encoder: FrozenEncoder, data: Path) -> dict[str, float]:
    """Return Spearman's correlation of the cosine with people's scores on STS-B, by pooling."""
    task = find_task(COMPARED)
    examples = read_examples(task, data, "dev")
    scores = np.array([example.label for example in examples])
    first = pooled_states(encoder, _texts(examples), task.max_tokens)
    second = pooled_states(
        encoder, [example.text_pair or "" for example in examples], task.max_tokens
    )
    return {
        pooling: METRICS["spearman"](_cosines(first[pooling], second[pooling]), scores)
        for pooling in POOLINGS
    }


def _cosines(first: States, second: States) -> npt.NDArray[np.float64]:
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: npt.NDArray[np.float64] = (first * second).sum(axis=1) / lengths
    return cosines


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]


def pooled_states(
    encoder: FrozenEncoder, texts: Sequence[str], max_tokens: int
) -> dict[str, States]:
    """Return the states of texts by pooling, each (N, D), in fp32.

    Texts are cut after `max_tokens`, [CLS] and [SEP] included.
    """
    limit = min(max_tokens, encoder.max_tokens)
    ids = encoder.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    pooled = {name: np.zeros((len(ids), encoder.hidden_size), np.float32) for name in POOLINGS}
    in_order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    for start in range(0, len(ids), BATCH_SIZE):
        numbers = in_order[start : start + BATCH_SIZE]
        batch = encoder.tokenizer.pad({"input_ids": [ids[number] for number in numbers]})
        padded, mask = (torch.tensor(batch[name]) for name in ("input_ids", "attention_mask"))
        states = encoder.states(padded, mask)
        weights = mask[..., None].to(states.dtype)
        pooled["mean"][numbers] = ((states * weights).sum(1) / weights.sum(1)).numpy()
        pooled["cls"][numbers] = states[:, 0].numpy()
    return pooled
