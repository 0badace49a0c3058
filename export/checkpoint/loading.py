"""
Reads a Hugging Face classifier, and separates it from the decoder that it was pretrained with.

Only safetensors are read, never a pickle. A tensor that does not fit is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from command import BadInput, BadUsage, Unavailable, first_line
from export.checkpoint.config import auto_class, plain_functions, read_config
from export.checkpoint.tokenizer import SLOW_TOKENIZERS
from service.artifact import sha256
from service.checkpoints.source import SHARDS, WEIGHTS, ModelSource

DECODER_PREFIX = "pretraining_decoder."
GRAPH = "model.onnx"
"""File of a graph that was exported elsewhere."""
# Output layers of pretraining, which some trainers leave in the file of a classifier.
PRETRAINING_HEADS = ("cls.", "lm_head.", "generator_predictions.", "discriminator_predictions.")
# Prefixes that a wrapper puts before every tensor's name: torch.compile, DataParallel and
# DistributedDataParallel, and a trainer's own module.
WRAPPERS = ("_orig_mod.", "module.", "model.")
# Families whose layers have the parameter names of BERT's.
BERT_LAYER_FAMILIES = ("bert", "electra", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Discarded:
    """Parts of a checkpoint that are not exported."""

    design: str
    """Name of the decoder's design, or "none"."""
    layers: int
    """Number of layers of the decoder."""
    parameters: int
    """Number of parameters of the decoder."""
    share_of_file: float
    """Bytes of the decoder's tensors as a share of all tensors' bytes, 0 to 1."""
    other_tensors: tuple[str, ...]
    """Names of tensors that belong to a pretraining head."""


@dataclass(frozen=True)
class Checkpoint:
    """A classifier as its folder holds it, decoder included."""

    directory: Path
    """Folder of the checkpoint."""
    config: dict[str, Any]
    """Fields of config.json."""
    tensors: dict[str, Tensor]
    """Tensors by name, without the prefix of a wrapper."""
    renamed: bool = False
    """Whether the file has a wrapper's prefix before every name."""
    graph: Path | None = None
    """An ONNX graph that was exported elsewhere, if there are no tensors."""

    def weights_sha256(self) -> str:
        """Return the SHA-256 of model.safetensors, or of its shards' digests in order.

        Without tensors it is that of the graph.
        """
        if self.graph is not None:
            return sha256(self.graph)
        if (self.directory / WEIGHTS).is_file():
            return sha256(self.directory / WEIGHTS)
        digests = "".join(sha256(self.directory / name) for name in _shards(self.directory))
        return hashlib.sha256(digests.encode()).hexdigest()

    @property
    def design(self) -> str | None:
        """Name of the decoder's design; None if the config describes no decoder."""
        decoder = self.config.get("pretraining_decoder")
        return None if decoder is None else str(decoder.get("design", "unnamed"))

    @property
    def decoder(self) -> dict[str, Tensor]:
        """Tensors of the decoder, by name."""
        return {
            name: tensor for name, tensor in self.tensors.items() if name.startswith(DECODER_PREFIX)
        }

    @property
    def decoder_layers(self) -> int:
        """Number of the decoder's layers."""
        pattern = re.compile(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.")
        matches = map(pattern.match, self.decoder)
        return len({match[1] for match in matches if match is not None})

    def discarded(self) -> Discarded:
        """Return the parts of the checkpoint that are not exported."""
        decoder = list(self.decoder.values())
        return Discarded(
            design=self.design or "none",
            layers=self.decoder_layers,
            parameters=sum(tensor.numel() for tensor in decoder),
            share_of_file=_byte_size(decoder) / max(1, _byte_size(self.tensors.values())),
            other_tensors=tuple(
                name for name in self.tensors if name.startswith(PRETRAINING_HEADS)
            ),
        )


def read_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Read a checkpoint from a folder, or download it if `source` is a hub id.

    Raises Unavailable if a file is missing, and BadInput if one cannot be used.
    """
    named = ModelSource.parse(source) if revision is None else ModelSource(source, revision)
    directory = named.folder()
    if not directory.is_dir():
        raise Unavailable(
            f"{source} does not exist; pass a folder with config.json, model.safetensors and"
            " tokenizer.json."
        )
    config = _read_config(directory)
    graph = _imported_graph(directory)
    stored = {} if graph is not None else _read_tensors(directory)
    tensors = _unwrapped(stored)
    if not (directory / "tokenizer.json").is_file() and not any(
        (directory / name).is_file() for name in SLOW_TOKENIZERS
    ):
        raise Unavailable(
            f"{directory} has no tokenizer.json; save a fast tokenizer into it with"
            " save_pretrained."
        )
    return Checkpoint(directory, config, tensors, tensors.keys() != stored.keys(), graph)


def _imported_graph(directory: Path) -> Path | None:
    """Return the ONNX graph of a folder that holds no weights for torch."""
    if any(directory.glob("*.safetensors")) or any(directory.glob("pytorch_model*.bin")):
        return None
    graph = directory / GRAPH
    return graph if graph.is_file() else None


def _byte_size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _read_config(directory: Path) -> dict[str, Any]:
    """Return the fields of config.json; raise Unavailable for an adapter or a SetFit model."""
    path = directory / "config.json"
    if (directory / "adapter_config.json").is_file():
        raise Unavailable(
            f"{directory} is a PEFT adapter, not a whole model; merge it with"
            " model.merge_and_unload() and save the result with save_pretrained."
        )
    if not path.is_file():
        raise Unavailable(
            f"{directory} has no config.json, so it is not a Hugging Face checkpoint; save the"
            " model with save_pretrained."
        )
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path} has no model_type; save the model with save_pretrained.")
    if (directory / "config_setfit.json").is_file() or (directory / "model_head.pkl").is_file():
        raise Unavailable(
            f"{directory} is a SetFit model: its head is a scikit-learn pickle, which is never"
            " read; train a head in torch (use_differentiable_head=True) and save the model as"
            " …ForSequenceClassification."
        )
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors, or of the shards that its index names."""
    if (directory / WEIGHTS).is_file():
        return _read_file(directory / WEIGHTS)
    if not (directory / SHARDS).is_file():
        raise Unavailable(f"{directory} has no {WEIGHTS}.{_other_weights(directory)}")
    tensors: dict[str, Tensor] = {}
    for name in _shards(directory):
        tensors |= _read_file(directory / name)
    return tensors


def _shards(directory: Path) -> list[str]:
    """Return the file names of a sharded checkpoint, in order, as its index lists them."""
    path = directory / SHARDS
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise BadInput(
            f"{path} has no weight_map with the files; save the model with save_pretrained."
        ) from None
    for name in names:
        if (
            not isinstance(name, str)
            or Path(name).name != name
            or not name.endswith(".safetensors")
            or not (directory / name).is_file()
        ):
            raise Unavailable(
                f"{path} names {name!r}, which is not a safetensors file in its folder."
            )
    return names


def _read_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise Unavailable(
                f"{path} is a git-lfs pointer, not the weights; fetch them with git lfs pull."
            )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} cannot be read: {error}.") from None


