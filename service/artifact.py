"""
The contract between export and service: a folder whose manifest.json lists the SHA-256 of every
file in it.

The reader owns the schema. An artifact is read whole or refused: an unknown field, and a file that
is missing, changed or not listed, is an ArtifactError that names it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from command import UNAVAILABLE, BadInput
from service.host import cpus
from service.host.files import Stamp, UnsuitableFile, hash_regular, read_regular

SCHEMA_VERSION: Literal[3] = 3
READABLE_VERSIONS = (2, 3)
"""Manifest versions that are read. Version 2 has no self-check, so its artifacts are served
unchecked.
"""
MANIFEST = "manifest.json"
# The logits of the self-check dominate: 5 MB for 5,000 labels and three variants.
MANIFEST_BYTES = 16 * 1024 * 1024
TOKENIZER = "tokenizer.json"
# More than twice the size of XLM-R's tokenizer with 250,000 tokens.
TOKENIZER_BYTES = 64 * 1024 * 1024
# All files together: XLM-R XXL in fp32 has 43 GB.
ARTIFACT_BYTES = 64 * 1024**3
MOST_FILES = 1_000
# Key of the folder's own stamp among those of its files; renaming the folder changes it.
FOLDER = "."
# Limit of a text's length. No BERT reads longer rows, and their attention alone takes gigabytes.
MOST_TOKENS = 32_768
# Files by which a Hugging Face checkpoint is recognised.
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer_config.json",
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

TextTask = Literal["single_label", "multi_label", "regression"]
"""What a classifier answers about a whole text."""
Task = TextTask | Literal["token_labels", "heads"]
"""`token_labels`: a label for each token of a text. `heads`: several heads, each with a task."""
Precision = Literal["f32", "bf16", "f16", "i8"]
UnquantizedPrecision = Literal["f32", "bf16"]
"""Precision in which a graph computes what it does not quantize."""


class ArtifactError(BadInput):
    """Raised for a folder that is not an artifact, or whose content is not what was exported."""


class ArtifactMissing(ArtifactError):
    """Raised where there is no artifact at the given path."""

    exit_code = UNAVAILABLE


class ArtifactUnreadable(ArtifactError):
    """Raised where the system refuses to read the artifact."""

    exit_code = UNAVAILABLE


class _Part(BaseModel):
    """A part of the manifest.

    Renamed fields keep their former keys in manifest.json and /info, as aliases: `padding_safe`,
    `seal`, `rest`, `wanted` and `wanted_per_label`. `_read_manifest` accepts these keys only.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class Parity(_Part):
    """The difference between a variant's answers and the reference's, on real texts."""

    texts: int
    """Number of compared texts."""
    max_probability_difference: float
    """Largest difference of a probability, over all texts and labels."""
    tolerance: float | None
    """The largest difference that counts as rounding; None for a variant with an accuracy gate."""
    label_agreement: float
    """Share of the texts that get the reference's label, 0 to 1."""


class LabelAgreement(_Part):
    """A variant's agreement with the fp32 variant, over the texts to which fp32 gives one label."""

    texts: int
    """Number of texts to which fp32 gives the label."""
    agreeing: int
    """Number of these texts with the same answer from the variant."""
    lower_bound: float
    """Lower bound of the agreeing share at 95 % confidence, as in Agreement; 0.0 without texts."""


class Agreement(_Part):
    """A variant's agreement with the fp32 variant, on texts that did not calibrate the variant."""

    texts: int
    """Number of compared texts."""
    agreeing: int
    """Number of texts with the same answer from both variants."""
    lower_bound: float
    """Lower bound of the agreeing share at 95 % confidence (Clopper-Pearson, one-sided)."""
    required_lower_bound: float = Field(validation_alias="wanted", serialization_alias="wanted")
    """The least lower bound with which the gate is passed."""
    accuracy: float | None
    """Share of labelled texts with the right answer; None where no text has a label."""
    accuracy_of_fp32: float | None
    """The fp32 variant's share of labelled texts with the right answer, for comparison."""
    labels: dict[str, LabelAgreement] = {}
    """Agreement by label; where a text may have several labels, over the texts that fp32 gives it.
    Empty for a regression.
    """
    required_per_label: float | None = Field(
        default=None, validation_alias="wanted_per_label", serialization_alias="wanted_per_label"
    )
    """The least lower bound of each label with which the gate is passed; None: not required."""
    unquantized_precision: UnquantizedPrecision | None = Field(
        default=None, validation_alias="rest", serialization_alias="rest"
    )
    """Precision in which the variant computed what it does not quantize. The service uses no lower
    one. None: the variant's own precision.
    """


