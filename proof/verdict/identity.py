"""
Compares two artifacts by what they compute: the first level of the proof, and the cheapest.

Digests are recomputed from the files; the manifest's own are only checked against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphs.canonical import Graph, first_differences, layers_only_in, split
from graphs.files import read_graph
from graphs.subnormals import count_subnormal_weights
from proof.evidence.store import EvidenceRejected
from service.artifact import Artifact, read_artifact


@dataclass(frozen=True)
class Difference:
    what: str
    detail: str


def compare(a: Path, b: Path) -> dict[str, Any]:
    """What is the same and what differs between two artifacts, as identity.json holds it."""
    first, second = read_artifact(a), read_artifact(b)
    shared = [name for name in first.manifest.variants if name in second.manifest.variants]
    variants: dict[str, dict[str, Any]] = {}
    differences = list(_facts(first, second))
    for name in shared:
        parts = _parts(first, name), _parts(second, name)
        for part, left, right in zip(("encoder", "head"), *parts, strict=True):
            same = left.digest == right.digest
            variants.setdefault(name, {})[part] = {
                "same": same,
                "digests": [left.digest, right.digest],
                "nodes": [len(left.nodes), len(right.nodes)],
            }
            if not same:
                differences.append(Difference(f"{name} {part}", _explain(left, right)))
        variants[name]["weight_bytes"] = [sum(g.weight_bytes for g in side) for side in parts]
        # No difference of work, but one of speed where the processor does not flush them to zero.
        variants[name]["subnormal_weights"] = [
            count_subnormal_weights(side.path(side.manifest.variants[name].files[0]))
            for side in (first, second)
        ]
    same_encoder = bool(variants) and all(v["encoder"]["same"] for v in variants.values())
    return {
        "a": str(a),
        "b": str(b),
        "same": not differences,
        "same_encoder": same_encoder,
        "differences": [{"what": d.what, "detail": d.detail} for d in differences],
        "variants": variants,
        "encoder_digest": [first.manifest.encoder_digest, second.manifest.encoder_digest],
        "parameters": [first.manifest.parameters, second.manifest.parameters],
        "flops_per_token": [first.manifest.flops_per_token, second.manifest.flops_per_token],
    }


def _facts(a: Artifact, b: Artifact) -> Iterator[Difference]:
    """Everything but the graphs that must agree for the same work to be done."""
    for name in (
        "tokenizer_digest",
        "parameters",
        "flops_per_token",
        "max_tokens",
        "padding_invariant",
        "inputs",
    ):
        left, right = getattr(a.manifest, name), getattr(b.manifest, name)
        if left != right:
            yield Difference(name, f"{_short(left)} and {_short(right)}")
    if len(a.manifest.labels) != len(b.manifest.labels):
        yield Difference("labels", f"{len(a.manifest.labels)} and {len(b.manifest.labels)}")
    only = set(a.manifest.variants) ^ set(b.manifest.variants)
    if only:
        yield Difference("variants", f"only one of them has {', '.join(sorted(only))}")
    for name in sorted(set(a.manifest.variants) & set(b.manifest.variants)):
        left, right = a.manifest.variants[name], b.manifest.variants[name]
        for what in ("runtime", "precision", "weight_bytes"):
            if getattr(left, what) != getattr(right, what):
                yield Difference(
                    f"{name} {what}",
                    f"{_short(getattr(left, what))} and {_short(getattr(right, what))}",
                )


def _parts(artifact: Artifact, name: str) -> tuple[Graph, Graph]:
    variant = artifact.manifest.variants[name]
    encoder, head = split(read_graph(artifact.path(variant.files[0])))
    if (encoder.digest, head.digest) != (variant.encoder_digest, variant.head_digest):
        raise EvidenceRejected(
            f"{artifact.directory}: the digests of {name} in its manifest are not those of its"
            " graph; export it again."
        )
    return encoder, head


def _explain(a: Graph, b: Graph) -> str:
    more, less = layers_only_in(b, a), layers_only_in(a, b)
    lines = [f"{len(a.nodes)} and {len(b.nodes)} nodes"]
    if more:
        lines.append(f"the second has the further layers {', '.join(more)}")
    if less:
        lines.append(f"the first has the further layers {', '.join(less)}")
    sides = ("the first", "the second")
    for side, nodes in zip(
        sides, zip(*first_differences(a, b, limit=3), strict=True), strict=False
    ):
        named = [
            f"{node.operator.rpartition('::')[2]} {node.name}" for node in nodes if node is not None
        ]
        if named:
            lines.append(f"{side} begins to differ at {', '.join(named)}")
    return "; ".join(lines)


def _short(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def headline(result: dict[str, Any]) -> str:
    """What a comparison comes to, in a few words."""
    if result["same"]:
        return "the same work"
    if not result["same_encoder"]:
        return "they do not do the same work"
    differing = {item["what"].rpartition(" ")[2] for item in result["differences"]}
    if "head" not in differing:
        return (
            "encoder and head equal,"
            f" {' and '.join(sorted(differing)).replace('_digest', '').replace('_', ' ')} not"
        )
    # Another head may have other labels, and other weights to count.
    return (
        "encoder equal, head differs"
        if differing <= {"head", "labels", "parameters", "weight_bytes"}
        else "encoder equal, head and more differ"
    )


def describe(result: dict[str, Any]) -> str:
    if result["same"]:
        graphs = ", ".join(result["variants"])
        return (
            f"same: {result['a']} and {result['b']} do the same work: one encoder"
            f" ({result['encoder_digest'][0][:12]}), one head, one tokenizer,"
            f" {result['parameters'][0]:,} parameters, {result['flops_per_token'][0]:,} FLOPs a"
            f" token ({graphs}), {_subnormals(result)}."
        )
    lines = [f"different: {result['a']} and {result['b']}: {headline(result)}."]
    lines += [f"  {item['what']}: {item['detail']}" for item in result["differences"]]
    return "\n".join(
        [*lines, f"  not a difference: {_subnormals(result)}"] if result["variants"] else lines
    )


def _subnormals(result: dict[str, Any]) -> str:
    counts = {name: variant["subnormal_weights"] for name, variant in result["variants"].items()}
    found = [
        f"{a:,} and {b:,} subnormal weights in {name}" for name, (a, b) in counts.items() if a or b
    ]
    return ", ".join(found) or "no subnormal weights"
