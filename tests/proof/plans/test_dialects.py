"""Servers that are not ours: how they are asked, restarted and delayed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from command import BadInput
from proof.commands import main
from proof.measuring.launch import free_port
from proof.plans.answers import read_answer
from proof.plans.dialects import (
    DIALECTS,
    DialectName,
    ServerTiming,
    headers_from,
    parse_server_timing,
)
from proof.plans.plan_file import read_plan
from tests.proof.measuring.test_run import read_rows


@pytest.mark.parametrize(
    ("dialect", "path", "body"),
    [
        ("drbert", "/classify", {"model": "m", "input": "good"}),
        ("vllm", "/classify", {"model": "m", "input": "good"}),
        ("infinity", "/classify", {"model": "m", "input": ["good"]}),
        ("tei", "/predict", {"inputs": "good"}),
        ("hf", "/", {"inputs": "good"}),
        ("kserve-v1", "/v1/models/m:predict", {"instances": ["good"]}),
    ],
)
def test_a_dialect_has_its_servers_path_and_body(
    dialect: DialectName, path: str, body: dict[str, Any]
) -> None:
    assert DIALECTS[dialect].path.format(model="m") == path
    assert DIALECTS[dialect].body("m", "good") == body


def test_tokens_are_read_where_an_answer_reports_them() -> None:
    assert read_answer(b'{"usage": {"prompt_tokens": 7}}').tokens == 7
    assert read_answer(b'[{"label": "POSITIVE", "score": 0.9}]').tokens == 0
    assert read_answer(b"<html>").tokens == 0


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ServerTiming()),
        ("inference;dur=5.1", ServerTiming({"inference": 5.1})),
        (
            'inference;dur=5.1;desc="b=2 t=8", cpu;dur=9.5, batch;desc="17 first"',
            ServerTiming({"inference": 5.1, "cpu": 9.5}, 2, 16, batch_id=17, first_of_shape=1),
        ),
        (
            'inference;dur=5.1;desc="b=2 t=8", batch;desc="18"',
            ServerTiming({"inference": 5.1}, 2, 16, batch_id=18, first_of_shape=0),
        ),
        (
            'tokenize;dur=0.25, queue;dur=1, inference;dur=5.125;desc="b=8 t=128", total;dur=7',
            ServerTiming(
                {"tokenize": 0.25, "queue": 1.0, "inference": 5.125, "total": 7.0}, 8, 1024
            ),
        ),
    ],
)
def test_server_timing_is_read_in_milliseconds_and_tokens(
    header: str, expected: ServerTiming
) -> None:
    assert parse_server_timing(header) == expected


def test_secret_headers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "Authorization: Bearer abc\nX-Tenant: a:b\n")
    assert headers_from("KEYS") == {"Authorization": "Bearer abc", "X-Tenant": "a:b"}
    monkeypatch.setenv("KEYS", "no colon")
    with pytest.raises(BadInput, match="holds a line without a colon"):
        headers_from("KEYS")
    monkeypatch.setenv("KEYS", "X-Busy-Wait: 0.05")
    with pytest.raises(BadInput, match="sets X-Busy-Wait, which is the proof's own"):
        headers_from("KEYS")
    monkeypatch.delenv("KEYS")
    with pytest.raises(BadInput, match="the variable KEYS, which is not set"):
        headers_from("KEYS")


THEIRS = """
import http.server, json, os, sys
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1    # head and body in one packet
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Bearer abc"
        usage = {"prompt_tokens": len(asked["input"][0].split())}
        data = [[{"label": "POSITIVE", "score": 0.9}]]
        body = json.dumps({"data": data, "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
    def log_message(self, *_): pass
open("pid", "w").write(str(os.getpid()))
open("orders", "a").write(os.environ["LOAD_ORDER"] + "\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def test_a_swap_on_a_stack_of_ones_own_is_judged_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "texts.txt").write_text("good film\nbad\n")
    arms = "\n".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nurl = "http://127.0.0.1:{port}"\nmodel ='
        f' "{model}"\ndialect = "infinity"\nheaders_env = "KEYS"'
        for name, role, model in (
            ("a", "reference", "old"),
            ("a2", "reference", "old"),
            ("b", "candidate", "new"),
            ("b2", "candidate", "new"),
        )
    )
    restart = (
        f"cd {tmp_path} && (kill $(cat pid) 2>/dev/null; {sys.executable} theirs.py {port}"
        " </dev/null >/dev/null 2>&1 &) && sleep 0.5"
    )
    (tmp_path / "plan.toml").write_text(f"""
name = "theirs"
seed = 1
texts = "{tmp_path / "texts.txt"}"
restarts = 4
{arms}
[[arm]]
name = "slow"
role = "delayed"
by = "client"
[level.unloaded]
tuples = 32
margins = {{ end_to_end = {{ p50 = 0.3 }} }}
[server]
restart = "{restart}"
""")
    monkeypatch.setenv("KEYS", "Authorization: Bearer abc")
    try:
        code = main(["run", str(tmp_path / "plan.toml"), "--evidence", str(tmp_path / "evidence")])
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    rows = read_rows(folder)
    assert code in (0, 1, 2, 3)
    assert {row["status"] for row in rows} == {200}
    assert {row["tokens"] for row in rows} == {1, 2}
    # The client's own delay: 90 % of every answer's time, in a quarter of the tuples.
    slow = [row["done_ns"] - row["sent_ns"] for row in rows if row["arm"] == "slow"]
    plain = [row["done_ns"] - row["sent_ns"] for row in rows if row["arm"] == "a"]
    assert len(slow) * 4 <= len(plain)
    assert sorted(slow)[len(slow) // 2] > 1.3 * sorted(plain)[len(plain) // 2]
    orders = (tmp_path / "orders").read_text().split("\n")
    assert sorted(orders[0].split()) == ["a", "a2", "b", "b2"]
    assert len({row["instance"] for row in rows}) == len({row["restart"] for row in rows})


def test_inference_time_can_be_claimed_only_where_it_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    arms = ", ".join(
        f'{{ name = "{name}", role = "{role}", url = "http://127.0.0.1:1", dialect = "vllm" }}'
        for name, role in (
            ("a", "reference"),
            ("a2", "reference"),
            ("b", "candidate"),
            ("b2", "candidate"),
        )
    )
    text = f"""
name = "theirs"
seed = 1
texts = "t"
restarts = 8
arm = [{arms}, {{ name = "slow", role = "delayed", by = "BY" }}]
[level.unloaded]
tuples = 32
margins = {{ METRIC = {{ p50 = 0.1 }} }}
"""
    path.write_text(text.replace("BY", "client").replace("METRIC", "inference"))
    with pytest.raises(
        BadInput, match="claims inference time, which only the dialect drbert reports"
    ):
        read_plan(path)
    path.write_text(text.replace("BY", "server").replace("METRIC", "end_to_end"))
    with pytest.raises(
        BadInput, match='servers of another dialect cannot delay; set by = "client"'
    ):
        read_plan(path)
