"""
Generates the reference pages of docs/ from the code that they describe: settings, metrics, log
events and commands.

    python -m tests.reference_pages
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from annotated_types import Ge, Gt, Le, Lt
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo

from command import SCRIPTS
from proof.commands import COMMANDS as PROOF_COMMANDS
from proof.plans import plan_file
from service.settings import PREFIX, Settings
from service.telemetry.metrics import Metrics
from service.telemetry.nvml import Reading

CONFIGURATION = Path("docs/configuration.md")
METRICS = Path("docs/metrics.md")
LOGS = Path("docs/logs.md")
COMMANDS = Path("docs/commands.md")
PLANS = Path("docs/plans.md")
PLAN_TABLES = {
    "": "_PlanTable",
    "[[arm]]": "_ArmTable",
    "[level.unloaded]": "_InterleavedTable",
    "[level.mixed-50], [level.mixed-80]": "_MixedTable",
    "[level.switchback-50], [level.switchback-80]": "_SwitchbackTable",
    "[level.capacity]": "_CapacityTable",
    "[level.repeat]": "_RepeatTable",
    "[server]": "_ServerTable",
    "[generator]": "_GeneratorTable",
    "[work]": "_WorkTable",
}
"""Tables of a plan, and the classes that read them."""
LEVELS = {"debug", "info", "warning", "error", "exception", "critical"}
HELP_COLUMNS = "100"
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


def plans_page() -> str:
    """Return the page of all keys of a plan."""
    lines = [
        "# Plans",
        "",
        "A plan is a TOML file that fixes a claim and how it is measured, before the run. Start"
        " from [demo.toml](../examples/plans/demo.toml),"
        " [other-servers.toml](../examples/plans/other-servers.toml) or"
        " [mini-fp32-pilot.toml](../benchmarks/plans/mini-fp32-pilot.toml). An unknown key is"
        " refused. [proof.md](proof.md) explains the method; its"
        " [terms](proof.md#terms) are used here. This page is generated:"
        " `python -m tests.reference_pages`.",
    ]
    for title, name in PLAN_TABLES.items():
        model = getattr(plan_file, name)
        descriptions = {
            key: text
            for base in reversed(model.__mro__)
            if base.__module__ == plan_file.__name__
            for key, text in field_descriptions(base).items()
        }
        lines += [
            "",
            f"## {title.replace('[', chr(92) + '[') if title else 'At the top'}",
            "",
            "| key | default | what it is |",
            "|---|---|---|",
        ]
        for key, field in model.model_fields.items():
            if key in descriptions:
                default = "required" if field.is_required() else _plan_default(field.default)
                lines.append(f"| `{key}` | {default} | {descriptions[key]} |")
    return "\n".join(lines) + "\n"


def _plan_default(value: object) -> str:
    return "–" if value in (None, "", [], {}) else f"`{value}`"


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


def logs_page() -> str:
    """Return the page of all events that the service logs."""
    lines = [
        "# Log events",
        "",
        "Every event of the service's log, with its fields besides `time`, `level` and `event`."
        " [Operations](operations.md#logs) describes the log itself. This page is generated:"
        " `python -m tests.reference_pages`.",
        "",
        "| event | level | fields |",
        "|---|---|---|",
    ]
    for event, levels, fields in log_events():
        names = ", ".join(f"`{field}`" for field in fields) or "–"
        lines.append(f"| {event} | {', '.join(levels)} | {names} |")
    return "\n".join(lines) + "\n"


def log_events() -> list[tuple[str, list[str], list[str]]]:
    """Return (event, levels, fields) of every event that is named where it is logged."""
    events: dict[str, tuple[set[str], set[str]]] = {}
    for path in sorted(Path("service").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        for function in functions:
            for event, level, fields in events_of(function):
                levels, known = events.setdefault(event, (set(), set()))
                levels.add(level)
                known |= fields
    return [(name, sorted(both[0]), sorted(both[1])) for name, both in sorted(events.items())]


def events_of(function: ast.AST) -> Iterator[tuple[str, str, set[str]]]:
    """Yield (event, level, fields) of each event that a function logs."""
    variables = dictionaries_of(function)
    for node in ast.walk(function):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                args=[event, *_],
                keywords=keywords,
            ) if level in LEVELS:
                fields = {key for word in keywords for key in keys_of(word, variables)}
                if level == "exception":
                    level, fields = "error", fields | {"traceback"}
                for name in constants(event):
                    yield name, level, fields


def dictionaries_of(function: ast.AST) -> dict[str, set[str]]:
    """Return the keys of each dictionary that a function builds in a variable."""
    variables: dict[str, set[str]] = {}
    for node in ast.walk(function):
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict() as value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict() as value)
                | ast.AugAssign(target=ast.Name(id=name), value=ast.Dict() as value)
            ):
                variables.setdefault(name, set()).update(keys_in(value))
            case ast.Assign(
                targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key)))]
            ):
                variables.setdefault(name, set()).add(key)
    return variables


def constants(node: ast.expr) -> list[str]:
    """Return the texts that an expression may have; none for what is computed."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=body, orelse=orelse):
            return constants(body) + constants(orelse)
    return []


def keys_of(word: ast.keyword, variables: dict[str, set[str]]) -> set[str]:
    """Return the fields that an argument of a logging call adds."""
    if word.arg == "exc_info":
        return {"traceback"}
    if word.arg != "extra":
        return set()
    names = {node.id for node in ast.walk(word.value) if isinstance(node, ast.Name)}
    return keys_in(word.value).union(*(variables.get(name, set()) for name in names))


def keys_in(node: ast.expr) -> set[str]:
    """Return the constant keys of the dictionaries in an expression."""
    return {
        key.value
        for dictionary in ast.walk(node)
        if isinstance(dictionary, ast.Dict)
        for key in dictionary.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def commands_page() -> str:
    """Return the page of all commands: the help of each console script."""
    lines = [
        "# Commands",
        "",
        "The help of every console script. This page is generated: `python -m"
        " tests.reference_pages`.",
    ]
    for module, script in SCRIPTS.items():
        lines += ["", f"## {script}", "", "```", help_of([module, "--help"]), "```"]
        if module == "proof":
            for name in PROOF_COMMANDS:
                lines += ["", f"### {script} {name}", "", "```"]
                lines += [help_of([module, name, "--help"]), "```"]
    return "\n".join(lines) + "\n"


def help_of(arguments: list[str]) -> str:
    """Return what a module prints as its help."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": HELP_COLUMNS},
        check=True,
    )
    return done.stdout.rstrip()


def field_descriptions(model: type[object]) -> dict[str, str]:
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
    LOGS.write_text(logs_page(), encoding="utf-8")
    COMMANDS.write_text(commands_page(), encoding="utf-8")
    PLANS.write_text(plans_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
