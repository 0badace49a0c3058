"""Servers that run already and are measured one after the other, as pods of a cluster are."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command import BadInput, Unavailable
from proof.commands import main
from proof.evidence.store import read_starts
from proof.measuring import pod_instances
from proof.plans.plan_file import read_plan, to_toml
from proof.plans.schedule import load_order
from service.artifact import Artifact
from tests.proof.measuring.test_run import read_rows
from tests.service.test_server import serving

# Many servers in one process, each with a port and an id of its own, that answer as the service
# does.
PODS = """
import http.server, json, sys, threading, time
busy_wait, models = sys.argv[1], sys.argv[2:]

def pod(number, model):
    class Answer(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1    # head and body in one packet
        def do_GET(self):
            loaded = {"digest": model, "variant": "cpu-fp32", "runtime": "openvino"}
            self.answer({"instance_id": f"pod-{number}", "settings": {"busy_wait": busy_wait},
                         "models": {model: loaded}})
        def do_POST(self):
            json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            began = time.perf_counter()
            longer = 1 + float(self.headers.get("X-Busy-Wait", 0))
            while time.perf_counter() - began < 0.0005 * longer: pass
            milliseconds = 1000 * (time.perf_counter() - began)
            timing = (
                f'tokenize;dur=0.001, queue;dur=0.001, inference;dur={milliseconds:.6f};'
                f'desc="b=1 t=4", total;dur={milliseconds + 0.003:.6f}'
            )
            self.answer({"usage": {"prompt_tokens": 3}}, {"Server-Timing": timing})
        def answer(self, told, more={}):
            body = json.dumps(told).encode()
            self.send_response(200)
            headers = {"Content-Length": len(body), "X-Instance-Id": f"pod-{number}", **more}
            for name, value in headers.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]

