"""
The scaffolding of pretraining: what stands between the encoder and the output layer, and is thrown away afterwards.

`drbert` is OUR RECONSTRUCTION of DrBERT / BPDec (arXiv 2401.15861) from its abstracts and
reviews; the paper's formulas and hyper-parameters were not available. It holds the three named
ingredients: n extra transformer blocks, Gradual Unmasking Attention, and a random mix of encoder
and decoder output, drawn for each position by itself. n, p and q are configuration, none is the
paper's number. The blocks are BERT's without dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import Config


class TransformerBlock(nn.Module):
    """One post-LayerNorm BERT layer; its parameters carry BertLayer's names."""

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = _Attention(hidden_size)
        self.intermediate = _Dense(hidden_size, intermediate_size)
        self.output = _Residual(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor, queries: Tensor, visible: Tensor | None = None) -> Tensor:
        """Updates `queries` (B, Q, D) from all of `hidden` (B, L, D); `visible` (B, Q, L) is False where a query may not look."""
        project = self.attention.self
        q = self._split(project.query(queries))                                        # (B, H, Q, D/H)
        k, v = self._split(project.key(hidden)), self._split(project.value(hidden))    # (B, H, L, D/H)
        mask = None if visible is None else visible[:, None]                           # (B, 1, Q, L)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                 # (B, H, Q, D/H)
        queries = self.attention.output(seen.transpose(1, 2).flatten(2), queries)      # (B, Q, D)
        result: Tensor = self.output(F.gelu(self.intermediate.dense(queries)), queries)
        return result                                                                  # (B, Q, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class _Attention(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.self = _Projections(hidden_size)
        self.output = _Residual(hidden_size, hidden_size)


class _Projections(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(hidden_size, hidden_size) for _ in range(3))


class _Dense(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, outer)


class _Residual(_Dense):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(inner, outer)
        self.LayerNorm = nn.LayerNorm(outer, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        summed: Tensor = self.LayerNorm(self.dense(x) + residual)
        return summed


class NoDecoder(nn.Module):
    """Vanilla BERT: the output layer reads the encoder."""

    def forward(self, hidden: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
        """The states to predict from at `positions` (B, K), out of `hidden` (B, L, D): (B, K, D)."""
        return at(hidden, positions)


class DrBertDecoder(nn.Module):
    """Extra blocks that may look at masked positions only gradually, mixed at random with the encoder.

    With S the predicted positions and h the encoder's output:

        U_1 = a random subset of S, each position with probability p;  U_2 … U_n = S
        block l attends to position j only if j is not in S, or in U_l, or the query's own
        o_t = decoder_t with probability q, else h_t

    The blocks are full ones; only the last computes its queries at S alone, because
    nothing else of it is read.
    """

    def __init__(
        self, hidden_size: int, heads: int, intermediate_size: int, layers: int, unmasked_first: float, decoder_share: float
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(TransformerBlock(hidden_size, heads, intermediate_size) for _ in range(layers))
        self.unmasked_first = unmasked_first
        self.decoder_share = decoder_share

    def forward(self, hidden: Tensor, positions: Tensor, generator: torch.Generator) -> Tensor:
        """The states to predict from at `positions` (B, K), out of `hidden` (B, L, D): (B, K, D)."""
        state = hidden
        for depth, block in enumerate(self.layer):
            visible = None
            if depth == 0:
                visible = first_block_sees(positions, hidden.shape[1], self.unmasked_first, generator)  # (B, L, L)
            if depth == len(self.layer) - 1:
                if visible is not None:
                    visible = at(visible, positions)                                   # (B, K, L)
                state = block(state, at(state, positions), visible)                    # (B, K, D)
            else:
                state = block(state, state, visible)                                   # (B, L, D)
        share = torch.rand(positions.shape, generator=generator, device=generator.device).to(hidden.device)
        return torch.where((share < self.decoder_share)[..., None], state, at(hidden, positions))


def first_block_sees(positions: Tensor, length: int, unmasked: float, generator: torch.Generator) -> Tensor:
    """Gradual Unmasking Attention's first mask, (B, L, L): True where query i may attend to key j."""
    kept = torch.rand(positions.shape, generator=generator, device=generator.device).to(positions.device) < unmasked
    visible = torch.ones(len(positions), length, dtype=torch.bool, device=positions.device)
    visible = visible.scatter(1, positions, kept)                                      # (B, L)
    own = torch.eye(length, dtype=torch.bool, device=positions.device)
    return visible[:, None, :] | own                                                   # (B, L, L)


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows of `hidden` (B, L, …) at `positions` (B, K): (B, K, …)."""
    return torch.gather(hidden, 1, positions[..., None].expand(-1, -1, hidden.shape[2]))


def build_decoder(config: Config) -> NoDecoder | DrBertDecoder:
    encoder, decoder = config.encoder, config.decoder
    if decoder.design == "none":
        return NoDecoder()
    return DrBertDecoder(
        encoder.hidden_size, encoder.heads, encoder.intermediate_size,
        decoder.layers, decoder.unmasked_first, decoder.decoder_share,
    )