class Gate(_Part):
    """The outcome of a variant's accuracy gate."""

    @property
    def is_open(self) -> bool:
        """Return whether `auto` may choose the variant."""
        return self.status in ("passed", "emulated")

    status: Literal["passed", "emulated", "failed", "ungated"]
    """`emulated`: the variant passed with torch's bf16 arithmetic, on a processor without bf16
    instructions; the self-check at start compares the engine with these answers.
    """
    reason: str
    """The measurement in words."""
    processor: str | None = None
    """The processor that measured it. On another one, the self-check at start decides."""
    agreement: Agreement | None = None
    """The counts behind the outcome; None where they were not taken."""


class Probe(_Part):
    """A text of the self-check with its token ids."""

    text: str
    text_pair: str | None
    input_ids: list[int] = Field(min_length=1)
    token_type_ids: list[int]


class SelfCheck(_Part):
    """The variant's answers to the probes on the exporting host."""

    logits: dict[Literal["f32", "bf16", "f16"], list[list[float]]]
    """Logits, (probes, labels), by the precision of what the variant does not quantize. An int8
    graph computes that in f32 or in bf16.
    """
    tolerance: float = Field(gt=0)
    """The largest difference of a logit that another processor's rounding may cause."""
    tolerances: list[float] = []
    """The same of each head of a model with several, whose logits may be of different sizes; the
    largest of them is `tolerance`. Empty for a model with one head.
    """


class Variant(_Part):
    """One compiled form of the model."""

    runtime: Literal["openvino", "onnxruntime", "cuda", "tensorrt"]
    precision: Precision
    files: list[str] = Field(min_length=1)
    """File names in the artifact's folder. The runtime loads the first one."""
    encoder_digest: str
    """Digest of the encoder's graph without weights and names."""
    head_digest: str
    """Digest of the classification head's graph without weights and names."""
    weight_bytes: int
    """Bytes of all weights."""
    parity: Parity | None
    """None where the exporting host could not run the variant; the gate's reason then states it."""
    gate: Gate
    """Whether `auto` may choose the variant."""
    self_check: SelfCheck | None = None
    """None where the exporting host could not run the variant, and in manifests of version 2."""

    @property
    def lowest_unquantized_precision(self) -> UnquantizedPrecision | None:
        """Return the lowest allowed precision for what the variant does not quantize.

        It is that of the gate or, without a gate, of the self-check. None: any precision.
        """
        if self.gate.agreement is not None:
            return self.gate.agreement.unquantized_precision
        if self.self_check is not None and "bf16" not in self.self_check.logits:
            return "f32"
        return None


class Dropped(_Part):
    """The pretraining decoder that export left out of the checkpoint."""

    design: str
    """Name of the decoder's design."""
    layers: int
    """Number of its layers."""
    parameters: int
    """Number of its parameters."""
    share_of_file: float
    """Its share of the checkpoint's bytes, 0 to 1."""


class Distilled(_Part):
    """How a model was made from a larger one of its family."""

    teacher_sha256: str
    """SHA-256 of the weights that it learnt from."""
    teacher_layers: int
    layers: int
    texts: int
    """Number of texts that it learnt on."""
    epochs: int
    gate: Gate
    """Its agreement with its teacher, on texts that it did not learn on."""


HEAD_NAME = re.compile(
    r"(?!(?:infer|config|stats|load|unload|ready|versions)$)[A-Za-z_][A-Za-z0-9_-]{0,62}"
)
"""What a head may be called: it follows its model's name and a slash in paths, some of which end
with a verb.
"""


class Head(_Part):
    """One of several classification heads on one encoder."""

    task: TextTask
    labels: list[str] = Field(min_length=1)
    activation: Literal["sigmoid", "none"] | None = None
    """As in Manifest."""
    checkpoint: str
    """Name of the folder that it was exported from."""
    checkpoint_sha256: str
    """SHA-256 of that folder's weights."""


PACKABLE_FAMILIES = (
    "albert",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "roberta",
    "xlm-roberta",
)
"""Families whose tokens meet only in attention, with positions added to the word embeddings."""


