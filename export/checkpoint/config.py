"""
Reads a checkpoint's config.json for the installed transformers.

Fields that transformers 5 names differently are translated. A field that may change answers is
never ignored.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
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
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from command import BadInput, first_line

HARMLESS_FIELDS = {
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
"""Fields about a checkpoint's origin, or for other programs, which change no answer."""
REMOVED_FIELDS = (
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
"""Fields that are removed before transformers reads them, because they do not change what the
encoder computes: how weights are stored, forms of the output that a graph does not have, and
feed-forward layers in chunks, which only save memory.
"""
CAUSAL_ENCODERS = ("xlnet",)
"""Families with a causal language model, but no masked one, that are encoders nevertheless."""
ENCODER_DECODERS = ("bart", "mbart", "t5", "mt5", "umt5", "led", "bigbird_pegasus", "plbart")
# A body or a masked language model may have a classifier's head in its file, so it is not listed.
OTHER_TASKS = (
    "ForMultipleChoice",
    "ForQuestionAnswering",
    "ForNextSentencePrediction",
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForImageClassification",
    "ForAudioClassification",
)
"""Suffixes of the class names of models that do not classify texts or their tokens."""
TOKEN_LABELS = "ForTokenClassification"
"""Suffix of the class names of models that label tokens."""
UNREADABLE_VERSION = (sys.maxsize,)
"""Version of a config whose transformers_version cannot be parsed; newer than any other."""


@contextmanager
def plain_functions() -> Iterator[None]:
    """Disable torch.jit.script for modules that are imported in the block.

    Compiled functions, such as DeBERTa's, leave branches in a graph.
    """
    script = torch.jit.script
    torch.jit.script = lambda function, *_, **__: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.script = script


def read_config(directory: Path, fields: dict[str, Any], extra_layers: int = 0) -> PretrainedConfig:
    """Return transformers' config for the `fields` of config.json, with `extra_layers` added.

    Raises BadInput if it does not describe a sequence classifier, or if a newer transformers saved
    it with a field that the installed one does not know.
    """
    path = directory / "config.json"
    _check_architecture(path, fields)
    fields = {name: value for name, value in fields.items() if name not in REMOVED_FIELDS}
    fields = _without_ignored_positions(path, fields)
    family = fields["model_type"]
    if family == "modernbert":
        fields = _translate_modernbert(path, fields)
    if family not in CONFIG_MAPPING:
        raise BadInput(
            f"{path} describes no classifier that can be built: transformers"
            f" {transformers.__version__} knows no family {family!r}."
        )
    try:
        config_class = type(AutoConfig.for_model(family))
    except Exception as error:  # A family's own default may raise anything.
        raise BadInput(
            f"{path} describes no classifier that can be built: {first_line(error)}"
        ) from None
    fields = _translate_rope(path, fields, config_class)
    _check_fields(path, fields, config_class)
    _check_labels(path, fields)
    if extra_layers:
        fields = fields | {"num_hidden_layers": fields["num_hidden_layers"] + extra_layers}
    try:
        return config_class.from_dict(fields)
    except Exception as error:  # The code of any family may raise anything for a wrong config.
        raise BadInput(
            f"{path} describes no classifier that can be built: {first_line(error)}"
        ) from None


def _check_architecture(path: Path, fields: dict[str, Any]) -> None:
    """Raise BadInput for a model that is not an encoder with a classifier, or needs own code."""
    _check_types(path, fields)
    family = fields.get("model_type")
    if "quantization_config" in fields:
        raise BadInput(
            f"{path} has a quantization_config: its weights are quantised already. Export the model"
            " that it was made from; export itself builds cpu-int8."
        )
    code = fields.get("auto_map") or {}
    own_models = {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"}
    if code.keys() & {"AutoModel", "AutoConfig", *own_models}:
        raise BadInput(
            f"{path} requires code of the checkpoint's own (auto_map), which is never run; only the"
            " model classes of transformers can be exported."
        )
    if family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in (
        *MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *CAUSAL_ENCODERS,
    ):
        raise BadInput(
            f"{path} is of the family {family}, a decoder: it reads a text from left to right and"
            " classifies by its last token. Only encoders, such as BERT, can be exported."
        )
    if fields.get("is_encoder_decoder") or family in ENCODER_DECODERS:
        raise BadInput(
            f"{path} is of the family {family}, an encoder with a decoder. Only encoders, such as"
            " BERT, can be exported."
        )
    architectures = fields.get("architectures")
    name = architectures[0] if architectures else None
    if isinstance(name, str) and name.endswith(OTHER_TASKS) and hasattr(transformers, name):
        raise BadInput(
            f"{path} states that the model is a {name}; only classifiers of texts"
            " (…ForSequenceClassification) and of tokens (…ForTokenClassification) can be exported."
        )


def labels_tokens(fields: Mapping[str, Any]) -> bool:
    """Return whether config.json is that of a model that labels tokens."""
    architectures = fields.get("architectures")
    name = architectures[0] if architectures else None
    return isinstance(name, str) and name.endswith(TOKEN_LABELS)


def auto_class(fields: Mapping[str, Any]) -> Any:
    """Return the class by which transformers loads a classifier with this config.json."""
    if labels_tokens(fields):
        return AutoModelForTokenClassification
    return AutoModelForSequenceClassification


def _check_types(path: Path, fields: dict[str, Any]) -> None:
    """Raise BadInput if a field that export itself reads has the wrong type."""
    for name, expected, noun in (
        ("architectures", list, "a list"),
        ("auto_map", dict, "an object"),
        ("layer_types", list, "a list"),
    ):
        value = fields.get(name)
        if value is not None and not isinstance(value, expected):
            raise BadInput(f"{path}: {name} is {value!r}; it must be {noun}.")


def _without_ignored_positions(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Remove relative positions that transformers 5 saved but does not compute.

    Their weights are not in the file either.
    """
    positions = str(fields.get("position_embedding_type"))
    if (
        not positions.startswith("relative_key")
        or not (5, 0) <= _saved_by(fields) < UNREADABLE_VERSION
        or fields["model_type"] == "esm"
    ):
        return fields
    print(
        f"{path}: ignores position_embedding_type {positions}, as transformers 5 does, which saved"
        " it.",
        flush=True,
    )
    return {name: value for name, value in fields.items() if name != "position_embedding_type"}


def _check_fields(path: Path, fields: dict[str, Any], config_class: type[PretrainedConfig]) -> None:
    """Report unknown fields, or raise BadInput if a newer transformers saved them."""
    unknown = sorted(set(fields) - HARMLESS_FIELDS - _known_fields(config_class))
    if not unknown:
        return
    family = fields["model_type"]
    if _saved_by(fields) > Version(transformers.__version__).release[:2]:
        raise BadInput(
            f"{path} was saved by transformers {fields.get('transformers_version')} and has the"
            f" field {unknown[0]} = {fields[unknown[0]]!r}, which transformers"
            f" {transformers.__version__} does not know for {family}: the answers may differ. Save"
            f" it with transformers {transformers.__version__}, or remove the field if it changes"
            " nothing."
        )
    print(
        f"{path}: ignores {', '.join(unknown)}, which transformers does not know for {family}.",
        flush=True,
    )


def _saved_by(fields: dict[str, Any]) -> tuple[int, ...]:
    """Return the major and minor version of the transformers that saved a config.

    The tuple is empty if the config has no version, and UNREADABLE_VERSION if it cannot be parsed.
    """
    version = fields.get("transformers_version")
    try:
        return () if version is None else Version(str(version)).release[:2]
    except InvalidVersion:
        return UNREADABLE_VERSION


def _known_fields(config_class: type[PretrainedConfig]) -> set[str]:
    """Return the fields that a family may read.

    They are all words in the source of its config and its model, and the fields of any config.
    """
    modules = {inspect.getmodule(config_class)}
    with plain_functions():  # The model's module may be imported here first.
        model = AutoModelForSequenceClassification._model_mapping.get(config_class, None)
    if model is not None:
        modules |= {
            inspect.getmodule(base)
            for base in model.__mro__
            if base.__module__.startswith("transformers.models.")
        }
    fields = set(PretrainedConfig().to_dict())
    fields |= set(re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(PretrainedConfig)))
    for module in modules:
        if module is not None:
            fields |= set(re.findall(r"\w+", inspect.getsource(module)))
    return fields


def _check_labels(path: Path, fields: dict[str, Any]) -> None:
    """Raise BadInput unless id2label numbers the classes from 0 without a gap."""
    labels = fields.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, dict):
        raise BadInput(f"{path}: id2label is not an object; it must map numbers to names.")
    numbers = []
    for key in labels:
        try:
            numbers.append(int(key))
        except (TypeError, ValueError):
            raise BadInput(
                f"{path}: id2label maps {key!r} to a name; it must map numbers to names."
            ) from None
    numbers.sort()
    if numbers != list(range(len(numbers))):
        raise BadInput(
            f"{path}: id2label numbers its {len(numbers)} classes"
            f" {', '.join(map(str, numbers[:10]))}; they must be 0 to {len(numbers) - 1}, one for"
            " each output of the head."
        )


def _translate_modernbert(path: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Return ModernBERT's fields under the names that transformers 4 has for them."""
    fields = dict(fields)
    ropes = fields.pop("rope_parameters", None)
    if ropes is not None:
        for layer_type, name, default in (
            ("full_attention", "global_rope_theta", 160_000.0),
            ("sliding_attention", "local_rope_theta", 10_000.0),
        ):
            rope = ropes.get(layer_type, {}) if isinstance(ropes, dict) else ropes
            fields[name] = _rope_theta(path, rope, default)
    layers = fields.pop("layer_types", None)
    if layers is not None:
        periods = range(1, len(layers) + 1)
        period = next((n for n in periods if layers == _layer_types(n, len(layers))), None)
        if period is None:
            raise BadInput(
                f"{path}: layer_types does not have full_attention in every n-th layer, starting"
                f" with the first; transformers {transformers.__version__} supports no other order."
            )
        fields["global_attn_every_n_layers"] = period
    return fields


def _layer_types(period: int, layers: int) -> list[str]:
    """Return ModernBERT's layer types with full attention in every `period`-th layer."""
    return ["sliding_attention" if index % period else "full_attention" for index in range(layers)]


def _translate_rope(
    path: Path, fields: dict[str, Any], config_class: type[PretrainedConfig]
) -> dict[str, Any]:
    """Return the fields with the base of rotary positions under transformers 4's name.

    Families that know rope_parameters, or have no rope_theta, keep their fields.
    """
    if "rope_parameters" not in fields:
        return fields
    known = _known_fields(config_class)
    if "rope_theta" not in known or "rope_parameters" in known:
        return fields
    fields = dict(fields)
    fields["rope_theta"] = _rope_theta(path, fields.pop("rope_parameters"))
    return fields


def _rope_theta(path: Path, rope: Any, default: float | None = None) -> float:
    """Return the base in one of transformers 5's rope_parameters, or the default."""
    theta = rope.get("rope_theta", default) if isinstance(rope, dict) else None
    if (
        not isinstance(theta, int | float)
        or rope.get("rope_type", "default") != "default"
        or not rope.keys() <= {"rope_type", "rope_theta"}
    ):
        raise BadInput(
            f"{path}: rope_parameters are {rope!r}; only a rope_theta with the rope_type default"
            " can be exported."
        )
    return float(theta)
