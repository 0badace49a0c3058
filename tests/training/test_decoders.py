"""Every decoder design computes what its paper or its reconstruction describes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertLayer

from training.decoders import (
    BottleneckDecoder,
    EnhancedMaskDecoder,
    MaskedAutoencoder,
    MaskedText,
    StackedDecoder,
    TransformerBlock,
    at,
    attend,
    draw_positions,
    encode,
    first_block_mask,
    masked_copies,
)
from training.losses import cross_entropy


def make_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bert(layers: int = 2) -> BertModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    return BertModel(
        BertConfig(**shape, num_hidden_layers=layers, initializer_range=0.3),
        add_pooling_layer=False,
    ).eval()


IDS, POSITIONS = (
    torch.randint(5, 50, (2, 12), generator=make_rng()),
    torch.tensor([[1, 4, 5], [0, 5, 11]]),
)


def test_gradual_unmasking_hides_masked_positions_from_all_but_themselves() -> None:
    positions = torch.tensor([[1, 3]])
    none = first_block_mask(positions, 4, 0.0, make_rng())[0]
    assert none.tolist() == [
        [True, False, True, False],
        [True, True, True, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    assert first_block_mask(positions, 4, 1.0, make_rng())[0].all()


def test_gradual_unmasking_shows_the_configured_share_of_masked_positions() -> None:
    positions = torch.arange(2, 102)[None].expand(50, -1)
    share = first_block_mask(positions, 110, 0.3, make_rng())[:, 0, 2:102].float().mean().item()
    assert share == pytest.approx(0.3, abs=0.03)


def test_a_transformer_block_computes_what_berts_layer_computes() -> None:
    config = BertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    reference, block = BertLayer(config).eval(), TransformerBlock(16, 2, 32).eval()
    block.load_state_dict(reference.state_dict())
    hidden = torch.randn(3, 5, 16)
    assert torch.allclose(block(hidden, hidden), reference(hidden)[0], atol=1e-5)


def test_queries_at_some_positions_answer_as_all_of_them_would() -> None:
    torch.manual_seed(0)
    block, hidden, positions = (
        TransformerBlock(16, 2, 32),
        torch.randn(2, 6, 16),
        torch.tensor([[1, 4], [0, 5]]),
    )
    visible = first_block_mask(positions, 6, 0.0, make_rng())
    some = block(hidden, at(hidden, positions), at(visible, positions))
    every = block(hidden, hidden, visible)
    assert torch.allclose(some, at(every, positions), atol=1e-6)


def test_the_mix_takes_whole_positions_from_the_encoder_or_the_decoder() -> None:
    torch.manual_seed(0)
    decoder = StackedDecoder(16, 2, 32, layers=2, decoder_share=0.5).eval()
    hidden, positions = torch.randn(1, 200, 16), torch.arange(200)[None]
    mixed = decoder.decode(hidden, positions, make_rng())[0]
    decoder.decoder_share = 1.0
    decoded = decoder.decode(hidden, positions, make_rng())[0]
    from_decoder = torch.isclose(mixed, decoded).all(dim=1)
    from_encoder = torch.isclose(mixed, hidden[0]).all(dim=1)
    assert (from_decoder ^ from_encoder).all()
    assert from_decoder.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_with_a_share_of_0_predictions_come_from_the_encoder_alone() -> None:
    encoder, decoder = (
        bert(),
        StackedDecoder(16, 2, 32, layers=2, unmasked_first=0.5, decoder_share=0.0),
    )
    assert torch.equal(
        decoder(encoder, IDS, POSITIONS, make_rng()), at(encode(encoder, IDS), POSITIONS)
    )


@torch.no_grad()
def test_blocks_on_top_are_a_deeper_encoder() -> None:
    deeper, encoder, decoder = bert(layers=4), bert(layers=4), StackedDecoder(16, 2, 32, layers=2)
    decoder.layer.load_state_dict(encoder.encoder.layer[2:].state_dict())
    del encoder.encoder.layer[2:]
    assert torch.allclose(
        decoder(encoder, IDS, POSITIONS, make_rng()), at(encode(deeper, IDS), POSITIONS), atol=1e-5
    )


@torch.no_grad()
def test_one_pass_without_positions_of_the_enhanced_mask_decoder_is_the_encoder_itself() -> None:
    encoder = bert()
    plain = at(encode(encoder, IDS), POSITIONS)
    decoded = EnhancedMaskDecoder(1)(encoder, IDS, POSITIONS, make_rng())
    assert not torch.allclose(decoded, plain, atol=1e-3)
    hidden = encoder.embeddings(input_ids=IDS)  # with the positions, which are then removed
    encoder.embeddings.forward = lambda input_ids: hidden
    encoder.embeddings.position_embeddings.weight.zero_()
    assert torch.allclose(
        EnhancedMaskDecoder(1)(encoder, IDS, POSITIONS, make_rng()), plain, atol=1e-5
    )


@torch.no_grad()
def test_the_second_pass_of_the_enhanced_mask_decoder_uses_the_same_layer_and_states() -> None:
    encoder = bert()
    before = encoder(input_ids=IDS, output_hidden_states=True).hidden_states[-2]
    once, twice = (EnhancedMaskDecoder(n)(encoder, IDS, POSITIONS, make_rng()) for n in (1, 2))
    assert torch.allclose(twice, attend(encoder.encoder.layer[-1], 2, before, once), atol=1e-5)
    assert not torch.allclose(once, twice, atol=1e-3)
    assert list(EnhancedMaskDecoder(2).parameters()) == []


@torch.no_grad()
def test_the_autoencoders_encoder_never_reads_a_masked_position() -> None:
    encoder, decoder = bert(), MaskedAutoencoder(16, 2, 32, layers=2)
    other = IDS.scatter(1, POSITIONS, (at(IDS[..., None], POSITIONS)[..., 0] + 1) % 50)
    assert not torch.equal(IDS, other)
    assert torch.equal(
        decoder(encoder, IDS, POSITIONS, make_rng()), decoder(encoder, other, POSITIONS, make_rng())
    )


@torch.no_grad()
def test_the_autoencoders_tokens_keep_their_positions() -> None:
    encoder = bert()
    visible = torch.tensor([[0, 2, 3, 7]])
    hidden = encode(encoder, IDS[:1].gather(1, visible), visible)
    outputs = []
    encoder.embeddings.register_forward_hook(
        lambda _, args, kwargs, out: outputs.append(out), with_kwargs=True
    )
    encode(encoder, IDS[:1].gather(1, visible), visible)
    encode(encoder, IDS[:1])
    assert torch.allclose(outputs[0], at(outputs[1], visible), atol=1e-6)
    assert hidden.shape == (1, 4, 16)


def test_each_rebuilt_position_sees_a_masked_copy_of_its_own_and_never_itself() -> None:
    positions = torch.tensor([[1, 3], [2, 4]])
    everything = masked_copies(positions, 5, 1.0, make_rng())
    assert everything[0].tolist() == [
        [True, False, True, True, True],
        [True, True, True, False, True],
    ]
    nothing = masked_copies(positions, 5, 0.0, make_rng())
    assert nothing[..., 0].all()
    assert not nothing[..., 1:].any()
    many = masked_copies(torch.arange(1, 101).expand(20, -1), 200, 0.5, make_rng())
    assert many[..., 101:].float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(many[0, 0], many[0, 1])


def test_the_share_of_positions_that_are_rebuilt_leaves_out_the_first_and_the_last() -> None:
    ids = torch.zeros(200, 12, dtype=torch.long)
    drawn = draw_positions(ids, 0.3, make_rng())
    assert drawn.shape == (200, 3)
    assert set(drawn.flatten().tolist()) == set(range(1, 11))
    assert (drawn.diff(dim=1) > 0).all()
    assert draw_positions(ids, 1.0, make_rng())[0].tolist() == list(range(1, 11))


@torch.no_grad()
def test_a_text_is_rebuilt_from_the_cls_state_and_the_words_that_are_seen_alone() -> None:
    encoder = bert()
    torch.manual_seed(1)
    decoder = BottleneckDecoder(16, 2, 32, layers=1, visible=0.5, rebuilt=1.0).eval()
    cls, chosen = torch.randn(1, 16), torch.tensor([[3, 7]])
    text = IDS[:1]
    seen = torch.zeros(1, 2, 12, dtype=torch.bool)
    seen[..., 0] = True
    seen[0, 0, 5] = True

    def rebuild(cls: torch.Tensor = cls, text: torch.Tensor = text) -> torch.Tensor:
        return decoder.rebuild(encoder, cls, text, chosen, seen)

    before = rebuild()
    assert not torch.allclose(rebuild(cls=cls + 1), before, atol=1e-2)
    for position in range(1, 12):
        changed = text.clone()
        changed[0, position] = 5 + (changed[0, position] - 4) % 45
        same = torch.isclose(rebuild(text=changed), before, atol=1e-6).all(dim=2)[0]
        assert same.tolist() == [position != 5, True]


def test_the_loss_adds_what_the_masks_and_what_the_rebuilt_words_cost() -> None:
    encoder, positions = bert(), POSITIONS
    decoder = BottleneckDecoder(16, 2, 32, layers=1, visible=0.5, rebuilt=0.5)
    text = MaskedText(IDS.scatter(1, positions, 1), positions, IDS.gather(1, positions))
    assert torch.equal(text.original, IDS)
    words = encoder.embeddings.word_embeddings.weight

    def predict(state: torch.Tensor) -> torch.Tensor:
        return functional.linear(state, words)

    losses = decoder.losses(encoder, predict, text, make_rng())
    masked = cross_entropy(predict(at(encode(encoder, text.inputs), positions)), text.targets)
    assert torch.allclose(losses["masked_loss"], masked)
    assert torch.allclose(losses["loss"], masked + losses["rebuilt_loss"])
    losses["rebuilt_loss"].backward()  # type: ignore[no-untyped-call]  # through [CLS] the encoder learns from the rebuilt words
    assert encoder.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
