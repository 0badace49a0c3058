"""Chart, docs, rules, dashboards and code name the same variables and the same metrics."""

from __future__ import annotations

import functools
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

# Set by the blocks of values that mount what they name.
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
# Not the service's: the client's key, and the switch of a chaos run's service.
OTHERS = {"DRBERT_API_KEY"}
IN_WORDS = {"default", "description", "title"}
CHART_NAMES = {current: former for former, current in FORMER_NAMES.items()}
"""The chart's values keep the former names of renamed settings."""


def variables(values: Values) -> dict[str, str]:
    """What the first arm's container is told."""
    [spec, *_] = [
        spec for document, spec in pod_specs(render(values)) if document["kind"] == "Deployment"
    ]
    [container] = [c for c in containers(spec) if c["name"] == "drbert"]
    return {variable["name"]: variable["value"] for variable in container.get("env", [])}


def without_words(schema: dict[str, Any]) -> dict[str, Any]:
    [told] = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    return {key: value for key, value in told.items() if key not in IN_WORDS}


def test_the_chart_knows_every_setting_of_the_service_with_its_type_and_limits() -> None:
    known = json.loads((CHART / "values.schema.json").read_text())["properties"]["settings"][
        "properties"
    ]
    fields = {
        CHART_NAMES.get(name, name): schema
        for name, schema in Settings.model_json_schema()["properties"].items()
    }
    assert set(known) | BY_MOUNTS == set(fields)
    assert not set(known) & BY_MOUNTS
    for name, schema in known.items():
        assert without_words(schema) == without_words(fields[name]), name


def test_every_variable_of_the_service_can_be_set() -> None:
    unset = {
        name: "shapes.json" if name == "gpu_shapes_file" else 3
        for name, value in Settings()
        if value is None
    }
    settings = {
        CHART_NAMES.get(name, name): value
        for name, value in (Settings().model_dump(mode="json") | unset).items()
        if name not in BY_MOUNTS
    }
    given = variables({**MOUNTS, "settings": settings})
    assert set(given) == {f"DRBERT_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_service_reads_what_the_chart_sets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables(EVERYTHING[name]).items():
        monkeypatch.setenv(variable, value)
    settings = read_settings("0.0.0.0").to_dict()
    for setting, value in EVERYTHING[name].get("settings", {}).items():
        assert settings[setting] == value


def test_what_the_chart_computes_with_are_the_services_own_defaults() -> None:
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


def test_docs_name_only_variables_that_there_are() -> None:
    known = {f"DRBERT_{name.upper()}" for name in Settings.model_fields} | OTHERS
    for path in (
        Path("README.md"),
        *Path("docs").glob("*.md"),
        *Path("k8s").rglob("*.md"),
        *Path("k8s").rglob("*.yaml"),
    ):
        named = set(re.findall(r"\bDRBERT_[A-Z_]*[A-Z]\b", path.read_text()))
        assert named <= known, f"{path}: {named - known}"


def exposed() -> set[str]:
    """The series on /metrics of a service with a model."""
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
    """Everything that asks Prometheus, and where it stands."""
    for path in sorted((CHART / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from (
                (f"{path} {rule.get('record') or rule.get('alert')}", rule["expr"])
                for rule in group["rules"]
            )
    for path in sorted((CHART / "dashboards").glob("*.json")):
        yield from (
            (str(path), expression) for expression in _expressions(json.loads(path.read_text()))
        )
    for document in of_kind(render(PROFILES["production"]), "ScaledObject"):
        yield from (
            ("ScaledObject", trigger["metadata"]["query"])
            for trigger in document["spec"]["triggers"]
        )
    for document in of_kind(render(PROFILES["production"]), "PrometheusRule"):
        yield from (
            ("PrometheusRule", rule["expr"])
            for group in document["spec"]["groups"]
            for rule in group["rules"]
        )
    for rule in yaml.safe_load(Path("k8s/examples/prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]:
        filled_in = {
            "<<.Series>>": rule["name"]["as"],
            "<<.LabelMatchers>>": 'namespace="prod",pod=~"a|b"',
            "<<.GroupBy>>": "pod",
        }
        yield (
            "prometheus-adapter",
            functools.reduce(
                lambda query, each: query.replace(*each), filled_in.items(), rule["metricsQuery"]
            ),
        )
    for document in of_kind(render(EVERYTHING["hpa"]), "HorizontalPodAutoscaler"):
        yield from (
            ("HorizontalPodAutoscaler", metric["pods"]["metric"]["name"])
            for metric in document["spec"]["metrics"]
        )


def _expressions(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from (part["expr"] for _ in [0] if isinstance(part.get("expr"), str))
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from _expressions(inner)


def filled(expression: str) -> str:
    """A dashboard's expression as Grafana would send it."""
    return re.sub(
        r"\$\{?(__rate_interval|__interval|__range)\}?",
        "5m",
        re.sub(r"\$\{?(?!__)\w+(:\w+)?\}?", "x", expression),
    )


def test_whoever_asks_prometheus_asks_for_metrics_that_the_service_has() -> None:
    there, asked = exposed(), list(expressions())
    assert len(asked) >= 4
    for where, expression in asked:
        promql_parser.parse(filled(expression))
        series = re.sub(r'"(\\.|[^"\\])*"', "", expression)
        named = set(re.findall(r"(?<![:\w])drbert_\w+", series))
        assert named <= there, f"{where} asks for {sorted(named - there)}"


def test_rules_ask_for_settings_that_the_chart_records() -> None:
    [rule] = of_kind(render(PROFILES["production"]), "PrometheusRule")
    recorded = {
        each["record"]
        for group in rule["spec"]["groups"]
        for each in group["rules"]
        if "record" in each
    }
    for where, expression in expressions():
        named = set(re.findall(r"\bdrbert:[\w:]+", expression))
        assert named <= recorded, f"{where} asks for {sorted(named - recorded)}"


@pytest.mark.parametrize(
    ("size", "variant"),
    [("mini", "cpu-fp32"), ("mini", "cpu-int8"), ("base", "cpu-fp32"), ("base", "cpu-int8")],
)
def test_sizes_in_the_docs_are_those_that_were_measured(size: str, variant: str) -> None:
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


def test_the_docs_commands_name_what_there_is() -> None:
    text = Path("k8s/README.md").read_text()
    kinds = {"svc": "Service", "deploy": "Deployment"}
    named = {(kinds[kind], name) for kind, name in re.findall(r"\b(svc|deploy)/([a-z-]+)", text)}
    assert named
    assert named <= {(document["kind"], document["metadata"]["name"]) for document in render({})}
    for path in re.findall(r"\b(k8s/[\w/.-]+|values/[\w-]+)", text):
        assert Path(path).exists() or Path("k8s", path).exists(), path
    [job] = of_kind(render(PROFILES["ab-proof"], name="proof"), "Job")
    for selector in re.findall(r"-l (\S+=proof\S*)", text):
        wanted = dict(pair.split("=") for pair in selector.split(","))
        assert wanted.items() <= job["metadata"]["labels"].items()


def test_the_docs_tell_the_services_own_defaults() -> None:
    told = re.findall(r"\| `DRBERT_(\w+)` \| ([^|]+) \|", Path("docs/operations.md").read_text())
    assert len(told) >= 5
    defaults = dict(Settings())
    for name, words in told:
        number, _, unit = words.strip().replace(",", "").partition(" ")
        assert defaults[name.lower()] == (
            None if number == "none" else float(number) * {"": 1, "MiB": 2**20}[unit]
        ), name
