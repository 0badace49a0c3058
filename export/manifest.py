"""What the manifest states: task, labels, activation, limits, graph digests, files and origin."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from command import BadInput
from export.checkpoint.config import labels_tokens
from export.checkpoint.cross_encoder import (
    Activation,
    check_scores,
    read_activation,
    read_max_tokens,
)
from export.checkpoint.loading import Checkpoint
from export.checkpoint.tokenizer import read_tokenizer_config
from export.graph.onnx_file import read_inputs
from export.graph.variants import RECIPES
from graphs.canonical import split
from graphs.files import read_graph
from service.artifact import (
    MANIFEST,
    MOST_TOKENS,
    SCHEMA_VERSION,
    Dropped,
    Gate,
    Head,
    Manifest,
    Task,
    Variant,
    sha256,
    with_checksum,
)

TASKS: dict[str, Task] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
"""Task by the problem_type of a checkpoint's config.json."""
MIN_TOKENS = 3
"""Smallest length limit that leaves room for a token between the two special ones."""
FAMILIES_COUNTING_FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "xmod",
    "lilt",
    "luke",
    "markuplm",
    "layoutlmv3",
    "esm",
)
"""Families whose first position is pad_token_id + 1, so that fewer positions hold tokens."""


@dataclass(frozen=True)
class Network:
    """What the manifest states of a model itself."""

    config: Any
    """Its config, as transformers reads it."""
    parameters: int
    """Number of its weights."""


@dataclass(frozen=True)
class Signature:
    """What a classifier reads and answers, as its checkpoint states it."""

    task: Task
    """Kind of answer: one label, several labels, or numbers."""
    labels: list[str]
    """Names of the outputs, all different, in the order of the logits."""
    activation: Activation | None
    """Function that turns the logit of a single label into its score; None if the task decides."""
    max_tokens: int
    """Longest text that the model reads, in tokens, special tokens included."""
    truncation_side: Literal["right", "left"]
    """End at which the checkpoint's tokenizer cuts a text that is too long."""
    heads: dict[str, Head] = field(default_factory=dict)
    """The heads of a model with several, by name; empty for a model with one."""


def read_signature(
    checkpoint: Checkpoint, config: Any, tokenizer: PreTrainedTokenizerFast, task: Task | None
) -> Signature:
    """Return the signature of a checkpoint; `task` overrides its problem_type.

    Raises BadInput for a field that is missing, contradictory, or cannot be served.
    """
    check_scores(checkpoint.directory)
    labels = _labels(checkpoint.directory, config)
    max_tokens = _max_tokens(checkpoint, config)
    if labels_tokens(checkpoint.config):
        if task not in (None, "token_labels"):
            raise BadInput(
                f"{checkpoint.directory / 'config.json'} states that the model labels tokens"
                f" ({checkpoint.config['architectures'][0]}); leave out --task {task}."
            )
        task = "token_labels"
    task = task or _task(checkpoint.directory, config)
    return Signature(
        task=task,
        labels=labels,
        activation=_activation(checkpoint, task, len(labels)),
        max_tokens=max_tokens,
        truncation_side=tokenizer.truncation_side,
    )


def describe_artifact(
    folder: Path,
    checkpoint: Checkpoint,
    network: Network,
    signature: Signature,
    variants: Sequence[str],
    *,
    keep_decoder: bool,
    flushed_weights: int,
    provenance: dict[str, str],
) -> Manifest:
    """Return the manifest of the files in `folder`, before verification and without checksum.

    Every variant is ungated, and the model counts as padding-invariant until it is measured.
    """
    encoder, head = split(read_graph(folder / "model.onnx"))
    inputs = read_inputs(folder / "model.onnx")
    discarded = checkpoint.discarded()
    dropped = None
    if discarded.parameters and not keep_decoder:
        dropped = Dropped(
            design=discarded.design,
            layers=discarded.layers,
            parameters=discarded.parameters,
            share_of_file=round(discarded.share_of_file, 6),
        )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=checkpoint.directory.resolve().name,
        family=network.config.model_type,
        task=signature.task,
        activation=signature.activation,
        labels=signature.labels,
        takes_pairs=signature.task != "token_labels" and accepts_pairs(inputs, network.config),
        max_tokens=signature.max_tokens,
        truncation_side=signature.truncation_side,
        inputs=inputs,
        encoder_digest=encoder.digest,
        head_digest=head.digest,
        tokenizer_digest=sha256(folder / "tokenizer.json"),
        parameters=network.parameters,
        flops_per_token=encoder.flops_per_token(),
        padding_invariant=True,
        dropped=dropped,
        flushed_weights=flushed_weights,
        kept_decoder_layers=discarded.layers if keep_decoder else 0,
        variants={name: _describe_variant(folder, name) for name in variants},
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        heads=signature.heads,
        checksum="",
        provenance=provenance,
    )


