"""
Puts attention in the form in which engines run it fastest in the place of the one a family was
written with.
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

FORMS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    ConvBertSelfAttention: BandAttention,
    MultiHeadSelfAttention: AddedMaskAttention,
}


def mended(model: nn.Module) -> nn.Module:
    """A copy of `model` with our form of attention in the place of every one that has such a form;
    a model without any as it is.
    """
    if not any(type(part) in FORMS for part in model.modules()):
        return model
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if (form := FORMS.get(type(child))) is not None:
                ours = form(copied.config)
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours.train(child.training))
    return copied
