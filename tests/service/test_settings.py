"""The variables that the service reads, and those that it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from command import BadUsage
from service.settings import (
    Settings,
    check_variables,
    deprecated_variables,
    likely_misspelt,
    read_settings,
    variable_names,
)
from tests.service.test_server import start

SERVICE_LINKS = {
    "DRBERT_SERVICE_HOST": "10.0.0.1",
    "DRBERT_SERVICE_PORT": "8000",
    "DRBERT_SERVICE_PORT_HTTP": "8000",
    "DRBERT_PORT": "tcp://10.0.0.1:8000",
    "DRBERT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "DRBERT_PORT_8000_TCP_PROTO": "tcp",
    "DRBERT_PORT_8000_TCP_PORT": "8000",
    "DRBERT_PORT_8000_TCP_ADDR": "10.0.0.1",
    "DRBERT_SERVE_SERVICE_HOST": "10.0.0.2",
    "DRBERT_SERVE_SERVICE_PORT": "8000",
    "DRBERT_SERVE_PORT": "udp://10.0.0.2:8000",
    "DRBERT_SERVE_PORT_53_UDP_ADDR": "10.0.0.2",
    "DRBERT_2_SHOP_PORT_8000_TCP": "tcp://10.0.0.3:8000",
}


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("DRBERT_API_KEY_FILE", "DRBERT_API_KEYS_FILE"),
        ("DRBERT_APIKEYS", "DRBERT_API_KEYS_FILE"),
        ("DRBERT_APIKEYS_FILE", "DRBERT_API_KEYS_FILE"),
        ("DRBERT_API_KEYS", "DRBERT_API_KEYS_FILE"),
        ("DRBERT__API_KEYS_FILE", "DRBERT_API_KEYS_FILE"),
        ("DRBERT_KEYS_FILE", "DRBERT_API_KEYS_FILE"),
        ("drbert_api_key_file", "DRBERT_API_KEYS_FILE"),
        ("DRBERT_MAX_QUEUE_SIZ", "DRBERT_MAX_QUEUE_SIZE"),
        ("DRBERT_MAX_WAITNG", "DRBERT_MAX_QUEUE_SIZE"),
        ("DRBERT_ADMN_PORT", "DRBERT_ADMIN_PORT"),
        ("DRBERT_TLS_CERT", "DRBERT_TLS_CERTIFICATE"),
        ("DRBERT_THREAD", "DRBERT_THREADS"),
        ("DRBERT_LOGLEVEL", "DRBERT_LOG_LEVEL"),
    ],
)
def test_a_misspelt_variable_is_refused_and_the_nearest_setting_named(
    variable: str, nearest: str
) -> None:
    with pytest.raises(
        BadUsage, match=f"^{variable} is no setting of this service; did you mean {nearest}\\?$"
    ):
        check_variables({variable: "8001"})


@pytest.mark.parametrize("variable", ["DRBERT_", "DRBERT_COLOUR_OF_THE_PAGE", "DRBERT_XYZ"])
def test_a_variable_like_no_setting_is_refused_too(variable: str) -> None:
    with pytest.raises(BadUsage, match=f"{variable} is no setting of this service"):
        check_variables({variable: "1"})


def test_settings_in_any_case_the_clients_key_and_service_links_are_accepted() -> None:
    check_variables(
        dict.fromkeys(variable_names(), "")
        | {name.lower(): "" for name in variable_names()}
        | {"DRBERT_API_KEY": "k", "PATH": "/bin"}
    )
    check_variables(SERVICE_LINKS)
    assert len(list(variable_names())) >= len(Settings.model_fields)


def test_a_kubernetes_service_whose_link_is_a_setting_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DRBERT_ADMIN_PORT", "tcp://10.0.0.1:8001")
    with pytest.raises(
        BadUsage,
        match=(
            r"DRBERT_ADMIN_PORT: .* a Service called drbert-admin: set enableServiceLinks to false"
        ),
    ):
        read_settings()


def test_a_misspelt_prefix_is_reported() -> None:
    assert likely_misspelt(
        {"DBERT_API_KEYS_FILE": "", "drbertapi_keys_file": "", "BERT_HOME": "", "PATH": ""}
    ) == [
        ("DBERT_API_KEYS_FILE", "DRBERT_API_KEYS_FILE"),
        ("drbertapi_keys_file", "DRBERT_API_KEYS_FILE"),
    ]


def test_a_server_with_a_misspelt_variable_does_not_start() -> None:
    process = start("nowhere", DRBERT_API_KEY_FILE="/keys")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 64
    assert (
        output == "drbert-serve: DRBERT_API_KEY_FILE is no setting of this service; did you mean"
        " DRBERT_API_KEYS_FILE?\n"
    )


def test_a_key_in_the_clients_variable_is_reported_and_not_logged() -> None:
    output = start("nowhere", DRBERT_API_KEY="zanzibar").communicate(timeout=60)[0]
    assert "this service asks for no key" in output
    assert "zanzibar" not in output


@pytest.mark.parametrize(
    ("former", "current", "value"),
    [
        ("max_waiting", "max_queue_size", 1500),
        ("max_bodies_bytes", "max_inflight_body_bytes", 8_000_000),
        ("stall_after_s", "engine_stall_timeout_s", 2.5),
        ("gpu_table", "gpu_shapes_file", Path("h100.json")),
    ],
)
def test_a_renamed_setting_is_read_under_its_former_name_too(
    former: str, current: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DRBERT_{former.upper()}", str(value))
    settings = read_settings()
    assert getattr(settings, current) == value
    shown = settings.to_dict()
    assert shown[former] == shown[current] == (str(value) if isinstance(value, Path) else value)
    assert deprecated_variables(os.environ) == [
        (f"DRBERT_{former.upper()}", f"DRBERT_{current.upper()}")
    ]


def test_a_former_name_counts_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("drbert_max_waiting", "1500")
    assert read_settings().max_queue_size == 1500


def test_a_value_that_makes_no_sense_is_reported_under_the_name_that_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DRBERT_MAX_WAITING", "many")
    with pytest.raises(BadUsage, match=r"^DRBERT_MAX_WAITING: .* \(it is 'many'\)\.$"):
        read_settings()


def test_a_setting_under_both_of_its_names_does_not_start() -> None:
    process = start("nowhere", DRBERT_MAX_WAITING="8", DRBERT_MAX_QUEUE_SIZE="8")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 64
    assert (
        output
        == "drbert-serve: DRBERT_MAX_WAITING is the former name of DRBERT_MAX_QUEUE_SIZE, and both"
        " are set; remove DRBERT_MAX_WAITING.\n"
    )


def test_a_start_with_a_former_name_logs_the_new_one() -> None:
    output = start("nowhere", DRBERT_STALL_AFTER_S="5").communicate(timeout=60)[0]
    [line] = [line for line in output.splitlines() if "deprecated" in line]
    fields = json.loads(line)
    assert fields["level"] == "warning"
    assert fields["variable"] == "DRBERT_STALL_AFTER_S"
    assert fields["use"] == "DRBERT_ENGINE_STALL_TIMEOUT_S"
