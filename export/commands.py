"""
Exports a fine-tuned checkpoint to an artifact that the service can trust.

    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert
    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert --calibration
        reviews.txt --gate more-reviews.jsonl
    python -m export examples/checkpoints/drbert-mini-sst2 artifacts/drbert-with-decoder
        --keep-decoder

Drops the pretraining decoder and says what it dropped, compiles the variants, runs each on
real texts against torch, and writes manifest.json last. Nothing half-written is left behind.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from command import BadInput, BadUsage, Parser
from export.checkpoint.loading import Checkpoint, Left, build_model, read_checkpoint
from export.checkpoint.reference import PROBES, Reference, TextOrPair, load_model, texts_for
from export.checkpoint.tokenizer import load_tokenizer, read_tokenizer_config, write_tokenizer
from export.checks.gate import FEWEST_TEXTS, judge
from export.checks.verify import (
    check_lengths,
    check_tokens,
    emulate_bf16,
    engine_here,
    measure_padding_safety,
    measure_parity,
    read_probes,
    record_self_check,
)
from export.graph.attention import mended
from export.graph.onnx_file import export_onnx, flush_subnormal_weights, graph_inputs, read_inputs
from export.graph.variants import GATED, RECIPES, UNASKED, Source
from export.package import place_of, put_in_place, workplace
from export.texts import SHIPPED, Labelled, read_texts, without
from graphs.canonical import split
from graphs.files import read_graph
from service.artifact import (
    MANIFEST,
    MOST_TOKENS,
    SCHEMA_VERSION,
    Artifact,
    Dropped,
    Gate,
    Manifest,
    Parity,
    Task,
    Variant,
    sealed,
    sha256,
)
from service.classifier import Classifier
from service.errors import ModelOutputInvalid
from service.host import cpus
from service.runtimes import Inputs, RuntimeUnavailable
from service.runtimes.auto import Choice, load
from service.runtimes.openvino import OpenVinoRuntime

TASKS: dict[str, Task] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}
# sentence-transformers' names for what comes behind a CrossEncoder's logit.
ACTIVATIONS: dict[str, Literal["sigmoid", "none"]] = {"Sigmoid": "sigmoid", "Identity": "none"}
FEWEST_TOKENS = 3
# Families that number positions from the padding id on, as RoBERTa does.
POSITIONS_AFTER_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "xmod",
    "lilt",
    "luke",
    "markuplm",
    "layoutlmv3",
    "esm",
)


@dataclass(frozen=True)
class Quantization:
    """How a calibrated variant (cpu-int8) is made and judged."""

    calibration: Path = SHIPPED
    """The file of texts that it is calibrated with, one a line or .jsonl."""
    gate: Path | None = None
    """The file of texts that it must answer as cpu-fp32 does; without one it is ungated."""
    agreement: float = 0.99
    """The lower confidence bound of the share of those texts that must agree."""
    agreement_per_label: float | None = None
    """The same for the texts of each label; None asks nothing of single labels."""
    reduce_range: bool | None = None
    """Whether weights keep to 7 bits; None where this processor has no VNNI, for there 8 bits
    saturate.
    """

    @property
    def reduces_range(self) -> bool:
        return (
            "i8" not in cpus.native_precisions() if self.reduce_range is None else self.reduce_range
        )


def export(
    source: str,
    target: Path,
    *,
    variants: Sequence[str] = UNASKED,
    task: Task | None = None,
    keep_decoder: bool = False,
    revision: str | None = None,
    quantization: Quantization = Quantization(),
) -> Manifest:
    """Writes the artifact of `source` to `target` and returns its manifest.

    A calibrated variant is held against cpu-fp32, which is built with it.
    """
    reduce_range, calibration, gate = (
        quantization.reduces_range,
        quantization.calibration,
        quantization.gate,
    )
    if any(RECIPES[name].calibrated for name in variants) and "cpu-fp32" not in variants:
        variants = ("cpu-fp32", *variants)
    place = place_of(target)
    checkpoint = read_checkpoint(source, revision)
    model = build_model(checkpoint, keep_decoder)
    tokenizer = load_tokenizer(checkpoint.directory)
    left = checkpoint.left_out()
    config: Any = model.config
    labels, max_tokens = _labels(checkpoint.directory, config), _max_tokens(checkpoint, config)
    calibrating = read_texts(calibration, labels)
    gating = (
        []
        if gate is None
        else without(read_texts(gate, labels), [item.text for item in calibrating])
    )
    if gate is not None and not gating:
        raise BadInput(
            f"{gate}: every text of it is among those of the calibration ({calibration}); a gate"
            " needs texts that calibration has not seen."
        )
    _say_what_is_dropped(checkpoint, left, keep_decoder)

    with workplace(place) as folder:
        print("exporting the graph", flush=True)
        write_tokenizer(
            tokenizer, checkpoint.directory, embedding_rows(model), folder / "tokenizer.json"
        )
        inputs_of_graph = graph_inputs(model, tokenizer.model_input_names)
        export_onnx(mended(model), folder / "model.onnx", inputs_of_graph, max_tokens)
        check_lengths(folder / "model.onnx", config.model_type, max_tokens, embedding_rows(model))
        flushed = flush_subnormal_weights(folder / "model.onnx")
        if flushed:
            print(
                f"sets {flushed:,} subnormal weights to zero: they change no answer and slow"
                " processors down",
                flush=True,
            )
        # A kept decoder is the proof's control: transformers would leave it out.
        own = model if keep_decoder else load_model(checkpoint)
        reference = Reference(own, tokenizer, max_tokens)
        inputs: list[Inputs] = []
        if any(RECIPES[name].calibrated for name in variants):
            print(
                f"calibrating with {len(calibrating)} texts of"
                f" {'those that come along' if calibration == SHIPPED else calibration}",
                flush=True,
            )
            inputs = _calibration_inputs(folder, config, reference, calibrating)
        for name in variants:
            RECIPES[name].build(Source(folder, config, inputs, reduce_range))
        manifest = _describe(folder, checkpoint, model, variants, task, left, keep_decoder)
        if reduce_range and any(RECIPES[name].calibrated for name in variants):
            print("int8 weights keep to 7 bits, for processors without VNNI", flush=True)
            manifest = manifest.model_copy(
                update={"provenance": manifest.provenance | {"int8_weights": "7 bits"}}
            )
        manifest = manifest.model_copy(
            update={"flushed_weights": flushed, "truncation_side": tokenizer.truncation_side}
        )
        manifest = _verify(
            folder,
            manifest,
            reference,
            gating,
            quantization.agreement,
            quantization.agreement_per_label,
        )
        # Written last: a folder without a manifest is not an artifact.
        manifest = sealed(manifest)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        put_in_place(folder, place)
    return manifest


def _labels(directory: Path, config: Any) -> list[str]:
    """What the classes are called; BadInput if two are called the same."""
    labels = [str(config.id2label[i]) for i in range(config.num_labels)]
    for i, label in enumerate(labels):
        if (first := labels.index(label)) < i:
            raise BadInput(
                f"{directory}: the classes {first} and {i} are both called {label!r}; name them"
                " differently in its config.json (id2label)."
            )
    return labels


def _say_what_is_dropped(checkpoint: Checkpoint, left: Left, keep_decoder: bool) -> None:
    name = checkpoint.directory
    if keep_decoder:
        print(
            f"{name}: KEEPS its {left.layers} decoder layers as encoder layers. A control for the"
            " proof: its answers mean nothing."
        )
    elif left.parameters:
        print(
            f"{name}: drops the {left.design} decoder: {left.layers} layers, {left.parameters:,}"
            f" parameters, {left.share_of_file:.1%} of the file."
        )
    else:
        print(f"{name}: holds no decoder; nothing to drop.")
    if left.other_tensors:
        print(
            f"{name}: drops {len(left.other_tensors)} tensors of a pretraining head"
            f" ({left.other_tensors[0]}, …)."
        )


def _describe(
    folder: Path,
    checkpoint: Checkpoint,
    model: Any,
    variants: Sequence[str],
    task: Task | None,
    left: Left,
    keep_decoder: bool,
) -> Manifest:
    config = model.config
    encoder, head = split(read_graph(folder / "model.onnx"))
    built: dict[str, Variant] = {}
    for name in variants:
        recipe = RECIPES[name]
        own = split(read_graph(folder / recipe.files[0]))
        built[name] = Variant(
            runtime=recipe.runtime,
            precision=recipe.precision,
            files=list(recipe.files),
            encoder_digest=own[0].digest,
            head_digest=own[1].digest,
            weight_bytes=own[0].weight_bytes + own[1].weight_bytes,
            parity=None,
            gate=Gate(status="ungated", reason="not yet verified"),
        )
    dropped = None
    if left.parameters and not keep_decoder:
        dropped = Dropped(
            design=left.design,
            layers=left.layers,
            parameters=left.parameters,
            share_of_file=round(left.share_of_file, 6),
        )
    inputs = read_inputs(folder / "model.onnx")
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=checkpoint.directory.resolve().name,
        family=config.model_type,
        task=task or _task(config),
        activation=_activation(checkpoint, task or _task(config), config.num_labels),
        labels=_labels(checkpoint.directory, config),
        takes_pairs=_takes_pairs(inputs, config),
        max_tokens=_max_tokens(checkpoint, config),
        inputs=inputs,
        encoder_digest=encoder.digest,
        head_digest=head.digest,
        tokenizer_digest=sha256(folder / "tokenizer.json"),
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_token=encoder.flops_per_token(),
        padding_safe=True,
        dropped=dropped,
        kept_decoder_layers=left.layers if keep_decoder else 0,
        variants=built,
        files={path.name: sha256(path) for path in sorted(folder.iterdir())},
        seal="",
        provenance={
            "checkpoint": checkpoint.directory.resolve().name,
            "checkpoint_sha256": checkpoint.weights_sha256(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
        }
        | {package: importlib.metadata.version(package) for package in _made_by(variants)},
    )


def _made_by(variants: Sequence[str]) -> list[str]:
    """The packages whose versions an artifact depends on."""
    packages = ["torch", "transformers", "onnx", "openvino", "nncf"]
    if any(RECIPES[name].runtime != "openvino" for name in variants):
        installed = {distribution.name for distribution in importlib.metadata.distributions()}
        packages += [name for name in ("onnxruntime", "onnxruntime-gpu") if name in installed]
    return packages


def _takes_pairs(inputs: Sequence[str], config: Any) -> bool:
    # XLNet has types of sentences without a field for their number. XLM takes them for words.
    types = getattr(config, "type_vocab_size", 2 if config.model_type == "xlnet" else 1)
    return "token_type_ids" not in inputs or types > 1


def _calibration_inputs(
    folder: Path, config: Any, reference: Reference, texts: Sequence[Labelled]
) -> list[Inputs]:
    """What the graph in `folder` is given of each text that it can read."""
    names = read_inputs(folder / "model.onnx")
    usable = [
        item.text for item in texts if isinstance(item.text, str) or _takes_pairs(names, config)
    ]
    if not usable:
        raise BadInput(
            "The calibration texts are pairs, and this model reads single texts; give others with"
            " --calibration."
        )
    encoded = [reference.encode(text) for text in usable]
    return [
        {name: one.get(name, np.zeros_like(one["input_ids"])) for name in names} for one in encoded
    ]


def _verify(
    folder: Path,
    manifest: Manifest,
    reference: Reference,
    gating: Sequence[Labelled],
    wanted: float,
    wanted_per_label: float | None,
) -> Manifest:
    """Runs every variant against torch; cpu-fp32 must agree, a reduced one is marked by what it
    does.
    """
    every = texts_for(reference.tokenizer, embedding_rows(reference.model))
    texts: list[TextOrPair] = [
        text for text in every if isinstance(text, str) or manifest.takes_pairs
    ]
    threads = cpus.usable()
    check_tokens(Artifact(folder, manifest), reference, texts, threads)
    try:
        safe = measure_padding_safety(
            Artifact(folder, manifest), folder / "model.onnx", texts, threads
        )
    except ModelOutputInvalid as error:
        raise BadInput(f"The model cannot be served: {error} Its weights may overflow.") from None
    manifest = manifest.model_copy(update={"padding_safe": safe})
    if not safe:
        print("answers depend on padding: the service will batch equal lengths only")
    manifest = manifest.model_copy(
        update={
            "probes": read_probes(
                Artifact(folder, manifest), [text for text in PROBES if text in texts], threads
            )
        }
    )
    verified = {}
    for name, variant in manifest.variants.items():
        try:
            engine = engine_here(Artifact(folder, manifest), name)
            parity = measure_parity(
                Artifact(folder, manifest),
                engine,
                reference,
                texts,
                RECIPES[name].tolerance,
                threads,
            )
            gate = (
                _gate_by_parity(name, parity, engine.runtime)
                if parity.tolerance is not None
                else (
                    _gate_by_labels(
                        Artifact(folder, manifest), name, gating, wanted, wanted_per_label, threads
                    )
                )
            )
            self_check = record_self_check(
                Artifact(folder, manifest), engine, reference, manifest.probes, threads
            )
        except (RuntimeUnavailable, ModelOutputInvalid) as error:
            if variant.precision == "f32":
                raise BadInput(f"{name} cannot be run: {error}") from None
            parity, self_check, gate = (
                None,
                None,
                Gate(status="ungated", reason=f"not verified: {error}"),
            )
            tolerance = RECIPES[name].tolerance
            if (
                variant.precision == "bf16"
                and tolerance is not None
                and isinstance(error, RuntimeUnavailable)
            ):
                try:
                    parity, self_check = emulate_bf16(
                        Artifact(folder, manifest), reference, texts, manifest.probes, tolerance
                    )
                    gate = _gate_by_parity(name, parity, variant.runtime)
                    gate = gate.model_copy(
                        update={
                            "status": "emulated" if gate.status == "passed" else gate.status,
                            "reason": (
                                f"{gate.reason}; by torch's arithmetic in bf16, for this processor"
                                " has none: a start on one that has checks its engine against that"
                            ),
                        }
                    )
                except ModelOutputInvalid as overflow:
                    gate = Gate(status="failed", reason=overflow.message)
        gate = gate.model_copy(update={"processor": cpus.describe()})
        verified[name] = variant.model_copy(
            update={"parity": parity, "gate": gate, "self_check": self_check}
        )
        print(
            f"{name}: {'FAILED its gate' if gate.status == 'failed' else gate.status}:"
            f" {gate.reason}",
            flush=True,
        )
    return manifest.model_copy(update={"variants": verified})


def _gate_by_parity(name: str, parity: Parity, engine: str) -> Gate:
    elsewhere = (
        "; run by onnxruntime on the CPU, not yet on a GPU"
        if engine != RECIPES[name].runtime
        else ""
    )
    found = (
        f"{parity.texts} texts, labels agree {parity.label_agreement:.1%}, largest difference of a"
        f" probability {parity.max_probability_difference:.1e} (at most"
        f" {parity.tolerance:.0e}){elsewhere}"
    )
    if parity.tolerance is None or parity.max_probability_difference <= parity.tolerance:
        return Gate(status="passed", reason=found)
    if RECIPES[name].precision == "f32":
        raise BadInput(
            f"{name} does not reproduce the checkpoint: {found}. This graph cannot be trusted."
        )
    return Gate(status="failed", reason=found)


def _gate_by_labels(
    artifact: Artifact,
    name: str,
    texts: Sequence[Labelled],
    wanted: float,
    wanted_per_label: float | None,
    threads: int,
) -> Gate:
    usable = [item for item in texts if isinstance(item.text, str) or artifact.manifest.takes_pairs]
    if not usable:
        return Gate(
            status="ungated",
            reason=f"no texts to gate it with; give --gate FILE with at least {FEWEST_TEXTS:,}",
        )
    exact, reduced = (
        Classifier(artifact, load(artifact, Choice(variant, "openvino", "verification"), threads))
        for variant in ("cpu-fp32", name)
    )
    assert isinstance(reduced.runtime, OpenVinoRuntime)
    return judge(exact, reduced, artifact, usable, wanted, reduced.runtime.rest, wanted_per_label)


def embedding_rows(model: Any) -> int:
    """How many tokens the model has an embedding for."""
    return len(model.get_input_embeddings().weight)


def _task(config: Any) -> Task:
    if config.problem_type is not None and config.problem_type not in TASKS:
        raise BadInput(
            f"config.json: problem_type is {config.problem_type!r}; it is one of"
            f" {', '.join(TASKS)}, or null."
        )
    return "single_label" if config.problem_type is None else TASKS[config.problem_type]


def _activation(
    checkpoint: Checkpoint, task: Task, labels: int
) -> Literal["sigmoid", "none"] | None:
    """What turns the logit of a single label into its score; None where the task says so.

    transformers, Text Embeddings Inference, vLLM and sentence-transformers' CrossEncoder take the
    sigmoid, unless the checkpoint says regression or names the activation of its CrossEncoder.
    """
    if labels > 1 or task != "single_label":
        return None
    described = checkpoint.config.get("sentence_transformers")
    told = described.get("activation_fn") if isinstance(described, dict) else None
    told = told or checkpoint.config.get("sbert_ce_default_activation_function")
    if told is None:
        return "sigmoid"
    found = ACTIVATIONS.get(str(told).rpartition(".")[2])
    if found is None:
        raise BadInput(
            f"{checkpoint.directory / 'config.json'}: the activation of its CrossEncoder is"
            f" {told!r}; known are {', '.join(ACTIVATIONS)}."
        )
    return found


def _max_tokens(checkpoint: Checkpoint, config: Any) -> int:
    """The smaller of what the tokenizer and the positions allow."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions == -1:  # XLNet's word for no limit.
        positions = None
    if positions is not None and config.model_type in POSITIONS_AFTER_PADDING:
        if config.pad_token_id is None:
            raise BadInput(
                f"{checkpoint.directory / 'config.json'}: pad_token_id is null, and"
                f" {config.model_type} counts positions from it; give the number of the tokenizer's"
                " padding."
            )
        positions -= config.pad_token_id + 1
    told = read_tokenizer_config(checkpoint.directory).get("model_max_length")
    if positions is None and told is None:
        raise BadInput(
            f"{checkpoint.directory}: neither config.json (max_position_embeddings) nor"
            " tokenizer_config.json (model_max_length) says how many tokens the model reads."
        )
    if told is not None and (
        isinstance(told, bool) or not isinstance(told, int | float) or not told >= FEWEST_TOKENS
    ):
        raise BadInput(
            f"{checkpoint.directory / 'tokenizer_config.json'}: model_max_length is {told!r}; it is"
            f" a number of tokens, {FEWEST_TOKENS} or more."
        )
    most = min(limit for limit in (positions, told) if limit is not None)
    if not FEWEST_TOKENS <= most <= MOST_TOKENS:
        raise BadInput(
            f"{checkpoint.directory}: by config.json (max_position_embeddings) and"
            f" tokenizer_config.json (model_max_length) the model reads {most:,} tokens;"
            f" {FEWEST_TOKENS} to {MOST_TOKENS:,} can be served. Say in model_max_length how many"
            " it was trained with."
        )
    _check_attention(checkpoint, config, int(most))
    return int(most)


