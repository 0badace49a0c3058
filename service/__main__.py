"""
Serves classifiers over HTTP.

    drbert-serve my-checkpoint
    drbert-serve bert=artifacts/bert drbert=artifacts/drbert --port 8000

A checkpoint is exported first (service/checkpoints). Environment variables DRBERT_* set everything
else (service/settings.py). The exit code is 0 after SIGTERM, SIGINT or SIGHUP; during an export it
is 143, 130 or 129.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

# Before tokenizers is imported: its own threads would compete with the engine's.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from command import BadUsage, Parser, finish
from service import server
from service.artifact import Task, TextTask
from service.checkpoints.cache import CheckpointCache
from service.checkpoints.exporter import ExportOptions
from service.checkpoints.source import ModelSource
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
    logs.set_up(settings.log_level, settings.log_format)
    warn_of_variables(settings, os.environ)
    sources = model_sources(options.models)
    check_export_options(options, sources)
    # A taken port is reported before an export, which takes half a minute.
    server.bind(options.host, options.port).close()
    checkpoints = CheckpointCache(settings.artifact_cache)
    export = ExportOptions(options.task, options.calibration, options.gate)
    artifacts = {name: checkpoints.fetch(source, export) for name, source in sources.items()}
    tasks: dict[str, Task] = {}
    for name, artifact in artifacts.items():
        # The score of a single label is a number: as a label it would always agree.
        main_head = artifact.manifest.parts[0].manifest
        is_number = len(main_head.labels) == 1
        tasks[name] = "regression" if is_number else main_head.task
    pairing = shadow_pairing(options.shadow, options.shadow_of, options.fraction, tasks)
    admin = None
    if settings.admin_port is not None:
        admin = server.bind(settings.admin_host, settings.admin_port, "DRBERT_ADMIN_PORT")
    service = ServiceState(artifacts, settings, options.variant, checkpoints)
    server.run(service, server.bind(options.host, options.port), admin, pairing)
    return 0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; raises BadUsage."""
    parser = Parser(
        prog="drbert-serve",
        description="Serve classifiers over HTTP.",
        results="  0   ended by SIGTERM, SIGINT or SIGHUP, with every accepted request answered",
        notes="70 is also a stalled engine or a failed GPU; 129, 130 and 143 are SIGHUP, Ctrl-C and"
        " SIGTERM\nwhile a checkpoint is exported.\n\n"
        "Environment variables DRBERT_* configure the service: docs/configuration.md.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help=(
            "a folder made by drbert-export, a Hugging Face checkpoint's folder, or a hub id"
            " (owner/model[@revision]); checkpoints are exported once, into a cache. The first is"
            " the default model"
        ),
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
    export = parser.add_argument_group("checkpoints", "options of drbert-export, for checkpoints")
    export.add_argument(
        "--task",
        choices=get_args(TextTask),
        help="task of the models (default: by their config.json)",
    )
    export.add_argument(
        "--gate",
        type=Path,
        metavar="TEXTS",
        help="build cpu-int8 too, which must agree with fp32 on these texts, at least 5,000",
    )
    export.add_argument(
        "--calibration",
        type=Path,
        metavar="TEXTS",
        help="texts to calibrate cpu-int8 with (default: bundled)",
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
        if tasks[name] in ("regression", "token_labels"):
            returned = "a number" if tasks[name] == "regression" else "labels of tokens"
            raise BadUsage(
                f"{name!r} returns {returned}, and --shadow counts whether two models return the"
                " same label; name two classifiers."
            )
    if shadow == of:
        raise BadUsage(
            f"{shadow!r} cannot shadow itself; --shadow and --shadow-of name two models."
        )
    if not 0 < fraction <= 1:
        raise BadUsage(f"--fraction {fraction:g} is not a share; give a number above 0, at most 1.")
    return Pairing(shadow, of, fraction)


def model_sources(arguments: Sequence[str]) -> dict[str, str]:
    """Return the models' sources by name: the text before `=`, or the source's own name."""
    models: dict[str, str] = {}
    for argument in arguments:
        name, equals, source = argument.partition("=")
        # A path may have an = in it, as in runs/lr=3e-5.
        if not equals or Path(argument).exists():
            equals, source = "", argument
        name = name if equals else ModelSource.parse(source).name
        # UTF-8 whatever the locale: in the locale C, non-ASCII letters are bytes that no answer
        # could hold.
        name = os.fsencode(name).decode("utf-8", "replace")
        if not name:
            raise BadUsage(f"{argument!r} gives an empty model name; write NAME=MODEL.")
        if name in models:
            raise BadUsage(f"Two models are called {name!r}; write NAME=MODEL to tell them apart.")
        models[name] = source
    return models


def check_export_options(options: argparse.Namespace, sources: Mapping[str, str]) -> None:
    """Raise BadUsage for an option of export where no model is a checkpoint."""
    if any(ModelSource.parse(source).is_checkpoint for source in sources.values()):
        return
    for option in ("task", "gate", "calibration"):
        if getattr(options, option) is not None:
            raise BadUsage(
                f"--{option} is for the export of checkpoints, and {', '.join(sources.values())}"
                " was exported already; pass it to drbert-export."
            )


def run() -> None:
    """Run the console script drbert-serve."""
    finish(main)


if __name__ == "__main__":
    run()
