"""
Operations of a batch: those of its matrix products, where a multiply-add counts as two.
"""

from __future__ import annotations

from service.artifact import Artifact


def attention_flops(layers: int, hidden: int, length: int) -> int:
    """Return the FLOPs of attention's own products for one text of `length` tokens.

    Each layer has two products of L × L × D, with two FLOPs for each multiply-add.
    """
    return 4 * layers * hidden * length * length


def flops(artifact: Artifact, checkpoint_config: dict[str, int], batch: int, length: int) -> int:
    """Return the FLOPs of a batch of `batch` texts with `length` tokens each.

    They are those of the layers' matrices and of attention's own products.
    """
    attention = attention_flops(
        checkpoint_config["num_hidden_layers"], checkpoint_config["hidden_size"], length
    )
    return batch * (artifact.manifest.flops_per_token * length + attention)