print(json.dumps([pod(number, model) for number, model in enumerate(models)]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts pods and has the names old.svc and new.svc stand for all of them, as a cluster's DNS
    has.
    """
    processes: list[subprocess.Popen[str]] = []
    ports: dict[str, list[int]] = {"old.svc": [], "new.svc": []}

    def start(pods: int, busy_wait: str = "anywhere") -> dict[str, list[int]]:
        names = [name for name in ports for _ in range(pods)]
        process = subprocess.Popen(
            [sys.executable, "-c", PODS, busy_wait, *(name.partition(".")[0] for name in names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout is not None
        for name, port in zip(names, json.loads(process.stdout.readline()), strict=True):
            ports[name].append(port)
        return ports

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        if host not in ports:
            return addresses_of(host, *rest, **more)
        if not ports[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports[host]
        ]

    addresses_of = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(pod_instances, "AVAILABLE_WITHIN_S", 0)
    yield start
    for process in processes:
        process.kill()
        process.communicate()


def write_plan(
    folder: Path,
    by: str = "server",
    server: str = "instances = true",
    url: str = "http://old.svc:8000",
) -> Path:
    (folder / "texts.txt").write_text("good film\nbad\n")
    arms = "".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nurl = "{arm_url}"\nmodel = "{model}"\n'
        for name, role, arm_url, model in (
            ("old", "reference", url, "old"),
            ("old-again", "reference", url, "old"),
            ("new", "candidate", "http://new.svc:8000", "new"),
            ("new-again", "candidate", "http://new.svc:8000", "new"),
        )
    )
    path = folder / "plan.toml"
    path.write_text(
        'name = "pods"\nseed = 1\nrestarts = 4\ntexts ='
        f' "{folder / "texts.txt"}"\n{arms}[[arm]]\nname = "slow"\nrole = "delayed"\nby ='
        f' "{by}"\n[level.unloaded]\ntuples = 32\nmargins = {{ inference = {{ p50 = 0.3 }}'
        f" }}\n[server]\n{server}\n"
    )
    return path


def test_every_restart_takes_servers_of_its_own(cluster: Any, tmp_path: Path) -> None:
    ports = cluster(9)  # eight of each arm are measured, one is spare
    assert len({port for of_arm in ports.values() for port in of_arm}) == 18
    code = main(["run", str(write_plan(tmp_path)), "--evidence", str(tmp_path / "evidence")])
    assert code in (1, 2, 3), "four restarts show no equivalence"
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    counted = [start for start in read_starts(folder) if not start.dropped]
    taken = [name for start in counted for name in start.instance.split()]
    assert len(taken) == len(set(taken)) == 4 * len(counted)
    for row in read_rows(folder):
        # The pods of the old model are the first nine.
        assert row["status"] == 200
        assert (int(row["instance"].removeprefix("pod-")) < 9) == (
            row["arm"] in ("old", "old-again", "slow")
        )
    models = json.loads((folder / "environment.json").read_text())["server"]["models"]
    assert {arm: model["digest"] for arm, model in models.items()} == {
        "old": "old",
        "old-again": "old",
        "new": "new",
        "new-again": "new",
    }
    assert main(["judge", str(folder)]) == code


def test_too_few_servers_are_named_before_anything_is_measured(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster(7)
    with pytest.raises(
        Unavailable,
        match=(
            r"Behind http://old.svc:8000 are 7 servers .*, and 8 are needed: .* Give it more"
            r" replicas, or the plan fewer restarts"
        ),
    ):
        main(["run", str(write_plan(tmp_path)), "--evidence", str(tmp_path / "evidence")])
    assert not (tmp_path / "evidence").exists()
    assert (
        "http://old.svc:8000: 7 of the 8 servers that are needed answer" in capsys.readouterr().out
    )


def test_an_unknown_host_stands_for_no_server(cluster: Any, tmp_path: Path) -> None:
    assert pod_instances.resolve_addresses("http://old.svc:8000") == []
    with pytest.raises(Unavailable, match="are 0 servers"):
        pod_instances.check_enough(read_plan(write_plan(tmp_path)))


def test_servers_that_counted_are_left_alone_and_those_tried_in_vain_come_last(
    cluster: Any, tmp_path: Path
) -> None:
    plan = read_plan(write_plan(tmp_path))
    cluster(4)
    everybody = {
        instance.id
        for instance in pod_instances.find_instances("http://old.svc:8000", plan.arms[0])
    }
    first = pod_instances.take_instances(plan, load_order(plan, 0), (), ())
    taken_first = {first[name].id for name in ("old", "old-again")}
    second = pod_instances.take_instances(
        plan, load_order(plan, 1), {instance.id for instance in first.values()}, ()
    )
    assert {second[name].id for name in ("old", "old-again")} == everybody - taken_first
    instead = pod_instances.take_instances(
        plan, load_order(plan, 0), (), {instance.id for instance in first.values()}
    )
    assert {instead[name].id for name in ("old", "old-again")} == everybody - taken_first


def test_servers_that_cannot_show_the_control_are_refused_at_the_start(
    cluster: Any, tmp_path: Path
) -> None:
    cluster(8, busy_wait="off")
    with pytest.raises(
        BadInput, match=r'start it with DRBERT_BUSY_WAIT=anywhere, or set by = "client"'
    ):
        pod_instances.take_instances(
            plan := read_plan(write_plan(tmp_path)), load_order(plan, 0), (), ()
        )
    plan = read_plan(write_plan(tmp_path, by="client"))
    assert len(pod_instances.take_instances(plan, load_order(plan, 0), (), ())) == 4


def test_the_service_reports_what_identifies_an_instance(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(artifact, "old", DRBERT_BUSY_WAIT="anywhere") as (url, _):
        plan = read_plan(write_plan(tmp_path, url=url))
        [instance] = pod_instances.find_instances(url, plan.arms[0])
        assert instance.address == url
        assert len(instance.id) == 32
        assert instance.info["settings"]["busy_wait"] == "anywhere"
        info = pod_instances.merge_info({"old": instance}, plan)
        assert info["models"]["old"]["digest"] == artifact.digest


@pytest.mark.parametrize(
    ("server", "url", "words"),
    [
        ('instances = "yes"', "http://a:1", "instances = 'yes' is neither true nor false"),
        ('instances = true\nrestart = "true"', "http://a:1", "leave one of them out"),
        ("instances = true", "https://a:1", "called by their addresses, which needs http"),
    ],
)
def test_a_plan_that_cannot_take_instances_is_refused(
    server: str, url: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=words):
        read_plan(write_plan(tmp_path, server=server, url=url))


def test_a_plan_with_instances_is_written_as_it_is_read(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path))
    (tmp_path / "again.toml").write_text(to_toml(plan, "Again."))
    again = read_plan(tmp_path / "again.toml")
    assert again.instances
    assert again.arms == plan.arms


def test_servers_that_want_a_key_are_distinguished_from_absent_ones(
    cluster: Any, artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("a-key\n")
    with serving(artifact, DRBERT_API_KEYS_FILE=str(tmp_path / "keys")) as (url, _):
        plan = read_plan(write_plan(tmp_path, url=url))
        with pytest.raises(
            BadInput, match=r"answers with 401: it wants a key\. Give arm old headers_env"
        ):
            pod_instances.check_enough(plan)
