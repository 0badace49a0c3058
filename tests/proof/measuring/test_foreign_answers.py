"""Servers of others that cheat: one that answers garbage, and one that keeps answers in a cache."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from proof.commands import main
from proof.measuring.launch import free_port

INVALID = 3
SERVER = """
import http.server, json, os, random, sys, time
seen = {}
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1    # head and body in one packet
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        score = 0.9
        MODE
        body = json.dumps([{"label": "A", "score": score}, {"label": "B", "score": 1 - score}])
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
        self.wfile.flush()
    def log_message(self, *_): pass
open("pid", "w").write(str(os.getpid()))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
MODES = {
    "honest": "time.sleep(0.006)",
    "garbage": "time.sleep(0.003); score = random.random()",
    "cache": "time.sleep(0.002 if text in seen else 0.02); seen[text] = score",
}


@pytest.mark.parametrize(
    ("mode", "fails"),
    [
        ("honest", None),
        ("garbage", "each model gives a text one answer"),
        ("cache", "no cache answers repeated texts"),
    ],
)
def test_a_server_that_cheats_is_invalid(tmp_path: Path, mode: str, fails: str | None) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(SERVER.replace("MODE", MODES[mode]))
    (tmp_path / "texts.txt").write_text("good film\nbad\n")
    arms = "\n".join(
        f'[[arm]]\nname = "{name}"\nrole = "{role}"\nurl = "http://127.0.0.1:{port}"\n'
        'dialect = "tei"'
        for name, role in (
            ("a", "reference"),
            ("a2", "reference"),
            ("b", "candidate"),
            ("b2", "candidate"),
        )
    )
    restart = (
        f"cd {tmp_path} && (kill $(cat pid) 2>/dev/null; {sys.executable} server.py {port}"
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
warm_up_tuples = 2
margins = {{ end_to_end = {{ p50 = 0.3 }} }}
[level.repeat]
texts = 8
repeats = 3
[server]
restart = "{restart}"
""")
    try:
        code = main(["run", str(tmp_path / "plan.toml"), "--evidence", str(tmp_path / "evidence")])
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    [folder] = [path for path in (tmp_path / "evidence").iterdir() if path.is_dir()]
    gates = json.loads((folder / "verdict.json").read_text())["levels"]["unloaded"]["gates"]
    failed = {gate["name"] for gate in gates if not gate["passed"]}
    cheating = {"each model gives a text one answer", "no cache answers repeated texts"}
    assert failed & cheating == ({fails} if fails else set())
    if fails:
        assert code == INVALID
    assert not (folder / "answers.json").exists()
    assert main(["judge", str(folder)]) == code
