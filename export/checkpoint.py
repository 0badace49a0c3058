"""
Reads a Hugging Face classifier and parts its encoder from the decoder it was pretrained with.

Only safetensors are read, never a pickle. What does not fit is refused by the tensor's name.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from command import BadInput, BadUsage, Unavailable

DECODER_PREFIX = "pretraining_decoder."
# Output layers of pretraining, which some trainers leave in a classifier's file.
PRETRAINING_HEADS = ("cls.", "lm_head.", "generator_predictions.", "discriminator_predictions.")
# What older trainers leave instead of tokenizer.json: WordPiece, byte-level BPE, SentencePiece.
SLOW_TOKENIZERS = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
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

    @property
    def design(self) -> str | None:
        described = self.config.get("pretraining_decoder")
        return None if described is None else str(described.get("design", "unnamed"))

    @property
    def decoder(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(DECODER_PREFIX)}

    @property
    def decoder_layers(self) -> int:
        found = {m[1] for name in self.decoder if (m := re.match(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.", name))}
        return len(found)

    def write_tokenizer(self, target: Path) -> None:
        """Its tokenizer.json, or what transformers makes of a vocabulary that older trainers left instead."""
        own = self.directory / "tokenizer.json"
        if own.is_file():
            try:
                Tokenizer.from_file(str(own))
            except Exception as error:  # tokenizers raises nothing narrower.
                raise BadInput(f"{own} cannot be read: {_one_line(error)}") from None
            shutil.copy(own, target)
            return
        try:
            made = AutoTokenizer.from_pretrained(self.directory, use_fast=True, local_files_only=True)
            made.backend_tokenizer.save(str(target))
        except ImportError as error:
            raise Unavailable(f"{self.directory}: its tokenizer has to be converted, and that takes another package: {_one_line(error)}") from None
        except Exception as error:  # A conversion fails in as many ways as there are tokenizers.
            raise BadInput(f"{self.directory} has no tokenizer.json, and none can be made of its vocabulary: {_one_line(error)}") from None
        print(f"{self.directory} has no tokenizer.json: made one of its vocabulary ({type(made).__name__}).", flush=True)

    def left_out(self) -> Left:
        parameters = sum(t.numel() for t in self.decoder.values())
        size = sum(t.numel() * t.element_size() for t in self.tensors.values())
        own = sum(t.numel() * t.element_size() for t in self.decoder.values())
        others = tuple(name for name in self.tensors if name.startswith(PRETRAINING_HEADS))
        return Left(self.design or "none", self.decoder_layers, parameters, own / size, others)


def read_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or of a hub id where there is a network."""
    directory = Path(source)
    if not directory.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not directory.parent.exists():
        directory = _download(source, revision)
    if not directory.is_dir():
        raise Unavailable(f"{source} does not exist; name a folder with config.json, model.safetensors and tokenizer.json.")
    if not (directory / "config.json").is_file():
        raise Unavailable(f"{directory} has no config.json, so it is no Hugging Face checkpoint; save_pretrained writes one.")
    if not (directory / "model.safetensors").is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        why = f" {pickles[0]} is a pickle and is never read; save the model with safe_serialization=True." if pickles else ""
        why = why or " A sharded checkpoint is saved as one file with max_shard_size='100GB'; others with safe_serialization=True."
        raise Unavailable(f"{directory} has no model.safetensors.{why}")
    if not (directory / "tokenizer.json").is_file() and not any((directory / name).is_file() for name in SLOW_TOKENIZERS):
        raise Unavailable(f"{directory} has no tokenizer.json; save a fast tokenizer with save_pretrained beside the model.")
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except ValueError as error:
        raise BadInput(f"{directory / 'config.json'} is not JSON: {error}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"{directory / 'config.json'} has no model_type.")
    try:
        tensors = load_file(directory / "model.safetensors")
    except SafetensorError as error:
        raise BadInput(f"{directory / 'model.safetensors'} cannot be read: {error}.") from None
    return Checkpoint(directory, config, tensors)


def build_model(checkpoint: Checkpoint, keep_decoder: bool = False) -> nn.Module:
    """The classifier in fp32, without its decoder; or with it as further encoder layers, as the proof's control."""
    described = {k: v for k, v in checkpoint.config.items() if k not in ("pretraining_decoder", "torch_dtype", "dtype")}
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in checkpoint.tensors.items()
        if not name.startswith((DECODER_PREFIX, *PRETRAINING_HEADS))
    }
    if keep_decoder:
        if not checkpoint.decoder_layers:
            raise BadUsage(f"{checkpoint.directory} (design {checkpoint.design or 'none'}) adds no layers that could be kept.")
        if described["model_type"] not in BERT_LAYERED:
            raise BadUsage(f"{checkpoint.directory}: its decoder's layers are BERT's and its encoder's are not ({described['model_type']}), so it adds no layers that could be kept.")
        depth = described["num_hidden_layers"]
        described["num_hidden_layers"] = depth + checkpoint.decoder_layers
    try:
        config = AutoConfig.for_model(**described)
        # Every family has the plain form of attention, and only in that form do equal encoders have equal graphs.
        with plain_functions():
            model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    except Exception as error:  # A config may be wrong in as many ways as there are models.
        raise BadInput(f"{checkpoint.directory / 'config.json'} describes no classifier that can be built: {_one_line(error)}") from None
    if keep_decoder:
        for name, tensor in checkpoint.decoder.items():
            placed = re.fullmatch(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.(.+)", name)
            if placed is None:
                continue    # What belongs to no layer, as the autoencoder's mask, has no place in an encoder.
            layer, rest = placed.groups()
            tensors[f"{model.base_model_prefix}.encoder.layer.{depth + int(layer)}.{rest}"] = tensor.float()
    _fit(model, tensors, checkpoint.directory)
    built: nn.Module = model.float().eval()
    return built


@contextmanager
def plain_functions() -> Iterator[None]:
    """Modules imported within keep as plain functions what they would compile: compiled ones, as DeBERTa's, leave branches in a graph."""
    compiling = torch.jit.script
    torch.jit.script = lambda function, *_, **__: function                          # type: ignore[assignment]
    try:
        yield
    finally:
        torch.jit.script = compiling


def _fit(model: nn.Module, tensors: dict[str, Tensor], directory: Path) -> None:
    wanted = model.state_dict()
    for name, tensor in tensors.items():
        if name in wanted and tensor.shape != wanted[name].shape:
            raise BadInput(
                f"{directory}: {name} has shape {list(tensor.shape)}, its config.json asks for {list(wanted[name].shape)}."
            )
    missing = [name for name in wanted if name not in tensors and not name.endswith("position_ids")]
    if any("classifier" in name for name in missing):
        raise BadInput(f"{directory} has no classification head ({missing[-1]}); fine-tune it first: python -m training.finetune.")
    if missing:
        raise BadInput(f"{directory} lacks the tensor {missing[0]}, which its config.json asks for.")
    unknown = [name for name in tensors if name not in wanted and not name.endswith("position_ids")]
    if unknown:
        raise BadInput(f"{directory} holds the tensor {unknown[0]}, which its config.json has no place for.")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadInput(f"{directory}: {broken[0]} holds NaN or infinity.")
    model.load_state_dict(tensors, strict=False)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors", *SLOW_TOKENIZERS, "merges.txt"]))
    except Exception as error:
        raise Unavailable(f"{hub_id} is no folder, and the hub did not give it: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