def _other_weights(directory: Path) -> str:
    """Return a sentence about the weights that there are, and how to convert them."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        return (
            f" {pickles[0]} is a pickle and is never read; save the model with"
            " save_pretrained(…, safe_serialization=True)."
        )
    for pattern, framework, option in (
        ("*.h5", "TensorFlow", "from_tf=True"),
        ("*.msgpack", "Flax", "from_flax=True"),
    ):
        if files := sorted(path.name for path in directory.glob(pattern)):
            return (
                f" {files[0]} holds {framework} weights; read them with from_pretrained(…,"
                f" {option}) and call save_pretrained."
            )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others and re.match(r"model-\d+-of-\d+", others[0]):
        return (
            f" {others[0]} is one of several shards, but {SHARDS}, which lists their tensors, is"
            " missing; copy it too."
        )
    if others and (variant := re.fullmatch(r"model\.(\w+)\.safetensors", others[0])):
        return (
            f" {others[0]} is another variant of the weights; read it with from_pretrained(…,"
            f" variant={variant[1]!r}) and call save_pretrained, or rename it to {WEIGHTS}."
        )
    if others:
        return (
            f" transformers does not look for {others[0]}; rename it to {WEIGHTS} if it holds the"
            " whole model."
        )
    if (graph := next(directory.glob("**/*.onnx"), None)) is not None:
        return (
            f" {graph.relative_to(directory)} would be taken as it is if it were {GRAPH}, neither"
            " optimised nor quantised; better, save the torch model it was made from."
        )
    return " Save the model with save_pretrained."


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names without the prefix of a wrapper."""
    for wrapper in WRAPPERS:
        # Only if every name has it: ModernBERT's body has the prefix "model." and its head has
        # none, so there it is the family's own name.
        while tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def build_model(checkpoint: Checkpoint, keep_decoder: bool = False) -> nn.Module:
    """Build the classifier in fp32, without its decoder.

    `keep_decoder` appends the decoder's layers to the encoder, for the proof's positive control.
    Raises BadInput if config and weights do not fit, and BadUsage if there are no layers to keep.
    """
    tensors = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    if keep_decoder:
        if not checkpoint.decoder_layers:
            raise BadUsage(
                f"{checkpoint.directory} has no decoder layers that could be kept (design"
                f" {checkpoint.design or 'none'}); leave out --keep-decoder."
            )
        if checkpoint.config["model_type"] not in BERT_LAYER_FAMILIES:
            raise BadUsage(
                f"{checkpoint.directory} has no decoder layers that could be kept: they are BERT's,"
                f" and its encoder is a {checkpoint.config['model_type']}; leave out"
                " --keep-decoder."
            )
    config = read_config(
        checkpoint.directory, checkpoint.config, checkpoint.decoder_layers if keep_decoder else 0
    )
    try:
        # Every family has eager attention, and only in that form do equal encoders have equal
        # graphs.
        with plain_functions():
            model = auto_class(checkpoint.config).from_config(config, attn_implementation="eager")
    except Exception as error:  # The code of any family may raise anything for a wrong config.
        raise BadInput(
            f"{checkpoint.directory / 'config.json'} describes no classifier that can be built:"
            f" {first_line(error)}"
        ) from None
    if keep_decoder:
        depth = config.num_hidden_layers - checkpoint.decoder_layers
        tensors |= _decoder_as_encoder(checkpoint, f"{model.base_model_prefix}.encoder", depth)
    classifier: nn.Module = _with_weights(model, tensors, checkpoint.directory).float().eval()
    return classifier