def read_provenance(
    checkpoint: Checkpoint, variants: Sequence[str], reduce_range: bool
) -> dict[str, str]:
    """Return where an artifact comes from: its checkpoint, date, and package versions."""
    provenance = {
        "checkpoint": checkpoint.directory.resolve().name,
        "checkpoint_sha256": checkpoint.weights_sha256(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    if checkpoint.graph is not None:
        provenance["reference"] = "its own ONNX graph, by ONNX Runtime; not compared with torch"
    for package in _packages(variants):
        provenance[package] = importlib.metadata.version(package)
    if reduce_range and any(RECIPES[name].calibrated for name in variants):
        provenance["int8_weights"] = "7 bits"
    return provenance


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json with its checksum, and return what was written.

    It is written last: a folder without a manifest is not an artifact.
    """
    manifest = with_checksum(manifest)
    text = manifest.model_dump_json(indent=2)
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    return manifest


def accepts_pairs(inputs: Sequence[str], config: Any) -> bool:
    """Return whether the model can read a pair of texts, given the inputs of its graph."""
    # XLNet has sentence types without a field for their number.
    default = 2 if config.model_type == "xlnet" else 1
    types: int = getattr(config, "type_vocab_size", default)
    return "token_type_ids" not in inputs or types > 1


def _describe_variant(folder: Path, name: str) -> Variant:
    recipe = RECIPES[name]
    encoder, head = split(read_graph(folder / recipe.files[0]))
    return Variant(
        runtime=recipe.runtime,
        precision=recipe.precision,
        files=list(recipe.files),
        encoder_digest=encoder.digest,
        head_digest=head.digest,
        weight_bytes=encoder.weight_bytes + head.weight_bytes,
        parity=None,
        gate=Gate(status="ungated", reason="not yet verified"),
    )


def _packages(variants: Sequence[str]) -> list[str]:
    """Return the installed packages that decide the contents of an artifact."""
    packages = ["torch", "transformers", "onnx", "openvino", "nncf"]
    if any(RECIPES[name].runtime != "openvino" for name in variants):
        installed = {distribution.name for distribution in importlib.metadata.distributions()}
        packages += [name for name in ("onnxruntime", "onnxruntime-gpu") if name in installed]
    return packages


def _labels(directory: Path, config: Any) -> list[str]:
    """Return the names of the classes; raise BadInput if two have the same name."""
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    for i, label in enumerate(labels):
        if (first := labels.index(label)) < i:
            raise BadInput(
                f"{directory / 'config.json'}: the classes {first} and {i} are both called"
                f" {label!r}; give them different names in id2label."
            )
    return labels


def _task(directory: Path, config: Any) -> Task:
    if config.problem_type is None:
        return "single_label"
    if config.problem_type not in TASKS:
        raise BadInput(
            f"{directory / 'config.json'}: problem_type is {config.problem_type!r}; it must be"
            f" {', '.join(TASKS)}, or null. Correct it, or pass --task."
        )
    return TASKS[config.problem_type]


def _activation(checkpoint: Checkpoint, task: Task, labels: int) -> Activation | None:
    """Return the function of a single label's logit; None if the task decides.

    transformers, Text Embeddings Inference, vLLM and sentence-transformers' CrossEncoder apply the
    sigmoid, unless the checkpoint is a regression or names the activation of its CrossEncoder.
    """
    if labels > 1 or task != "single_label":
        return None
    return read_activation(checkpoint.directory, checkpoint.config) or "sigmoid"


def _max_tokens(checkpoint: Checkpoint, config: Any) -> int:
    """Return the smaller of the limits that the tokenizer and the positions set, in tokens."""
    directory = checkpoint.directory
    positions = _positions(directory, config)
    tokenizer_limit = read_tokenizer_config(directory).get("model_max_length")
    if positions is None and tokenizer_limit is None:
        raise BadInput(
            f"{directory}: the model has no length limit. Set max_position_embeddings in"
            " config.json, or model_max_length in tokenizer_config.json."
        )
    if tokenizer_limit is not None and (
        isinstance(tokenizer_limit, bool)
        or not isinstance(tokenizer_limit, int | float)
        or not tokenizer_limit >= MIN_TOKENS
    ):
        raise BadInput(
            f"{directory / 'tokenizer_config.json'}: model_max_length is {tokenizer_limit!r}; it"
            f" must be a number of tokens, {MIN_TOKENS} or more."
        )
    limits = (positions, tokenizer_limit, read_max_tokens(directory))
    limit = min(value for value in limits if value is not None)
    if not MIN_TOKENS <= limit <= MOST_TOKENS:
        raise BadInput(
            f"{directory}: the model reads {limit:,} tokens, by config.json"
            " (max_position_embeddings) and tokenizer_config.json (model_max_length);"
            f" {MIN_TOKENS} to {MOST_TOKENS:,} can be served. Set model_max_length to the length"
            " that the model was trained with."
        )
    _check_sparse_attention(directory, config, int(limit))
    return int(limit)


def _positions(directory: Path, config: Any) -> int | None:
    """Return how many tokens have a position; None if the family has no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or positions == -1:  # XLNet writes -1 for no limit.
        return None
    if config.model_type not in FAMILIES_COUNTING_FROM_PADDING:
        return positions
    if config.pad_token_id is None:
        raise BadInput(
            f"{directory / 'config.json'}: pad_token_id is null, but {config.model_type} counts"
            " positions from it; set it to the id of the tokenizer's padding token."
        )
    return positions - int(config.pad_token_id) - 1


def _check_sparse_attention(directory: Path, config: Any, max_tokens: int) -> None:
    """Raise BadInput for a BigBird whose attention changes within the lengths that it may read.

    Its code branches on a text's length and on earlier texts: after one short text it attends to
    everything, at any length. A graph can hold only one of the two forms.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return
    full_up_to = (5 + 2 * config.num_random_blocks) * config.block_size
    if max_tokens > full_up_to:
        raise BadInput(
            f"{directory / 'config.json'}: attention_type is block_sparse, which a"
            f" {config.model_type} uses for texts of more than {full_up_to} tokens, and this model"
            f" reads {max_tokens:,}. Set attention_type to original_full to attend to everything,"
            f" or model_max_length to {full_up_to}."
        )
