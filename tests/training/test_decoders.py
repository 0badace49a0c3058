from __future__ import annotations

import pytest
import torch
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

from training.decoders import DrBertDecoder, TransformerBlock, at, first_block_sees


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradual_unmasking_hides_masked_positions_from_all_but_themselves() -> None:
    positions = torch.tensor([[1, 3]])
    none = first_block_sees(positions, 4, 0.0, dice())[0]
    assert none.tolist() == [
        [True, False, True, False],
        [True, True, True, False],
        [True, False, True, False],
        [True, False, True, True],
    ]
    assert first_block_sees(positions, 4, 1.0, dice())[0].all()


def test_gradual_unmasking_shows_the_asked_share_of_masked_positions() -> None:
    positions = torch.arange(2, 102)[None].expand(50, -1)
    seen = first_block_sees(positions, 110, 0.3, dice())[:, 0, 2:102].float().mean().item()
    assert seen == pytest.approx(0.3, abs=0.03)


def test_our_block_is_berts_layer() -> None:
    config = BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32, attn_implementation="eager")
    torch.manual_seed(0)
    theirs, ours = BertLayer(config).eval(), TransformerBlock(16, 2, 32).eval()
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(3, 5, 16)
    assert torch.allclose(ours(hidden, hidden), theirs(hidden)[0], atol=1e-5)


def test_queries_at_some_positions_answer_as_all_of_them_would() -> None:
    torch.manual_seed(0)
    block, hidden, positions = TransformerBlock(16, 2, 32), torch.randn(2, 6, 16), torch.tensor([[1, 4], [0, 5]])
    visible = first_block_sees(positions, 6, 0.0, dice())
    some = block(hidden, at(hidden, positions), at(visible, positions))
    every = block(hidden, hidden, visible)
    assert torch.allclose(some, at(every, positions), atol=1e-6)


def test_the_mix_takes_whole_positions_from_the_encoder_or_the_decoder() -> None:
    torch.manual_seed(0)
    decoder = DrBertDecoder(16, 2, 32, layers=2, unmasked_first=1.0, decoder_share=0.5).eval()
    hidden, positions = torch.randn(1, 200, 16), torch.arange(200)[None]
    mixed = decoder(hidden, positions, dice())[0]
    decoder.decoder_share = 1.0
    decoded = decoder(hidden, positions, dice())[0]
    from_decoder = torch.isclose(mixed, decoded).all(dim=1)
    from_encoder = torch.isclose(mixed, hidden[0]).all(dim=1)
    assert (from_decoder ^ from_encoder).all()
    assert from_decoder.float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_without_a_share_the_decoder_is_not_heard() -> None:
    decoder = DrBertDecoder(16, 2, 32, layers=2, unmasked_first=0.5, decoder_share=0.0)
    hidden, positions = torch.randn(2, 6, 16), torch.tensor([[1, 4], [0, 5]])
    assert torch.equal(decoder(hidden, positions, dice()), at(hidden, positions))
