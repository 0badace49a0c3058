"""
Compare two artifacts by what they compute: the first level of the proof, and the cheapest.

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
from graphs.values import first_difference, have_same_head
from proof.evidence.store import EvidenceRejected
from service.artifact import Artifact, read_artifact, read_manifest


@dataclass(frozen=True)
class Difference:
    """One respect in which two artifacts do not do the same work."""

    subject: str
    """What differs, as a field of the manifest or a part of a variant."""
    detail: str
    """Both values, or the first nodes that differ."""


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Return what two artifacts have in common and what differs, as identity.json holds it."""
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
        variants[name]["weight_bytes"] = [
            sum(graph.weight_bytes for graph in graphs) for graphs in parts
        ]
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
        "differences": [
            {"what": difference.subject, "detail": difference.detail} for difference in differences
        ],
        "variants": variants,
        "encoder_digest": [first.manifest.encoder_digest, second.manifest.encoder_digest],
        "parameters": [first.manifest.parameters, second.manifest.parameters],
        "flops_per_token": [first.manifest.flops_per_token, second.manifest.flops_per_token],
        # Compared and reported. They are no work: of equal graphs, one may record what was dropped.
        "artifact_bytes": [_total_bytes(first), _total_bytes(second)],
        "distilled": [artifact.manifest.distilled is not None for artifact in (first, second)],
    }


def have_same_body(a: Path, b: Path) -> bool | None:
    """Return whether the encoders have the same weights too; None if a model has no fp32 graph."""
    first, second = (_fp32_graph(folder) for folder in (a, b))
    if first is None or second is None:
        return None
    return first_difference(first, second) is None


def describe_body(a: Path, b: Path) -> str:
    """Return a line about two classifiers that differ in their heads only; empty for others."""
    first, second = (_fp32_graph(folder) for folder in (a, b))
    one_headed = all(
        not manifest.labels_tokens and not manifest.heads for manifest in map(read_manifest, (a, b))
    )
    if first is None or second is None or not one_headed:
        return ""
    if first_difference(first, second) is not None or have_same_head(first, second):
        return ""
    return (
        "same body: their encoders have the same weights too, and only the heads differ. If they"
        " read texts in the same way, `drbert-export NAME=CHECKPOINT OUT --head NAME=CHECKPOINT`"
        " makes one model of both, which runs the encoder once."
    )


def _fp32_graph(folder: Path) -> Path | None:
    variant = read_manifest(folder).variants.get("cpu-fp32")
    return None if variant is None else folder / variant.files[0]


def _total_bytes(artifact: Artifact) -> int:
    return sum(artifact.path(name).stat().st_size for name in artifact.manifest.files)


def _facts(a: Artifact, b: Artifact) -> Iterator[Difference]:
    """Yield differences in everything but the graphs that the same work requires."""
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
    unshared = set(a.manifest.variants) ^ set(b.manifest.variants)
    if unshared:
        yield Difference("variants", f"only one of them has {', '.join(sorted(unshared))}")
    for name in sorted(set(a.manifest.variants) & set(b.manifest.variants)):
        for field in ("runtime", "precision", "weight_bytes"):
            left = getattr(a.manifest.variants[name], field)
            right = getattr(b.manifest.variants[name], field)
            if left != right:
                yield Difference(f"{name} {field}", f"{_short(left)} and {_short(right)}")


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
    """Return how two graphs differ: their sizes, further layers, and the first other nodes."""
    sentences = [f"{len(a.nodes)} and {len(b.nodes)} nodes"]
    for side, layers in (("second", layers_only_in(b, a)), ("first", layers_only_in(a, b))):
        if layers:
            sentences.append(f"the {side} has the further layers {', '.join(layers)}")
    differing = list(first_differences(a, b, limit=3))
    for side, nodes in (
        ("first", [node for node, _ in differing]),
        ("second", [node for _, node in differing]),
    ):
        labels = [
            f"{node.operator.rpartition('::')[2]} {node.name}" for node in nodes if node is not None
        ]
        if labels:
            sentences.append(f"the {side} begins to differ at {', '.join(labels)}")
    return "; ".join(sentences)


def _short(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def headline(result: dict[str, Any]) -> str:
    """Return the result of a comparison in a few words."""
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
    """Return the result of a comparison with every difference, as lines for a terminal."""
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
    if any(result.get("distilled", ())):
        lines.append(
            "  one of them was distilled from a larger model: it is another graph, so use"
            ' claim = "non-inferiority" in a plan'
        )
    if result["variants"]:
        lines.append(f"  not a difference: {_subnormals(result)}")
    return "\n".join(lines)


def _subnormals(result: dict[str, Any]) -> str:
    counts = []
    for name, variant in result["variants"].items():
        first, second = variant["subnormal_weights"]
        if first or second:
            counts.append(f"{first:,} and {second:,} subnormal weights in {name}")
    return ", ".join(counts) or "no subnormal weights"
