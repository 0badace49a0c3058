"""
The scaffolding of pretraining: what stands between the encoder and the output layer, and is thrown
away afterwards.

Every design answers one question: which states are the masked words to be predicted from?

    none    the encoder's own                                            BERT, arXiv 1810.04805
    plain   n more blocks on top          RECONSTRUCTION of DrBERT / BPDec, arXiv 2401.15861
    gua     … whose first block may look at masked positions only partly  RECONSTRUCTION, the same
    mix     … heard at random, the encoder otherwise                      RECONSTRUCTION, the same
    drbert  gua and mix together                                          RECONSTRUCTION, the same
    emd     the last layer twice, its queries told the absolute place     DeBERTa, arXiv 2006.03654
            §3.2, as its released code does it
    mae     masked words left out of the encoder, filled in by n blocks   RECONSTRUCTION of MAE-LM,
            arXiv 2302.02060

DrBERT's formulas and hyper-parameters were not available; the reconstruction follows its abstracts
and reviews. n, p and q are configuration, none is a paper's number. The blocks are BERT's without
dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from training import local_attention_init
from training.attention import attention
from training.config import Config


class Decoder(nn.Module):
    """A design, as the pretraining model calls it."""

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, dice: torch.Generator
    ) -> Tensor:
        """The states to predict from, (B, K, D), at `positions` (B, K) of `inputs` (B, L)."""
        raise NotImplementedError

    def initialise_neighbours(self) -> None:
        """Called where the encoder's first weights are those of neighbours.py; a decoder that mixes
        places itself begins so too.
        """


class NoDecoder(Decoder):
    """Vanilla BERT: the output layer reads the encoder."""

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, dice: torch.Generator
    ) -> Tensor:
        return at(encode(encoder, inputs), positions)


class StackedDecoder(Decoder):
    """n blocks on top of the encoder: `plain`, and with p < 1 `gua`, with q < 1 `mix`, with both
    `drbert`.

    With S the predicted positions and h the encoder's output:

        U_1 = a random subset of S, each position with probability p;  U_2 … U_n = S
        block l attends to position j only if j is not in S, or in U_l, or the query's own
        o_t = decoder_t with probability q, else h_t

    The blocks are full ones; only the last computes its queries at S alone, because
    nothing else of it is read.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        intermediate_size: int,
        layers: int,
        unmasked_first: float = 1.0,
        decoder_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TransformerBlock(hidden_size, heads, intermediate_size) for _ in range(layers)
        )
        self.unmasked_first = unmasked_first
        self.decoder_share = decoder_share

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, dice: torch.Generator
    ) -> Tensor:
        return self.decode(encode(encoder, inputs), positions, dice)

    def decode(self, hidden: Tensor, positions: Tensor, dice: torch.Generator) -> Tensor:
        """(B, K, D) out of the encoder's output (B, L, D)."""
        visible = (
            None
            if self.unmasked_first == 1
            else first_block_sees(positions, hidden.shape[1], self.unmasked_first, dice)
        )
        decoded = through(self.layer, hidden, positions, visible)
        if self.decoder_share == 1:
            return decoded
        share = torch.rand(positions.shape, generator=dice, device=dice.device).to(hidden.device)
        return torch.where((share < self.decoder_share)[..., None], decoded, at(hidden, positions))


class EnhancedMaskDecoder(Decoder):
    """DeBERTa's: the encoder's last layer, run n times on queries that begin with the absolute
    position.

        q_1 = h⁻[S] + position[S];   q_{i+1} = last layer(queries q_i, keys and values h⁻);   h⁻ =
            the layer before the last

    It adds no parameter. BERT knows absolute positions from its input too; in DeBERTa, which does
    not, this is where they enter.
    """

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, dice: torch.Generator
    ) -> Tensor:
        hidden = encoder.embeddings(input_ids=inputs)
        for layer in encoder.encoder.layer[:-1]:
            hidden = _tensor(layer(hidden))  # (B, L, D)
        queries: Tensor = at(hidden, positions) + encoder.embeddings.position_embeddings(positions)
        for _ in range(self.passes):
            queries = attend(
                encoder.encoder.layer[-1], encoder.config.num_attention_heads, hidden, queries
            )
        return queries  # (B, K, D)


