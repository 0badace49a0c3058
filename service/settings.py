"""
The service's settings, read once at start from DRBERT_* environment variables.

Artifacts, host and port are arguments of the command instead.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from command import BadUsage

PREFIX = "DRBERT_"
FORMER_NAMES = {
    "max_waiting": "max_queue_size",
    "max_bodies_bytes": "max_inflight_body_bytes",
    "stall_after_s": "engine_stall_timeout_s",
    "gpu_table": "gpu_shapes_file",
}
"""Former name of each renamed setting, and its name now. Both are read and shown in /info."""
CLIENT_VARIABLES = {"DRBERT_API_KEY"}
"""Variables of `drbert-classify`, which the service ignores."""
# Kubernetes sets these in every container for a Service called drbert or drbert-NAME, unless
# enableServiceLinks is false.
SERVICE_LINK = re.compile(
    r"DRBERT_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
SERVICE_LINK_PORT = re.compile(r"DRBERT_([A-Z0-9_]+_)?PORT")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
LIKELY = 0.6
"""Similarity of two names, 0 to 1, from which one is taken for the other misspelt."""


class Settings(BaseSettings):
    """The settings of one server. They do not change while it runs."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    runtime: Literal["auto", "openvino", "onnxruntime", "cuda", "tensorrt"] = "auto"
    """The engine. An engine that is named is used, or the start fails; `auto` chooses one."""
    measure_engines: bool = True
    """Whether `auto` runs a few batches by OpenVINO and by ONNX Runtime, where both can run a
    model, and takes the faster one. It is done at a model's first load, and kept in the user's
    cache folder. Without it `auto` takes OpenVINO.
    """
    classify_dialect: Literal["native", "infinity", "semantic-router", "ort-server"] = "native"
    """The dialect of POST /classify: `native`, a superset of vLLM's, or that of Infinity, of vLLM
    semantic-router's `http_classify`, or of ort-server. POST /v1/classify is always native; the
    other dialects have paths of their own.
    """
    root_dialect: Literal["huggingface", "tei"] = "huggingface"
    """The dialect of POST /: Hugging Face's, or Text Embeddings Inference's."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads of the engine; by default the CPUs that quota and affinity allow."""
    gpu_memory_mib: int | None = Field(default=None, ge=1)
    """Upper limit of the GPU memory of one model; by default what it needs."""
    gpu_shapes_file: Path | None = None
    """The grid of shapes that `python -m benchmarks gpu --calibrate` measured on this kind of GPU;
    by default a grid that suits most GPUs.
    """
    gpu_graphs: bool = True
    """Whether every shape is captured as a CUDA graph. Without graphs kernels are started one by
    one, which slows short texts down.
    """
    gpu_cache: Path | None = None
    """Folder of the engines that TensorRT built; by default in the user's cache folder."""
    artifact_cache: Path | None = None
    """Folder of the artifacts that the service made of checkpoints; by default in the user's cache
    folder. Artifacts that are not needed any more can be deleted.
    """
    cache_mib: int | None = Field(default=None, ge=1)
    """MiB of memory for answers, by which a text that was answered before is answered again, and
    equal texts at the same time are computed once; by default every text is computed.
    """
    max_batch_size: int | None = Field(default=None, ge=1, le=128)
    """Texts in a batch; by default 16 on a CPU, 32 on a CPU with packing, and 128 on a GPU. The
    default is also the largest value in effect.
    """
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in a batch, padding included; by default 4,096 on a CPU and 16,384 on a GPU."""
    max_queue_size: int = Field(default=2048, ge=1)
    """Texts that may wait in the queue; one more is refused with 429."""
    max_queue_s: float | None = Field(default=None, gt=0)
    """Seconds that the engine needs at the measured rate for all waiting texts; a request beyond it
    is refused with 429. By default each request's own time limit.
    """
    max_texts: int = Field(default=1000, ge=1)
    """Texts in a request; more are refused with 413."""
    max_text_chars: int = Field(default=131_072, ge=1)
    """Characters in a text or in each half of a pair; more are refused with 413."""
    max_windows: int = Field(default=64, ge=1)
    """Windows of a long text, where a request asks for windows; more are refused with 413."""
    max_request_tokens: int | None = Field(default=None, ge=1)
    """Tokens of all texts of a request together, after truncation; more are refused with 413. By
    default only the other limits apply.
    """
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1)
    """Bytes in a request's body; more are refused with 413."""
    max_inflight_body_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Bytes of all request bodies together, from when they are read until they are answered; one
    more is refused with 429.
    """
    request_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds after which a waiting text is answered with 504 and never reaches the model. A
    request may ask for less by X-Request-Timeout-Ms.
    """
    saturated_after_s: float | None = Field(default=None, gt=0)
    """Seconds of a full queue after which the service is not ready. Off by default: on all replicas
    at once it would leave the Kubernetes Service without endpoints.
    """
    engine_stall_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds of one batch after which the service is not ready; after twice as long the process
    ends with exit code 70, for a supervisor to start it again.
    """
    drain_timeout_s: float = Field(default=20.0, gt=0)
    """Seconds that accepted requests have to finish after SIGTERM, lame-duck time included."""
    lame_duck_s: float = Field(default=5.0, ge=0)
    """Seconds after SIGTERM in which requests are still answered, each with Connection: close,
    while /readyz answers 503; at most half of the drain. It ends early once no client is connected.
    """
    max_connection_age_s: float = Field(default=0.0, ge=0)
    """Seconds after which a kept connection is closed with its next answer, longer or shorter by up
    to a tenth, so that clients spread over new replicas; 0 keeps it.
    """
    max_connection_requests: int = Field(default=0, ge=0)
    """Requests after which a kept connection is closed, more or less by up to a tenth; 0 keeps it.
    """
    write_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds that a client may read nothing of its answer before its connection is aborted."""
    warm_up_s: float = Field(default=1.0, ge=0)
    """Upper limit of the seconds that a model is warmed up before the service is ready."""
    warm_up_max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of the longest text whose batch shapes are warmed up. By default what the model reads.
    """
    busy_wait: Literal["off", "loopback", "anywhere"] = "off"
    """Whether a request's X-Busy-Wait header may slow its batch down: the positive control of a
    latency proof. `loopback` refuses to start on an address that others can reach; `anywhere` is
    for a proof in a cluster, and lets callers waste your processor.
    """
    api_keys_file: Path | None = None
    """A file of keys, one a line; a request without one of them is answered with 401. The file is
    read again when it changes.
    """
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """The admin port, on which models are loaded, replaced and unloaded; by default there is none.
    """
    admin_host: str = "127.0.0.1"
    """The address that the admin port listens on. An address that others can reach requires
    DRBERT_ADMIN_KEYS_FILE.
    """
    admin_keys_file: Path | None = None
    """A file of keys for the admin port, one a line, in the form of DRBERT_API_KEYS_FILE."""
    admin_load_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds after which loading a model on the admin port is given up. TensorRT builds engines
    for minutes.
    """
    metrics: Literal["service", "admin"] = "service"
    """The port on which /metrics is answered."""
    tls_certificate: Path | None = None
    """The certificate and its chain, in PEM form; requires DRBERT_TLS_KEY."""
    tls_key: Path | None = None
    """The certificate's private key, in PEM form. With both, both ports serve https."""
    root_path: str = Field(default="", pattern=r"^(/[A-Za-z0-9._~-]+)*$")
    """The path under which a proxy offers the service, as /nlp; /openapi.json then names it, and
    requests are accepted with and without it. A proxy that removes the path may send it in
    X-Forwarded-Prefix instead.
    """
    cors_origins: str = ""
    """Origins whose pages may call the service from a browser, separated by commas; none by
    default.
    """
    tracing: bool = False
    """Whether each classification is an OpenTelemetry span; OTEL_* variables name the receiver."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The lowest severity that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """One line of JSON for each event, or text for people; `auto` is text if the log is a terminal.
    """
    access_log: bool = False
    """Whether each request is logged, with its id, status, duration, model and tokens, and never
    with its text.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, those of FORMER_NAMES under both of their names.

        GET /info answers this. Its callers rely on the old keys, so these stay.
        """
        values = self.model_dump(mode="json")
        return values | {former: values[current] for former, current in FORMER_NAMES.items()}


def read_settings(host: str = "127.0.0.1") -> Settings:
    """Return the settings of the environment for a server on `host`.

    Raises BadUsage, which names the variable, for an unknown name, a value out of range, or values
    that contradict each other.
    """
    check_variables(os.environ)
    former = _former_values(os.environ)
    try:
        settings = Settings(**former)
    except ValidationError as error:
        first = error.errors()[0]
        field = "_".join(str(part) for part in first["loc"])
        name = _as_set(field.lower().removeprefix(PREFIX.lower()), former)
        raise BadUsage(
            f"{name}: {first['msg']} (it is"
            f" {first['input']!r}).{_service_link_remedy(name, first['input'])}"
        ) from None
    _check_limits(settings, former)
    _check_exposure(settings, host)
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise BadUsage(
            "DRBERT_TLS_CERTIFICATE and DRBERT_TLS_KEY go together; one of them is not set."
        )
    return settings


def _check_limits(settings: Settings, former: Mapping[str, str]) -> None:
    """Raise BadUsage for a limit of one request that is above the limit of all requests."""
    if settings.max_texts > settings.max_queue_size:
        raise BadUsage(
            f"DRBERT_MAX_TEXTS ({settings.max_texts}) is above"
            f" {_as_set('max_queue_size', former)} ({settings.max_queue_size}): a request of that"
            " many texts could never be admitted."
        )
    if settings.max_body_bytes > settings.max_inflight_body_bytes:
        raise BadUsage(
            f"DRBERT_MAX_BODY_BYTES ({settings.max_body_bytes}) is above"
            f" {_as_set('max_inflight_body_bytes', former)} ({settings.max_inflight_body_bytes}): a"
            " body of that many bytes could never be admitted."
        )


def _check_exposure(settings: Settings, host: str) -> None:
    """Raise BadUsage for what only this host may reach on an address that others can reach."""
    if settings.busy_wait == "loopback" and not _is_loopback(host):
        raise BadUsage(
            f"DRBERT_BUSY_WAIT=loopback and --host {host} do not go together: others could slow"
            " this server down. Serve on 127.0.0.1, turn it off, or set DRBERT_BUSY_WAIT=anywhere."
        )
    if (
        settings.admin_keys_file is None
        and settings.admin_port is not None
        and not _is_loopback(settings.admin_host)
    ):
        raise BadUsage(
            f"DRBERT_ADMIN_HOST={settings.admin_host} lets others load models; set"
            " DRBERT_ADMIN_KEYS_FILE, or listen on 127.0.0.1."
        )
    if settings.metrics == "admin" and settings.admin_port is None:
        raise BadUsage("DRBERT_METRICS=admin needs DRBERT_ADMIN_PORT.")


def check_variables(environment: Mapping[str, str]) -> None:
    """Raise BadUsage for a DRBERT_* variable that is no setting, and for one under two names.

    A misspelt variable would otherwise be ignored, and the service would run without keys. Names
    count in any case, as they do where the settings are read.
    """
    known = {*variable_names(), *_former_variables()}
    for variable, value in environment.items():
        name = variable.upper()
        if (
            not name.startswith(PREFIX)
            or name in known
            or name in CLIENT_VARIABLES
            or _is_service_link(name, value)
        ):
            continue
        nearest = _nearest(name, known)
        remedy = (
            f"did you mean {nearest}?"
            if nearest
            else "remove it. docs/configuration.md lists all settings."
        )
        raise BadUsage(f"{variable} is no setting of this service; {remedy}")
    names = {variable.upper() for variable in environment}
    for former, current in deprecated_variables(environment):
        if current in names:
            raise BadUsage(
                f"{former} is the former name of {current}, and both are set; remove {former}."
            )


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the variable that `name` probably means, under its name now; None if none is close."""
    short = name.removeprefix(PREFIX)
    settings = sorted(setting.removeprefix(PREFIX) for setting in known)
    if len(short) > 2 and (
        longer := [setting for setting in settings if setting.startswith(short)]
    ):
        return _current(PREFIX + min(longer))
    close = difflib.get_close_matches(short, settings, 1, cutoff=LIKELY)
    return _current(PREFIX + close[0]) if close else None


