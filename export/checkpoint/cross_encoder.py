"""
Reads what sentence-transformers stores beside a CrossEncoder's model.

Since its release 6, config_sentence_transformers.json takes precedence over config.json. Everything
in these files that changes a score is either followed or refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from command import BadInput

SETTINGS = "config_sentence_transformers.json"
MODULES = "modules.json"
TRANSFORMER = "sentence_bert_config.json"
Activation = Literal["sigmoid", "none"]
ACTIVATIONS: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "none"}
"""Activation by the class name that sentence-transformers stores for a CrossEncoder."""


def read_activation(directory: Path, config: dict[str, Any]) -> Activation | None:
    """Return the activation that a CrossEncoder's files name; None if they name none.

    `config` is the content of config.json. Raises BadInput for an activation that is not known.
    """
    settings = _settings(directory)
    path, name = directory / SETTINGS, settings.get("activation_fn")
    if name is None:
        path = directory / "config.json"
        stored = config.get("sentence_transformers")
        name = stored.get("activation_fn") if isinstance(stored, dict) else None
        name = name or config.get("sbert_ce_default_activation_function")
    if name is None:
        return None
    activation = ACTIVATIONS.get(str(name).rpartition(".")[2])
    if activation is None:
        raise BadInput(
            f"{path}: the activation of its CrossEncoder is {name!r}; only"
            f" {' and '.join(ACTIVATIONS)} can be exported."
        )
    return activation


def read_max_tokens(directory: Path) -> int | None:
    """Return the limit that a CrossEncoder has in addition to the tokenizer's; None if it has none.

    It counts for CrossEncoders only: an encoder of sentences has limits of its own.
    """
    if not _is_cross_encoder(_settings(directory)):
        return None
    limit = _read(directory / TRANSFORMER).get("max_seq_length")
    return limit if isinstance(limit, int) and not isinstance(limit, bool) else None


def check_scores(directory: Path) -> None:
    """Raise BadInput if a CrossEncoder changes its texts or its scores in a way that is not served.

    That is a default prompt, which is put before the texts, lower-casing outside of the tokenizer,
    other settings of the tokenizer, and modules behind the model.
    """
    settings = _settings(directory)
    if not _is_cross_encoder(settings):
        return
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts")
    if name is not None and isinstance(prompts, dict) and prompts.get(name):
        raise BadInput(
            f"{directory / SETTINGS}: default_prompt_name is {name!r}, so its CrossEncoder puts"
            f" {prompts[name]!r} before every text, and the service would not. Set it to null, and"
            " send the prompt with the texts."
        )
    transformer = _read(directory / TRANSFORMER)
    for field in ("do_lower_case", "processing_kwargs"):
        if transformer.get(field):
            raise BadInput(
                f"{directory / TRANSFORMER}: {field} is {transformer[field]!r}, which changes how"
                " texts become tokens and is not served; set it in the tokenizer's own files."
            )
    modules = _read_modules(directory)
    if len(modules) > 1:
        raise BadInput(
            f"{directory / MODULES} lists {len(modules)} modules ({', '.join(modules)}); a"
            " CrossEncoder of one Transformer can be exported."
        )


def _is_cross_encoder(settings: dict[str, Any]) -> bool:
    return settings.get("model_type") == "CrossEncoder" or "activation_fn" in settings


def _settings(directory: Path) -> dict[str, Any]:
    return _read(directory / SETTINGS)


def _read_modules(directory: Path) -> list[str]:
    """Return the class names in modules.json; empty if there is none."""
    path = directory / MODULES
    if not path.is_file():
        return []
    modules = _parse(path)
    if not isinstance(modules, list):
        raise BadInput(f"{path} is no list of modules.")
    return [
        str(module.get("type")).rpartition(".")[2] for module in modules if isinstance(module, dict)
    ]


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    value = _parse(path)
    if not isinstance(value, dict):
        raise BadInput(f"{path} is no JSON object.")
    return value


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
