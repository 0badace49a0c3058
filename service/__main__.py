"""
Serves artifacts over HTTP.

    python -m service artifacts/drbert
    python -m service bert=artifacts/bert drbert=artifacts/drbert --port 8000

Everything else is told by DRBERT_* variables (service/settings.py). Ends with 0 after SIGTERM,
SIGINT or SIGHUP.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before tokenizers is imported: its own threads would only fight the engine's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from command import BadUsage, Parser, finish
from service import server
from service.artifact import Task, read_artifact
from service.registry import Models
from service.settings import Settings, deprecated_variables, likely_misspelt, read_settings
from service.shadow import Pairing
from service.telemetry import logs

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it, and return the exit code."""
    try:
        return serve(arguments)
    finally:
        # Otherwise an error that ends the start can share a line with the log.
        logs.flush()


def serve(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m service", description="Serve exported classifiers over HTTP.")
    parser.add_argument(
        "artifacts",
        nargs="+",
        metavar="[NAME=]ARTIFACT",
        help="folders made by python -m export; the first is the default model",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--variant",
        default="auto",
        help="a variant of the artifacts, or auto: the fastest this host can run",
    )
    parser.add_argument(
        "--shadow",
        metavar="NAME",
        help="a model that answers a share of another one's texts too, for the counters only",
    )
    parser.add_argument("--of", metavar="NAME", help="the model it shadows (default: the first)")
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.1,
        help="the share of that model's requests, 0 to 1 (default: 0.1)",
    )
    given = parser.parse_args(arguments)
    if not 0 <= given.port <= 65535:
        raise BadUsage(f"--port {given.port} is no port; give 0 to 65535.")
    server.ignore_signals()
    settings = read_settings(given.host)
    logs.set_up(settings.log_level)
    warn_of_variables(settings, os.environ)
    artifacts = {name: read_artifact(path) for name, path in named(given.artifacts).items()}
    pairing = paired(
        given.shadow,
        given.of,
        given.fraction,
        {
            # The score of a single label is a number: as a label it would always agree.
            name: "regression" if len(artifact.manifest.labels) == 1 else artifact.manifest.task
            for name, artifact in artifacts.items()
        },
    )
    admin = (
        None
        if settings.admin_port is None
        else server.bind(settings.admin_host, settings.admin_port, "DRBERT_ADMIN_PORT")
    )
    server.run(
        Models(artifacts, settings, given.variant),
        server.bind(given.host, given.port),
        admin,
        pairing,
    )
    return 0


def warn_of_variables(settings: Settings, environment: Mapping[str, str]) -> None:
    """Log settings under former names, and variables that look like settings and are none.

    Values are not logged: they may be keys.
    """
    for former, current in deprecated_variables(environment):
        log.warning("a variable is deprecated", extra={"variable": former, "use": current})
    if "DRBERT_API_KEY" in environment and settings.api_keys_file is None:
        log.warning(
            "DRBERT_API_KEY is a variable of the client; this service asks for no key."
            " DRBERT_API_KEYS_FILE names a file of keys."
        )
    for name, setting in likely_misspelt(environment):
        log.warning(
            "a variable looks like a setting and is not read",
            extra={"variable": name, "setting": setting},
        )


def paired(
    shadow: str | None, of: str | None, fraction: float, tasks: Mapping[str, Task]
) -> Pairing | None:
    """What --shadow, --of and --fraction ask for, of models with these tasks; BadUsage if they make
    no sense together.
    """
    if shadow is None:
        if of is not None:
            raise BadUsage("--of names the model that --shadow stands behind; give that too.")
        return None
    of = next(iter(tasks)) if of is None else of
    for name in (shadow, of):
        if name not in tasks:
            raise BadUsage(f"No model is called {name!r}; there are {', '.join(tasks)}.")
        if tasks[name] == "regression":
            raise BadUsage(
                f"{name!r} answers with a number, and --shadow counts whether two models give the"
                " same label; name two classifiers."
            )
    if shadow == of:
        raise BadUsage(f"{shadow!r} cannot shadow itself; --shadow and --of name two models.")
    if not 0 < fraction <= 1:
        raise BadUsage(f"--fraction {fraction:g} is no share; give one above 0, at most 1.")
    return Pairing(shadow, of, fraction)


def named(arguments: Sequence[str]) -> dict[str, Path]:
    """Folders by model name; a name is given before '=' or is the folder's own."""
    models: dict[str, Path] = {}
    for argument in arguments:
        name, given, path = argument.partition("=")
        directory = Path(path if given else argument)
        name = name if given else directory.resolve().name
        # As UTF-8 whatever the locale: in C, letters of arguments and folders are bytes that no
        # answer could hold.
        name = os.fsencode(name).decode("utf-8", "replace")
        if not name:
            raise BadUsage(f"{argument!r} gives an empty model name; write NAME=ARTIFACT.")
        if name in models:
            raise BadUsage(
                f"Two models are called {name!r}; write NAME=ARTIFACT to tell them apart."
            )
        models[name] = directory
    return models


def run() -> None:
    """The console script drbert-serve."""
    finish(main)


if __name__ == "__main__":
    run()
