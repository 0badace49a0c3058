"""Chart, docs, rules, dashboards and code use the same variables and the same metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from service.settings import FORMER_NAMES, Settings, read_settings
from service.telemetry.metrics import Metrics
from service.telemetry.nvml import Reading
from tests.k8s.helm import CHART, render
from tests.k8s.profiles import EVERYTHING, PROFILES, Values, containers, of_kind, pod_specs

# Settings that the chart sets where it mounts their files.
# The image has no exporter, so a pod serves artifacts only.
NOT_IN_CHART = {"artifact_cache"}
BY_MOUNTS = {
    "api_keys_file",
    "tls_certificate",
    "tls_key",
    "admin_port",
    "admin_host",
    "admin_keys_file",
    "gpu_cache",
}
MOUNTS: Values = {
    "apiKeys": {"existingSecret": "keys"},
    "tls": {"existingSecret": "certificate"},
    "admin": {"enabled": True, "existingSecret": "admins"},
    "networkPolicy": {"admins": [{"podSelector": {}}]},
    "gpu": {"enabled": True},
}
# A variable of the client.
OTHERS = {"DRBERT_API_KEY"}
ANNOTATIONS = {"default", "description", "title"}
CHART_NAMES = {current: former for former, current in FORMER_NAMES.items()}
"""The chart's values keep the former names of renamed settings."""


def variables(values: Values) -> dict[str, str]:
    """Return the variables of the first arm's container."""
    [spec, *_] = [
        spec for document, spec in pod_specs(render(values)) if document["kind"] == "Deployment"
    ]
    [container] = [c for c in containers(spec) if c["name"] == "drbert"]
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def without_annotations(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a setting's value, without its description and its default."""
    options = schema.get("anyOf", [schema])
    [value] = [option for option in options if option.get("type") != "null"]
    return {key: part for key, part in value.items() if key not in ANNOTATIONS}


def test_the_chart_knows_every_setting_of_the_service_with_its_type_and_limits() -> None:
    known = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"][
        "properties"
    ]
    fields = {
        CHART_NAMES.get(name, name): schema
        for name, schema in Settings.model_json_schema()["properties"].items()
    }
    assert set(known) | BY_MOUNTS | NOT_IN_CHART == set(fields)
    assert not set(known) & BY_MOUNTS
    for name, schema in known.items():
        assert without_annotations(schema) == without_annotations(fields[name]), name


def test_every_variable_of_the_service_can_be_set() -> None:
    unset = {
        name: "shapes.json" if name == "gpu_shapes_file" else 3
        for name, value in Settings()
        if value is None
    }
    settings = {
        CHART_NAMES.get(name, name): value
        for name, value in (Settings().model_dump(mode="json") | unset).items()
        if name not in BY_MOUNTS | NOT_IN_CHART
    }
    rendered = variables({**MOUNTS, "settings": settings})
    fields = Settings.model_fields.keys() - NOT_IN_CHART
    assert set(rendered) == {f"DRBERT_{name.upper()}" for name in fields}


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_service_reads_what_the_chart_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables(EVERYTHING[name]).items():
        monkeypatch.setenv(variable, value)
    settings = read_settings("0.0.0.0").to_dict()
    for setting, value in EVERYTHING[name].get("settings", {}).items():
        assert settings[setting] == value


def test_the_chart_computes_with_the_defaults_of_the_service() -> None:
    [deployment, *_] = of_kind(render({"shutdown": {"preStopSeconds": 7}}), "Deployment")
    assert (
        deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        == 7 + Settings().drain_timeout_s + 10
    )
    [rule] = of_kind(render({"monitoring": {"rules": {"enabled": True}}}), "PrometheusRule")
    [waiting] = [
        rule["expr"]
        for rule in rule["spec"]["groups"][0]["rules"]
        if rule["record"] == "drbert:setting:max_waiting"
    ]
    assert waiting == f"vector({Settings().max_queue_size})"


def test_docs_name_only_variables_that_exist() -> None:
    known = {f"DRBERT_{name.upper()}" for name in Settings.model_fields} | OTHERS
    for path in (
        Path("README.md"),
        *Path("docs").glob("*.md"),
        *Path("k8s").rglob("*.md"),
        *Path("k8s").rglob("*.yaml"),
    ):
        names = set(re.findall(r"\bDRBERT_[A-Z_]*[A-Z]\b", path.read_text()))
        assert names <= known, f"{path}: {names - known}"


def exposed_series() -> set[str]:
    """Return the names of the series on /metrics of a service with a model."""
    gpu = Reading("GPU-0", "H100", 1, 0.5, 1e9, 300.0, 40.0, frozenset())
    metrics = Metrics(CollectorRegistry(), readings=lambda: [gpu])
    metrics.add_model("reviews", "d", "e", "openvino", "cpu-fp32")
    metrics.count_request("reviews", 200)
    for counter, labels in (
        (metrics.rejected, ["full"]),
        (metrics.shadowed, ["a", "b", "agreed"]),
        (metrics.shadow_seconds, ["a"]),
    ):
        counter.labels(*labels)
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}


def expressions() -> Iterator[tuple[str, str]]:
    """Yield each expression that is sent to Prometheus, after the place that holds it."""
    yield from rule_expressions()
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for expression in nested_expressions(json.loads(path.read_text())):
            yield str(path), expression
    yield from autoscaler_expressions()
    yield from adapter_expressions()


