"""
A real Prometheus scrapes real services under the chart's rules: all queries return data, and the
alerts fire on their faults.

There are two releases: `twins` serves BERT, DrBERT and DrBERT with its decoder kept; `faults`
fails, refuses requests and lacks an arm. The windows and delays of the rules are shortened to
seconds. The speed of the machine decides only how long the tests take.
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import yaml

from tests.factories import write_artifact
from tests.k8s import helm
from tests.k8s.queries import CHART, SETTINGS, dashboard_queries, fill_in, rules, runbook_queries
from tests.requirements import PROMETHEUS, PROMTOOL, prometheus
from tests.service.test_server import free_port, running

pytestmark = prometheus

NAMESPACE = "prod"
TWINS = {"bert": "reference", "drbert": "candidate", "drbert-with-decoder": "candidate"}
FAULTS = {"faulty": "reference", "gone": "candidate"}
MAX_WAITING = 8
# A shared machine is noisy; a kept decoder of two layers on four takes about 1.4 times as long.
MARGIN = 0.15
WINDOW = "20s"
TIMEOUT_S = 120

VARIABLES = {"namespace": NAMESPACE, "release": "twins", "arm": ".*", "__rate_interval": WINDOW}
ALERTS = [rule["alert"] for rule in rules() if "alert" in rule]
RECORDED = [rule for rule in rules() if "record" in rule]


class PrometheusClient:
    """A client of Prometheus' HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an endpoint."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30
        ) as response:
            return json.load(response)["data"]

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the series of a query's result."""
        result: list[dict[str, Any]] = self.get("query", query=query)["result"]
        return result

    def wait_for(self, query: str) -> list[dict[str, Any]]:
        """Return the result of a query once it is not empty."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (result := self.query(query)):
            assert time.monotonic() < deadline, f"no result after {TIMEOUT_S} s: {query}"
            time.sleep(0.25)
        return result


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusClient]:
    """A client of a Prometheus that scrapes both releases under load."""
    folder = tmp_path_factory.mktemp("prometheus")
    poisoned = write_artifact(folder / "poisoned")
    with ExitStack() as stack:
        urls = {
            arm: stack.enter_context(running(f"{arm}={twin(arm)}", DRBERT_THREADS="1"))[0]
            for arm in TWINS
        }
        faulty, _ = stack.enter_context(
            running(
                f"bert={twin('bert')}",
                f"poisoned={poisoned.directory}",
                DRBERT_THREADS="1",
                DRBERT_MAX_QUEUE_SIZE=str(MAX_WAITING),
                DRBERT_MAX_TEXTS=str(MAX_WAITING),
            )
        )
        others = stack.enter_context(cluster([pod_of("twins", arm) for arm in TWINS]))
        targets = [target("twins", arm, url) for arm, url in urls.items()] + [
            target("faults", "faulty", faulty)
        ]
        url = stack.enter_context(running_prometheus(folder, targets, others))
        stack.enter_context(even_load(urls))
        stack.enter_context(faulty_load(faulty))
        yield PrometheusClient(url)


def twin(name: str) -> Path:
    """Return an artifact of the examples, which is exported if it does not exist."""
    artifact = Path("artifacts", name)
    if not (artifact / "manifest.json").exists():
        checkpoint, _, decoder = name.partition("-with-")
        command = [
            sys.executable,
            "-m",
            "export",
            f"examples/checkpoints/{checkpoint}-mini-sst2",
            str(artifact),
            *(["--keep-decoder"] if decoder else []),
        ]
        subprocess.run(command, check=True, capture_output=True)
    return artifact


def pod_of(release: str, arm: str) -> str:
    """Return the name of an arm's pod."""
    return f"{release}-{arm}-0"


def target(release: str, arm: str, url: str) -> dict[str, Any]:
    """Return a target of Prometheus, with the labels that the ServiceMonitor gives it."""
    labels = {
        "namespace": NAMESPACE,
        "release": release,
        "arm": arm,
        "pod": pod_of(release, arm),
        "container": "drbert",
        "endpoint": "http",
    }
    return {"targets": [url.removeprefix("http://")], "labels": labels}


