"""
Builds the encoders that can be pretrained: transformers' BERT, ELECTRA and ConvBERT.

They are Hugging Face models with Hugging Face's parameter names. Their faults when trained from
scratch are corrected here and in convbert.py.
"""

from __future__ import annotations

from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    ElectraConfig,
    ElectraModel,
    PretrainedConfig,
    PreTrainedModel,
)

from training import convbert, local_attention_init
from training.attention import attention_implementation
from training.config import Config, Encoder
from training.vocabulary import Vocabulary


def build_encoder(config: Config, vocabulary: Vocabulary) -> PreTrainedModel:
    """Return the encoder of `config` with new weights, drawn from torch's global generator."""
    described = encoder_config(config.encoder, vocabulary, config.data.sequence_length)
    if config.encoder.family == "convbert":
        model = ConvBertModel(described)
        convbert.initialise(model, described)
        return convbert.patch_attention(model)
    if config.encoder.family == "electra":
        model = ElectraModel(described)
    else:
        model = BertModel(described, add_pooling_layer=False)
    if config.encoder.initialisation == "neighbours":
        local_attention_init.initialise(model)
    return model


def encoder_config(shape: Encoder, vocabulary: Vocabulary, positions: int) -> PretrainedConfig:
    """Return the encoder's configuration in transformers' terms."""
    common = {
        "vocab_size": len(vocabulary),
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": positions,
        "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout,
        "pad_token_id": vocabulary.pad,
        "layer_norm_eps": 1e-12,
    }
    embedding_size = shape.embedding_size or shape.hidden_size
    match shape.family:
        case "bert":
            return BertConfig(**common, attn_implementation=attention_implementation())
        case "electra":
            return ElectraConfig(**common, embedding_size=embedding_size)
        case _:
            return ConvBertConfig(
                **common,
                embedding_size=embedding_size,
                head_ratio=2,
                conv_kernel_size=shape.kernel_size,
                num_groups=shape.groups,
            )


def generator_shape(shape: Encoder, width: float) -> Encoder:
    """Return the shape of the generator that is trained with an encoder.

    It is as deep, `width` times as wide, and reads the encoder's own embeddings.
    """
    heads = max(1, round(shape.heads * width))
    return shape.model_copy(
        update={
            "hidden_size": round(shape.hidden_size * width / heads) * heads,
            "heads": heads,
            "intermediate_size": round(shape.intermediate_size * width),
            "embedding_size": shape.embedding_size or shape.hidden_size,
            # A projection stands between its layers and the positions.
            "initialisation": "bert",
        }
    )


def encode_embeddings(encoder: PreTrainedModel, embedded: Tensor) -> Tensor:
    """Return the output (B, L, D) of an ELECTRA's or ConvBERT's layers on embeddings (B, L, E)."""
    if hasattr(encoder, "embeddings_project"):
        embedded = encoder.embeddings_project(embedded)
    hidden: Tensor = encoder.encoder(embedded).last_hidden_state
    return hidden


def remove_embeddings(encoder: PreTrainedModel) -> PreTrainedModel:
    """Remove the embeddings of an encoder that reads another's, and return it."""
    del encoder.embeddings
    return encoder