def likely_misspelt(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return variables without our prefix that look like settings, each with the setting's
    variable.

    They may belong to another program, so they are no error.
    """
    known = [*variable_names(), *_former_variables()]
    pairs = []
    for variable in environment:
        name = variable.upper()
        if "BERT" in name and not name.startswith(PREFIX):
            close = difflib.get_close_matches(name, known, 1, cutoff=0.9)
            pairs += [(variable, _current(setting)) for setting in close]
    return pairs


def deprecated_variables(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the variables that are set under a former name, each with its name now."""
    return [
        (name, _current(name))
        for name in map(str.upper, environment)
        if name in _former_variables()
    ]


def variable_names() -> list[str]:
    """Return the variable of every setting, in capitals and without former names."""
    return [PREFIX + name.upper() for name in Settings.model_fields]


def _former_variables() -> dict[str, str]:
    """Return the variables of FORMER_NAMES, each with its name now."""
    return {
        PREFIX + former.upper(): PREFIX + current.upper()
        for former, current in FORMER_NAMES.items()
    }


def _current(variable: str) -> str:
    return _former_variables().get(variable, variable)


def _former_values(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the values that are set under former names, by the settings' names now."""
    values = {}
    for variable, value in environment.items():
        field = FORMER_NAMES.get(variable.lower().removeprefix(PREFIX.lower()))
        if field is not None and variable.upper().startswith(PREFIX):
            values[field] = value
    return values


def _as_set(field: str, former: Mapping[str, str]) -> str:
    """Return the variable of a setting, under its former name if that is how it was set."""
    if field in former:
        field = next(name for name, current in FORMER_NAMES.items() if current == field)
    return PREFIX + field.upper()


def _is_service_link(name: str, value: str) -> bool:
    # DRBERT_PORT and DRBERT_SHOP_PORT differ from a misspelt DRBERT_ADMIN_PORT by their value.
    return bool(
        SERVICE_LINK.fullmatch(name)
        or (SERVICE_LINK_PORT.fullmatch(name) and SERVICE_ADDRESS.match(value))
    )


def _service_link_remedy(name: str, value: object) -> str:
    """Return the remedy where the name of a Kubernetes Service makes its variable one of ours.

    A Service called drbert-admin sets DRBERT_ADMIN_PORT.
    """
    if not (
        SERVICE_LINK_PORT.fullmatch(name)
        and isinstance(value, str)
        and SERVICE_ADDRESS.match(value)
    ):
        return ""
    service = name.removesuffix("_PORT").lower().replace("_", "-")
    return (
        f" Kubernetes sets it for a Service called {service}: set enableServiceLinks to false in"
        " the pod, or rename that Service."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
