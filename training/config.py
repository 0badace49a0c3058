"""
Reads the TOML file that describes a pretraining run, and refuses one that cannot work.

A file may extend another and then holds only the differences. An error names the file, the key,
the value and the limit.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails

from command import BadInput, Unavailable

Family = Literal["bert", "convbert", "electra"]
ObjectiveName = Literal["mlm", "rtd"]
Design = Literal["none", "plain", "gua", "mix", "drbert", "emd", "mae", "retro"]
Initialisation = Literal["bert", "neighbours"]
Precision = Literal["auto", "bf16", "fp32"]

CONFIGS = Path(__file__).parent / "configs"
"""The folder of the configs that experiments name."""

LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
"""How an error states a limit, by pydantic's name of the error."""


def _keep_integer(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    validate(value)
    return value


Number = Annotated[float, WrapValidator(_keep_integer)]
"""A float. An integer stays one: a run records its config as the file has it, and compares that."""
Probability = Annotated[Number, Field(ge=0, le=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Table(BaseModel):
    """A table of a TOML file: exact types, no unknown keys, not changed once it is read."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Data(Table):
    """The text of a run and how it is cut into sequences."""

    held_out: list[str]
    """Shards below the data folder that are never trained on, as glob patterns."""
    text: list[str] = []
    """Shards below the data folder to train on, as glob patterns; empty if a dataset is named."""
    dataset: str = ""
    """Name of a dataset on the Hugging Face hub, or a folder that `datasets` can load."""
    dataset_config: str = ""
    dataset_split: str = "train"
    text_column: str = "text"
    tokenizer: str = ""
    """A tokenizer.json below the data folder; if empty, WordPiece is trained on the text."""
    vocabulary_size: int = 8192
    sequence_length: int = Field(default=128, ge=8)
    """Tokens of a sequence, [CLS] and [SEP] included."""


class Encoder(Table):
    """The shape of an encoder."""

    layers: Count
    hidden_size: Count
    heads: Count
    intermediate_size: Count
    family: Family = "bert"
    embedding_size: int = 0
    """Width of the embeddings; 0 means hidden_size, the only width that BERT supports."""
    kernel_size: Count = 9
    """Width of ConvBERT's convolution, in tokens."""
    groups: Count = 1
    """Number of groups of ConvBERT's feed-forward layers."""
    dropout: Number = Field(default=0.0, ge=0, lt=1)
    initialisation: Initialisation = "bert"
    """BERT's normal(0, 0.02), or "neighbours": the first layer begins as local attention, with
    which short runs learn from context (local_attention_init.py).
    """


class Decoder(Table):
    """The pretraining decoder, which is dropped after pretraining."""

    design: Design = "none"
    layers: int = 0
    """Blocks on top of the encoder; for emd, passes through the encoder's own last layer."""
    unmasked_first: Probability = 1.0
    """p: the share of masked positions that the first block may attend to (gua, drbert)."""
    decoder_share: Probability = 1.0
    """q: the probability that a position is predicted from the decoder (mix, drbert)."""
    visible: Probability = 1.0
    """The share of the other positions that a position may attend to (retro)."""
    rebuilt: Share = 1.0
    """The share of the positions that are rebuilt (retro)."""


class Objective(Table):
    """The pretraining objective."""

    name: ObjectiveName = "mlm"
    mask_rate: Number = Field(default=0.15, gt=0, lt=1)
    """The share of a sequence's tokens to predict."""
    whole_words: bool = False
    """Whether all tokens of a word are masked together."""
    generator_width: Number = Field(default=0.25, gt=0, le=1)
    """The generator's width as a share of the encoder's (rtd)."""
    detection_weight: Number = 50.0
    """Weight of the detector's loss in the total; the generator's has weight 1 (rtd)."""


class Optimisation(Table):
    """Steps, batches and the optimiser."""

    steps: Count
    batch_size: Count
    """Sequences a step, over all processes and micro-batches together."""
    peak_learning_rate: Number
    warmup_steps: int
    accumulate: Count = 1
    """Micro-batches in which a process computes its share of a step."""
    beta2: Number = 0.98
    """AdamW's second-moment decay; 0.98 is RoBERTa's, ELECTRA and ConvBERT use 0.999."""
    weight_decay: Number = 0.01
    clip_norm: Number = 1.0
    """The largest norm of the gradient; larger ones are scaled down."""
    precision: Precision = "auto"
    """Precision of the matrix products; auto is bf16 where the hardware has it, else fp32."""
    seed: int = Field(default=0, ge=0)
    checkpoint_every: Count = 200
    """Steps between two saves of the progress."""
    average: Count = 1
    """The checkpoint's weights are the mean over the last so many saves."""


class Config(Table):
    """A pretraining run."""

    data: Data
    encoder: Encoder
    optimisation: Optimisation
    objective: Objective = Objective()
    decoder: Decoder = Decoder()

    def as_dict(self) -> dict[str, Any]:
        """Return the config as runs and checkpoints record it."""
        return self.model_dump()


SECTIONS: dict[str, type[Table]] = {
    "data": Data,
    "encoder": Encoder,
    "objective": Objective,
    "decoder": Decoder,
    "optimisation": Optimisation,
}

AnyTable = TypeVar("AnyTable", bound=Table)


def read_config(path: Path) -> Config:
    """Read the run that a TOML file describes.

    Raises Unavailable if the file does not exist, BadInput if it cannot work.
    """
    tables = _read_tables(path)
    unknown = sorted(tables.keys() - SECTIONS.keys())
    if unknown:
        raise BadInput(f"{path}: unknown section [{unknown[0]}]; known are {', '.join(SECTIONS)}.")
    sections: dict[str, Any] = {
        name: validate(section, tables.get(name, {}), f"{path}: [{name}]")
        for name, section in SECTIONS.items()
    }
    return _checked(Config(**sections), f"{path}:")


def with_optimisation(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """Return the config with `changes` to its optimisation.

    Raises BadInput, which begins with `source`, if the result cannot work.
    """
    values = {**config.optimisation.model_dump(), **changes}
    optimisation = validate(Optimisation, values, source)
    return _checked(config.model_copy(update={"optimisation": optimisation}), source)


def with_defaults(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that a run recorded, with the defaults of keys that its version lacked."""
    complete = {name: dict(section) for name, section in recorded.items()}
    for name, section in SECTIONS.items():
        defaults = {
            key: field.get_default()
            for key, field in section.model_fields.items()
            if not field.is_required()
        }
        complete[name] = {**defaults, **complete.get(name, {})}
    return complete


def validate(table: type[AnyTable], values: Any, source: str) -> AnyTable:
    """Return the table that holds `values`; BadInput begins with `source` and names the key."""
    try:
        return table.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    # A misspelt key is two errors, one unknown key and one missing: report what the file has.
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    raise BadInput(f"{source} {_complaint(table, values, first)}")


def _complaint(table: type[Table], values: Any, error: ErrorDetails) -> str:
    """Return what is wrong with one key: its value and the limit, the type or the known values."""
    if not error["loc"]:
        return f"is {values!r}, which is not a table."
    key = str(error["loc"][0])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}; known are {', '.join(table.model_fields)}."
        case "missing":
            return f"missing key {key!r}."
        case "literal_error":
            known = get_args(table.model_fields[key].annotation)
            return f"{key} {values[key]!r} is unknown; known are {', '.join(known)}."
        case kind if kind in LIMITS:
            limit, words = LIMITS[kind]
            return f"{key} = {values[key]} must be {words} {error['ctx'][limit]}."
        case _:
            # TOML has no null: a key that may be None is one that may be left out.
            expected = inspect.formatannotation(table.model_fields[key].annotation)
            return f"{key} = {values[key]!r} is not of type {expected.removesuffix(' | None')}."


def _read_tables(path: Path) -> dict[str, Any]:
    """Return the tables of a file, on top of those of the file that it extends."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unavailable(f"{path} does not exist; training/configs holds examples.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} is not TOML: {error}.") from None
    parent = tables.pop("extends", None)
    if parent is None:
        return tables
    merged = _read_tables(path.parent / parent)
    for name, section in tables.items():
        if not isinstance(section, dict):
            raise BadInput(f"{path}: {name} = {section!r} is outside any section.")
        merged[name] = {**merged.get(name, {}), **section}
    return merged


def _checked(config: Config, source: str) -> Config:
    """Return the config; BadInput if values that are each valid do not work together."""
    checks = (
        *_data_problems(config.data),
        *_encoder_problems(config.encoder),
        *_decoder_problems(config.decoder, config.encoder.family),
        *_objective_problems(config.objective, config.encoder, config.decoder.design),
        *_initialisation_problems(config.encoder, config.data.sequence_length),
        *_optimisation_problems(config.optimisation),
    )
    for problem in checks:
        raise BadInput(f"{source} {problem}")
    return config


def _data_problems(data: Data) -> Iterator[str]:
    if bool(data.text) == bool(data.dataset):
        yield "[data] takes either text (shards) or dataset (a name), not both and not neither."
    if data.vocabulary_size > 2**16:
        yield f"vocabulary_size {data.vocabulary_size} does not fit 16-bit ids; at most 65536 do."


def _encoder_problems(encoder: Encoder) -> Iterator[str]:
    family, hidden_size = encoder.family, encoder.hidden_size
    if hidden_size % encoder.heads:
        yield f"hidden_size {hidden_size} is not a multiple of heads {encoder.heads}."
    if family == "bert" and encoder.embedding_size not in (0, hidden_size):
        yield (
            "BERT's embeddings are as wide as the encoder; embedding_size ="
            f' {encoder.embedding_size} needs family "electra" or "convbert".'
        )
    if family == "convbert" and encoder.heads % 2:
        yield f"ConvBERT halves its heads; heads = {encoder.heads} is odd."
    if family == "convbert" and encoder.kernel_size % 2 == 0:
        yield f"ConvBERT's kernel_size = {encoder.kernel_size} has no middle; take an odd one."
    if family != "convbert" and encoder.groups != 1:
        yield f'groups = {encoder.groups} needs family "convbert".'
    if hidden_size % encoder.groups:
        yield f"hidden_size {hidden_size} is not a multiple of groups {encoder.groups}."


def _decoder_problems(decoder: Decoder, family: Family) -> Iterator[str]:
    design = decoder.design
    if (design == "none") != (decoder.layers == 0):
        yield f"decoder design {design!r} does not go with layers = {decoder.layers}."
    if design in ("emd", "mae", "retro") and family != "bert":
        yield f"the {design} decoder uses BERT's own layers; family {family!r} has others."
    if design not in ("gua", "drbert") and decoder.unmasked_first != 1:
        yield (
            f"decoder design {design!r} has no gradual unmasking; unmasked_first belongs to gua"
            " and drbert."
        )
    if design not in ("mix", "drbert") and decoder.decoder_share != 1:
        yield (
            f"decoder design {design!r} has no random mix; decoder_share belongs to mix and drbert."
        )
    if design != "retro" and (decoder.visible, decoder.rebuilt) != (1, 1):
        yield f"decoder design {design!r} rebuilds no text; visible and rebuilt belong to retro."


def _objective_problems(objective: Objective, encoder: Encoder, design: Design) -> Iterator[str]:
    if objective.name == "mlm":
        return
    share, hidden_size = objective.generator_width, encoder.hidden_size
    generator_size = round(hidden_size * share)
    if design != "none":
        yield (
            "replaced-token detection does not support a decoder; design"
            f' {design!r} needs objective "mlm".'
        )
    if encoder.family == "bert":
        yield (
            "replaced-token detection shares embeddings with a narrower generator; take family"
            ' "electra" or "convbert".'
        )
    if generator_size % encoder.groups:
        yield (
            f"the generator's width, {share} of {hidden_size}, is not a multiple of groups"
            f" {encoder.groups}."
        )
    if generator_size < 2:
        yield f"generator_width = {share} of hidden_size {hidden_size} leaves no generator."


def _initialisation_problems(encoder: Encoder, sequence_length: int) -> Iterator[str]:
    if encoder.initialisation == "bert":
        return
    hidden_size = encoder.hidden_size
    if encoder.family == "convbert":
        yield (
            'initialisation "neighbours" is for BERT and ELECTRA; ConvBERT\'s convolution sees'
            " neighbours already."
        )
    if encoder.embedding_size not in (0, hidden_size):
        yield (
            'initialisation "neighbours" needs embeddings as wide as the encoder;'
            f" embedding_size = {encoder.embedding_size}, hidden_size = {hidden_size}."
        )
    if sequence_length > hidden_size:
        yield (
            'initialisation "neighbours" distinguishes as many positions as there are columns;'
            f" sequence_length = {sequence_length}, hidden_size = {hidden_size}."
        )
    if hidden_size // encoder.heads % 2:
        yield (
            'initialisation "neighbours" pairs the columns of a head; hidden_size'
            f" {hidden_size} over heads {encoder.heads} is odd."
        )


def _optimisation_problems(settings: Optimisation) -> Iterator[str]:
    if settings.warmup_steps >= settings.steps:
        yield f"warmup_steps = {settings.warmup_steps} must be less than steps = {settings.steps}."
    if settings.batch_size % settings.accumulate:
        yield (
            f"batch_size {settings.batch_size} is not a multiple of accumulate"
            f" {settings.accumulate}."
        )
    saves = -(-settings.steps // settings.checkpoint_every)
    if settings.average > saves:
        yield (
            f"average = {settings.average} is more than the {saves} saves of {settings.steps}"
            f" steps, one every {settings.checkpoint_every}."
        )
