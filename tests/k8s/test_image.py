"""The images as Kubernetes would run them: built from the Dockerfile, under the chart's
securityContext, without a container engine.
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

# The first build fetches and unpacks every package.
pytestmark = [containers, pytest.mark.timeout(1800)]

SENTENCE = "a charming and often affecting journey"
TWINS = ("bert=/models/bert", "drbert=/models/drbert")


@pytest.fixture(scope="module")
def service_image() -> str:
    for twin in ("bert", "drbert"):
        if not Path("artifacts", twin, "manifest.json").exists():
            images.said(
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
    port = free_port()
    with container(
        image,
        [*models, "--host", "127.0.0.1", "--port", str(port)],
        environment=environment,
        mounts=mounts,
    ) as served:
        url = f"http://127.0.0.1:{port}"
        give_up = time.monotonic() + 120
        while not ready(url):
            assert served.process.poll() is None, served.process.communicate()[0]
            assert time.monotonic() < give_up
            time.sleep(0.05)
        yield url, served


def test_the_service_image_is_small_and_holds_no_torch(
    service_image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with images.unpacked(service_image) as (root, told):
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
    assert size <= 600, f"{service_image} takes {size} MB unpacked, and 600 were promised"
    assert told["User"] == "10001:10001"
    assert told["Cmd"] == [*TWINS, "--host", "0.0.0.0", "--port", "8000"]
    assert told["Labels"]["org.opencontainers.image.version"] == images.version()


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


def test_nothing_that_reports_to_others_stays_in_an_image(
    service_image: str, proof_image: str
) -> None:
    for image in (service_image, proof_image):
        with images.unpacked(image) as (root, _):
            assert list(root.glob("app/lib/python3*/site-packages/openvino"))
            assert not list(root.glob("app/lib/python3*/site-packages/openvino_telemetry*"))


def test_a_container_classifies_as_nobody_in_particular_on_a_root_it_cannot_write(
    service_image: str,
) -> None:
    with serving(service_image, *TWINS) as (url, served):
        assert classify(url, SENTENCE)["data"][0]["label"] == "POSITIVE"
        status = dict(
            line.split(":", 1) for line in served.run("cat", "/proc/1/status").splitlines()
        )
        assert (status["Uid"].split(), status["Gid"].split()) == (["10001"] * 4, ["10001"] * 4)
        assert (
            int(status["CapEff"], 16),
            int(status["CapBnd"], 16),
            status["NoNewPrivs"].strip(),
        ) == (0, 0, "1")
        assert (
            served.run(
                "sh",
                "-c",
                "touch /tmp/there; touch /app/there /models/there /there 2>/dev/null || echo"
                " refused",
            ).strip()
            == "refused"
        )


def test_a_mounted_model_takes_the_place_of_the_baked_ones(
    service_image: str, tmp_path: Path
) -> None:
    write_artifact(tmp_path / "reviews")
    tmp_path.chmod(0o755)
    with serving(service_image, "/models/reviews", mounts={tmp_path: "/models"}) as (url, served):
        assert classify(url, "good film")["data"][0]["label"] == "POSITIVE"
        assert served.run("ls", "/models").split() == ["reviews"]


def test_a_container_that_is_told_to_stop_answers_what_it_has_and_ends_with_0(
    service_image: str,
) -> None:
    patience = {"DRBERT_DRAIN_TIMEOUT_S": "300", "DRBERT_REQUEST_TIMEOUT_S": "300"}
    with serving(service_image, *TWINS, environment=patience) as (url, served):
        answers: list[int] = []
        # As many as a request may hold: /metrics is up to a second old, and shows them only if they
        # take longer than that.
        asked = urllib.request.Request(
            f"{url}/classify",
            json.dumps({"input": [f"{SENTENCE} {i}" * 12 for i in range(1000)]}).encode(),
        )

        def ask() -> None:
            with urllib.request.urlopen(asked, timeout=300) as response:
                answers.append(len(json.load(response)["data"]))

        asking = Thread(target=ask)
        asking.start()
        while "drbert_queue_depth 0.0" in metrics(url):
            assert asking.is_alive(), "it was answered before it was seen; ask for more"
        served.send("TERM")
        asking.join()
        assert answers == [1000]
        output = served.process.communicate(timeout=60)[0]
        assert served.process.returncode == 0, output
        assert [json.loads(line)["event"] for line in output.splitlines()][-2:] == [
            "draining",
            "drained",
        ]


def test_the_charts_pod_runs_and_its_own_test_is_content(service_image: str) -> None:
    """Their arguments, variables and securityContext, with this host's address for the
    cluster's.
    """
    rendered = helm.render({})
    [pod, *_] = [
        document["spec"]["template"]["spec"]
        for document in rendered
        if document["kind"] == "Deployment"
    ]
    [tester] = [document["spec"] for document in rendered if document["kind"] == "Pod"]
    [own], [asking] = pod["containers"], tester["containers"]
    for security in (
        {**pod["securityContext"], **own["securityContext"]},
        {**tester["securityContext"], **asking["securityContext"]},
    ):
        assert security.items() >= SECURITY.items()
    assert [mount["mountPath"] for mount in own["volumeMounts"]] == ["/tmp"]
    [model, *where] = own["args"]
    assert where == ["--host", "0.0.0.0", "--port", "8000"]
    variables = {variable["name"]: variable["value"] for variable in own.get("env", [])}
    with (
        serving(service_image, model, environment=variables) as (url, _),
        container(service_image, [url], command=asking["command"]) as test,
    ):
        said = test.process.communicate(timeout=120)[0]
        assert test.process.returncode == 0, said
        assert "says POSITIVE" in said


def test_the_proof_image_judges_published_evidence(
    proof_image: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with images.unpacked(proof_image) as (root, _), capsys.disabled():
        print(f"\n{proof_image}: {images.size_mb(root)} MB unpacked")
    evidence = Path("evidence/published/twins-base-2")
    with container(proof_image, ["judge", "/evidence"], mounts={evidence: "/evidence"}) as judging:
        said = judging.process.communicate(timeout=300)[0]
    assert judging.process.returncode == 0, said
    assert "verdict: equivalent" in said


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
        said = running.process.communicate(timeout=300)[0]
    # How so few requests are judged is the machine's business.
    assert running.process.returncode in (0, 1, 2, 3), said
    assert "verdict: " in said


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        page: str = response.read().decode()
        return page
