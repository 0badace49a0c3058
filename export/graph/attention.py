"""
Replaces a family's attention with an equivalent one that engines recognise and run faster.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention
from transformers.models.distilbert.modeling_distilbert import MultiHeadSelfAttention

from export.graph.convbert import BandAttention
from export.graph.distilbert import AddedMaskAttention

REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ConvBertSelfAttention: BandAttention,
    MultiHeadSelfAttention: AddedMaskAttention,
}
"""Attention module of transformers, and the module that is exported instead of it."""


def with_export_attention(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with its attention replaced by the form for export.

    A model without such attention is returned itself.
    """
    if not any(type(module) in REPLACEMENTS for module in model.modules()):
        return model
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if (build := REPLACEMENTS.get(type(child))) is not None:
                replacement = build(copied.config)
                replacement.load_state_dict(child.state_dict())
                setattr(parent, name, replacement.train(child.training))
    return copied