def embedding_rows(model: Any) -> int:
    """Return how many token ids have an embedding."""
    return len(model.get_input_embeddings().weight)


def _decoder_as_encoder(checkpoint: Checkpoint, encoder: str, depth: int) -> dict[str, Tensor]:
    """Return the decoder's layers in fp32, named as layers that follow the `depth` encoder layers.

    Tensors outside of layers, such as the autoencoder's mask, have no place in an encoder.
    """
    pattern = re.compile(rf"{re.escape(DECODER_PREFIX)}layer\.(\d+)\.(.+)")
    tensors = {}
    for name, tensor in checkpoint.decoder.items():
        if (match := pattern.fullmatch(name)) is not None:
            layer, suffix = match.groups()
            tensors[f"{encoder}.layer.{depth + int(layer)}.{suffix}"] = tensor.float()
    return tensors


def _with_weights(model: Any, tensors: dict[str, Tensor], directory: Path) -> nn.Module:
    """Return the model with the checkpoint's weights, placed by transformers.

    Raises BadInput if a tensor is missing, holds NaN or infinity, or has another shape.
    """
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise BadInput(
                f"{directory}: {name} has shape {list(tensor.shape)}, but its config.json requires"
                f" {list(expected[name].shape)}."
            )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise BadInput(f"{directory}: {broken[0]} holds NaN or infinity; train the model again.")
    try:
        with plain_functions(), quiet():
            filled, loading = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception as error:  # The code of any family may raise anything for wrong weights.
        raise BadInput(
            f"{directory}: its weights do not fit its config.json: {first_line(error)}"
        ) from None
    missing = sorted(loading["missing_keys"])
    heads = [name for name in missing if not name.startswith(f"{model.base_model_prefix}.")]
    if heads:
        raise BadInput(
            f"{directory} has no classification head ({heads[-1]}): it is a pretrained encoder"
            " only; fine-tune it first, for example with drbert-finetune."
        )
    if missing:
        raise BadInput(
            f"{directory} lacks the tensor {missing[0]}, which its config.json requires."
        )
    dropped = sorted(
        name
        for name in loading["unexpected_keys"]
        if not name.startswith((DECODER_PREFIX, *PRETRAINING_HEADS))
    )
    if dropped:
        names = ", ".join(dropped[:4]) + (", …" if len(dropped) > 4 else "")
        print(
            f"{directory}: drops {len(dropped)} tensors that {type(model).__name__} does not have,"
            f" as transformers does: {names}",
            flush=True,
        )
    return cast(nn.Module, filled)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings: export reports or refuses what they are about."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
