"""With local attention the first layer attends to neighbours from the first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training.factories import CONFIGS, vocabulary
from training.config import read_config
from training.decoders import at
from training.encoders import build_encoder
from training.masking import Ids, mask_tokens
from training.model import MaskedLanguageModel, build_model

WORDS = vocabulary()


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_the_first_layer_begins_by_attending_to_the_neighbours(family: str) -> None:
    config = read_config(CONFIGS / "bert-mini.toml")
    shape = config.encoder.model_copy(update={"family": family, "initialisation": "neighbours"})
    torch.manual_seed(1)
    encoder = build_encoder(config.model_copy(update={"encoder": shape}), WORDS).eval()
    length = config.data.sequence_length
    with torch.no_grad():
        read = encoder.embeddings(
            torch.from_numpy(WORDS.ordinary).view(-1)[torch.randint(0, 900, (4, length))]
        )
        attention = encoder.encoder.layer[0].attention.self
        queries, keys = (
            layer(read).view(4, length, shape.heads, -1).transpose(1, 2)
            for layer in (attention.query, attention.key)
        )
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)  # (B, H, L, L)
    for head, offset in enumerate((-1, 1, -2, 2)):
        neighbours = weights[:, head].diagonal(offset, dim1=-2, dim2=-1)
        assert neighbours.median() > 0.5, f"head {head} looks {offset} tokens on"


def test_the_words_are_those_of_berts_initialisation() -> None:
    config = read_config(CONFIGS / "bert-mini.toml")
    encoders = []
    for name in ("bert", "neighbours"):
        torch.manual_seed(1)
        shape = config.encoder.model_copy(update={"initialisation": name})
        encoders.append(
            build_encoder(config.model_copy(update={"encoder": shape}), WORDS).state_dict()
        )
    changed = {
        name for name in encoders[0] if not torch.equal(encoders[0][name], encoders[1][name])
    }
    assert {name.removeprefix("encoder.layer.0.attention.") for name in changed} == {
        "embeddings.position_embeddings.weight",
        "self.query.weight",
        "self.key.weight",
        "self.value.weight",
        "output.dense.weight",
    }


@torch.no_grad()
def test_the_autoencoders_first_block_begins_by_looking_at_the_neighbours_of_a_masked_place() -> (
    None
):
    config = read_config(CONFIGS / "mae-mini.toml")
    model = build_model(config, WORDS).eval()
    assert isinstance(model, MaskedLanguageModel)
    masked = mask_tokens(
        sequences(config.data.sequence_length), 0.15, WORDS, np.random.default_rng(0)
    )
    states: list[torch.Tensor] = []
    block = "pretraining_decoder.layer.0"
    model.get_submodule(block).register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))
    positions = torch.from_numpy(masked.positions)
    model.logits(torch.from_numpy(masked.inputs), positions, torch.Generator())
    assert at(states[0], positions).std() == pytest.approx(
        1, abs=0.01
    )  # as large as the encoder's output elsewhere
    queries, keys = (
        model.get_submodule(f"{block}.attention.self.{name}")(states[0])
        .unflatten(2, (config.encoder.heads, -1))
        .transpose(1, 2)
        for name in ("query", "key")
    )
    weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)  # (B, H, L, L)
    for head, offset in enumerate((-1, 1, -2, 2)):
        places = positions + offset
        inside = (places >= 0) & (places < config.data.sequence_length)
        shares = at(weights[:, head], positions).gather(
            2, places.clamp(0, config.data.sequence_length - 1)[..., None]
        )[..., 0]
        assert shares[inside].median() > 0.5, f"head {head} looks {offset} tokens on"


def sequences(length: int) -> Ids:
    ids: Ids = np.random.default_rng(0).integers(5, 900, (4, length))
    ids[:, 0], ids[:, -1] = WORDS.cls, WORDS.sep
    return ids
