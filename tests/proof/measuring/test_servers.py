"""Servers that a run starts itself."""

from __future__ import annotations

import dataclasses
import socket
import threading
from pathlib import Path

import pytest

from command import BadInput, Unavailable
from proof.measuring import servers
from proof.measuring.servers import check_computes, serve_arms
from tests.proof.factories import write_plan


def test_a_port_that_another_holds_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "PORT_FREE_WITHIN_S", 0)
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        pytest.raises(
            Unavailable,
            match=(
                r"Port \d+ of 127.0.0.1 cannot be had .*; choose another in the plan's \[server\]"
            ),
        ),
        serve_arms(
            dataclasses.replace(write_plan(tmp_path), port=held.getsockname()[1]),
            [0],
            tmp_path / "log",
        ),
    ):
        pass


def test_a_port_that_a_killed_server_is_about_to_let_go_of_is_waited_for() -> None:
    held = socket.create_server(("127.0.0.1", 0))
    port = held.getsockname()[1]
    threading.Timer(0.3, held.close).start()
    servers._check_port(port)
    assert held.fileno() == -1


def test_a_server_that_answers_from_a_cache_is_refused() -> None:
    check_computes({}, "http://other")  # a server of another project
    check_computes({"settings": {"cache_mib": None}}, "http://ours")
    with pytest.raises(BadInput, match="http://ours has a cache of answers"):
        check_computes({"settings": {"cache_mib": 64}}, "http://ours")
