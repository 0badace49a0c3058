"""
Pretraining decoders: modules between the encoder and the output layer, dropped after pretraining.

A design decides from which states the masked words are predicted:

    none    the encoder's output                       BERT, arXiv 1810.04805
    plain   n more blocks on top of it                 RECONSTRUCTION of DrBERT / BPDec,
                                                       arXiv 2401.15861
    gua     … the first block attends to only a        RECONSTRUCTION, the same
            share p of the masked positions
    mix     … used with probability q a position,      RECONSTRUCTION, the same
            the encoder's output otherwise
    drbert  gua and mix together                       RECONSTRUCTION, the same
    emd     the encoder's last layer, twice, on        DeBERTa's enhanced mask decoder, arXiv
            queries with the absolute position         2006.03654 §3.2, as its released code does it
    mae     n blocks that fill in masked positions,    RECONSTRUCTION of MAE-LM, arXiv 2302.02060
            which the encoder never reads
    retro   the encoder's output; besides, n blocks    RetroMAE's enhanced decoding,
            rebuild the text from the [CLS] state      arXiv 2205.12035 §3.3
            and a masked copy of the text

DrBERT's formulas and hyper-parameters were not available; the reconstruction follows its abstracts
and reviews. Its n, p and q are configuration, not the paper's numbers. The blocks are BERT's
without dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel

from training import local_attention_init
from training.attention import attention
from training.config import Config
from training.losses import Losses, cross_entropy


@dataclass(frozen=True)
class MaskedText:
    """A batch that a model learns from."""

    inputs: Tensor
    """(B, L) ids, as the encoder reads them."""
    positions: Tensor
    """(B, K) positions to predict."""
    targets: Tensor
    """(B, K) the original ids there."""

    @property
    def original(self) -> Tensor:
        """(B, L) the ids before they were masked."""
        return self.inputs.scatter(1, self.positions, self.targets)


class Decoder(nn.Module):
    """The interface of a decoder design."""

    loss_parts: tuple[str, ...] = ()
    """Names of the losses that add up to the total, if there is more than one."""

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Return the states (B, K, D) to predict from, at `positions` (B, K) of `inputs` (B, L)."""
        raise NotImplementedError

    def losses(
        self,
        encoder: BertModel,
        predict: Callable[[Tensor], Tensor],
        text: MaskedText,
        rng: torch.Generator,
    ) -> Losses:
        """Return the loss, in nats, and its parts if the design has any.

        `predict` returns the output layer's logits (B, K, V) of states (B, K, D).
        """
        state = self(encoder, text.inputs, text.positions, rng)
        return {"loss": cross_entropy(predict(state), text.targets)}

    def initialise_local_attention(self) -> None:
        """Begin with local attention, as an encoder with that initialisation does.

        Only a decoder whose first block must find a position's neighbours itself does something.
        """


class NoDecoder(Decoder):
    """Vanilla BERT: predictions come from the encoder's output."""

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
    ) -> Tensor:
        return at(encode(encoder, inputs), positions)


class StackedDecoder(Decoder):
    """n blocks on top of the encoder: `plain`; with p < 1 `gua`, q < 1 `mix`, or both `drbert`.

    With S the predicted positions and h the encoder's output:

        U_1 = a random subset of S, each position with probability p;  U_2 … U_n = S
        block l attends to position j only if j is not in S, or in U_l, or the query's own
        o_t = decoder_t with probability q, else h_t

    The last block computes its queries at S alone, because nothing else of it is read.
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
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
    ) -> Tensor:
        return self.decode(encode(encoder, inputs), positions, rng)

    def decode(self, hidden: Tensor, positions: Tensor, rng: torch.Generator) -> Tensor:
        """Return the states to predict from, (B, K, D), of the encoder's output (B, L, D)."""
        visible = None
        if self.unmasked_first != 1:
            visible = first_block_mask(positions, hidden.shape[1], self.unmasked_first, rng)
        decoded = run_blocks(self.layer, hidden, positions, visible)
        if self.decoder_share == 1:
            return decoded
        share = torch.rand(positions.shape, generator=rng, device=rng.device).to(hidden.device)
        return torch.where((share < self.decoder_share)[..., None], decoded, at(hidden, positions))