class Manifest(_Part):
    """The content of manifest.json."""

    schema_version: Literal[2, 3]
    name: str
    family: str
    task: Task
    labels: list[str] = Field(min_length=1)
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    """The function from logits to probabilities, where it differs from the task's own: a model
    with one label has the sigmoid. None: the task's own.
    """
    takes_pairs: bool
    max_tokens: int = Field(gt=2, le=MOST_TOKENS)
    truncation_side: Literal["right", "left"] = "right"
    """The side on which the checkpoint's tokenizer cuts a text that is too long."""
    inputs: list[str]
    encoder_digest: str
    head_digest: str
    tokenizer_digest: str
    parameters: int
    flops_per_token: int
    padding_invariant: bool = Field(
        validation_alias="padding_safe", serialization_alias="padding_safe"
    )
    """Whether a text's answer is independent of the padding around it. If it is not, only texts of
    equal length share a batch.
    """
    dropped: Dropped | None
    """The decoder that export left out; None where the checkpoint has none."""
    distilled: Distilled | None = None
    """How it was made from a larger model; None if it was not."""
    flushed_weights: int = 0
    """Number of subnormal weights that export set to zero. They change no answer, and processors
    multiply them up to a hundred times slower.
    """
    probes: list[Probe] = []
    """Texts of the self-check."""
    kept_decoder_layers: int
    """Decoder layers that export kept. Above 0 in the proof's positive control, whose answers mean
    nothing.
    """
    variants: dict[str, Variant] = Field(min_length=1)
    files: dict[str, str] = Field(max_length=MOST_FILES)
    """SHA-256 of every file in the folder except the manifest, by name."""
    heads: dict[str, Head] = {}
    """The heads of a model with several, in the order of their logits, the main one first; `labels`
    are then those of all heads, as head/label. Empty for a model with one head.
    """
    provenance: dict[str, str]
    checksum: str = Field(validation_alias="seal", serialization_alias="seal")
    """SHA-256 of all other fields; see manifest_checksum."""

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        # Answers are keyed by label, so two of one name would be merged.
        repeated = next((label for label, times in Counter(labels).items() if times > 1), None)
        if repeated is not None:
            raise ValueError(
                f"two are called {repeated!r}; name every class of the checkpoint differently and"
                " export it again"
            )
        return labels

    @model_validator(mode="after")
    def _files_are_known(self) -> Manifest:
        for name in self.files:
            if Path(name).name != name or name == MANIFEST:
                raise ValueError(f"{name!r} is no plain file name")
        if self.tokenizer_digest != self.files.get("tokenizer.json"):
            raise ValueError("tokenizer_digest is not the digest of tokenizer.json")
        if self.labels_tokens and self.takes_pairs:
            raise ValueError("a model that labels tokens takes no pairs")
        users = {"tokenizer.json": "tokenizer"}
        for variant_name, variant in self.variants.items():
            users |= dict.fromkeys(variant.files, variant_name)
        for name, user in users.items():
            if name not in self.files:
                raise ValueError(f"{user} uses {name}, which files does not list")
        return self

    @model_validator(mode="after")
    def _labels_are_those_of_heads(self) -> Manifest:
        if bool(self.heads) != (self.task == "heads"):
            raise ValueError("a model has the task heads if it has several, and no other one then")
        for name in self.heads:
            if not HEAD_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a head")
        if self.heads and self.labels != labels_of(self.heads):
            raise ValueError("labels are not those of its heads")
        for name, variant in self.variants.items():
            recorded = variant.self_check.tolerances if variant.self_check else []
            if recorded and len(recorded) != len(self.heads):
                raise ValueError(f"{name} has no tolerance for each of its heads")
        return self

    @property
    def labels_tokens(self) -> bool:
        """Whether the model labels the tokens of a text, and not the text."""
        return self.task == "token_labels"

    @property
    def by_head(self) -> dict[str, HeadView]:
        """Each head as a model of its own, by name; empty for a model with one head."""
        views, begin = {}, 0
        for name, head in self.heads.items():
            alone = self.model_copy(
                update={
                    "task": head.task,
                    "labels": head.labels,
                    "activation": head.activation,
                    "heads": {},
                }
            )
            views[name] = HeadView(slice(begin, begin + len(head.labels)), alone)
            begin += len(head.labels)
        return views

    @property
    def parts(self) -> list[HeadView]:
        """Each head as a model of its own, the main one first; all of a model with one head."""
        return list(self.by_head.values()) or [HeadView(slice(None), self)]

    @property
    def can_pack(self) -> bool:
        """Whether OpenVINO can run several texts in one row."""
        return self.padding_invariant and self.family in PACKABLE_FAMILIES


