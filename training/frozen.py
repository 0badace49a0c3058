"""
Reads a pretrained encoder without its decoder, to measure what its states hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from command import BadInput
from training import convbert
from training.attention import attention_implementation
from training.checkpoint import read_checkpoint


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder whose weights do not change, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def hidden_size(self) -> int:
        """The width of its states."""
        return int(self.model.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The longest text that it reads."""
        return int(self.model.config.max_position_embeddings)

    @torch.no_grad()
    def states(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the last layer's output (B, L, D) for ids (B, L)."""
        hidden: Tensor = self.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def load_frozen(checkpoint: Path) -> FrozenEncoder:
    """Return the encoder of a checkpoint; a pretraining decoder or a head in it is left out.

    Raises Unavailable if a file is missing, BadInput if the tensors do not fit the config.
    """
    described, tensors = read_checkpoint(checkpoint)
    model = AutoModel.from_config(family_config(described, {}))
    load_encoder(model, model.base_model_prefix, tensors)
    if model.config.model_type == "convbert":
        convbert.patch_attention(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    return FrozenEncoder(model.eval(), PreTrainedTokenizerFast.from_pretrained(checkpoint))


def family_config(described: Mapping[str, Any], changes: Mapping[str, Any]) -> Any:
    """Return transformers' config of a checkpoint's config.json, with some settings changed."""
    settings = {**described, **changes}
    if described["model_type"] == "bert":
        # transformers refuses the option for models that have only an attention of their own.
        settings["attn_implementation"] = attention_implementation()
    for key in ("pretraining_decoder", "architectures", "torch_dtype", "dtype"):
        settings.pop(key, None)
    return AutoConfig.for_model(**settings)


def load_encoder(encoder: PreTrainedModel, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Give an encoder a checkpoint's tensors, whose names begin with `prefix` and a dot.

    A pooler keeps its own. Raises BadInput if another tensor is missing, unknown or of another
    shape.
    """
    of_encoder = {
        name.removeprefix(f"{prefix}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.")
    }
    expected = encoder.state_dict()
    for name in sorted(expected.keys() | of_encoder.keys()):
        if name.startswith("pooler."):
            continue
        shapes = [
            tuple(part[name].shape) if name in part else None for part in (of_encoder, expected)
        ]
        if shapes[0] != shapes[1]:
            raise BadInput(
                f"The encoder's tensors do not fit its config.json: {name} is {shapes[0]}, and the"
                f" config describes {shapes[1]}."
            )
    encoder.load_state_dict(of_encoder, strict=False)
