"""
How many operations a batch takes: those of its matrix products, two for a multiplication and
addition.
"""

from __future__ import annotations

from service.artifact import Artifact


def attention_flops(layers: int, hidden: int, length: int) -> int:
    """Of one text, what the products of attention take: two of (L, L, D) a layer, two FLOPs
    each.
    """
    return 4 * layers * hidden * length * length


def flops(artifact: Artifact, checkpoint_config: dict[str, int], batch: int, length: int) -> int:
    """What a batch of texts of that length takes: the layers' matrices, and attention's own
    products.
    """
    own = attention_flops(
        checkpoint_config["num_hidden_layers"], checkpoint_config["hidden_size"], length
    )
    return batch * (artifact.manifest.flops_per_token * length + own)
