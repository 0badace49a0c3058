"""
Reads and writes checkpoints (Hugging Face folders of safetensors) and the progress of a run.

Nothing here writes or reads a pickle. Progress is replaced as a whole, so an interrupted save
leaves the previous one.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
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
    # transformers has no pretraining class for ConvBERT: the file holds the detector's head too.
    ("electra", "rtd"): "ElectraForPreTraining",
    ("convbert", "rtd"): "ConvBertModel",
}
# Names of BERT's output layer in the other families.
OUTPUT_LAYER_NAMES = {
    "cls.predictions.transform.": "generator_predictions.",
    "cls.predictions.bias": "generator_lm_head.bias",
}
GENERATOR = ("generator.", "generator_predictions.")


def save_pretrained(model: nn.Module, config: Config, tokenizer: Path, directory: Path) -> None:
    """Write config.json, model.safetensors (fp32) and the tokenizer of a pretrained model.

    A generator is not written.
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
    for prefix, replacement in OUTPUT_LAYER_NAMES.items():
        if name.startswith(prefix):
            return name.replace(prefix, replacement, 1)
    return name


def copy_tokenizer(source: Path, directory: Path, max_tokens: int) -> None:
    """Write tokenizer.json and tokenizer_config.json; longer texts than `max_tokens` are cut."""
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
    """Return the config.json and the tensors of a checkpoint.

    Raises Unavailable if a file is missing, BadInput if one is broken.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / name).is_file():
            raise Unavailable(f"{directory} is not a checkpoint: it has no {name}.")
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return config, load_file(directory / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise BadInput(f"{directory} cannot be read: {error}.") from None


class WeightSum:
    """The sum of a model's weights at several steps, whose mean is the checkpoint's."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """Add the model's weights of now."""
        self.count += 1
        for name, weight in model.state_dict().items():
            now = weight.detach().cpu()
            self._sums[name] = self._sums[name] + now if name in self._sums else now.clone()

    def load_mean(self, model: nn.Module) -> None:
        """Give the model the mean of the weights that were added."""
        model.load_state_dict({name: total / self.count for name, total in self._sums.items()})

    def save(self, directory: Path) -> None:
        """Write the sum into the folder of a run's progress; without one nothing is written."""
        if self.count:
            count = torch.tensor(self.count)
            save_file({**contiguous(self._sums), "count": count}, directory / "sum.safetensors")

    @classmethod
    def load(cls, directory: Path) -> WeightSum:
        """Return the sum that is in the folder of a run's progress."""
        weights = cls()
        if (directory / "sum.safetensors").is_file():
            weights._sums = load_file(directory / "sum.safetensors")
            weights.count = int(weights._sums.pop("count"))
        return weights


def save_progress(
    directory: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    weights: WeightSum,
    progress: Mapping[str, Any],
) -> None:
    """Write all that a run resumes from: weights and moments as safetensors, the rest as JSON."""
    with atomic_directory(directory) as draft:
        weights.save(draft)
        save_file(contiguous(model.state_dict()), draft / "model.safetensors")
        names = {id(p): name for name, p in model.named_parameters()}
        moments = {
            f"{names[id(parameter)]}:{key}": value
            for parameter, state in optimiser.state.items()
            for key, value in state.items()
        }
        save_file(contiguous(moments), draft / "optimiser.safetensors")
        write_json(draft / "progress.json", dict(progress))


def read_progress(directory: Path) -> dict[str, Any]:
    """Return the step that was saved, the seconds until then, and the run's fingerprint."""
    progress: dict[str, Any] = json.loads((directory / "progress.json").read_text(encoding="utf-8"))
    return progress


def load_progress(directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Load the saved weights into the model and the saved moments into the optimiser."""
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
    """Return the tensors as safetensors needs them: contiguous and on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def library_versions() -> dict[str, str]:
    """Return the versions that training.json records."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file with an indent of 2."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
