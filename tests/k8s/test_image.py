"""The images, built from the Dockerfile and run as Kubernetes runs them.

They run under the chart's securityContext, without a container engine.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from tests.factories import write_artifact
from tests.k8s import helm, images
from tests.k8s.containers import SECURITY, Container, container
from tests.requirements import containers
from tests.service.test_server import classify, free_port, ready

# The first build downloads and unpacks all packages.
pytestmark = [containers, pytest.mark.timeout(1800)]

SENTENCE = "a charming and often affecting journey"
TWINS = ("bert=/models/bert", "drbert=/models/drbert")


@pytest.fixture(scope="module")
def service_image() -> str:
    for twin in ("bert", "drbert"):
        if not Path("artifacts", twin, "manifest.json").exists():
            images.output_of(
                sys.executable,
                "-m",
                "export",
                f"examples/checkpoints/{twin}-mini-sst2",
                f"artifacts/{twin}",
            )
    return images.build("service")


@pytest.fixture(scope="module")
def proof_image(service_image: str) -> str:
    return images.build("proof")


@contextmanager
def serving(
    image: str,
    *models: str,
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[Path, str] | None = None,
) -> Iterator[tuple[str, Container]]:
    """Run the service in a container; yield its URL once it is ready, and the container."""
    port = free_port()
    with container(
        image,
        [*models, "--host", "127.0.0.1", "--port", str(port)],
        environment=environment,
        mounts=mounts,
    ) as server:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while not ready(url):
            assert server.process.poll() is None, server.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url, server


def test_the_service_image_is_small_and_holds_no_torch(
    service_image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with images.unpacked(service_image) as (root, config):
        size = images.size_mb(root)
        [packages] = root.glob("app/lib/python3*/site-packages")
        assert not [
            name
            for name in (
                "torch",
                "transformers",
                "locust",
                "pip",
                "tests",
                "websockets",
                "watchfiles",
            )
            if (packages / name).exists()
        ]
        assert {path.name for path in root.glob("models/*")} == {"bert", "drbert"}
    with capsys.disabled():
        print(f"\n{service_image}: {size} MB unpacked")
    assert size <= 600, f"{service_image} takes {size} MB unpacked; the limit is 600 MB"
    assert config["User"] == "10001:10001"
    assert config["Cmd"] == [*TWINS, "--host", "0.0.0.0", "--port", "8000"]
    assert config["Labels"]["org.opencontainers.image.version"] == images.version()


def test_nothing_of_this_host_stays_in_an_image(service_image: str, proof_image: str) -> None:
    for image in (service_image, proof_image):
        with images.unpacked(image) as (root, _):
            assert not [
                path
                for path in ("etc/pip.conf", "root/.cache", "build", "artifacts")
                if (root / path).exists()
            ]
            assert not any((root / "opt").iterdir())
            assert "nameserver" not in (root / "etc/resolv.conf").read_text()


def test_no_package_for_telemetry_stays_in_an_image(service_image: str, proof_image: str) -> None:
    for image in (service_image, proof_image):
        with images.unpacked(image) as (root, _):
            assert list(root.glob("app/lib/python3*/site-packages/openvino"))
            assert not list(root.glob("app/lib/python3*/site-packages/openvino_telemetry*"))


def test_a_container_classifies_without_privileges_on_a_read_only_root(
    service_image: str,
) -> None:
    with serving(service_image, *TWINS) as (url, server):
        assert classify(url, SENTENCE)["data"][0]["label"] == "POSITIVE"
        status = dict(
            line.split(":", 1) for line in server.run("cat", "/proc/1/status").splitlines()
        )
        assert (status["Uid"].split(), status["Gid"].split()) == (["10001"] * 4, ["10001"] * 4)
        assert (
            int(status["CapEff"], 16),
            int(status["CapBnd"], 16),
            status["NoNewPrivs"].strip(),
        ) == (0, 0, "1")
        assert (
            server.run(
                "sh",
                "-c",
                "touch /tmp/there; touch /app/there /models/there /there 2>/dev/null || echo"
                " refused",
            ).strip()
            == "refused"
        )


def test_a_mounted_model_replaces_those_of_the_image(service_image: str, tmp_path: Path) -> None:
    write_artifact(tmp_path / "reviews")
    tmp_path.chmod(0o755)
    with serving(service_image, "/models/reviews", mounts={tmp_path: "/models"}) as (url, server):
        assert classify(url, "good film")["data"][0]["label"] == "POSITIVE"
        assert server.run("ls", "/models").split() == ["reviews"]


def test_a_stopped_container_answers_pending_requests_and_ends_with_0(
    service_image: str,
) -> None:
    timeouts = {"DRBERT_DRAIN_TIMEOUT_S": "300", "DRBERT_REQUEST_TIMEOUT_S": "300"}
    with serving(service_image, *TWINS, environment=timeouts) as (url, server):
        answers: list[int] = []
        # The largest request: /metrics is up to a second old, so the request has to take longer to
        # be seen there.
        request = urllib.request.Request(
            f"{url}/classify",
            json.dumps({"input": [f"{SENTENCE} {i}" * 12 for i in range(1000)]}).encode(),
        )

        def send() -> None:
            with urllib.request.urlopen(request, timeout=300) as response:
                answers.append(len(json.load(response)["data"]))

        client = Thread(target=send)
        client.start()
        while "drbert_queue_depth 0.0" in metrics(url):
            assert client.is_alive(), "it was answered before it was seen; send more texts"
        server.send("TERM")
        client.join()
        assert answers == [1000]
        output = server.process.communicate(timeout=60)[0]
        assert server.process.returncode == 0, output
        assert [json.loads(line)["event"] for line in output.splitlines()][-2:] == [
            "draining",
            "drained",
        ]


def test_the_pod_of_the_chart_runs_and_passes_its_test(service_image: str) -> None:
    """Both run with their arguments, variables and securityContext, on the address of this host."""
    rendered = helm.render({})
    [pod, *_] = [
        document["spec"]["template"]["spec"]
        for document in rendered
        if document["kind"] == "Deployment"
    ]
    [tester] = [document["spec"] for document in rendered if document["kind"] == "Pod"]
    [service], [client] = pod["containers"], tester["containers"]
    for security in (
        {**pod["securityContext"], **service["securityContext"]},
        {**tester["securityContext"], **client["securityContext"]},
    ):
        assert security.items() >= SECURITY.items()
    assert [mount["mountPath"] for mount in service["volumeMounts"]] == ["/tmp"]
    [model, *options] = service["args"]
    assert options == ["--host", "::", "--port", "8000"]
    variables = {variable["name"]: variable["value"] for variable in service.get("env", [])}
    with (
        serving(service_image, model, environment=variables) as (url, _),
        container(service_image, [url], command=client["command"]) as test,
    ):
        output = test.process.communicate(timeout=120)[0]
        assert test.process.returncode == 0, output
        assert "answers POSITIVE" in output


def test_the_proof_image_judges_published_evidence(
    proof_image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with images.unpacked(proof_image) as (root, _), capsys.disabled():
        print(f"\n{proof_image}: {images.size_mb(root)} MB unpacked")
    evidence = Path("evidence/published/twins-base-2")
    with container(proof_image, ["judge", "/evidence"], mounts={evidence: "/evidence"}) as judging:
        output = judging.process.communicate(timeout=300)[0]
    assert judging.process.returncode == 0, output
    assert "verdict: equivalent" in output


def test_the_proof_image_runs_a_plan_to_its_verdict(proof_image: str, tmp_path: Path) -> None:
    copies = {
        "bert": "reference",
        "bert-again": "reference",
        "drbert": "candidate",
        "drbert-again": "candidate",
    }
    arms = "".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nartifact ='
        f' "/models/{name.removesuffix("-again")}"\n'
        for name, role in copies.items()
    )
    (tmp_path / "plan.toml").write_text(f"""
name = "small"
seed = 1
texts = "examples/texts/sentences.txt"
restarts = 4
{arms}
[[arm]]
name = "delayed"
role = "delayed"
[level.unloaded]
tuples = 32
warm_up_tuples = 2
margins = {{ inference = {{ p50 = 0.5 }} }}
[server]
port = {free_port()}
settings = {{ warm_up_s = 0 }}
""")
    tmp_path.chmod(0o755)
    mounts = {tmp_path: "/plan", Path("artifacts"): "/models"}
    with container(
        proof_image, ["run", "/plan/plan.toml", "--evidence", "/tmp/evidence"], mounts=mounts
    ) as running:
        output = running.process.communicate(timeout=300)[0]
    # The verdict on so few requests depends on the machine.
    assert running.process.returncode in (0, 1, 2, 3), output
    assert "verdict: " in output


def metrics(url: str) -> str:
    """Return the page of metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        page: str = response.read().decode()
        return page
