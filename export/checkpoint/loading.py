"""
Reads a Hugging Face classifier and parts its encoder from the decoder it was pretrained with.

Only safetensors are read, never a pickle. What does not fit is refused by the tensor's name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from command import BadInput, BadUsage, Unavailable, first_line
from export.checkpoint.config import plain_functions, read_config
from export.checkpoint.tokenizer import SLOW_TOKENIZERS
from service.artifact import sha256

DECODER_PREFIX = "pretraining_decoder."
# Output layers of pretraining, which some trainers leave in a classifier's file.
PRETRAINING_HEADS = ("cls.", "lm_head.", "generator_predictions.", "discriminator_predictions.")
# What a wrapper leaves before every name: torch.compile, DataParallel and DistributedDataParallel,
# a trainer's own module.
WRAPPERS = ("_orig_mod.", "module.", "model.")
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
# Families whose layers are BERT's, by the names of their parameters.
BERT_LAYERED = ("bert", "electra", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Left:
    """What export leaves out of the checkpoint."""

    design: str
    layers: int
    parameters: int
    share_of_file: float
    other_tensors: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A classifier as its file holds it, decoder and all."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    renamed: bool = False
    """Whether its file has other names for them, with a wrapper's before each."""

    def weights_sha256(self) -> str:
        """Of model.safetensors, or of its shards' digests in their order."""
        if (self.directory / WEIGHTS).is_file():
            return sha256(self.directory / WEIGHTS)
        return hashlib.sha256(
            "".join(sha256(self.directory / name) for name in _shards(self.directory)).encode()
        ).hexdigest()

    @property
    def design(self) -> str | None:
        described = self.config.get("pretraining_decoder")
        return None if described is None else str(described.get("design", "unnamed"))

    @property
    def decoder(self) -> dict[str, Tensor]:
        return {
            name: tensor for name, tensor in self.tensors.items() if name.startswith(DECODER_PREFIX)
        }

    @property
    def decoder_layers(self) -> int:
        found = {
            m[1]
            for name in self.decoder
            if (m := re.match(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.", name))
        }
        return len(found)

    def left_out(self) -> Left:
        parameters = sum(t.numel() for t in self.decoder.values())
        size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        own = sum(t.numel() * t.element_size() for t in self.decoder.values())
        others = tuple(name for name in self.tensors if name.startswith(PRETRAINING_HEADS))
        return Left(self.design or "none", self.decoder_layers, parameters, own / size, others)


def read_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id where there is a network."""
    directory = Path(source)
    if (
        not directory.exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
        and not directory.parent.exists()
    ):
        if revision is None and (near := _near(directory)) is not None:
            raise Unavailable(
                f"{source} does not exist; did you mean {near}? If it is a hub id, say so with"
                " --revision main."
            )
        directory = _download(source, revision)
    if not directory.is_dir():
        raise Unavailable(
            f"{source} does not exist; name a folder with config.json, model.safetensors and"
            " tokenizer.json."
        )
    config = _read_described(directory)
    stored = _read_tensors(directory)
    tensors = _unwrapped(stored)
    if not (directory / "tokenizer.json").is_file() and not any(
        (directory / name).is_file() for name in SLOW_TOKENIZERS
    ):
        raise Unavailable(
            f"{directory} has no tokenizer.json; save a fast tokenizer with save_pretrained beside"
            " the model."
        )
    return Checkpoint(directory, config, tensors, tensors.keys() != stored.keys())


def _near(directory: Path) -> Path | None:
    """A folder whose name and parent's name are almost those, as where a path is misspelt."""
    for parent in get_close_matches(directory.parent.name, _folders(Path()), cutoff=0.7):
        for child in get_close_matches(directory.name, _folders(Path(parent)), n=1, cutoff=0.7):
            return Path(parent, child)
    return None


def _folders(directory: Path) -> list[str]:
    try:
        return [child.name for child in directory.iterdir() if child.is_dir()]
    except OSError:
        return []


def _read_described(directory: Path) -> dict[str, Any]:
    """What config.json says."""
    path = directory / "config.json"
    if (directory / "adapter_config.json").is_file():
        raise Unavailable(
            f"{directory} is a PEFT adapter, not a whole model; merge it first:"
            " model.merge_and_unload(), then save_pretrained."
        )
    if not path.is_file():
        raise Unavailable(
            f"{directory} has no config.json, so it is no Hugging Face checkpoint; save_pretrained"
            " writes one."
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} has no model_type.")
    if (directory / "config_setfit.json").is_file() or (directory / "model_head.pkl").is_file():
        raise Unavailable(
            f"{directory} is a SetFit model: its head is a pickle of scikit-learn's, which is never"
            " read; train a head in torch (use_differentiable_head=True) and save it as"
            " …ForSequenceClassification."
        )
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that its index names."""
    if (directory / WEIGHTS).is_file():
        return _read_file(directory / WEIGHTS)
    if not (directory / SHARDS).is_file():
        raise Unavailable(f"{directory} has no {WEIGHTS}.{_other_weights(directory)}")
    tensors: dict[str, Tensor] = {}
    for name in _shards(directory):
        tensors |= _read_file(directory / name)
    return tensors


def _shards(directory: Path) -> list[str]:
    """The files that the index of a checkpoint in shards names, in their order."""
    path = directory / SHARDS
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise BadInput(f"{path} has no weight_map that names the files.") from None
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or not (directory / name).is_file()
        ):
            raise Unavailable(f"{path} names {name!r}, which is no safetensors file beside it.")
    return names


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise Unavailable(
                f"{path} is a git-lfs pointer, not the weights themselves; fetch them: git lfs"
                " pull."
            )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be read: {error}.") from None


def _other_weights(directory: Path) -> str:
    """What there is instead of safetensors, and how they are made of it."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        return (
            f" {pickles[0]} is a pickle and is never read; save the model with"
            " safe_serialization=True."
        )
    for pattern, kind, how in (
        ("*.h5", "TensorFlow", "from_tf=True"),
        ("*.msgpack", "Flax", "from_flax=True"),
    ):
        if found := sorted(path.name for path in directory.glob(pattern)):
            return (
                f" {found[0]} is of {kind}; read it with from_pretrained(…, {how}) and call"
                " save_pretrained."
            )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others and re.match(r"model-\d+-of-\d+", others[0]):
        return (
            f" {others[0]} is one of several shards, and {SHARDS}, which says what each holds, is"
            " missing."
        )
    if others and (variant := re.fullmatch(r"model\.(\w+)\.safetensors", others[0])):
        return (
            f" {others[0]} is another variant of the weights; read it with from_pretrained(…,"
            f" variant={variant[1]!r}) and call save_pretrained, or rename it."
        )
    if others:
        return (
            f" {others[0]} is no name that transformers looks for; rename it if it holds the whole"
            " model."
        )
    if next(directory.glob("**/*.onnx"), None) is not None:
        return " An ONNX graph cannot be exported again; save the torch model that it was made of."
    return " save_pretrained writes it."


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have without a wrapper around the whole model."""
    for wrapper in WRAPPERS:
        # A head without a wrapper beside a body with one, as ModernBERT's, shows that it is the
        # family's own name.
        while tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def build_model(checkpoint: Checkpoint, keep_decoder: bool = False) -> nn.Module:
    """The classifier in fp32, without its decoder; or with it as further encoder layers, as the
    proof's control.
    """
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    if keep_decoder:
        if not checkpoint.decoder_layers:
            raise BadUsage(
                f"{checkpoint.directory} (design {checkpoint.design or 'none'}) adds no layers that"
                " could be kept."
            )
        if checkpoint.config["model_type"] not in BERT_LAYERED:
            raise BadUsage(
                f"{checkpoint.directory}: its decoder's layers are BERT's and its encoder's are not"
                f" ({checkpoint.config['model_type']}), so it adds no layers that could be kept."
            )
    config = read_config(
        checkpoint.directory, checkpoint.config, checkpoint.decoder_layers if keep_decoder else 0
    )
    try:
        # Every family has the plain form of attention, and only in that form do equal encoders have
        # equal graphs.
        with plain_functions():
            model = AutoModelForSequenceClassification.from_config(
                config, attn_implementation="eager"
            )
    except Exception as error:  # A config may be wrong in as many ways as there are models.
        raise BadInput(
            f"{checkpoint.directory / 'config.json'} describes no classifier that can be built:"
            f" {first_line(error)}"
        ) from None
    if keep_decoder:
        depth = config.num_hidden_layers - checkpoint.decoder_layers
        for name, tensor in checkpoint.decoder.items():
            placed = re.fullmatch(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.(.+)", name)
            if placed is None:
                # What belongs to no layer, as the autoencoder's mask, has no place in an encoder.
                continue
            layer, rest = placed.groups()
            tensors[f"{model.base_model_prefix}.encoder.layer.{depth + int(layer)}.{rest}"] = (
                tensor.float()
            )
    built: nn.Module = _filled(model, tensors, checkpoint.directory).float().eval()
    return built


def _filled(model: Any, tensors: dict[str, Tensor], directory: Path) -> nn.Module:
    """The model with the checkpoint's weights, as transformers places them; BadInput if one is
    missing, broken or of another shape.
    """
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise BadInput(
                f"{directory}: {name} has shape {list(tensor.shape)}, its config.json asks for"
                f" {list(wanted[name].shape)}."
            )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadInput(f"{directory}: {broken[0]} holds NaN or infinity.")
    try:
        with plain_functions(), quiet():
            filled, found = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # Weights may not fit in as many ways as there are models.
        raise BadInput(
            f"{directory}: its weights do not fit its config.json: {first_line(error)}"
        ) from None
    missing = sorted(found["missing_keys"])
    heads = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise BadInput(
            f"{directory} has no classification head ({heads[-1]}), so it is a pretrained body"
            " only; fine-tune it first: python -m training.finetune."
        )
    if missing:
        raise BadInput(
            f"{directory} lacks the tensor {missing[0]}, which its config.json asks for."
        )
    dropped = sorted(
        name
        for name in found["unexpected_keys"]
        if not name.startswith((DECODER_PREFIX, *PRETRAINING_HEADS))
    )
    if dropped:
        few = ", ".join(dropped[:4]) + (", …" if len(dropped) > 4 else "")
        print(
            f"{directory}: drops {len(dropped)} tensors that {type(model).__name__} has no place"
            f" for, as transformers does: {few}",
            flush=True,
        )
    return cast(nn.Module, filled)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own warnings off: what they say is said here, or refused."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", *SLOW_TOKENIZERS, "merges.txt"],
            )
        )
    except Exception as error:
        raise Unavailable(
            f"{hub_id} is no folder, and the hub did not give it: {first_line(error)}"
        ) from None
