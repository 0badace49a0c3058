"""
The command line of export.

    drbert-export examples/checkpoints/drbert-mini-sst2 artifacts/drbert
    drbert-export examples/checkpoints/drbert-mini-sst2 artifacts/drbert --calibration
        reviews.txt --gate more-reviews.jsonl
    drbert-export examples/checkpoints/drbert-mini-sst2 artifacts/small --distill reviews.txt
        --layers 2 --gate more-reviews.jsonl
    drbert-export examples/checkpoints/drbert-mini-sst2 artifacts/drbert-with-decoder
        --keep-decoder
    drbert-export sentiment=SENTIMENT artifacts/several --head topic=TOPIC --head intent=INTENT

The steps are in export/pipeline.py.
"""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

from command import BadUsage, Parser
from export.checks.gate import MIN_TEXTS
from export.distillation import Distillation
from export.graph.variants import DEFAULT_VARIANTS, RECIPES, gated_variants
from export.manifest import TASKS
from export.pipeline import Quantization, export
from export.texts import BUNDLED_TEXTS
from service.artifact import HEAD_NAME


def main(arguments: Sequence[str]) -> int:
    """Export a checkpoint by command-line arguments, and return the exit code."""
    options = _parser().parse_args(arguments)
    quantization = Quantization(
        calibration=options.calibration,
        gate=options.gate,
        agreement=_share("--agreement", options.agreement),
        agreement_per_label=(
            None
            if options.agreement_per_label is None
            else _share("--agreement-per-label", options.agreement_per_label)
        ),
        reduce_range=options.reduce_range,
    )
    manifest = export(
        _heads(options) if options.head else options.checkpoint,
        options.artifact,
        variants=_variants(
            options.variants,
            gated=options.gate is not None,
            distilled=options.distill is not None,
        ),
        task=options.task,
        keep_decoder=options.keep_decoder,
        revision=options.revision,
        quantization=quantization,
        distillation=_distillation(options),
    )
    print(
        f"{options.artifact}: {manifest.family}, {manifest.parameters:,} parameters,"
        f" {manifest.max_tokens} tokens, encoder {manifest.encoder_digest[:12]}, head"
        f" {manifest.head_digest[:12]}"
    )
    gates = [
        variant.gate
        for name, variant in manifest.variants.items()
        if RECIPES[name].gated_by_agreement
    ]
    if manifest.distilled is not None:
        gates.append(manifest.distilled.gate)
    failed = any(gate.status != "passed" for gate in gates)
    return 1 if options.require_gate and failed else 0


def _heads(options: Namespace) -> dict[str, str]:
    """Return the checkpoints of a model with several heads, by the names of their heads.

    Raises BadUsage if a name is missing, cannot be one or is given twice.
    """
    heads: dict[str, str] = {}
    for argument in (options.checkpoint, *options.head):
        name, _, checkpoint = argument.partition("=")
        if not checkpoint:
            raise BadUsage(
                f"{argument!r} names no head; with --head, every checkpoint is written"
                " NAME=CHECKPOINT, the first one too."
            )
        if not HEAD_NAME.fullmatch(name):
            raise BadUsage(
                f"{name!r} cannot be the name of a head; one begins with a letter, holds letters,"
                " digits, _ and -, at most 63, and is no verb of the API, such as infer or load."
            )
        if name in heads:
            raise BadUsage(f"Two heads are called {name!r}; give each a name of its own.")
        heads[name] = checkpoint
    return heads


def _distillation(options: Namespace) -> Distillation | None:
    """Return how to distil by the options; raises BadUsage if only a part of them is given."""
    if options.distill is None:
        if options.layers is not None or options.epochs is not None:
            raise BadUsage("--layers and --epochs belong to --distill; give it, or leave them out.")
        return None
    if options.layers is None:
        raise BadUsage("--distill needs --layers, the number of layers of the smaller model.")
    if options.keep_decoder:
        raise BadUsage("--distill makes a smaller model and --keep-decoder a larger one.")
    if options.epochs is not None and options.epochs < 1:
        raise BadUsage(f"--epochs is {options.epochs}; it must be at least 1.")
    epochs = Distillation.epochs if options.epochs is None else options.epochs
    return Distillation(options.distill, options.layers, epochs)