class EnhancedMaskDecoder(Decoder):
    """DeBERTa's decoder: the encoder's last layer, n times, on queries with the absolute position.

        q_1 = h⁻[S] + position[S];   q_{i+1} = last layer(queries q_i, keys and values h⁻);   h⁻ =
            the layer before the last

    It adds no parameter. BERT's input has absolute positions already; DeBERTa's has not, so there
    they enter here.
    """

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.passes = passes

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
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
    """MAE-LM: the encoder never reads a masked position, the blocks on top read all positions.

    To the blocks a masked position is one learnt vector plus its position embedding. The sum goes
    through the embeddings' LayerNorm, as a word does, so that it is as large as the encoder's
    output at the other positions.
    """

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.mask = nn.Parameter(torch.zeros(hidden_size))
        self.layer = nn.ModuleList(
            TransformerBlock(hidden_size, heads, intermediate_size) for _ in range(layers)
        )

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
    ) -> Tensor:
        rows, length = inputs.shape
        masked = torch.zeros_like(inputs).scatter(1, positions, 1)  # (B, L)
        in_order = masked.argsort(dim=1, stable=True)  # unmasked positions first, ascending
        visible = in_order[:, : length - positions.shape[1]]  # (B, L-K)
        encoded = encode(encoder, inputs.gather(1, visible), visible)  # (B, L-K, D)
        placed = self.mask + encoder.embeddings.position_embeddings(positions)
        filled = encoder.embeddings.LayerNorm(placed)  # (B, K, D)
        whole = encoded.new_zeros(rows, length, encoded.shape[2])
        whole = whole.scatter(1, visible[..., None].expand_as(encoded), encoded)
        whole = whole.scatter(1, positions[..., None].expand_as(filled), filled.to(encoded.dtype))
        return run_blocks(self.layer, whole, positions)

    def initialise_local_attention(self) -> None:
        # A masked position is its position embedding alone, of which the encoder's output elsewhere
        # holds little. Twice the score was tried, and it learns.
        local_attention_init.initialise_attention(
            self.layer[0].attention, self.heads, 2 * local_attention_init.SCORE
        )


class BottleneckDecoder(Decoder):
    """RetroMAE: blocks rebuild the text from the [CLS] state and a heavily masked copy of it.

    With h the encoder's output, x the text without its masks, e_j the embedding of x_j at its
    position, and s the words' first deviation:

        q_i = LayerNorm(s · h_[CLS] + position_i);   c = h_[CLS], e_1, …, e_{L-1}
        o_i = blocks(queries q_i, keys and values c)
        loss = cross-entropy at the masks, from h, + cross-entropy of x_i from o_i

    Position i attends to [CLS], never to itself, and to each other position with probability
    `visible`: its own masked copy. The masks are predicted from the encoder's output, as in BERT.

    Two things differ from the paper. It rebuilds all positions; here a random share `rebuilt` of
    each row is. It adds h_[CLS] as it is; here h_[CLS] is as large as a word, because next to a
    vector of deviation 1 a new position embedding of 0.02 is not seen.
    """

    loss_parts = ("masked_loss", "rebuilt_loss")

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        intermediate_size: int,
        layers: int,
        visible: float,
        rebuilt: float,
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TransformerBlock(hidden_size, heads, intermediate_size) for _ in range(layers)
        )
        self.heads = heads
        self.visible = visible
        self.rebuilt = rebuilt

    def initialise_local_attention(self) -> None:
        # Its queries are embeddings, as those of the encoder's first layer are.
        local_attention_init.initialise_attention(self.layer[0].attention, self.heads)

    def forward(
        self, encoder: BertModel, inputs: Tensor, positions: Tensor, rng: torch.Generator
    ) -> Tensor:
        return at(encode(encoder, inputs), positions)

    def losses(
        self,
        encoder: BertModel,
        predict: Callable[[Tensor], Tensor],
        text: MaskedText,
        rng: torch.Generator,
    ) -> Losses:
        hidden = encode(encoder, text.inputs)
        masked_loss = cross_entropy(predict(at(hidden, text.positions)), text.targets)
        original = text.original
        chosen = draw_positions(original, self.rebuilt, rng)  # (B, R)
        seen = masked_copies(chosen, original.shape[1], self.visible, rng)
        state = self.rebuild(encoder, hidden[:, 0], original, chosen, seen)
        rebuilt_loss = cross_entropy(predict(state), original.gather(1, chosen))
        return {
            "loss": masked_loss + rebuilt_loss,
            "masked_loss": masked_loss,
            "rebuilt_loss": rebuilt_loss,
        }

    def rebuild(
        self, encoder: BertModel, cls: Tensor, original: Tensor, chosen: Tensor, seen: Tensor
    ) -> Tensor:
        """Return the states (B, R, D) from which the words at `chosen` (B, R) are rebuilt.

        `cls` (B, D) is the encoder's output at [CLS], `original` (B, L) the text, and `seen`
        (B, R, L) is True where a position may attend.
        """
        embedded = encoder.embeddings(input_ids=original)
        context = torch.cat([cls[:, None].to(embedded.dtype), embedded[:, 1:]], dim=1)  # (B, L, D)
        as_word = encoder.config.initializer_range * cls[:, None].to(embedded.dtype)  # (B, 1, D)
        queries: Tensor = encoder.embeddings(
            inputs_embeds=as_word.expand(-1, chosen.shape[1], -1), position_ids=chosen
        )
        for block in self.layer:
            queries = block(context, queries, seen)
        return queries


