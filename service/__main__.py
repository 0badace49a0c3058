"""
Serves artifacts over HTTP.

    drbert-serve artifacts/drbert
    drbert-serve bert=artifacts/bert drbert=artifacts/drbert --port 8000

Environment variables DRBERT_* set everything else (service/settings.py). The exit code is 0 after
SIGTERM, SIGINT or SIGHUP.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before tokenizers is imported: its own threads would compete with the engine's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from command import BadUsage, Parser, finish
from service import server
from service.artifact import Task, read_artifact
from service.settings import Settings, deprecated_variables, likely_misspelt, read_settings
from service.shadow import Pairing
from service.state import ServiceState
from service.telemetry import logs

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Serve until a signal ends it, and return the exit code."""
    try:
        return serve(arguments)
    finally:
        # Otherwise an error message can share a line with the log.
        logs.flush()


def serve(arguments: Sequence[str]) -> int:
    """Parse the command line and serve."""
    options = parse_arguments(arguments)
    server.ignore_signals()
    settings = read_settings(options.host)
    logs.set_up(settings.log_level)
    warn_of_variables(settings, os.environ)
    folders = artifact_folders(options.artifacts)
    artifacts = {name: read_artifact(path) for name, path in folders.items()}
    tasks: dict[str, Task] = {}
    for name, artifact in artifacts.items():
        # The score of a single label is a number: as a label it would always agree.
        is_number = len(artifact.manifest.labels) == 1
        tasks[name] = "regression" if is_number else artifact.manifest.task
    pairing = shadow_pairing(options.shadow, options.shadow_of, options.fraction, tasks)
    admin = None
    if settings.admin_port is not None:
        admin = server.bind(settings.admin_host, settings.admin_port, "DRBERT_ADMIN_PORT")
    service = ServiceState(artifacts, settings, options.variant)
    server.run(service, server.bind(options.host, options.port), admin, pairing)
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; raises BadUsage."""
    parser = Parser(prog="drbert-serve", description="Serve exported classifiers over HTTP.")
    parser.add_argument(
        "artifacts",
        nargs="+",
        metavar="[NAME=]ARTIFACT",
        help="folders made by drbert-export; the first is the default model",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: 8000)")
    parser.add_argument(
        "--variant",
        default="auto",
        help="a variant of the artifacts, or auto: the fastest one that this host can run",
    )
    parser.add_argument(
        "--shadow",
        metavar="NAME",
        help="a model that computes a share of another model's texts too, for metrics only",
    )
    parser.add_argument(
        "--shadow-of", metavar="NAME", help="the model that it shadows (default: the first)"
    )
    parser.add_argument("--of", dest="shadow_of", help=argparse.SUPPRESS)
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.1,
        help="the share of that model's requests, 0 to 1 (default: 0.1)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise BadUsage(f"--port {options.port} is not a port; give 0 to 65535.")
    return options


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


def shadow_pairing(
    shadow: str | None, of: str | None, fraction: float, tasks: Mapping[str, Task]
) -> Pairing | None:
    """Return the pairing of --shadow, --shadow-of and --fraction; None without --shadow.

    `tasks` are the models' tasks by name. Raises BadUsage if the options do not go together.
    """
    if shadow is None:
        if of is not None:
            raise BadUsage("--shadow-of names the model that --shadow shadows; give --shadow too.")
        return None
    of = next(iter(tasks)) if of is None else of
    for name in (shadow, of):
        if name not in tasks:
            raise BadUsage(f"No model is called {name!r}; there are {', '.join(tasks)}.")
        if tasks[name] == "regression":
            raise BadUsage(
                f"{name!r} returns a number, and --shadow counts whether two models return the same"
                " label; name two classifiers."
            )
    if shadow == of:
        raise BadUsage(
            f"{shadow!r} cannot shadow itself; --shadow and --shadow-of name two models."
        )
    if not 0 < fraction <= 1:
        raise BadUsage(f"--fraction {fraction:g} is not a share; give a number above 0, at most 1.")
    return Pairing(shadow, of, fraction)


def artifact_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Return the folders by model name: the text before `=`, or the folder's own name."""
    models: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        directory = Path(path if equals else argument)
        name = name if equals else directory.resolve().name
        # UTF-8 whatever the locale: in the locale C, non-ASCII letters are bytes that no answer
        # could hold.
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
    """Run the console script drbert-serve."""
    finish(main)


if __name__ == "__main__":
    run()