class MaskedAutoencoder(Decoder):
    """MAE-LM: the encoder never sees a masked position; blocks on top see them all, as one learnt
    vector and their place.

    That vector goes through the embeddings' LayerNorm, as a word does, so that it is as large as
    the encoder's output beside it.
    """

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.mask = nn.Parameter(torch.zeros(hidden_size))
        self.layer = nn.ModuleList(
            TransformerBlock(hidden_size, heads, intermediate_size) for _ in range(layers)
        )

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, dice: torch.Generator
    ) -> Tensor:
        rows, length = inputs.shape
        masked = torch.zeros_like(inputs).scatter(1, positions, 1)  # (B, L)
        kept = masked.argsort(dim=1, stable=True)[
            :, : length - positions.shape[1]
        ]  # (B, L-K), ascending
        seen = encode(encoder, inputs.gather(1, kept), kept)  # (B, L-K, D)
        placed = self.mask + encoder.embeddings.position_embeddings(positions)
        filled = encoder.embeddings.LayerNorm(placed)  # (B, K, D)
        whole = seen.new_zeros(rows, length, seen.shape[2])
        whole = whole.scatter(1, kept[..., None].expand_as(seen), seen)
        whole = whole.scatter(1, positions[..., None].expand_as(filled), filled.to(seen.dtype))
        return through(self.layer, whole, positions)

    def initialise_neighbours(self) -> None:
        # A masked place is position alone and the encoder's output holds little of it; twice the
        # score was tried and learns.
        local_attention_init.initialise_attention(
            self.layer[0].attention, self.heads, 2 * local_attention_init.SCORE
        )


class TransformerBlock(nn.Module):
    """One post-LayerNorm BERT layer; its parameters carry BertLayer's names."""

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = _Attention(hidden_size)
        self.intermediate = _Dense(hidden_size, intermediate_size)
        self.output = _Residual(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor, queries: Tensor, visible: Tensor | None = None) -> Tensor:
        """Updates `queries` (B, Q, D) from all of `hidden` (B, L, D); `visible` (B, Q, L) is False
        where a query may not look.
        """
        return attend(self, self.heads, hidden, queries, visible)


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


def attend(
    layer: Any, heads: int, hidden: Tensor, queries: Tensor, visible: Tensor | None = None
) -> Tensor:
    """What a BERT layer, ours or transformers', makes of `queries` (B, Q, D) when they look at
    `hidden` (B, L, D); without dropout.

    transformers' own layer takes its queries from where it takes its keys; a decoder wants them
    from elsewhere.
    """

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    project, inner, outer = layer.attention.self, layer.attention.output, layer.output
    q = split(project.query(queries))  # (B, H, Q, D/H)
    k, v = split(project.key(hidden)), split(project.value(hidden))  # (B, H, L, D/H)
    mask = None if visible is None else visible[:, None]  # (B, 1, Q, L)
    seen = attention(q, k, v, mask).transpose(1, 2).flatten(2)
    queries = inner.LayerNorm(inner.dense(seen) + queries)  # (B, Q, D)
    wide = F.gelu(layer.intermediate.dense(queries))
    updated: Tensor = outer.LayerNorm(outer.dense(wide) + queries)
    return updated  # (B, Q, D)


def through(
    blocks: nn.ModuleList, state: Tensor, positions: Tensor, first_sees: Tensor | None = None
) -> Tensor:
    """`state` (B, L, D) through all blocks, read at `positions`: (B, K, D). `first_sees` (B, L, L)
    restricts the first block.
    """
    last = len(blocks) - 1
    for depth, block in enumerate(blocks):
        visible = first_sees if depth == 0 else None
        if depth == last:
            seen = None if visible is None else at(visible, positions)
            return block(state, at(state, positions), seen)  # type: ignore[no-any-return]
        state = block(state, state, visible)  # (B, L, D)
    raise ValueError("a decoder has a block at least")


def first_block_sees(
    positions: Tensor, length: int, unmasked: float, dice: torch.Generator
) -> Tensor:
    """Gradual Unmasking Attention's first mask, (B, L, L): True where query i may attend to
    key j.
    """
    kept = (
        torch.rand(positions.shape, generator=dice, device=dice.device).to(positions.device)
        < unmasked
    )
    visible = torch.ones(len(positions), length, dtype=torch.bool, device=positions.device)
    visible = visible.scatter(1, positions, kept)  # (B, L)
    own = torch.eye(length, dtype=torch.bool, device=positions.device)
    return visible[:, None, :] | own  # (B, L, L)


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Rows of `hidden` (B, L, …) at `positions` (B, K): (B, K, …)."""
    return torch.gather(hidden, 1, positions[..., None].expand(-1, -1, hidden.shape[2]))


def encode(encoder: BertModel, inputs: Tensor, places: Tensor | None = None) -> Tensor:
    """The encoder's output, (B, L, D); `places` (B, L) where the tokens do not stand side by
    side.
    """
    hidden: Tensor = encoder(input_ids=inputs, position_ids=places).last_hidden_state
    return hidden


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What a transformers layer returns: a tensor in some versions, a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def build_decoder(config: Config) -> Decoder:
    shape, decoder = config.encoder, config.decoder
    sizes = (shape.hidden_size, shape.heads, shape.intermediate_size, decoder.layers)
    match decoder.design:
        case "none":
            return NoDecoder()
        case "emd":
            return EnhancedMaskDecoder(decoder.layers)
        case "mae":
            return MaskedAutoencoder(*sizes)
        case _:
            return StackedDecoder(*sizes, decoder.unmasked_first, decoder.decoder_share)