@contextmanager
def running_prometheus(
    folder: Path, targets: Sequence[dict[str, Any]], others: str
) -> Iterator[str]:
    """Run Prometheus with the rules of both releases; yield its URL."""
    for release, arms in {"twins": TWINS, "faults": FAULTS}.items():
        (folder / f"{release}.rules.yaml").write_text(
            yaml.safe_dump({"groups": shortened(rule_groups(release, arms))})
        )
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": ["*.rules.yaml"],
                "scrape_configs": [
                    {"job_name": "drbert", "static_configs": list(targets)},
                    {
                        "job_name": "cluster",
                        "honor_labels": True,
                        "static_configs": [{"targets": [others]}],
                    },
                ],
            }
        )
    )
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not answers(f"http://{address}/-/ready"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    """Return whether a URL can be read."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


def rule_groups(release: str, arms: dict[str, str]) -> list[dict[str, Any]]:
    """Return the groups of rules of a release, as the chart renders them."""
    [rule] = [
        document for document in manifests(release, arms) if document["kind"] == "PrometheusRule"
    ]
    groups: list[dict[str, Any]] = rule["spec"]["groups"]
    return groups


def manifests(release: str, arms: dict[str, str]) -> list[dict[str, Any]]:
    """Return the objects of a release with these arms, rules and an autoscaler."""
    return helm.render(
        {
            "arms": (
                dict.fromkeys(("bert", "drbert"))
                | {arm: {"role": role} for arm, role in arms.items()}
            ),
            "settings": {"max_waiting": MAX_WAITING, "max_texts": MAX_WAITING},
            "monitoring": {"rules": {"enabled": True, "margin": MARGIN}},
            "autoscaling": {"keda": {"enabled": True, "serverAddress": "http://prometheus:9090"}},
        },
        name=release,
    )


def shortened(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules with windows and delays of seconds.

    The least rate of requests is lowered to one that a slow machine reaches.
    """

    def shortened_rule(rule: dict[str, Any]) -> dict[str, Any]:
        expression = re.sub(r"\[\d+[mhd]\]", f"[{WINDOW}]", rule["expr"]).replace(
            ">= 40", ">= 0.05"
        )
        return rule | {"expr": expression} | ({"for": "1s"} if "for" in rule else {})

    return [
        {"name": group["name"], "rules": [shortened_rule(rule) for rule in group["rules"]]}
        for group in groups
    ]


@contextmanager
def even_load(urls: dict[str, str]) -> Iterator[None]:
    """Send texts to the arms in turn, one at a time, so that noise affects all of them alike."""
    texts = Path("examples/texts/sentences.txt").read_text().splitlines()
    stop = Event()

    def send() -> None:
        for number, text in enumerate(itertools.cycle(texts)):
            for arm, url in urls.items():
                if stop.is_set():
                    return
                assert post(url, {"input": text, "model": arm}) == 200
                if number % 20 == 0:
                    assert post(url, {"input": ""}) == 422

    with running_threads(stop, send):
        yield


@contextmanager
def faulty_load(url: str) -> Iterator[None]:
    """Send texts that fail, and more texts than the queue holds."""
    stop = Event()

    def fail() -> None:
        while not stop.wait(0.2):
            assert post(url, {"input": "poison", "model": "poisoned"}) in (500, 429)

    def crowd() -> None:
        while not stop.wait(0.2):
            post(url, {"input": ["a long and winding road " * 20] * MAX_WAITING, "model": "bert"})

    with running_threads(stop, fail, crowd, crowd, crowd):
        yield


@contextmanager
def running_threads(stop: Event, *targets: Any) -> Iterator[None]:
    """Run functions in threads for the length of the block; `stop` ends them."""
    threads = [Thread(target=target) for target in targets]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def post(url: str, body: dict[str, Any]) -> int:
    """Send a request to /classify and return the status of the response."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", "/classify", json.dumps(body))
        return connection.getresponse().status
    finally:
        connection.close()


@contextmanager
def cluster(pods: Sequence[str]) -> Iterator[str]:
    """Serve the metrics of a cluster whose pods are throttled and restart every second.

    They are those of kube-state-metrics and of the kubelet, and the service's own of a GPU and of a
    model that was replaced in one of two pods.
    """
    start = time.monotonic()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seconds = int(time.monotonic() - start)
            metrics = {
                "kube_pod_container_status_restarts_total": seconds,
                "container_cpu_cfs_periods_total": 10 * seconds,
                "container_cpu_cfs_throttled_periods_total": 5 * seconds,
                "container_memory_working_set_bytes": 3e8,
                'kube_pod_container_resource_limits{resource="memory"}': 1e9,
                **{
                    f'drbert_gpu_{name}{{release="twins",arm="bert",gpu="GPU-1"}}': 1.0
                    for name in ("utilization_ratio", "memory_used_bytes", "sm_clock_hertz")
                },
                'drbert_gpu_slowed{release="twins",arm="bert",gpu="GPU-1",reason="power"}': 1.0,
            }
            lines = []
            for name, value in metrics.items():
                series, _, more = name.removesuffix("}").partition("{")
                lines += [
                    f'{series}{{namespace="{NAMESPACE}",pod="{pod}",container="drbert"'
                    f"{',' if more else ''}{more}}} {value}\n"
                    for pod in pods
                ]
            lines += [
                f'drbert_model_info{{namespace="{NAMESPACE}",release="faults",arm="faulty",'
                f'pod="faults-{digest}",model="replaced",digest="{digest}"}} 1\n'
                for digest in ("aa", "bb")
            ]
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write("".join(lines).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            serving.join()


@pytest.mark.parametrize(
    "rule", RECORDED, ids=lambda rule: "-".join([rule["record"], *rule.get("labels", {}).values()])
)
def test_every_recording_rule_records(client: PrometheusClient, rule: dict[str, Any]) -> None:
    labels = "".join(f'{name}="{value}",' for name, value in rule.get("labels", {}).items())
    client.wait_for(f"{rule['record']}{{{labels}}}")


def test_the_settings_of_every_release_are_recorded(client: PrometheusClient) -> None:
    for name in SETTINGS:
        assert {series["metric"]["release"] for series in client.wait_for(name)} == {
            "twins",
            "faults",
        }


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_fires_on_its_fault(client: PrometheusClient, alert: str) -> None:
    client.wait_for(f'ALERTS{{alertname="{alert}",alertstate="firing"}}')
    [firing, *_] = [
        active
        for active in client.get("alerts")["alerts"]
        if active["labels"]["alertname"] == alert
    ]
    for annotation in firing["annotations"].values():
        assert "error expanding template" not in annotation
        assert "<no value>" not in annotation


def test_no_rule_fails(client: PrometheusClient) -> None:
    """The latest evaluation counts: a wrong rule fails at each, a slow machine only at some."""
    client.wait_for("drbert:ratio:p99")
    deadline = time.monotonic() + TIMEOUT_S
    while failing := [
        (rule["name"], rule.get("lastError"))
        for group in client.get("rules")["groups"]
        for rule in group["rules"]
        if rule["health"] != "ok"
    ]:
        assert time.monotonic() < deadline, failing
        time.sleep(0.25)


def test_a_kept_decoder_is_detected_and_a_dropped_one_is_not(client: PrometheusClient) -> None:
    ratio = 'drbert:ratio:mean{release="twins",phase="inference",arm="%s"}'
    near, far = (
        f"abs({ratio % 'drbert'} - 1) < {MARGIN}",
        f"{ratio % 'drbert-with-decoder'} > 1 + {MARGIN}",
    )
    firing = (
        'ALERTS{alertname="DrbertRatioOutOfMargin",alertstate="firing",release="twins",arm="%s",'
        'phase="inference"}'
    )
    # At the same moment, the alert fires for one arm and is silent for the other.
    alarmed = (
        f"{firing % 'drbert-with-decoder'} and on () ({near}) and on () ({far}) unless on ()"
        f" {firing % 'drbert'}"
    )
    client.wait_for(alarmed)


def test_alerts_fire_only_for_the_release_that_has_the_fault(client: PrometheusClient) -> None:
    for alert, broken in {
        "DrbertErrorBudgetBurnsFast": "faulty",
        "DrbertErrorBudgetBurnsSlowly": "faulty",
        "DrbertQueueSaturated": "faulty",
    }.items():
        firing = client.wait_for(f'ALERTS{{alertname="{alert}",alertstate="firing"}}')
        labels = {(alarm["metric"]["release"], alarm["metric"]["arm"]) for alarm in firing}
        assert labels == {("faults", broken)}
    for alert in ("DrbertNoReadyPod", "DrbertTargetMissing"):
        client.wait_for(
            f'ALERTS{{alertname="{alert}",alertstate="firing",release="faults",arm="gone"}}'
        )


@pytest.mark.parametrize(
    "query",
    [query for _, query in dashboard_queries()],
    ids=[name for name, _ in dashboard_queries()],
)
def test_every_dashboard_query_returns_data(client: PrometheusClient, query: str) -> None:
    client.wait_for(fill_in(query, VARIABLES))


def test_the_variables_of_the_dashboards_list_the_releases(client: PrometheusClient) -> None:
    client.wait_for('drbert_ready{release="faults"}')
    for path in CHART.glob("dashboards/*.json"):
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                [(series, label)] = re.findall(
                    r"^label_values\((.*), (\w+)\)$", variable["query"]["query"]
                )
                assert client.get(
                    f"label/{label}/values", **{"match[]": fill_in(series, VARIABLES)}
                ), variable["name"]


@pytest.mark.parametrize("query", runbook_queries())
def test_every_query_of_the_runbooks_returns_data(client: PrometheusClient, query: str) -> None:
    # A query for failing requests needs the release that fails.
    client.wait_for(query.replace('release="twins",code=~"5.."', 'release="faults",code=~"5.."'))


def test_an_autoscalers_query_returns_one_number(client: PrometheusClient) -> None:
    """KEDA accepts exactly one."""
    scaled = [
        document for document in manifests("twins", TWINS) if document["kind"] == "ScaledObject"
    ]
    assert len(scaled) == len(TWINS)
    for document in scaled:
        for trigger in document["spec"]["triggers"]:
            assert len(client.wait_for(trigger["metadata"]["query"])) == 1


def test_a_page_of_metrics_is_well_formed(client: PrometheusClient) -> None:
    [series] = client.wait_for('up{release="twins",arm="bert"}')
    with urllib.request.urlopen(
        f"http://{series['metric']['instance']}/metrics", timeout=10
    ) as response:
        page = response.read()
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=page, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
