"""
The models that are pretrained: an encoder, what stands on it during pretraining, and the loss.

    MaskedLanguageModel      an encoder, a decoder design, a tied output layer             BERT,
        arXiv 1810.04805
    ReplacedTokenDetector    an encoder that tells a small generator's words from real ones
        ELECTRA, arXiv 2003.10555

Parameter names are Hugging Face's (bert.*, cls.predictions.*, …) and pretraining_decoder.layer.*,
so a saved state dict is a Hugging Face checkpoint with the decoder beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.config import Config
from training.decoders import at, build_decoder
from training.encoders import build_encoder, narrowed, transform, without_embeddings
from training.rng import seed_of
from training.vocabulary import Vocabulary

Losses = dict[str, Tensor]


class PredictionHead(nn.Module):
    """BERT's output layer; its matrix is the word embedding itself."""

    def __init__(self, hidden_size: int, embedding_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(hidden_size, embedding_size),
                "LayerNorm": nn.LayerNorm(embedding_size, eps=1e-12),
            }
        )
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, state: Tensor, embeddings: Tensor) -> Tensor:
        """Scores (B, K, V) from states (B, K, D) and the embedding matrix (V, E)."""
        state = self.transform["LayerNorm"](F.gelu(self.transform["dense"](state)))
        return F.linear(state, embeddings, self.bias)


class DetectionHead(nn.Module):
    """ELECTRA's: is this token the original?"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dense_prediction = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores (B, L), positive for "replaced", from states (B, L, D)."""
        scores: Tensor = self.dense_prediction(F.gelu(self.dense(hidden))).squeeze(-1)
        return scores


class MaskedLanguageModel(nn.Module):
    parts: tuple[str, ...] = ()
    """Names of the losses that the total is made of, where there is more than one."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        shape, seed = config.encoder, config.optimisation.seed
        # The encoder and the head are drawn before the decoder and from their own seed:
        # twins that differ in the decoder alone begin with equal encoders.
        torch.manual_seed(seed_of(seed, "encoder"))
        self.family = shape.family
        self.add_module(self.family, build_encoder(config, vocabulary))
        self.cls = nn.ModuleDict(
            {
                "predictions": PredictionHead(
                    shape.hidden_size, shape.embedding_size or shape.hidden_size, len(vocabulary)
                )
            }
        )
        initialise(self.cls)
        torch.manual_seed(seed_of(seed, "scaffolding"))
        self.pretraining_decoder = build_decoder(config)
        initialise(self.pretraining_decoder)
        if shape.initialisation == "neighbours":
            self.pretraining_decoder.initialise_neighbours()

    @property
    def encoder(self) -> PreTrainedModel:
        return self.get_submodule(self.family)

    def forward(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, dice: torch.Generator
    ) -> Losses:
        """Mean cross-entropy in nats of `targets` (B, K) at `positions` (B, K) of `inputs`
        (B, L).
        """
        return {"loss": cross_entropy(self.scores(inputs, positions, dice), targets)}

    def scores(self, inputs: Tensor, positions: Tensor, dice: torch.Generator) -> Tensor:
        """Scores (B, K, V) at `positions` (B, K) of `inputs` (B, L)."""
        state = self.pretraining_decoder(self.encoder, inputs, positions, dice)  # (B, K, D)
        scores: Tensor = self.cls["predictions"](
            state, self.encoder.embeddings.word_embeddings.weight
        )
        return scores


class ReplacedTokenDetector(nn.Module):
    """A generator fills the masks in, the encoder says of every token whether it was replaced.

        loss = cross-entropy of the generator at the masks + λ · mean binary cross-entropy of the
            detector at all tokens

    The generator is as deep as the encoder and narrower, of its family and on its embeddings; its
    words are drawn from its distribution, and no gradient flows through the draw.
    """

    parts = ("generator_loss", "detector_loss")

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        shape, objective, seed = config.encoder, config.objective, config.optimisation.seed
        torch.manual_seed(seed_of(seed, "encoder"))
        self.family = shape.family
        self.add_module(self.family, build_encoder(config, vocabulary))
        self.discriminator_predictions = DetectionHead(shape.hidden_size)
        initialise(self.discriminator_predictions)
        torch.manual_seed(seed_of(seed, "scaffolding"))
        narrow = narrowed(shape, objective.generator_width)
        self.generator = without_embeddings(
            build_encoder(config.model_copy(update={"encoder": narrow}), vocabulary)
        )
        self.generator_predictions = PredictionHead(
            narrow.hidden_size, narrow.embedding_size, len(vocabulary)
        )
        initialise(self.generator_predictions)
        self.detection_weight = objective.detection_weight

    @property
    def encoder(self) -> PreTrainedModel:
        return self.get_submodule(self.family)

    def forward(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, dice: torch.Generator
    ) -> Losses:
        """The weighted loss and its two parts in nats; `targets` (B, K) stood at `positions` (B, K)
        of `inputs` (B, L).
        """
        embeddings = self.encoder.embeddings
        hidden = transform(self.generator, embeddings(input_ids=inputs))  # (B, L, G)
        scores = self.generator_predictions(
            at(hidden, positions), embeddings.word_embeddings.weight
        )
        guesses = draw(scores.detach().float(), dice)  # (B, K)
        corrupted = inputs.scatter(1, positions, guesses)  # (B, L)
        replaced = torch.zeros_like(inputs).scatter(1, positions, (guesses != targets).long())
        doubts = self.discriminator_predictions(
            transform(self.encoder, embeddings(input_ids=corrupted))
        )  # (B, L)
        generator_loss = cross_entropy(scores, targets)
        detector_loss = F.binary_cross_entropy_with_logits(doubts.float(), replaced.float())
        total = generator_loss + self.detection_weight * detector_loss
        return {"loss": total, "generator_loss": generator_loss, "detector_loss": detector_loss}


PretrainingModel = MaskedLanguageModel | ReplacedTokenDetector


def build_model(config: Config, vocabulary: Vocabulary) -> PretrainingModel:
    return (MaskedLanguageModel if config.objective.name == "mlm" else ReplacedTokenDetector)(
        config, vocabulary
    )


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, in nats; scores (B, K, V), targets (B, K)."""
    return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())


def draw(scores: Tensor, dice: torch.Generator) -> Tensor:
    """A word for every position (B, K), each from the softmax of its `scores` (B, K, V), by one
    throw a position.
    """
    cumulated = scores.softmax(-1).cumsum(-1)  # (B, K, V)
    throws = torch.rand(scores.shape[:-1], generator=dice, device=dice.device).to(scores.device)
    # Rounding may leave the last sum a little under 1; a throw beyond it means the last word.
    return (
        torch.searchsorted(cumulated, throws[..., None]).squeeze(-1).clamp(max=scores.shape[-1] - 1)
    )


def initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02) matrices, zero biases, unit LayerNorms."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