def rule_expressions() -> Iterator[tuple[str, str]]:
    """Yield the expressions of the rules, as files and as the chart renders them."""
    for path in sorted((CHART / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                yield f"{path} {rule.get('record') or rule.get('alert')}", rule["expr"]
    for document in of_kind(render(PROFILES["production"]), "PrometheusRule"):
        for group in document["spec"]["groups"]:
            for rule in group["rules"]:
                yield "PrometheusRule", rule["expr"]


def autoscaler_expressions() -> Iterator[tuple[str, str]]:
    """Yield the expressions of KEDA's and of Kubernetes' own autoscalers."""
    for document in of_kind(render(PROFILES["production"]), "ScaledObject"):
        for trigger in document["spec"]["triggers"]:
            yield "ScaledObject", trigger["metadata"]["query"]
    for document in of_kind(render(EVERYTHING["hpa"]), "HorizontalPodAutoscaler"):
        for metric in document["spec"]["metrics"]:
            yield "HorizontalPodAutoscaler", metric["pods"]["metric"]["name"]


def adapter_expressions() -> Iterator[tuple[str, str]]:
    """Yield the expressions of prometheus-adapter, with values for its placeholders."""
    example = yaml.safe_load(Path("k8s/examples/prometheus-adapter.yaml").read_text())
    for rule in example["rules"]["custom"]:
        query = rule["metricsQuery"]
        query = query.replace("<<.Series>>", rule["name"]["as"])
        query = query.replace("<<.LabelMatchers>>", 'namespace="prod",pod=~"a|b"')
        yield "prometheus-adapter", query.replace("<<.GroupBy>>", "pod")


def nested_expressions(part: Any) -> Iterator[str]:
    """Yield the values of all keys `expr` within a dashboard."""
    if isinstance(part, dict):
        if isinstance(part.get("expr"), str):
            yield part["expr"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from nested_expressions(inner)


def fill_in_variables(expression: str) -> str:
    """Return a dashboard's expression as Grafana sends it."""
    expression = re.sub(r"\$\{?(?!__)\w+(:\w+)?\}?", "x", expression)
    return re.sub(r"\$\{?(__rate_interval|__interval|__range)\}?", "5m", expression)


def test_expressions_use_only_metrics_that_the_service_has() -> None:
    series = exposed_series()
    all_expressions = list(expressions())
    assert len(all_expressions) >= 4
    for place, expression in all_expressions:
        promql_parser.parse(fill_in_variables(expression))
        without_strings = re.sub(r'"(\\.|[^"\\])*"', "", expression)
        names = set(re.findall(r"(?<![:\w])drbert_\w+", without_strings))
        assert names <= series, f"{place} reads {sorted(names - series)}"


def test_rules_use_only_settings_that_the_chart_records() -> None:
    [document] = of_kind(render(PROFILES["production"]), "PrometheusRule")
    recorded: set[str] = set()
    for group in document["spec"]["groups"]:
        recorded |= {rule["record"] for rule in group["rules"] if "record" in rule}
    for place, expression in expressions():
        names = set(re.findall(r"\bdrbert:[\w:]+", expression))
        assert names <= recorded, f"{place} reads {sorted(names - recorded)}"


@pytest.mark.parametrize(
    ("size", "variant"),
    [("mini", "cpu-fp32"), ("mini", "cpu-int8"), ("base", "cpu-fp32"), ("base", "cpu-int8")],
)
def test_sizes_in_the_docs_are_the_measured_ones(size: str, variant: str) -> None:
    results = Path("benchmarks/RESULTS.md").read_text()
    precision = variant.removeprefix("cpu-")
    peers = results.partition(f"## peers {size}\n")[2]
    [rate] = re.findall(
        rf"^\| DrBERT Serve {precision} \| openvino \| [\d.,]+ \| [\d.,]+ \| ([\d.,]+) \|",
        peers.partition("\n## ")[0],
        re.MULTILINE,
    )
    [memory] = re.findall(
        rf"^\| {size} \| {variant} \| [\d.]+ \| [\d,]+ \| ([\d,]+) \|",
        results.partition("## startup\n")[2].partition("\n## ")[0],
        re.MULTILINE,
    )
    hours = 1e6 / (3600 * float(rate.replace(",", "")))
    assert (
        f"| {size}, `{variant}` | {rate} | {memory} | {hours:.1f} |"
        in Path("k8s/README.md").read_text()
    )


def test_the_commands_of_the_docs_name_objects_and_files_that_exist() -> None:
    text = Path("k8s/README.md").read_text()
    kinds = {"svc": "Service", "deploy": "Deployment"}
    objects = {(kinds[kind], name) for kind, name in re.findall(r"\b(svc|deploy)/([a-z-]+)", text)}
    assert objects
    assert objects <= {(document["kind"], document["metadata"]["name"]) for document in render({})}
    for path in re.findall(r"\b(k8s/[\w/.-]+|values/[\w-]+)", text):
        assert Path(path).exists() or Path("k8s", path).exists(), path
    [job] = of_kind(render(PROFILES["ab-proof"], name="proof"), "Job")
    for selector in re.findall(r"-l (\S+=proof\S*)", text):
        labels = dict(pair.split("=") for pair in selector.split(","))
        assert labels.items() <= job["metadata"]["labels"].items()


def test_the_docs_state_the_defaults_of_the_service() -> None:
    rows = re.findall(r"\| `DRBERT_(\w+)` \| ([^|]+) \|", Path("docs/operations.md").read_text())
    assert len(rows) >= 5
    defaults = dict(Settings())
    for name, words in rows:
        number, _, unit = words.strip().replace(",", "").partition(" ")
        assert defaults[name.lower()] == (
            None if number == "none" else float(number) * {"": 1, "MiB": 2**20}[unit]
        ), name
