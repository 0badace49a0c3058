"""
The encoders that can be pretrained: BERT, ELECTRA and ConvBERT, as transformers builds them.

What leaves this file is a Hugging Face model whose parameters carry Hugging Face's names; what
goes wrong there when one trains from scratch is put right here and in convbert.py.
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
from training.attention import transformers_name
from training.config import Config, Encoder
from training.vocabulary import Vocabulary


def build_encoder(config: Config, vocabulary: Vocabulary) -> PreTrainedModel:
    """The encoder of `config`, freshly drawn from torch's generator."""
    described = encoder_config(config.encoder, vocabulary, config.data.sequence_length)
    if config.encoder.family == "convbert":
        model = ConvBertModel(described)
        convbert.initialise(model, described)
        return convbert.mend(model)
    model = (
        ElectraModel(described)
        if config.encoder.family == "electra"
        else BertModel(described, add_pooling_layer=False)
    )
    if config.encoder.initialisation == "neighbours":
        local_attention_init.initialise(model)
    return model


def encoder_config(shape: Encoder, vocabulary: Vocabulary, positions: int) -> PretrainedConfig:
    """transformers' description of the encoder."""
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
            return BertConfig(**common, attn_implementation=transformers_name())
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


def narrowed(shape: Encoder, width: float) -> Encoder:
    """The generator beside an encoder: as deep, `width` times as wide, on the encoder's own
    embeddings.
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


def transform(encoder: PreTrainedModel, embedded: Tensor) -> Tensor:
    """Projection and layers of an ELECTRA or ConvBERT on embeddings (B, L, E) made elsewhere: (B,
    L, D).
    """
    if hasattr(encoder, "embeddings_project"):
        embedded = encoder.embeddings_project(embedded)
    hidden: Tensor = encoder.encoder(embedded).last_hidden_state
    return hidden


def without_embeddings(encoder: PreTrainedModel) -> PreTrainedModel:
    """The encoder with its own embeddings taken out, for one that reads another's."""
    del encoder.embeddings
    return encoder
