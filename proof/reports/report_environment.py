"""
The sections on artifacts and machine, from identity.json and environment.json.

Either file may hold more than is known here, or nothing; whatever it holds is shown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from proof.reports.page import Cell, Column, Row, Table, optional_table

MODEL_FIELDS = (
    "digest",
    "variant",
    "runtime",
    "device",
    "precision",
    "packs",
    "parameters",
    "encoder_digest",
)
"""Fields of a loaded model that are shown, in this order, where a server reports them."""


@dataclass(frozen=True)
class ArtifactComparison:
    """One artifact compared with the reference's."""

    name: str
    is_same: bool
    """Whether it does the same work as the reference."""
    is_control: bool
    """Whether it belongs to a control, which should do different work."""
    has_same_encoder: bool
    differences: Sequence[str]
    """Each difference in one line."""
    graphs: Table | None


def build_comparisons(
    identity: Mapping[str, Any], controls: Collection[str]
) -> list[ArtifactComparison]:
    """Return each candidate and control compared with the reference.

    `identity` is the content of identity.json, `controls` the names of the control arms.
    """
    return [
        ArtifactComparison(
            name=name,
            is_same=bool(result.get("same")),
            is_control=name in controls,
            has_same_encoder=bool(result.get("same_encoder")),
            differences=[_difference(item) for item in result.get("differences", [])],
            graphs=_graphs(name, result),
        )
        for name, result in identity.items()
    ]


def _difference(item: Mapping[str, str]) -> str:
    return f"{_spaced(item['what'])}: {item['detail']}"


def _graphs(name: str, result: Mapping[str, Any]) -> Table | None:
    columns = [Column(title) for title in ("", "", "reference", name, "nodes")]
    rows: list[Row] = []
    for variant, parts in result.get("variants", {}).items():
        rows += [_graph_row(variant, part, value) for part, value in parts.items()]
    for field in ("parameters", "flops_per_token", "artifact_bytes"):
        if field in result:
            rows.append(_pair_row(_spaced(field), result[field]))
    caption = f"Graphs of the reference and of {name}"
    return optional_table(Table(caption, columns, rows, layout="wide"))


def _graph_row(variant: str, part: str, value: Any) -> Row:
    """Return one row: of a graph, with its digests and node counts, or of a pair of numbers."""
    if not isinstance(value, Mapping):
        return _pair_row(f"{variant} {_spaced(part)}", value)
    digests = [Cell(digest[:16], is_code=True) for digest in value["digests"]]
    nodes = " and ".join(f"{count:,}" for count in value["nodes"])
    return [f"{variant} {part}", _comparison(value["digests"]), *digests, nodes]


def _pair_row(name: str, pair: Sequence[Any]) -> Row:
    return [name, _comparison(pair), *map(_format_value, pair), ""]


def _comparison(pair: Sequence[object]) -> str:
    return "same" if pair[0] == pair[1] else "differs"


@dataclass(frozen=True)
class EnvironmentSection:
    """Where a run took place."""

    facts: Sequence[tuple[str, str]]
    """(name, value) of machine, libraries and server."""
    models: Table | None
    """The loaded models, one row for each arm; None if the server did not report them."""


def build_environment(environment: Mapping[str, Any]) -> EnvironmentSection:
    """Return machine, libraries, server and loaded models from environment.json."""
    models = environment.get("server", {}).get("models", {})
    return EnvironmentSection(list(_facts(environment)), _models_table(models))


def describe_machine(environment: Mapping[str, Any]) -> str:
    """Return the processor and how many of it there were; empty if it is not known."""
    processor, count = environment.get("processor"), environment.get("processors")
    if not isinstance(processor, str):
        return ""
    return f"{count} × {processor}" if isinstance(count, int) else processor


def _facts(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in environment.items():
        if name != "server":
            yield _spaced(name), _format_value(value)
    for name, value in environment.get("server", {}).items():
        if name != "models":
            yield f"server {_spaced(name)}", _format_value(value)


def _models_table(models: Mapping[str, Mapping[str, Any]]) -> Table | None:
    fields = [name for name in MODEL_FIELDS if any(name in model for model in models.values())]
    columns = [Column("arm"), *(Column(_spaced(field)) for field in fields)]
    rows = []
    for arm, model in sorted(models.items()):
        rows.append([arm, *(_model_cell(field, model.get(field, "")) for field in fields)])
    return optional_table(Table("Loaded models, by arm", columns, rows, layout="wide"))


def _model_cell(field: str, value: Any) -> str | Cell:
    if field.endswith("digest"):
        return Cell(str(value)[:16], is_code=True)
    return _format_value(value)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _format_value(value: Any) -> str:
    """Return a JSON value in words, without brackets or quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_format_value(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_format_value, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
