"""
The contract between export and service: a folder with a manifest.json that accounts for every byte
in it.

The reader owns the schema. An artifact is read whole or refused: an unknown field,
a file that is missing, changed or not listed is an ArtifactError that names it.
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
"""Version 2 has no self-check: what was exported with it is served unchecked."""
MANIFEST = "manifest.json"
# The logits of a self-check are most of it: 5 MB for 5,000 labels and three variants.
MANIFEST_BYTES = 16 * 1024 * 1024
TOKENIZER = "tokenizer.json"
# Twice that of XLM-R's 250,000 tokens, with room.
TOKENIZER_BYTES = 64 * 1024 * 1024
# All files together: XLM-R XXL in fp32 has 43 GB.
ARTIFACT_BYTES = 64 * 1024**3
MOST_FILES = 1_000
# The folder itself, among the stamps of its files: renaming it changes its own.
FOLDER = "."
# Of a text. Longer rows are beyond every BERT, and their attention alone takes gigabytes.
MOST_TOKENS = 32_768
# What lies in a folder of Hugging Face's.
CHECKPOINT_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "tokenizer_config.json",
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Task = Literal["single_label", "multi_label", "regression"]
Precision = Literal["f32", "bf16", "f16", "i8"]


class ArtifactError(BadInput):
    """The folder is not an artifact this service can trust."""


class ArtifactMissing(ArtifactError):
    """There is no artifact where one was named."""

    exit_code = UNAVAILABLE


class ArtifactUnreadable(ArtifactError):
    """The system does not give what is there."""

    exit_code = UNAVAILABLE


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Parity(_Part):
    """How far a variant's answers are from the reference's, on real texts."""

    texts: int
    max_probability_difference: float
    tolerance: float | None
    """The largest difference that is taken for rounding; None for a variant that its gate judges.
    """
    label_agreement: float
    """Share of the texts given the reference's label, 0 to 1."""


Rest = Literal["f32", "bf16"]


class LabelAgreement(_Part):
    """How often a variant gave the fp32 variant's answer, of the texts to which fp32 gives one
    label.
    """

    texts: int
    agreeing: int
    lower_bound: float
    """Of the share that agrees, as for all texts; 0.0 where there are none."""


class Agreement(_Part):
    """How often a variant gave the fp32 variant's label, on texts it was not calibrated with."""

    texts: int
    agreeing: int
    lower_bound: float
    """Of the share that agrees, at 95 % confidence (Clopper-Pearson, one-sided)."""
    wanted: float
    """What the lower bound has to reach."""
    accuracy: float | None
    """Share of labelled texts answered rightly; None where none are labelled."""
    accuracy_of_fp32: float | None
    labels: dict[str, LabelAgreement] = {}
    """The same by label; of several labels at once, over the texts that have it by fp32. Empty for
    a number.
    """
    wanted_per_label: float | None = None
    """What the lower bound of each label has to reach, where that was asked."""
    rest: Rest | None = None
    """In which precision that was found for what the variant does not quantise; it is served in no
    lower one. None: in its own.
    """


class Gate(_Part):
    """Whether `auto` may choose the variant: only one that passed, by its engine or emulated."""

    @property
    def is_open(self) -> bool:
        return self.status in ("passed", "emulated")

    status: Literal["passed", "emulated", "failed", "ungated"]
    """`emulated`: it passed by torch's arithmetic in bf16, on a processor without instructions for
    it; the start's self-check holds the engine to that.
    """
    reason: str
    processor: str | None = None
    """Where that was found. Elsewhere the start's self-check says whether it holds."""
    agreement: Agreement | None = None


class Probe(_Part):
    """A text of the self-check, and what the model reads of it."""

    text: str
    text_pair: str | None
    input_ids: list[int] = Field(min_length=1)
    token_type_ids: list[int]


class SelfCheck(_Part):
    """What a variant answered to the probes where it was exported."""

    logits: dict[Literal["f32", "bf16", "f16"], list[list[float]]]
    """(probes, labels) by the precision of what the variant does not quantise: an int8 graph
    computes the rest in f32 or in bf16.
    """
    tolerance: float = Field(gt=0)
    """The largest difference of a logit that may be rounding of another processor."""


