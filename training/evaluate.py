"""
Evaluates a classifier through the running service, as its users get it.

    drbert-evaluate examples/checkpoints/bert-mini-sst2 --task sst2 --data DIR \\
        --url http://127.0.0.1:8000 --model bert

The result is written to the checkpoint's evaluation.json and model card.
"""

from __future__ import annotations

import datetime
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput, Parser, Unavailable, finish
from training.card import write_card
from training.checkpoint import write_json
from training.metrics import compute_metrics
from training.tasks import Example, Task, find_task, read_examples

TEXTS_A_REQUEST = 64
TIMEOUT_S = 60
"""Seconds that a request may take."""


def evaluate(task: Task, data: Path, url: str, model: str) -> dict[str, Any]:
    """Return the metrics of the served `model` on the task's development set."""
    examples, names = read_examples(task, data, "dev"), task.class_names(data)
    predictions: list[float] = []
    for start in range(0, len(examples), TEXTS_A_REQUEST):
        chunk = [_item(example) for example in examples[start : start + TEXTS_A_REQUEST]]
        for answer in classify(url, model, chunk):
            if task.kind == "regression":
                predictions.append(answer["score"])
            else:
                predictions.append(_class_number(names, answer["label"], model))
    labels = np.array([example.label for example in examples])
    return {
        "task": task.name,
        "split": "dev",
        "examples": len(examples),
        **compute_metrics(task.metrics, np.array(predictions, float), labels),
        "through": "POST /classify",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _item(example: Example) -> str | dict[str, str]:
    if example.text_pair is None:
        return example.text
    return {"text": example.text, "text_pair": example.text_pair}


def _class_number(names: Sequence[str], label: str, model: str) -> int:
    if label not in names:
        raise BadInput(
            f"The model {model!r} answers {label!r}, which is not a label of the task; name the"
            " task that it was trained for."
        )
    return names.index(label)


def classify(url: str, model: str, items: list[str | dict[str, str]]) -> list[dict[str, Any]]:
    """Return the service's answers to texts or pairs, in order.

    Raises BadInput if the service refuses the request, Unavailable if it does not answer.
    """
    request = urllib.request.Request(
        f"{url}/classify", json.dumps({"model": model, "input": items}).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answers: list[dict[str, Any]] = json.load(response)["data"]
            return answers
    except urllib.error.HTTPError as error:
        raise BadInput(
            f"{url} refused the request: {error.read().decode(errors='replace')}"
        ) from None
    except OSError as error:
        raise Unavailable(
            f"No service answers at {url} ({error}); start one with `drbert-serve`."
        ) from None


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code."""
    parser = Parser(
        prog="drbert-evaluate",
        description="Measure a classifier through the running service.",
    )
    parser.add_argument(
        "checkpoint", type=Path, help="the classifier's folder, whose model card gets the result"
    )
    parser.add_argument("--task", default="sst2", help="the labelled task (default: sst2)")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the task's folder"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running service")
    parser.add_argument("--model", required=True, help="the model's name in the service")
    options = parser.parse_args(arguments)
    if not (options.checkpoint / "training.json").is_file():
        raise Unavailable(
            f"{options.checkpoint} has no training.json; name a checkpoint of training.finetune."
        )
    result = evaluate(find_task(options.task), options.data, options.url.rstrip("/"), options.model)
    write_json(options.checkpoint / "evaluation.json", result)
    write_card(options.checkpoint, name=options.checkpoint.resolve().name)
    print(json.dumps(result))
    return 0


def run() -> None:
    """Run the console script drbert-evaluate."""
    finish(main)


if __name__ == "__main__":
    run()
