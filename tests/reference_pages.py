"""
Generates docs/configuration.md and docs/metrics.md from the code that they describe.

    python -m tests.reference_pages
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo

from service.settings import PREFIX, Settings
from service.telemetry.metrics import Metrics
from service.telemetry.nvml import Reading

CONFIGURATION = Path("docs/configuration.md")
METRICS = Path("docs/metrics.md")
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
PROCESS = "process_"
"""Prefix of prometheus_client's metrics of the process, which the page leaves out."""
GPU = Reading("GPU-1", "a GPU", 1, 0.5, 1e9, 100.0, 40.0, frozenset())
HISTOGRAM_LABELS = ("model",)


def configuration_page() -> str:
    """Return the page of all environment variables of the service."""
    descriptions = field_descriptions(Settings)
    lines = [
        "# Configuration",
        "",
        "The service is configured by environment variables, read once at start. A variable that"
        " begins with `DRBERT_` and is not listed here ends the start with exit code 64 and the"
        " nearest name. `GET /info` shows the values in use. This page is generated:"
        " `python -m tests.reference_pages`.",
        "",
        "| variable | value | default | what it does |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        cells = (f"`{PREFIX}{name.upper()}`", values_of(field), default_of(field))
        lines.append(f"| {' | '.join(cells)} | {descriptions[name]} |")
    return "\n".join(lines) + "\n"


def metrics_page() -> str:
    """Return the page of all metrics of the service."""
    lines = [
        "# Metrics",
        "",
        "`GET /metrics` answers in Prometheus' text format. Units are in the names: seconds, bytes,"
        " hertz, watts, degrees Celsius. `model` is the name of a loaded model; a label's series"
        " end when their model is unloaded. Histograms have buckets from 100 µs, each 1.2 times"
        f" the one before. `{PROCESS}*` are prometheus_client's own metrics of the process. This"
        " page is generated: `python -m tests.reference_pages`.",
        "",
        "| metric | type | labels | what it counts |",
        "|---|---|---|---|",
    ]
    for name, kind, labels, text in metric_rows():
        label_names = ", ".join(f"`{label}`" for label in labels) or "–"
        lines.append(f"| `{name}` | {kind} | {label_names} | {text} |")
    return "\n".join(lines) + "\n"


def field_descriptions(model: type[Settings]) -> dict[str, str]:
    """Return the docstring below each field of a class."""
    [definition] = ast.parse(inspect.getsource(model)).body
    assert isinstance(definition, ast.ClassDef)
    descriptions = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                descriptions[name] = " ".join(text.split())
    return descriptions


def values_of(field: FieldInfo) -> str:
    """Return what a variable may be set to."""
    choices = typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in choices)
    kinds = [kind for kind in choices or (field.annotation,) if kind is not type(None)]
    [kind] = kinds
    words = {int: "integer", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
    bounds = []
    for bound in field.metadata:
        if type(bound) in BOUNDS:  # The others are patterns, which the description explains.
            attribute, sign = BOUNDS[type(bound)]
            bounds.append(f"{sign} {getattr(bound, attribute):,}")
    return " ".join([words[kind], *bounds])


def default_of(field: FieldInfo) -> str:
    """Return a variable's default as it would be written."""
    match field.default:
        case None | "":
            return "–"
        case bool(value):
            return f"`{str(value).lower()}`"
        case float(value) if value.is_integer():
            return f"`{value:.0f}`"
        case value:
            return f"`{value}`"


def metric_rows() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Yield the name, type, labels and description of each metric."""
    metrics = Metrics(CollectorRegistry(), readings=lambda: [GPU])
    metrics.add_model("reviews", "d", "e", "openvino", "cpu-fp32")
    labels: dict[str, tuple[str, ...]] = {}
    for value in vars(metrics).values():
        if isinstance(value, MetricWrapperBase):
            labels[value._name] = tuple(value._labelnames)
    for family in sorted(metrics.registry.collect(), key=lambda family: family.name):
        if family.name.startswith(PROCESS):
            continue
        of_samples = tuple(sorted({label for sample in family.samples for label in sample.labels}))
        kind = family.type
        names = of_samples if kind == "info" else labels.get(family.name, of_samples)
        if kind == "histogram":
            names = HISTOGRAM_LABELS
        suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
        shown = family.name.removesuffix(suffix) + suffix
        yield shown, "gauge" if kind == "info" else kind, names, family.documentation


def main() -> None:
    CONFIGURATION.write_text(configuration_page(), encoding="utf-8")
    METRICS.write_text(metrics_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
