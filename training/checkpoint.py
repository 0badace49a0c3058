"""
Checkpoints: Hugging Face directories of safetensors, and what a run needs to go on as if it had
never stopped.

Nothing here writes or reads a pickle. A folder is written beside its place and
renamed, so an interrupted save leaves the previous one whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atomic import atomic_directory
from command import BadInput, Unavailable
from training.config import Config

DECODER_PREFIX = "pretraining_decoder."


ARCHITECTURES = {
    ("bert", "mlm"): "BertForMaskedLM",
    ("electra", "mlm"): "ElectraForMaskedLM",
    ("convbert", "mlm"): "ConvBertForMaskedLM",
    # transformers knows no pretraining form of ConvBERT; the detector's head lies beside the
    # encoder.
    ("electra", "rtd"): "ElectraForPreTraining",
    ("convbert", "rtd"): "ConvBertModel",
}
# What BERT's output layer is called in the other families.
RENAMED = {
    "cls.predictions.transform.": "generator_predictions.",
    "cls.predictions.bias": "generator_lm_head.bias",
}
GENERATOR = ("generator.", "generator_predictions.")


def save_pretrained(model: nn.Module, config: Config, tokenizer: Path, directory: Path) -> None:
    """Writes config.json, model.safetensors (fp32) and the tokenizer of a pretrained model into
    `directory`; a generator stays behind.
    """
    family, objective = config.encoder.family, config.objective.name
    described = model.encoder.config.to_dict()  # type: ignore[union-attr, operator]
    described["architectures"] = [ARCHITECTURES[family, objective]]
    if config.decoder.design != "none":
        described["pretraining_decoder"] = config.as_dict()["decoder"]
    weights = contiguous(model.state_dict())
    if objective == "rtd":
        weights = {
            name: tensor for name, tensor in weights.items() if not name.startswith(GENERATOR)
        }
    elif family != "bert":
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
    write_json(directory / "config.json", described)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    copy_tokenizer(tokenizer, directory, described["max_position_embeddings"])


def _renamed(name: str) -> str:
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return name


def copy_tokenizer(source: Path, directory: Path, max_tokens: int) -> None:
    shutil.copy(source / "tokenizer.json", directory / "tokenizer.json")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_tokens,
            "do_lower_case": True,
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    )


def read_checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors; Unavailable or BadInput names the file that is missing or
    broken.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise Unavailable(f"{directory} is no checkpoint: it has no {name}.")
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")), load_file(
            directory / "model.safetensors"
        )
    except (json.JSONDecodeError, SafetensorError) as error:
        raise BadInput(f"{directory} cannot be read: {error}.") from None


def save_progress(
    directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Mapping[str, Any]
) -> None:
    """Everything a run needs to resume: weights and moments as safetensors, the rest as JSON."""
    with atomic_directory(directory) as building:
        save_file(contiguous(model.state_dict()), building / "model.safetensors")
        names = {id(p): name for name, p in model.named_parameters()}
        moments = {
            f"{names[id(parameter)]}:{key}": value
            for parameter, state in optimiser.state.items()
            for key, value in state.items()
        }
        save_file(contiguous(moments), building / "optimiser.safetensors")
        write_json(building / "progress.json", dict(progress))


def read_progress(directory: Path) -> dict[str, Any]:
    """How far a run came, and what it was told."""
    progress: dict[str, Any] = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    return progress


def load_progress(directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Puts the saved weights and moments in place."""
    model.load_state_dict(load_file(directory / "model.safetensors"))
    moments = load_file(directory / "optimiser.safetensors")
    for name, parameter in model.named_parameters():
        state = {
            key.rpartition(":")[2]: value
            for key, value in moments.items()
            if key.rpartition(":")[0] == name
        }
        if state:
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in state.items()
            }


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