class TransformerBlock(nn.Module):
    """One post-LayerNorm BERT layer; its parameters carry BertLayer's names."""

    def __init__(self, hidden_size: int, heads: int, intermediate_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = _Attention(hidden_size)
        self.intermediate = _Dense(hidden_size, intermediate_size)
        self.output = _Residual(intermediate_size, hidden_size)

    def forward(self, hidden: Tensor, queries: Tensor, visible: Tensor | None = None) -> Tensor:
        """Return `queries` (B, Q, D) updated from `hidden` (B, L, D).

        `visible` (B, Q, L) is False where a query may not attend.
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
    """Return a BERT layer's update of `queries` (B, Q, D) from `hidden` (B, L, D), without dropout.

    The layer is TransformerBlock or transformers' BertLayer, whose own forward takes queries and
    keys from the same states; a decoder needs them from different ones.
    """

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    project, inner, outer = layer.attention.self, layer.attention.output, layer.output
    q = split(project.query(queries))  # (B, H, Q, D/H)
    k, v = split(project.key(hidden)), split(project.value(hidden))  # (B, H, L, D/H)
    mask = None if visible is None else visible[:, None]  # (B, 1, Q, L)
    attended = attention(q, k, v, mask).transpose(1, 2).flatten(2)
    queries = inner.LayerNorm(inner.dense(attended) + queries)  # (B, Q, D)
    wide = F.gelu(layer.intermediate.dense(queries))
    updated: Tensor = outer.LayerNorm(outer.dense(wide) + queries)
    return updated  # (B, Q, D)


def run_blocks(
    blocks: nn.ModuleList, state: Tensor, positions: Tensor, first_mask: Tensor | None = None
) -> Tensor:
    """Return `state` (B, L, D) after all blocks, at `positions`: (B, K, D).

    `first_mask` (B, L, L) restricts the first block.
    """
    last = len(blocks) - 1
    for depth, block in enumerate(blocks):
        visible = first_mask if depth == 0 else None
        if depth == last:
            if visible is not None:
                visible = at(visible, positions)
            return block(state, at(state, positions), visible)  # type: ignore[no-any-return]
        state = block(state, state, visible)  # (B, L, D)
    raise ValueError("a decoder needs at least one block")


def first_block_mask(
    positions: Tensor, length: int, unmasked: float, rng: torch.Generator
) -> Tensor:
    """Return Gradual Unmasking Attention's first mask, (B, L, L): True where i may attend to j."""
    draws = torch.rand(positions.shape, generator=rng, device=rng.device).to(positions.device)
    visible = torch.ones(len(positions), length, dtype=torch.bool, device=positions.device)
    visible = visible.scatter(1, positions, draws < unmasked)  # (B, L)
    itself = torch.eye(length, dtype=torch.bool, device=positions.device)
    return visible[:, None, :] | itself  # (B, L, L)


def draw_positions(ids: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Return positions (B, R) of `ids` (B, L), a share of each row without its first and last."""
    rows, length = ids.shape
    count = max(1, round(share * (length - 2)))
    draws = torch.rand((rows, length - 2), generator=rng, device=rng.device).to(ids.device)
    return draws.argsort(dim=1)[:, :count].sort(dim=1).values + 1


def masked_copies(positions: Tensor, length: int, visible: float, rng: torch.Generator) -> Tensor:
    """Return what each of `positions` (B, R) sees of a text: (B, R, L), True where it may attend.

    It sees the first position, never itself, and each other one with probability `visible`.
    """
    shape = (*positions.shape, length)
    seen = torch.rand(shape, generator=rng, device=rng.device).to(positions.device) < visible
    seen = seen.scatter(2, positions[..., None], value=False)
    seen[..., 0] = True
    return seen


def at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the rows (B, K, …) of `hidden` (B, L, …) at `positions` (B, K)."""
    return torch.gather(hidden, 1, positions[..., None].expand(-1, -1, hidden.shape[2]))


def encode(encoder: BertModel, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """Return the encoder's output, (B, L, D).

    `position_ids` (B, L) are the positions of `inputs` (B, L) if they are not consecutive.
    """
    hidden: Tensor = encoder(input_ids=inputs, position_ids=position_ids).last_hidden_state
    return hidden


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a transformers layer's output: a tensor in some versions, a tuple in others."""
    return output[0] if isinstance(output, tuple) else output


def build_decoder(config: Config) -> Decoder:
    """Return the decoder of the config's design, with torch's own first weights."""
    shape, decoder = config.encoder, config.decoder
    sizes = (shape.hidden_size, shape.heads, shape.intermediate_size, decoder.layers)
    match decoder.design:
        case "none":
            return NoDecoder()
        case "emd":
            return EnhancedMaskDecoder(decoder.layers)
        case "mae":
            return MaskedAutoencoder(*sizes)
        case "retro":
            return BottleneckDecoder(*sizes, decoder.visible, decoder.rebuilt)
        case "plain" | "gua" | "mix" | "drbert":
            return StackedDecoder(*sizes, decoder.unmasked_first, decoder.decoder_share)
