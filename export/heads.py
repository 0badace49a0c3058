"""
Several classifiers on one encoder become one model with several heads.

Each checkpoint holds the encoder and a head of its own, as training with a frozen encoder leaves
them. The encoders must be the same, weight by weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
from transformers import PreTrainedTokenizerFast

from command import BadInput
from export.checkpoint.loading import Checkpoint, build_model, read_checkpoint
from export.checkpoint.reference import Reference, TextOrPair
from export.checkpoint.tokenizer import load_tokenizer
from export.graph.merged import check_mergeable, merge
from export.manifest import Signature, read_signature
from export.model_source import read_imported_model
from graphs.values import first_difference
from service.artifact import Head, Task, TextTask, labels_of


@dataclass(frozen=True)
class Classifier:
    """A checkpoint as it was read."""

    checkpoint: Checkpoint
    model: Any
    """The torch model, or the ImportedModel of a folder with an ONNX graph."""
    tokenizer: PreTrainedTokenizerFast
    signature: Signature


def read_classifier(
    source: str, revision: str | None, task: Task | None, keep_decoder: bool = False
) -> Classifier:
    """Read a checkpoint; raise BadInput or Unavailable if it cannot be exported."""
    checkpoint = read_checkpoint(source, revision)
    model = read_imported_model(checkpoint) or build_model(checkpoint, keep_decoder)
    tokenizer = load_tokenizer(checkpoint.directory)
    signature = read_signature(checkpoint, model.config, tokenizer, task)
    return Classifier(checkpoint, model, tokenizer, signature)


def joined_signature(classifiers: Mapping[str, Classifier]) -> Signature:
    """Return the signature of a model with these heads, by name.

    Raises BadInput if one labels tokens, or if they do not read texts in the same way.
    """
    [first, *_] = classifiers.values()
    for name, classifier in classifiers.items():
        signature = classifier.signature
        if signature.task == "token_labels":
            raise BadInput(
                f"The head {name} labels tokens; only heads that label whole texts can share an"
                " encoder. Export it by itself."
            )
        for what, value, other in (
            ("family", classifier.model.config.model_type, first.model.config.model_type),
            ("length limit", signature.max_tokens, first.signature.max_tokens),
            ("truncation side", signature.truncation_side, first.signature.truncation_side),
            ("tokenizer", _rules(classifier), _rules(first)),
        ):
            if value != other:
                values = "" if what == "tokenizer" else f": {value} and {other}"
                raise BadInput(
                    f"{classifier.checkpoint.directory} and {first.checkpoint.directory} differ in"
                    f" their {what}{values}. Heads of one model read texts in the same way."
                )
    heads = _describe_heads(classifiers)
    return Signature(
        task="heads",
        labels=labels_of(heads),
        activation=None,
        max_tokens=first.signature.max_tokens,
        truncation_side=first.signature.truncation_side,
        heads=heads,
    )


def _rules(classifier: Classifier) -> str:
    """Return what decides how a tokenizer reads a text.

    The service truncates and pads by itself, so what a training script left of that is no part.
    """
    rules = json.loads(classifier.tokenizer.backend_tokenizer.to_str())
    return json.dumps(rules | {"truncation": None, "padding": None}, sort_keys=True)


def _describe_heads(classifiers: Mapping[str, Classifier]) -> dict[str, Head]:
    """Return what the manifest states of each head, by name."""
    return {
        name: Head(
            task=cast(TextTask, each.signature.task),
            labels=each.signature.labels,
            activation=each.signature.activation,
            checkpoint=each.checkpoint.directory.resolve().name,
            checkpoint_sha256=each.checkpoint.weights_sha256(),
        )
        for name, each in classifiers.items()
    }


def merge_graphs(graphs: Mapping[str, Path], target: Path, labels: int) -> int:
    """Write the graph of a model with several heads, and remove the graphs of each, by head.

    `labels` is the number of labels of all heads. Return how many weights the heads after the first
    one add. Raises BadInput if the encoders are not the same, with the place where they differ.
    """
    [first, *others] = graphs
    models = [onnx.load(path) for path in graphs.values()]
    check_mergeable(models, list(graphs))
    for name in others:
        place = first_difference(graphs[first], graphs[name])
        if place is not None:
            raise BadInput(
                f"The encoders of the heads {first} and {name} differ, first in {place}. Heads"
                " share an encoder that was frozen while they were trained; export the checkpoints"
                " one by one otherwise."
            )
    merged = merge(models, list(graphs), labels)
    onnx.save(merged, target)
    for path in graphs.values():
        path.unlink()
    weights = [each for each in merged.graph.initializer if each.name.startswith("heads.")]
    return sum(math.prod(each.dims) for each in weights)


class HeadsReference(Reference):
    """The references of several heads, whose logits are put side by side."""

    def __init__(self, references: Sequence[Reference]) -> None:
        self.references = references
        [first, *_] = references
        self.engine = first.engine
        self.can_emulate_bf16 = all(each.can_emulate_bf16 for each in references)
        self.tokenizer = first.tokenizer
        self.max_tokens = first.max_tokens
        self.embedding_rows = first.embedding_rows
        self.labels_tokens = False

    def in_bf16(self) -> HeadsReference:
        """Return a copy with weights and arithmetic in bf16."""
        return HeadsReference([each.in_bf16() for each in self.references])

    def logits(self, texts: Sequence[TextOrPair]) -> npt.NDArray[np.float32]:
        """Return the logits of each text run alone, (texts, labels of all heads)."""
        return np.concatenate([each.logits(texts) for each in self.references], axis=1)

    def encode(self, text: TextOrPair) -> dict[str, npt.NDArray[np.int64]]:
        """Return the model's inputs for a text, as the first head reads it."""
        return self.references[0].encode(text)