def _parser() -> Parser:
    parser = Parser(
        prog="drbert-export",
        description="Export a fine-tuned checkpoint to a verified artifact.",
        results=(
            "  0   the artifact is written\n"
            "  1   it is written, but it failed a gate (with --require-gate)"
        ),
    )
    parser.add_argument(
        "checkpoint", help="Hugging Face folder with safetensors or an ONNX graph, or a hub id"
    )
    parser.add_argument("artifact", type=Path, help="folder to write")
    parser.add_argument(
        "--head",
        action="append",
        metavar="NAME=CHECKPOINT",
        help=(
            "a checkpoint with the same encoder, whose head the model gets too; the first"
            " checkpoint is written NAME=CHECKPOINT then. May be repeated"
        ),
    )
    parser.add_argument(
        "--variants",
        help=(
            f"comma-separated list from {','.join(RECIPES)} (default: {','.join(DEFAULT_VARIANTS)};"
            " with --gate, cpu-int8 too, and on a processor without instructions for int8"
            " cpu-int8-ort)"
        ),
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=BUNDLED_TEXTS,
        help="texts of your domain to calibrate cpu-int8 with, one per line (default: bundled)",
    )
    parser.add_argument(
        "--gate",
        type=Path,
        help=(
            f"at least {MIN_TEXTS:,} other texts on which int8 variants must agree with fp32, one"
            " per line, or .jsonl with text and label"
        ),
    )
    parser.add_argument(
        "--require-gate",
        action="store_true",
        help=(
            "end with 1 if an int8 variant or a distilled model fails its gate; by default the"
            " artifact marks it as failed"
        ),
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.99,
        help="required lower confidence bound of the share that agrees (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement-per-label",
        type=float,
        metavar="SHARE",
        help="the same for the texts to which fp32 gives each label (default: not required)",
    )
    parser.add_argument(
        "--reduce-range",
        action=BooleanOptionalAction,
        default=None,
        help=(
            "limit int8 weights to 7 bits, for processors without VNNI (default: if this processor"
            " has none)"
        ),
    )
    parser.add_argument(
        "--task",
        choices=sorted(set(TASKS.values())),
        help="task of the model; overrides the checkpoint's problem_type",
    )
    parser.add_argument(
        "--distill",
        type=Path,
        metavar="TEXTS",
        help=(
            "make a smaller model first, which learns the checkpoint's answers on these texts; an"
            " interrupted training goes on if the command is given again"
        ),
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="layers of the smaller model (with --distill)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"times that it reads each text (with --distill; default: {Distillation.epochs})",
    )
    parser.add_argument("--revision", help="revision of a hub id")
    parser.add_argument(
        "--keep-decoder",
        action="store_true",
        help="keep the decoder as encoder layers, as the positive control of the proof",
    )
    return parser


def _variants(names: str | None, gated: bool, distilled: bool) -> list[str]:
    """Return the variants to build; raise BadUsage for an unknown one, or a gate without one."""
    if not names:
        return gated_variants() if gated else list(DEFAULT_VARIANTS)
    variants = [name.strip() for name in names.split(",")]
    for name in variants:
        if name not in RECIPES:
            raise BadUsage(f"Unknown variant {name!r}; known are {', '.join(RECIPES)}.")
    if gated and not distilled and not any(RECIPES[name].gated_by_agreement for name in variants):
        raise BadUsage(
            f"--gate judges int8 variants, and --variants {names} names none; leave out --gate, or"
            " add cpu-int8 or cpu-int8-ort."
        )
    return variants


def _share(option: str, value: float) -> float:
    if not 0 < value < 1:
        raise BadUsage(f"{option} is {value}; it must lie between 0 and 1.")
    return value