def _check_attention(checkpoint: Checkpoint, config: Any, most: int) -> None:
    """Raise BadInput for a BigBird whose attention is another one for texts that it may get.

    Its code looks at a text's length, and at what it has seen before: after one short text it
    attends to everything, whatever comes. A graph has one of both.
    """
    if getattr(config, "attention_type", None) != "block_sparse":
        return
    longest = (5 + 2 * config.num_random_blocks) * config.block_size
    if most > longest:
        raise BadInput(
            f"{checkpoint.directory / 'config.json'}: attention_type is block_sparse, which a"
            f" {config.model_type} uses for texts of more than {longest} tokens, and this one reads"
            f" {most:,}. Say original_full to attend to everything, or {longest} in"
            " model_max_length."
        )


def main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="python -m export",
        description="Export a fine-tuned checkpoint to a verified artifact.",
    )
    parser.add_argument("checkpoint", help="a Hugging Face folder with safetensors, or a hub id")
    parser.add_argument("artifact", type=Path, help="the folder to write")
    parser.add_argument(
        "--variants",
        help=(
            f"comma-separated, of {','.join(RECIPES)} (default: {','.join(UNASKED)}; with --gate,"
            " also cpu-int8)"
        ),
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=SHIPPED,
        help=(
            "texts of your domain to calibrate cpu-int8 with, one a line (default: some that come"
            " along)"
        ),
    )
    parser.add_argument(
        "--gate",
        type=Path,
        help=(
            f"at least {FEWEST_TEXTS:,} other texts, one a line, or .jsonl with text and label:"
            " cpu-int8 must give them fp32's answers"
        ),
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        help="the lower confidence bound of the share that must agree (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement-per-label",
        type=float,
        metavar="SHARE",
        help="the same for each label, over the texts to which fp32 gives it (default: not asked)",
    )
    parser.add_argument(
        "--reduce-range",
        action=BooleanOptionalAction,
        default=None,
        help=(
            "keep int8 weights to 7 bits, which processors without VNNI need (default: where this"
            " one has none)"
        ),
    )
    parser.add_argument(
        "--task",
        choices=sorted(set(TASKS.values())),
        help="overrides the checkpoint's problem_type",
    )
    parser.add_argument("--revision", help="the revision of a hub id")
    parser.add_argument(
        "--keep-decoder",
        action="store_true",
        help="keep the decoder as encoder layers: the proof's control",
    )
    given = parser.parse_args(arguments)
    variants = (
        [name.strip() for name in given.variants.split(",")]
        if given.variants
        else list(UNASKED if given.gate is None else GATED)
    )
    for option in ("agreement", "agreement_per_label"):
        share = getattr(given, option)
        if share is not None and not 0 < share < 1:
            raise BadUsage(
                f"--{option.replace('_', '-')} {share} is no share; it lies between 0 and 1."
            )
    for name in variants:
        if name not in RECIPES:
            raise BadUsage(f"Unknown variant {name!r}; known are {', '.join(RECIPES)}.")
    if given.gate is not None and not any(RECIPES[name].calibrated for name in variants):
        raise BadUsage(
            f"--gate is for variants in 8 bits, and --variants {given.variants} names none; leave"
            " out --gate, or name cpu-int8."
        )
    manifest = export(
        given.checkpoint,
        given.artifact,
        variants=variants,
        task=given.task,
        keep_decoder=given.keep_decoder,
        revision=given.revision,
        quantization=Quantization(
            calibration=given.calibration,
            gate=given.gate,
            agreement=given.agreement,
            agreement_per_label=given.agreement_per_label,
            reduce_range=given.reduce_range,
        ),
    )
    print(
        f"{given.artifact}: {manifest.family}, {manifest.parameters:,} parameters,"
        f" {manifest.max_tokens} tokens, encoder {manifest.encoder_digest[:12]}, head"
        f" {manifest.head_digest[:12]}"
    )
    return 0
