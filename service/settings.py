"""
Everything the service can be told beside its models, host and port.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from command import BadUsage

PREFIX = "DRBERT_"
# Not the service's: `drbert-classify` reads its key from it.
CLIENT_VARIABLES = {"DRBERT_API_KEY"}
# What Kubernetes sets in every container for a Service called drbert or drbert-NAME, unless
# enableServiceLinks is false.
SERVICE_LINK = re.compile(
    r"DRBERT_([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
SERVICE_LINK_PORT = re.compile(r"DRBERT_([A-Z0-9_]+_)?PORT")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
# Similarity of two names, 0 to 1, from which one is taken for the other misspelt.
LIKELY = 0.6


class Settings(BaseSettings):
    """Read once, at start, from DRBERT_* variables, and passed on."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    runtime: Literal["auto", "openvino", "onnxruntime", "cuda", "tensorrt"] = "auto"
    """The engine; what is asked for by name is in use or the start fails."""
    classify_dialect: Literal["native", "infinity"] = "native"
    """In whose shape POST /classify is answered: our own, a superset of vLLM's, or Infinity's. POST
    /v1/classify is always ours; the other dialects have paths of their own.
    """
    root_dialect: Literal["huggingface", "tei"] = "huggingface"
    """In whose shape POST / is answered: Hugging Face's, or Text Embeddings Inference's."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads for the engine; by default what quota and affinity leave."""
    gpu_memory_mib: int | None = Field(default=None, ge=1)
    """The most that a model may take of the GPU's memory; by default what it needs."""
    gpu_table: Path | None = None
    """What `python -m benchmarks gpu --calibrate` measured on this kind of GPU; by default a grid
    of shapes that suits most.
    """
    gpu_graphs: bool = True
    """Whether every shape is captured as a CUDA graph; without, kernels are started one by one,
    which short texts feel.
    """
    gpu_cache: Path | None = None
    """Where TensorRT keeps the engines that it built; by default under the user's cache folder."""
    max_batch_size: int | None = Field(default=None, ge=1, le=128)
    """Texts a batch may hold; by default 16 on a CPU, or 32 where they share rows, and 128 on a
    GPU, and never more than that.
    """
    max_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens a batch may hold, padding counted; by default 4,096 on a CPU and 16,384 on a GPU."""
    max_waiting: int = Field(default=2048, ge=1)
    """Texts that may wait; one more is refused with 429."""
    max_queue_s: float | None = Field(default=None, gt=0)
    """Seconds within which all that waits is to be answered, by the measured rate; more is refused
    with 429. By default each request's own time limit.
    """
    max_texts: int = Field(default=1000, ge=1)
    """Texts a request may hold; more are refused with 413."""
    max_text_chars: int = Field(default=131_072, ge=1)
    """Characters a text (or a pair's half) may hold; more are refused with 413."""
    max_windows: int = Field(default=64, ge=1)
    """Windows a long text may take where a request asks for them; more are refused with 413."""
    max_request_tokens: int | None = Field(default=None, ge=1)
    """Tokens that all texts of a request may take together, as the model reads them; more are
    refused with 413. By default only the other limits hold.
    """
    max_body_bytes: int = Field(default=4 * 1024 * 1024, ge=1)
    """Bytes a request's body may hold; more are refused with 413."""
    max_bodies_bytes: int = Field(default=256 * 1024 * 1024, ge=1)
    """Bytes that the bodies of all requests may hold together while they are read and answered; one
    more is refused with 429.
    """
    request_timeout_s: float = Field(default=30.0, gt=0)
    """A text that waited longer is answered with 504 and never reaches the model. A request may ask
    for less by X-Request-Timeout-Ms.
    """
    saturated_after_s: float | None = Field(default=None, gt=0)
    """Not ready once the queue has been full for so long. Off by default: on all replicas at once
    it would empty the Service.
    """
    stall_after_s: float = Field(default=60.0, gt=0)
    """A batch that takes longer makes the service not ready; one that takes twice as long ends it
    with 70, for a supervisor to start it again.
    """
    drain_timeout_s: float = Field(default=20.0, gt=0)
    """How long accepted requests may take to finish after SIGTERM, the lame-duck time included."""
    lame_duck_s: float = Field(default=5.0, ge=0)
    """How long requests are still answered after SIGTERM, each with Connection: close, while
    /readyz says 503; at most half of the drain. It ends early once no client is connected.
    """
    write_timeout_s: float = Field(default=30.0, gt=0)
    """How long a client may read nothing of its answer before its connection is aborted."""
    warm_up_s: float = Field(default=1.0, ge=0)
    """The longest time a model is warmed up before the service is ready."""
    busy_wait: Literal["off", "loopback", "anywhere"] = "off"
    """Whether a request's X-Busy-Wait header may slow its batch down: the control of a latency
    proof. `loopback` refuses to start on an address that others can reach; `anywhere` is for a
    proof in a cluster, and lets callers waste your processor.
    """
    api_keys_file: Path | None = None
    """A file of keys, one a line; who sends none of them is answered with 401. Read again when it
    changes.
    """
    admin_port: int | None = Field(default=None, ge=0, le=65535)
    """A second port on which models are loaded, reloaded and unloaded; by default there is none."""
    admin_host: str = "127.0.0.1"
    """Where the second port listens. On an address that others can reach it takes
    DRBERT_ADMIN_KEYS_FILE too.
    """
    admin_keys_file: Path | None = None
    """A file of keys for the second port, one a line, in the form of DRBERT_API_KEYS_FILE."""
    admin_load_timeout_s: float = Field(default=600.0, gt=0)
    """How long a model may take to load on the second port; then it is given up. TensorRT builds
    engines for minutes.
    """
    metrics: Literal["service", "admin"] = "service"
    """On which port /metrics is answered."""
    tls_certificate: Path | None = None
    """The certificate and those that vouch for it, in PEM form; takes DRBERT_TLS_KEY too."""
    tls_key: Path | None = None
    """The certificate's private key, in PEM form. With both, requests come by https, to the second
    port too.
    """
    cors_origins: str = ""
    """Origins whose pages may call the service from a browser, commas in between; none by default.
    """
    tracing: bool = False
    """Whether each classification is a span for OpenTelemetry; where it is sent is told by OTEL_*
    variables.
    """
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least severe lines that are logged."""


def read_settings(host: str = "127.0.0.1") -> Settings:
    """The settings of the environment for a server on `host`; BadUsage names the variable that
    makes no sense.
    """
    check_variables(os.environ)
    try:
        settings = Settings()
        if settings.max_texts > settings.max_waiting:
            raise BadUsage(
                f"DRBERT_MAX_TEXTS ({settings.max_texts}) is above DRBERT_MAX_WAITING"
                f" ({settings.max_waiting}): a request of that many texts could never be admitted."
            )
        if settings.max_body_bytes > settings.max_bodies_bytes:
            raise BadUsage(
                f"DRBERT_MAX_BODY_BYTES ({settings.max_body_bytes}) is above"
                f" DRBERT_MAX_BODIES_BYTES ({settings.max_bodies_bytes}): a body of that many bytes"
                " could never be admitted."
            )
        if settings.busy_wait == "loopback" and not _is_loopback(host):
            raise BadUsage(
                f"DRBERT_BUSY_WAIT=loopback and --host {host} do not go together: others could slow"
                " this server down. Serve on 127.0.0.1, turn it off, or say"
                " DRBERT_BUSY_WAIT=anywhere."
            )
        if (
            settings.admin_keys_file is None
            and settings.admin_port is not None
            and not _is_loopback(settings.admin_host)
        ):
            raise BadUsage(
                f"DRBERT_ADMIN_HOST={settings.admin_host} lets others load models; give"
                " DRBERT_ADMIN_KEYS_FILE, or serve them on 127.0.0.1."
            )
        if settings.metrics == "admin" and settings.admin_port is None:
            raise BadUsage("DRBERT_METRICS=admin needs DRBERT_ADMIN_PORT.")
        if (settings.tls_certificate is None) != (settings.tls_key is None):
            raise BadUsage(
                "DRBERT_TLS_CERTIFICATE and DRBERT_TLS_KEY go together; one of them is not set."
            )
        return settings
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(str(part) for part in first["loc"]).upper()
        name = name if name.startswith(PREFIX) else PREFIX + name
        raise BadUsage(
            f"{name}: {first['msg']} (it is"
            f" {first['input']!r}).{_service_link_remedy(name, first['input'])}"
        ) from None


def check_variables(environment: Mapping[str, str]) -> None:
    """Raise BadUsage for a DRBERT_* variable that is no setting: a misspelt one would be ignored,
    and the service run without keys.

    Names count in any case, as they do where the settings are read.
    """
    known = set(variable_names())
    for variable, value in environment.items():
        name = variable.upper()
        if (
            not name.startswith(PREFIX)
            or name in known
            or name in CLIENT_VARIABLES
            or _is_service_link(name, value)
        ):
            continue
        nearest = _nearest(
            name.removeprefix(PREFIX), [setting.removeprefix(PREFIX) for setting in known]
        )
        remedy = (
            f"did you mean {PREFIX}{nearest}?"
            if nearest
            else "docs/operations.md lists those that there are; remove it."
        )
        raise BadUsage(f"{variable} is no setting of this service; {remedy}")


def _nearest(name: str, settings: list[str]) -> str | None:
    begun = [setting for setting in settings if len(name) > 2 and setting.startswith(name)]
    return (
        min(begun)
        if begun
        else next(iter(difflib.get_close_matches(name, settings, 1, cutoff=LIKELY)), None)
    )


def likely_misspelt(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Variables without our prefix that look like settings, each with the setting. They may be
    another program's, so they are no error.
    """
    known = list(variable_names())
    names = [
        name
        for name in environment
        if "BERT" in name.upper() and not name.upper().startswith(PREFIX)
    ]
    pairs = [
        (name, difflib.get_close_matches(name.upper(), known, 1, cutoff=0.9)) for name in names
    ]
    return [(name, nearest[0]) for name, nearest in pairs if nearest]


def variable_names() -> Iterator[str]:
    """Every variable that sets something, in capitals."""
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        if alias is None:
            yield PREFIX + name.upper()
        else:
            names = alias.choices if isinstance(alias, AliasChoices) else [alias]
            yield from (choice.upper() for choice in names if isinstance(choice, str))


def _is_service_link(name: str, value: str) -> bool:
    # A port's value tells DRBERT_PORT and DRBERT_SHOP_PORT from a misspelt DRBERT_ADMIN_PORT.
    return bool(
        SERVICE_LINK.fullmatch(name)
        or (SERVICE_LINK_PORT.fullmatch(name) and SERVICE_ADDRESS.match(value))
    )


def _service_link_remedy(name: str, value: object) -> str:
    """What to do where a Service of an unlucky name sets a variable of ours, as one called
    drbert-admin sets DRBERT_ADMIN_PORT.
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
