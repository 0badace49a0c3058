from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.training.worlds import CONFIGS, vocabulary
from training.config import read_config
from training.encoders import build_encoder
from training.model import build_model

WORDS = vocabulary()


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_first_layer_begins_by_looking_at_the_neighbours(family: str) -> None:
    told = read_config(CONFIGS / "bert-mini.toml")
    shape = dataclasses.replace(told.encoder, family=family, initialisation="neighbours")
    torch.manual_seed(1)
    encoder = build_encoder(dataclasses.replace(told, encoder=shape), WORDS).eval()
    length = told.data.sequence_length
    with torch.no_grad():
        read = encoder.embeddings(torch.from_numpy(WORDS.ordinary).view(-1)[torch.randint(0, 900, (4, length))])
        attention = encoder.encoder.layer[0].attention.self
        queries, keys = (layer(read).view(4, length, shape.heads, -1).transpose(1, 2) for layer in (attention.query, attention.key))
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)            # (B, H, L, L)
    for head, offset in enumerate((-1, 1, -2, 2)):
        neighbours = weights[:, head].diagonal(offset, dim1=-2, dim2=-1)
        assert neighbours.median() > 0.5, f"head {head} looks {offset} tokens on"


def test_the_words_are_those_of_berts_initialisation() -> None:
    told = read_config(CONFIGS / "bert-mini.toml")
    encoders = []
    for name in ("bert", "neighbours"):
        torch.manual_seed(1)
        shape = dataclasses.replace(told.encoder, initialisation=name)
        encoders.append(build_encoder(dataclasses.replace(told, encoder=shape), WORDS).state_dict())
    changed = {name for name in encoders[0] if not torch.equal(encoders[0][name], encoders[1][name])}
    assert {name.removeprefix("encoder.layer.0.attention.") for name in changed} == {
        "embeddings.position_embeddings.weight", "self.query.weight", "self.key.weight", "self.value.weight", "output.dense.weight",
    }


def test_a_decoder_that_meets_positions_by_itself_begins_by_looking_around_too() -> None:
    told = read_config(CONFIGS / "mae-mini.toml")
    first = build_model(told, WORDS).pretraining_decoder.layer[0].attention
    as_bert = build_model(dataclasses.replace(told, encoder=dataclasses.replace(told.encoder, initialisation="bert")), WORDS)
    assert as_bert.pretraining_decoder.layer[0].attention.self.key.weight.std() < 0.03
    # Each column of a pair is read by one head.
    assert (first.self.key.weight != 0).sum(dim=0).eq(1).all()