@dataclass(frozen=True)
class HeadView:
    """One head of a model, seen as a model."""

    columns: slice
    """Its logits among those of all heads."""
    manifest: Manifest
    """The manifest of a model with this head alone."""


def labels_of(heads: Mapping[str, Head]) -> list[str]:
    """Return the labels of all heads, as head/label, in the order of their logits."""
    return [f"{name}/{label}" for name, head in heads.items() for label in head.labels]


@dataclass(frozen=True)
class Artifact:
    """A verified folder with its manifest."""

    directory: Path
    """The folder as it was named by the caller."""
    manifest: Manifest
    """The manifest, whose files were all verified."""
    digest: str = ""
    """SHA-256 of manifest.json, which identifies the artifact: the manifest holds the SHA-256 of
    every other file.
    """

    resolved: Path | None = None
    """The folder without symbolic links. A link that is changed later leads to no other folder."""
    stamps: Mapping[str, tuple[Stamp, Stamp]] = field(default_factory=dict)
    """Stamps of each path by name, as it was verified: of the path itself, which may be a link, and
    of the file behind it. FOLDER is among them where its times are steady.
    """

    def path(self, name: str) -> Path:
        """Return the path of one of the artifact's files."""
        return (self.resolved or self.directory) / name

    def check_unchanged(self) -> None:
        """Raise ArtifactError if a file was replaced or written to since it was verified.

        Call it after an engine has read the files: it then has read what was verified.
        """
        for name, stamps in self.stamps.items():
            try:
                same = _same(_stamps(self.path(name)), stamps)
            except OSError:
                same = False
            if not same:
                raise ArtifactError(
                    f"{self.directory / name} was changed or touched after it was verified; load it"
                    " again."
                )


def read_artifact(directory: Path) -> Artifact:
    """Return the artifact in `directory`, with every file verified against the manifest.

    Raises ArtifactError, which names the first file that differs.
    """
    try:
        manifest, digest = _read_manifest(directory)
        resolved = directory.resolve(strict=True)
        folder = _stamps(resolved)
        _check_names(directory, manifest)
        links = {name: Stamp.of(os.lstat(resolved / name)) for name in manifest.files}
        paths = [resolved / name for name in manifest.files]
        _check_sizes(directory, paths)
        # hashlib releases the GIL, and hashing a large artifact is half of a start's time.
        with ThreadPoolExecutor(cpus.usable(), thread_name_prefix="sha256") as hashing:
            hashes = dict(zip(manifest.files, hashing.map(_hash, paths), strict=True))
        # Some network file systems report a new time for a folder at every call. Such times show
        # no change.
        is_steady = _same(_stamps(resolved), folder)
    except OSError as error:
        raise _unreadable(directory, error) from None
    for name, expected in manifest.files.items():
        _check_digest(directory / name, hashes[name][0], expected)
    stamps = {name: (links[name], stamp) for name, (_, stamp) in hashes.items()}
    if is_steady:
        stamps[FOLDER] = folder
    return Artifact(directory, manifest, digest, resolved, stamps)


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest in `directory` without verifying its files."""
    try:
        return _read_manifest(directory)[0]
    except OSError as error:
        raise _unreadable(directory, error) from None


def _read_manifest(directory: Path) -> tuple[Manifest, str]:
    """Return the manifest and the SHA-256 of its bytes."""
    path = directory / MANIFEST
    _check_place(directory)
    content, _ = read_regular(path, MANIFEST_BYTES)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{path} is not JSON: {reason}.") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ArtifactError(
            f"{path}: schema_version is {_shortened(repr(version))}, this service reads {readable};"
            " export it again."
        )
    try:
        manifest = Manifest.model_validate(values, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "it"
        raise ArtifactError(f"{path}: {_shortened(place)}: {_shortened(first['msg'])}.") from None
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply.") from None
    if manifest.checksum != manifest_checksum(values):
        raise ArtifactError(
            f"{path} has changed since export: its fields do not match its checksum (seal); export"
            " it again."
        )
    return manifest, hashlib.sha256(content).hexdigest()


def _check_place(directory: Path) -> None:
    """Raise ArtifactMissing unless `directory` is a folder with a manifest.

    The message names what `directory` is instead, with the command that makes an artifact of it.
    """
    if not _is_there(directory):
        hint = ""
        if HUB_ID.fullmatch(str(directory)) and not directory.parent.exists():
            hint = f" If {directory} is a model of Hugging Face's hub, write {directory}@main."
        raise ArtifactMissing(
            f"{directory} does not exist; name the folder of a checkpoint, or of an artifact that"
            f" `drbert-export CHECKPOINT {directory}` makes.{hint}"
        )
    if not directory.is_dir():
        raise ArtifactMissing(
            f"{directory} is no folder; name the folder of a checkpoint or of an artifact."
        )
    if not _is_there(directory / MANIFEST):
        if any((directory / name).exists() for name in CHECKPOINT_FILES):
            raise ArtifactMissing(
                f"{directory} is a checkpoint, not an artifact; export it: `drbert-export"
                f" {directory} artifacts/{directory.resolve().name}`, and serve"
                f" artifacts/{directory.resolve().name}."
            )
        raise ArtifactMissing(
            f"{directory} has no {MANIFEST} and no config.json, so it is neither an artifact nor a"
            " checkpoint. An export that was interrupted leaves no manifest."
        )


def _is_there(path: Path) -> bool:
    """Return whether the path exists; errors other than its absence are raised."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a NUL, or characters that no file name can have here
        raise UnsuitableFile(errno.EINVAL, "no file can have that name", "the path") from None
    return True