class Variant(_Part):
    """One compiled form of the model."""

    runtime: Literal["openvino", "onnxruntime", "cuda", "tensorrt"]
    precision: Precision
    files: list[str] = Field(min_length=1)
    """The first is the one to load."""
    encoder_digest: str
    head_digest: str
    weight_bytes: int
    parity: Parity | None
    """None where the exporting host could not run the variant; its gate then says so."""
    gate: Gate
    self_check: SelfCheck | None = None
    """None where the exporting host could not run the variant, or was of an earlier version."""

    @property
    def lowest_rest(self) -> Rest | None:
        """The lowest precision for what the variant does not quantise: that of its gate or,
        ungated, of its self-check; None: any.
        """
        if self.gate.agreement is not None:
            return self.gate.agreement.rest
        return (
            "f32" if self.self_check is not None and "bf16" not in self.self_check.logits else None
        )


class Dropped(_Part):
    """What export left out of the checkpoint."""

    design: str
    layers: int
    parameters: int
    share_of_file: float


class Manifest(_Part):
    schema_version: Literal[2, 3]
    name: str
    family: str
    task: Task
    labels: list[str] = Field(min_length=1)
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    """What turns logits into probabilities, where it is not the task that says so: a single label
    has the sigmoid's.
    """
    takes_pairs: bool
    max_tokens: int = Field(gt=2, le=MOST_TOKENS)
    truncation_side: Literal["right", "left"] = "right"
    """Where the checkpoint's tokenizer cuts a text that is too long."""
    inputs: list[str]
    encoder_digest: str
    head_digest: str
    tokenizer_digest: str
    parameters: int
    flops_per_token: int
    padding_safe: bool
    """False: answers depend on how far a text is padded, so only equal lengths share a batch."""
    dropped: Dropped | None
    flushed_weights: int = 0
    """Subnormal weights that export set to zero: they change no answer, and processors multiply
    them up to a hundred times slower.
    """
    probes: list[Probe] = []
    """Texts of the self-check."""
    kept_decoder_layers: int
    """Above 0 in the proof's positive control, whose answers mean nothing."""
    variants: dict[str, Variant] = Field(min_length=1)
    files: dict[str, str] = Field(max_length=MOST_FILES)
    """sha256 of every file beside the manifest."""
    provenance: dict[str, str]
    seal: str
    """sha256 of all the above; see seal_of."""

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: list[str]) -> list[str]:
        # Whoever answers by name would merge them.
        twice = next((label for label, times in Counter(labels).items() if times > 1), None)
        if twice is not None:
            raise ValueError(
                f"two are called {twice!r}; name every class of the checkpoint differently and"
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
        used = {"tokenizer.json": "tokenizer"} | {
            f: v for v, variant in self.variants.items() for f in variant.files
        }
        for name, user in used.items():
            if name not in self.files:
                raise ValueError(f"{user} uses {name}, which files does not list")
        return self


@dataclass(frozen=True)
class Artifact:
    """A verified folder and what its manifest says."""

    directory: Path
    manifest: Manifest
    digest: str = ""
    """sha256 of the manifest as it was read, which holds the sha256 of everything else."""

    resolved: Path | None = None
    """The folder without symbolic links, so that a link that is changed meanwhile leads to no other
    folder.
    """
    stamps: Mapping[str, tuple[Stamp, Stamp]] = field(default_factory=dict)
    """Of each file as it was verified, and of the link to it where it is one; FOLDER's own where it
    has steady times.
    """

    def path(self, name: str) -> Path:
        return (self.resolved or self.directory) / name

    def check_unchanged(self) -> None:
        """Raise ArtifactError if a file was replaced or written to since it was verified.

        Called once an engine has read them: what it read is then what was verified.
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
    """The artifact in `directory`, every file checked against the manifest; else an
    ArtifactError.
    """
    try:
        manifest, digest = _read_manifest(directory)
        resolved = directory.resolve(strict=True)
        folder = _stamps(resolved)
        _check_names(directory, manifest)
        links = {name: Stamp.of(os.lstat(resolved / name)) for name in manifest.files}
        _check_sizes(directory, [resolved / name for name in manifest.files])
        # hashlib lets go of the interpreter, and a large artifact's files are half of a start's
        # time.
        with ThreadPoolExecutor(cpus.usable(), thread_name_prefix="sha256") as hashing:
            hashes = dict(
                zip(
                    manifest.files,
                    hashing.map(_hash, (resolved / name for name in manifest.files)),
                    strict=True,
                )
            )
        # Some network file systems make up a new time for a folder whenever they are asked; there
        # it says nothing.
        stamps = {FOLDER: folder} if _same(_stamps(resolved), folder) else {}
    except OSError as error:
        raise _unreadable(directory, error) from None
    for name, wanted in manifest.files.items():
        _check_digest(directory / name, hashes[name][0], wanted)
    return Artifact(
        directory,
        manifest,
        digest,
        resolved,
        {name: (links[name], stamp) for name, (_, stamp) in hashes.items()} | stamps,
    )


def read_manifest(directory: Path) -> Manifest:
    """The manifest alone, its files not looked at."""
    try:
        return _read_manifest(directory)[0]
    except OSError as error:
        raise _unreadable(directory, error) from None


def _read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The manifest and the digest of its bytes."""
    path = directory / MANIFEST
    _check_place(directory)
    content, _ = read_regular(path, MANIFEST_BYTES)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ArtifactError(f"{path} is not JSON: {why}.") from None
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ArtifactError(
            f"{path}: schema_version is {_shortened(repr(version))}, this service reads {readable};"
            " export it again."
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise ArtifactError(f"{path}: {_shortened(where)}: {_shortened(first['msg'])}.") from None
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply.") from None
    if manifest.seal != seal_of(values):
        raise ArtifactError(
            f"{path} has changed since export: its fields do not give its seal; export it again."
        )
    return manifest, hashlib.sha256(content).hexdigest()


def _check_place(directory: Path) -> None:
    """Raise ArtifactMissing unless `directory` is a folder with a manifest; it says what else was
    given.
    """
    if not _is_there(directory):
        hub = (
            f" If {directory} is a model of Hugging Face's hub: `python -m export {directory}"
            f" artifacts/{directory.name}`."
            if (HUB_ID.fullmatch(str(directory)) and not directory.parent.exists())
            else ""
        )
        raise ArtifactMissing(
            f"{directory} does not exist; `python -m export CHECKPOINT {directory}` makes it.{hub}"
        )
    if not directory.is_dir():
        raise ArtifactMissing(
            f"{directory} is no folder; an artifact is the folder that `python -m export` makes."
        )
    if not _is_there(directory / MANIFEST):
        if any((directory / name).exists() for name in CHECKPOINT_FILES):
            raise ArtifactMissing(
                f"{directory} is a checkpoint, not an artifact; export it: `python -m export"
                f" {directory} artifacts/{directory.resolve().name}`, and serve"
                f" artifacts/{directory.resolve().name}."
            )
        raise ArtifactMissing(
            f"{directory} has no {MANIFEST}; export writes it last, so run export again."
        )


def _is_there(path: Path) -> bool:
    """Whether something is there; other errors than its absence are raised."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a NUL, or characters that no file name can have here
        raise UnsuitableFile(errno.EINVAL, "no file can have that name", "the path") from None
    return True


def _check_names(directory: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a file that the manifest lists and that is not there, or the other
    way about.
    """
    missing = set(manifest.files)
    extra: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in missing:
                missing.discard(entry.name)
            elif entry.name != MANIFEST and not _is_of_the_system(entry.name):
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


def _is_of_the_system(name: str) -> bool:
    """Whether a file is one that systems leave in folders: .DS_Store, a mounted disk's lost+found,
    a projected volume's ..data. Nothing reads it.
    """
    return name.startswith(".") or name == "lost+found"


def _check_sizes(directory: Path, paths: list[Path]) -> None:
    size = sum(path.stat().st_size for path in paths)
    if size > ARTIFACT_BYTES:
        raise ArtifactError(
            f"The files of {directory} have {size} bytes together, the limit is {ARTIFACT_BYTES}."
        )


def _check_digest(path: Path, digest: str, wanted: str) -> None:
    if digest != wanted:
        raise ArtifactError(
            f"{path} has changed since export: sha256 {digest[:12]}…, the manifest says"
            f" {wanted[:12]}…; export it again."
        )


def _hash(path: Path) -> tuple[str, Stamp]:
    return hash_regular(path, TOKENIZER_BYTES if path.name == TOKENIZER else ARTIFACT_BYTES)


def _stamps(path: Path) -> tuple[Stamp, Stamp]:
    return Stamp.of(os.lstat(path)), Stamp.of(os.stat(path))


def _same(stamps: tuple[Stamp, Stamp], others: tuple[Stamp, Stamp]) -> bool:
    return all(stamp.same_content(other) for stamp, other in zip(stamps, others, strict=True))


def _unreadable(directory: Path, error: OSError) -> ArtifactError:
    """The refusal of what the system does not give, or gives as something that no artifact
    holds.
    """
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


def seal_of(values: Mapping[str, Any]) -> str:
    """sha256 of a manifest's fields as they stand in its file, in canonical JSON, the seal itself
    left out.
    """
    fields = {name: value for name, value in values.items() if name != "seal"}
    return hashlib.sha256(
        json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sealed(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"seal": seal_of(manifest.model_dump(mode="json"))})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
