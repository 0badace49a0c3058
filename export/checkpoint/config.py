"""
A checkpoint's config.json for the transformers that is installed: what transformers 5 calls
otherwise is translated, and nothing is passed over that may change answers.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import InvalidVersion, Version
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from command import BadInput, first_line

# They say where a checkpoint comes from, or are read by others.
HARMLESS = {
    "_name_or_path",
    "_num_labels",
    "adapters",
    "architectures",
    "auto_map",
    "cls_token_id",
    "dtype",
    "finetuning_task",
    "language",
    "mask_token_id",
    "model_type",
    "name",
    "pretraining_decoder",
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "setfit",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
}
# Not what the encoder computes, and not passed on: how weights are stored, forms of the answer that
# the graph has none of, and the feed-forward layers in pieces, which save memory and change
# nothing.
LEFT_OUT = (
    "pretraining_decoder",
    "torch_dtype",
    "dtype",
    "torchscript",
    "return_dict",
    "use_return_dict",
    "output_attentions",
    "output_hidden_states",
    "auto_map",
    "chunk_size_feed_forward",
    "transformers_weights",
)
NOT_DECODERS = ("xlnet",)
# What the name of a class for something else ends in. A body or a masked language model may have
# been given a classifier's head.
OTHER_TASKS = (
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForNextSentencePrediction",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
    "ForAudioClassification",
)


UNREADABLE = (sys.maxsize,)
"""What stands for a version that is none, beyond all that there are."""


@contextmanager
def plain_functions() -> Iterator[None]:
    """Modules imported within keep as plain functions what they would compile: compiled ones, as
    DeBERTa's, leave branches in a graph.
    """
    compiling = torch.jit.script
    torch.jit.script = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.script = compiling


def read_config(directory: Path, described: dict[str, Any], depth: int = 0) -> PretrainedConfig:
    """The config as transformers makes it, with `depth` more layers.

    BadInput if it asks for something else than a classifier of sequences, or was saved by a newer
    transformers with a field that the installed one does not know.
    """
    path = directory / "config.json"
    _check_architecture(path, described)
    described = {name: value for name, value in described.items() if name not in LEFT_OUT}
    positions = str(described.get("position_embedding_type"))
    if (
        positions.startswith("relative_key")
        and (5, 0) <= _saved_by(described) < UNREADABLE
        and described["model_type"] != "esm"
    ):
        # Its weights are not in the file either.
        print(
            f"{path}: passes over position_embedding_type {positions}, as transformers 5 does,"
            " which saved it.",
            flush=True,
        )
        del described["position_embedding_type"]
    if described["model_type"] == "modernbert":
        described = _modernbert_of_4(path, described)
    if described["model_type"] not in CONFIG_MAPPING:
        raise BadInput(
            f"{path} describes no classifier that can be built: transformers"
            f" {transformers.__version__} knows no family {described['model_type']!r}."
        )
    try:
        kind = type(AutoConfig.for_model(described["model_type"]))
    except Exception as error:  # A family's own default may raise anything.
        raise BadInput(
            f"{path} describes no classifier that can be built: {first_line(error)}"
        ) from None
    described = _rope_of_4(path, described, kind)
    _check_fields(path, described, kind)
    _check_labels(path, described)
    if depth:
        described = described | {"num_hidden_layers": described["num_hidden_layers"] + depth}
    try:
        return kind.from_dict(described)
    except Exception as error:  # A config may be wrong in as many ways as there are models.
        raise BadInput(
            f"{path} describes no classifier that can be built: {first_line(error)}"
        ) from None


def _check_architecture(path: Path, described: dict[str, Any]) -> None:
    """Refuses what is no classifier of sequences by its own word, or is code of its own."""
    architectures, code, family = (
        described.get(field) for field in ("architectures", "auto_map", "model_type")
    )
    for field, value, kind in (
        ("architectures", architectures, list),
        ("auto_map", code, dict),
        ("layer_types", described.get("layer_types"), list),
    ):
        if value is not None and not isinstance(value, kind):
            raise BadInput(
                f"{path}: {field} is {value!r}; it is {'a list' if kind is list else 'an object'}."
            )
    name = architectures[0] if architectures else None
    if "quantization_config" in described:
        raise BadInput(
            f"{path} has a quantization_config: its weights are in fewer bits. Export the model"
            " that it was made of; cpu-int8 is made by export."
        )
    if (code or {}).keys() & {"AutoModel", "AutoModelForSequenceClassification", "AutoConfig"}:
        raise BadInput(
            f"{path} names code of the checkpoint's own (auto_map), which is never run; only the"
            " model classes of transformers are exported."
        )
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in (
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *NOT_DECODERS,
    ):
        raise BadInput(
            f"{path} is of the family {family}, a decoder: it reads a text from left to right and"
            " classifies by its last token. Only encoders are served, as BERT."
        )
    if described.get("is_encoder_decoder") or family in (
        "bart",
        "mbart",
        "t5",
        "mt5",
        "umt5",
        "led",
        "bigbird_pegasus",
        "plbart",
    ):
        raise BadInput(
            f"{path} is of the family {family}, an encoder with a decoder behind it. Only encoders"
            " are served, as BERT."
        )
    if isinstance(name, str) and name.endswith(OTHER_TASKS) and hasattr(transformers, name):
        raise BadInput(
            f"{path} says that the model is a {name}; only classifiers of whole texts are served"
            " (…ForSequenceClassification)."
        )


def _check_fields(path: Path, described: dict[str, Any], kind: type[PretrainedConfig]) -> None:
    saved_by, newer = (
        described.get("transformers_version"),
        _saved_by(described) > Version(transformers.__version__).release[:2],
    )
    unknown = sorted(set(described) - HARMLESS - _fields(kind))
    if unknown and newer:
        raise BadInput(
            f"{path} was saved by transformers {saved_by} and has the field {unknown[0]} ="
            f" {described[unknown[0]]!r}, which transformers {transformers.__version__} does not"
            f" know for {described['model_type']}: the answers would be others. Save it with that"
            " version, or take the field out if it changes nothing."
        )
    if unknown:
        print(
            f"{path}: passes over {', '.join(unknown)}, which transformers does not know for"
            f" {described['model_type']}.",
            flush=True,
        )


def _saved_by(described: dict[str, Any]) -> tuple[int, ...]:
    """Major and minor version of the transformers that saved a config: none where it does not say,
    beyond all where that is no version.
    """
    told = described.get("transformers_version")
    try:
        return () if told is None else Version(str(told)).release[:2]
    except InvalidVersion:
        return UNREADABLE


def _fields(kind: type[PretrainedConfig]) -> set[str]:
    """The fields that a family's code knows: words in the modules of its config and its model, and
    what every config has.
    """
    modules = {inspect.getmodule(kind)}
    with plain_functions():  # It may be imported here first.
        model = AutoModelForSequenceClassification._model_mapping.get(kind, None)
    if model is not None:
        modules |= {
            inspect.getmodule(base)
            for base in model.__mro__
            if base.__module__.startswith("transformers.models.")
        }
    words = {
        word
        for module in modules
        if module is not None
        for word in re.findall(r"\w+", inspect.getsource(module))
    }
    every = set(PretrainedConfig().to_dict()) | set(
        re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(PretrainedConfig))
    )
    return words | every


def _check_labels(path: Path, described: dict[str, Any]) -> None:
    labels = described.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, dict):
        raise BadInput(f"{path}: id2label is no object from numbers to names.")
    try:
        numbers = sorted(int(number) for number in labels)
    except (TypeError, ValueError):
        raise BadInput(
            f"{path}: id2label has a class that is no number: {next(iter(labels))!r}."
        ) from None
    if numbers != list(range(len(numbers))):
        raise BadInput(
            f"{path}: id2label numbers its {len(numbers)} classes"
            f" {', '.join(map(str, numbers[:10]))}; they must be 0 to {len(numbers) - 1}, one for"
            " each of the head's outputs."
        )


def _modernbert_of_4(path: Path, described: dict[str, Any]) -> dict[str, Any]:
    """ModernBERT's fields by the names that transformers 4 has for them."""
    described = dict(described)
    ropes = described.pop("rope_parameters", None)
    if ropes is not None:
        for kind, name, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        ):
            described[name] = _theta(
                path, ropes.get(kind, {}) if isinstance(ropes, dict) else ropes, default
            )
    layers = described.pop("layer_types", None)
    if layers is not None:
        periods = range(1, len(layers) + 1)
        every = next((n for n in periods if layers == _layer_types(n, len(layers))), None)
        if every is None:
            raise BadInput(
                f"{path}: layer_types does not have full_attention in every n-th layer, beginning"
                f" with the first; transformers {transformers.__version__} knows no other order."
            )
        described["global_attn_every_n_layers"] = every
    return described


def _layer_types(every: int, layers: int) -> list[str]:
    """Return ModernBERT's layer types with full attention in every so many-th layer."""
    return ["sliding_attention" if place % every else "full_attention" for place in range(layers)]


def _rope_of_4(
    path: Path, described: dict[str, Any], kind: type[PretrainedConfig]
) -> dict[str, Any]:
    """The base of rotary positions by the name that transformers 4 has for it, where the family has
    it.
    """
    if (
        "rope_parameters" not in described
        or "rope_theta" not in _fields(kind)
        or "rope_parameters" in _fields(kind)
    ):
        return described
    described = dict(described)
    described["rope_theta"] = _theta(path, described.pop("rope_parameters"))
    return described


def _theta(path: Path, rope: Any, default: float | None = None) -> float:
    """The base in one of transformers 5's rope_parameters, or its default where there is one."""
    theta = rope.get("rope_theta", default) if isinstance(rope, dict) else None
    if (
        not isinstance(theta, int | float)
        or rope.get("rope_type", "default") != "default"
        or not rope.keys() <= {"rope_type", "rope_theta"}
    ):
        raise BadInput(
            f"{path}: rope_parameters are {rope!r}; only those with a rope_theta and of the type"
            " default can be exported."
        )
    return float(theta)