def _check_names(directory: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a listed file that is missing, or a file that is not listed."""
    missing = set(manifest.files)
    extra: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in missing:
                missing.discard(entry.name)
            elif entry.name != MANIFEST and not _is_system_file(entry.name):
                extra.append(entry.name)
            if len(extra) > MOST_FILES:
                break
    if missing:
        raise ArtifactError(
            f"{directory} lacks {_shortened(min(missing))}, which its manifest lists; export it"
            " again."
        )
    if extra:
        raise ArtifactError(
            f"{directory} holds {_shortened(min(extra))}, which its manifest does not list; remove"
            " it or export again."
        )


def _is_system_file(name: str) -> bool:
    """Return whether a file is one that systems leave in folders, which the service ignores.

    Examples are .DS_Store, a mounted disk's lost+found, and a projected volume's ..data.
    """
    return name.startswith(".") or name == "lost+found"


def _check_sizes(directory: Path, paths: list[Path]) -> None:
    size = sum(path.stat().st_size for path in paths)
    if size > ARTIFACT_BYTES:
        raise ArtifactError(
            f"The files of {directory} have {size} bytes together, the limit is {ARTIFACT_BYTES}."
        )


def _check_digest(path: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise ArtifactError(
            f"{path} has changed since export: sha256 {digest[:12]}…, the manifest says"
            f" {expected[:12]}…; export it again."
        )


def _hash(path: Path) -> tuple[str, Stamp]:
    return hash_regular(path, TOKENIZER_BYTES if path.name == TOKENIZER else ARTIFACT_BYTES)


def _stamps(path: Path) -> tuple[Stamp, Stamp]:
    return Stamp.of(os.lstat(path)), Stamp.of(os.stat(path))


def _same(stamps: tuple[Stamp, Stamp], others: tuple[Stamp, Stamp]) -> bool:
    """Return whether neither the link nor the file behind it has changed."""
    return all(stamp.same_content(other) for stamp, other in zip(stamps, others, strict=True))


def _unreadable(directory: Path, error: OSError) -> ArtifactError:
    """Return the error for a path that the system refuses to read, or that is no regular file."""
    place = error.filename if isinstance(error.filename, str) and error.filename else str(directory)
    if isinstance(error, UnsuitableFile):
        return ArtifactError(
            f"{_shortened(place)} cannot be read: {error.strerror}; export writes regular files."
        )
    return ArtifactUnreadable(
        f"{_shortened(place)} cannot be read ({error.strerror}); check the path and its"
        " permissions."
    )


def _shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def manifest_checksum(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's fields, with the keys of its file, in hexadecimal.

    The fields are hashed as canonical JSON: sorted, without spaces, and without the checksum.
    """
    fields = {name: value for name, value in values.items() if name != "seal"}
    return hashlib.sha256(
        json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def with_checksum(manifest: Manifest) -> Manifest:
    """Return the manifest with the checksum of its other fields."""
    checksum = manifest_checksum(manifest.model_dump(mode="json"))
    return manifest.model_copy(update={"checksum": checksum})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
