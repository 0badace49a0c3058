"""
Measures a classifier through the running service, where its users meet it.

    python -m training.evaluate examples/checkpoints/bert-mini-sst2 --task sst2 --data DIR --url
        http://127.0.0.1:8000 --model bert

The result goes into the checkpoint's evaluation.json and model card.
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
from training.metrics import measure
from training.tasks import Example, Task, read_examples, task_named

TEXTS_A_REQUEST = 64


def evaluate(task: Task, data: Path, url: str, model: str) -> dict[str, Any]:
    """The task's measures of `model` behind `url` on its development set."""
    examples, names = read_examples(task, data, "dev"), task.class_names(data)
    answers: list[float] = []
    for start in range(0, len(examples), TEXTS_A_REQUEST):
        items = classify(
            url, model, [_item(example) for example in examples[start : start + TEXTS_A_REQUEST]]
        )
        answers += [
            item["score"] if task.kind == "regression" else _number(names, item["label"], model)
            for item in items
        ]
    labels = np.array([example.label for example in examples])
    return {
        "task": task.name,
        "split": "dev",
        "examples": len(examples),
        **measure(task.metrics, np.array(answers, float), labels),
        "through": "POST /classify",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _item(example: Example) -> str | dict[str, str]:
    return (
        example.text
        if example.text_pair is None
        else {"text": example.text, "text_pair": example.text_pair}
    )


def _number(names: Sequence[str], label: str, model: str) -> int:
    if label not in names:
        raise BadInput(
            f"The model {model!r} answers {label!r}, which is none of the task's labels; name the"
            " task it was trained for."
        )
    return names.index(label)


def classify(url: str, model: str, items: list[str | dict[str, str]]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{url}/classify", json.dumps({"model": model, "input": items}).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answered: list[dict[str, Any]] = json.load(response)["data"]
            return answered
    except urllib.error.HTTPError as error:
        raise BadInput(f"{url} refused: {error.read().decode(errors='replace')}") from None
    except OSError as error:
        raise Unavailable(
            f"No service answers at {url} ({error}); start one with `python -m service`."
        ) from None


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m training.evaluate",
        description="Measure a classifier through the running service.",
    )
    parser.add_argument("checkpoint", type=Path, help="the classifier whose card takes the result")
    parser.add_argument("--task", default="sst2", help="the labelled task (default: sst2)")
    parser.add_argument(
        "--data", type=Path, required=True, help="the folder that holds the task's folder"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running service")
    parser.add_argument("--model", required=True, help="the name the service gives the model")
    given = parser.parse_args(arguments)
    if not (given.checkpoint / "training.json").is_file():
        raise Unavailable(
            f"{given.checkpoint} has no training.json; name a checkpoint of training.finetune."
        )
    result = evaluate(task_named(given.task), given.data, given.url.rstrip("/"), given.model)
    write_json(given.checkpoint / "evaluation.json", result)
    write_card(given.checkpoint, name=given.checkpoint.resolve().name)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    finish(main)
