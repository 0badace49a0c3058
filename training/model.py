"""
The models that are pretrained: an encoder, its pretraining modules and the loss.

    MaskedLanguageModel      encoder, decoder design, tied output layer    BERT, arXiv 1810.04805
    ReplacedTokenDetector    encoder that detects a generator's words      ELECTRA, arXiv 2003.10555

Parameter names are Hugging Face's (bert.*, cls.predictions.*, …) and pretraining_decoder.layer.*,
so a saved state dict is a Hugging Face checkpoint with the decoder's weights added.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.config import Config
from training.decoders import MaskedText, at, build_decoder
from training.encoders import build_encoder, encode_embeddings, generator_shape, remove_embeddings
from training.losses import Losses, cross_entropy
from training.rng import derive_seed
from training.vocabulary import Vocabulary


class PredictionHead(nn.Module):
    """BERT's output layer; its matrix is tied to the word embeddings."""

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
        """Return logits (B, K, V) of states (B, K, D) and the embedding matrix (V, E)."""
        state = self.transform["LayerNorm"](F.gelu(self.transform["dense"](state)))
        return F.linear(state, embeddings, self.bias)


class DetectionHead(nn.Module):
    """ELECTRA's output layer: was a token replaced?"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.dense_prediction = nn.Linear(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (B, L), positive for "replaced", of states (B, L, D)."""
        logits: Tensor = self.dense_prediction(F.gelu(self.dense(hidden))).squeeze(-1)
        return logits


class MaskedLanguageModel(nn.Module):
    """An encoder that predicts masked words through a decoder design."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        shape, seed = config.encoder, config.optimisation.seed
        # The encoder and the head have a seed of their own, and are drawn before the decoder: two
        # models that differ in the decoder alone begin with equal encoders.
        torch.manual_seed(derive_seed(seed, "encoder"))
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
        torch.manual_seed(derive_seed(seed, "scaffolding"))
        self.pretraining_decoder = build_decoder(config)
        initialise(self.pretraining_decoder)
        if shape.initialisation == "neighbours":
            self.pretraining_decoder.initialise_local_attention()

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, which is registered under its family's name."""
        return self.get_submodule(self.family)

    @property
    def loss_parts(self) -> tuple[str, ...]:
        """Names of the losses that add up to the total, if there is more than one."""
        return self.pretraining_decoder.loss_parts

    def forward(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, rng: torch.Generator
    ) -> Losses:
        """Return the design's losses in nats; most have one, the cross-entropy of `targets` (B, K).

        They are predicted at `positions` (B, K) of `inputs` (B, L).
        """
        text = MaskedText(inputs, positions, targets)
        return self.pretraining_decoder.losses(self.encoder, self.predict, text, rng)

    def logits(self, inputs: Tensor, positions: Tensor, rng: torch.Generator) -> Tensor:
        """Return logits (B, K, V) at `positions` (B, K) of `inputs` (B, L)."""
        return self.predict(self.pretraining_decoder(self.encoder, inputs, positions, rng))

    def predict(self, state: Tensor) -> Tensor:
        """Return the output layer's logits (B, K, V) of states (B, K, D)."""
        words = self.encoder.embeddings.word_embeddings.weight
        logits: Tensor = self.cls["predictions"](state, words)
        return logits


class ReplacedTokenDetector(nn.Module):
    """A generator fills in the masks; the encoder classifies every token as replaced or original.

        loss = cross-entropy of the generator at the masks + λ · mean binary cross-entropy of the
            detector at all tokens

    The generator has the encoder's family, depth and embeddings, and is narrower. Its words are
    drawn from its distribution, and no gradient flows through the draw.
    """

    loss_parts = ("generator_loss", "detector_loss")

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__()
        shape, objective, seed = config.encoder, config.objective, config.optimisation.seed
        torch.manual_seed(derive_seed(seed, "encoder"))
        self.family = shape.family
        self.add_module(self.family, build_encoder(config, vocabulary))
        self.discriminator_predictions = DetectionHead(shape.hidden_size)
        initialise(self.discriminator_predictions)
        torch.manual_seed(derive_seed(seed, "scaffolding"))
        narrow = generator_shape(shape, objective.generator_width)
        self.generator = remove_embeddings(
            build_encoder(config.model_copy(update={"encoder": narrow}), vocabulary)
        )
        self.generator_predictions = PredictionHead(
            narrow.hidden_size, narrow.embedding_size, len(vocabulary)
        )
        initialise(self.generator_predictions)
        self.detection_weight = objective.detection_weight

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder, which is registered under its family's name."""
        return self.get_submodule(self.family)

    def forward(
        self, inputs: Tensor, positions: Tensor, targets: Tensor, rng: torch.Generator
    ) -> Losses:
        """Return the weighted loss and its two parts, in nats.

        `targets` (B, K) are the original ids at `positions` (B, K) of `inputs` (B, L).
        """
        embeddings = self.encoder.embeddings
        words = embeddings.word_embeddings.weight
        hidden = encode_embeddings(self.generator, embeddings(input_ids=inputs))  # (B, L, G)
        generator_logits = self.generator_predictions(at(hidden, positions), words)  # (B, K, V)
        guesses = sample(generator_logits.detach().float(), rng)  # (B, K)
        corrupted = inputs.scatter(1, positions, guesses)  # (B, L)
        # A word that the generator guessed right is an original.
        replaced = torch.zeros_like(inputs).scatter(1, positions, (guesses != targets).long())
        hidden = encode_embeddings(self.encoder, embeddings(input_ids=corrupted))  # (B, L, D)
        detector_logits = self.discriminator_predictions(hidden)  # (B, L)
        generator_loss = cross_entropy(generator_logits, targets)
        detector_loss = F.binary_cross_entropy_with_logits(
            detector_logits.float(), replaced.float()
        )
        total = generator_loss + self.detection_weight * detector_loss
        return {"loss": total, "generator_loss": generator_loss, "detector_loss": detector_loss}


PretrainingModel = MaskedLanguageModel | ReplacedTokenDetector


def build_model(config: Config, vocabulary: Vocabulary) -> PretrainingModel:
    """Return the model of the config's objective, with first weights drawn from its seed."""
    if config.objective.name == "mlm":
        return MaskedLanguageModel(config, vocabulary)
    return ReplacedTokenDetector(config, vocabulary)


def sample(logits: Tensor, rng: torch.Generator) -> Tensor:
    """Draw a word for every position, (B, K), from the softmax of its `logits` (B, K, V).

    Each position uses one random number.
    """
    cumulated = logits.softmax(-1).cumsum(-1)  # (B, K, V)
    draws = torch.rand(logits.shape[:-1], generator=rng, device=rng.device).to(logits.device)
    words = torch.searchsorted(cumulated, draws[..., None]).squeeze(-1)
    # Rounding may leave the last sum a little under 1; a draw beyond it means the last word.
    return words.clamp(max=logits.shape[-1] - 1)


def initialise(module: nn.Module) -> None:
    """Draw BERT's initialisation: normal(0, 0.02) matrices, zero biases, unit LayerNorms."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
