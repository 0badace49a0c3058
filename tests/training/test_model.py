"""The losses are those of the papers, and replaced tokens are labelled correctly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.training.factories import tiny, vocabulary
from training.model import ReplacedTokenDetector, build_model, sample


def make_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["electra", "convbert"])
def detector(request: pytest.FixtureRequest, tmp_path: Path) -> ReplacedTokenDetector:
    model = build_model(tiny(request.param, tmp_path / "c.toml"), vocabulary(80)).eval()
    assert isinstance(model, ReplacedTokenDetector)
    return model


INPUTS = torch.randint(5, 80, (2, 32), generator=make_rng())
POSITIONS = torch.tensor([[1, 4, 5], [3, 20, 30]])
TARGETS = INPUTS.gather(1, POSITIONS)
MASKED = INPUTS.scatter(1, POSITIONS, 4)


def test_words_are_sampled_from_the_logits() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().expand(1, 30_000, 3)
    shares = torch.bincount(sample(logits, make_rng())[0], minlength=3) / 30_000
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.01)
    assert torch.equal(sample(logits, make_rng(3)), sample(logits, make_rng(3)))


def test_the_loss_is_the_generators_plus_fifty_times_the_detectors(
    detector: ReplacedTokenDetector,
) -> None:
    losses = detector(MASKED, POSITIONS, TARGETS, make_rng())
    assert losses["loss"].item() == pytest.approx(
        losses["generator_loss"].item() + 50 * losses["detector_loss"].item(), rel=1e-5
    )


def test_the_detectors_labels_are_the_tokens_that_really_changed(
    detector: ReplacedTokenDetector,
) -> None:
    read: list[torch.Tensor] = []
    detector.encoder.embeddings.register_forward_hook(
        lambda _, __, kwargs, ___: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    losses = detector(MASKED, POSITIONS, TARGETS, make_rng())
    masked, corrupted = read
    assert torch.equal(masked, MASKED)
    detector_logits = detector.discriminator_predictions(
        detector.encoder(input_ids=corrupted).last_hidden_state
    )
    # A word that the generator guessed right is an original again.
    expected = F.binary_cross_entropy_with_logits(detector_logits, (corrupted != INPUTS).float())
    assert losses["detector_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert (corrupted != INPUTS).any()
    untouched = torch.ones_like(INPUTS, dtype=torch.bool).scatter(1, POSITIONS, False)
    assert torch.equal(corrupted[untouched], INPUTS[untouched])


def test_generator_and_detector_share_their_embeddings_and_nothing_else(
    detector: ReplacedTokenDetector,
) -> None:
    assert not any(name.startswith("generator.embeddings.") for name in detector.state_dict())
    losses = detector(MASKED, POSITIONS, TARGETS, make_rng())
    words = detector.encoder.embeddings.word_embeddings.weight
    for part in detector.loss_parts:
        detector.zero_grad()
        losses[part].backward(retain_graph=True)
        assert words.grad is not None
        assert words.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in detector.generator.parameters())


def test_the_generator_is_narrower_and_as_deep(detector: ReplacedTokenDetector) -> None:
    assert detector.generator.config.hidden_size == detector.encoder.config.hidden_size // 2
    assert detector.generator.config.num_hidden_layers == detector.encoder.config.num_hidden_layers
