"""
A load test of a running server: users who send texts one after another and check the answers.

    locust -f loadtests/ --host http://127.0.0.1:8000 -u 50 -r 10 -t 1m --headless
    locust -f loadtests/ --host http://127.0.0.1:8000
        the same, with numbers and models chosen in Locust's page

Locust's statistics have a line for each model. With PLAN=plan.toml, locustfile.py sends the plan's
schedule instead.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, events, task

# Import our packages, not folders of the same name in the working directory.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import BadInput, BadUsage, CommandError, Unavailable
from proof.plans.answers import read_answer
from proof.plans.restart import is_given

TEXTS = Path(__file__).with_name("sentences.txt")
LIST_WITHIN_S = 10.0
"""Longest wait for the server's list of models."""
AFTER_FAILURE_S = 0.1
"""Pause of a user after a request that failed."""
KEY_VARIABLE = "DRBERT_API_KEY"
"""Environment variable with the API key, as for drbert-classify."""


class ClassifyUser(FastHttpUser):
    """Sends a text to each model in turn, and the next when it is answered."""

    abstract = is_given()
    requests: Iterator[tuple[str, str]] = iter(())
    """(model, text) of the requests to come, of all users together."""

    @task
    def classify(self) -> None:
        """Send one text; an answer that is no classification counts as a failure."""
        model, text = next(self.requests)
        with self.rest(
            "POST",
            "/classify",
            json={"input": text, "model": model},
            headers=key_headers(),
            name=model,
        ) as response:
            problem = find_problem(response.status_code, response.content or b"")
            if problem:
                response.failure(problem)
                # A server that refuses at once would be asked without end.
                gevent.sleep(AFTER_FAILURE_S)


def find_problem(status: int, content: bytes) -> str:
    """Return what is wrong with an answer, or an empty string."""
    if status == 0:
        return "no answer"
    if status != 200:
        return f"status {status}: {_message(content)}"
    if not read_answer(content).score_count:
        return "status 200 without a classification"
    return ""


def _message(content: bytes) -> str:
    try:
        error = json.loads(content)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")


def key_headers() -> dict[str, str]:
    """Return the header with the API key of KEY_VARIABLE; none if it is not set."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def list_models(host: str) -> list[str]:
    """Return the names of a server's models; raises Unavailable if it does not answer."""
    if not host.startswith(("http://", "https://")):
        raise BadUsage(f"--host {host} is not an address; write it as http://host:port.")
    request = urllib.request.Request(f"{host.rstrip('/')}/v1/models", headers=key_headers())
    try:
        with urllib.request.urlopen(request, timeout=LIST_WITHIN_S) as response:
            return [str(model["id"]) for model in json.load(response)["data"]]
    except urllib.error.HTTPError as error:
        remedy = f"; {KEY_VARIABLE} sets its API key" if error.code == 401 else ""
        raise Unavailable(
            f"{host} answers GET /v1/models with {error.code}, not with its models{remedy}."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", error)
        raise Unavailable(
            f"{host} did not answer: {getattr(reason, 'strerror', None) or reason}. Start a server"
            " with drbert-serve, or name another one with --host."
        ) from None


def choose_models(names: str, listed: list[str]) -> list[str]:
    """Return the models of a comma-separated list, all listed ones by default.

    Raises BadUsage for a name that the server does not list.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()] or listed
    for name in chosen:
        if name not in listed:
            raise BadUsage(f"--models {name}: the server has {', '.join(listed)}.")
    return chosen


def read_texts(path: str) -> list[str]:
    """Return the lines of a file that are not blank; raises BadInput or Unavailable."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise Unavailable(f"--texts {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise BadInput(f"--texts {path} is not UTF-8; convert it.") from None
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise BadInput(f"--texts {path} has no text; write one on each line.")
    return texts


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add the options of the load test to Locust's command line and to its page."""
    # Not in a group of their own: Locust's page shows only the parser's arguments.
    parser.add_argument(
        "--models",
        default="",
        env_var="LOADTEST_MODELS",
        help="models to ask in turn, separated by commas (default: all that the server lists)",
    )
    parser.add_argument(
        "--texts",
        default=str(TEXTS),
        env_var="LOADTEST_TEXTS",
        help="file with one text on each line (default: bundled sentences)",
    )


@events.test_start.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Read the texts and ask the server for its models; end Locust if there are none."""
    if is_given():
        return
    options = environment.parsed_options
    try:
        if not environment.host:
            raise BadUsage("--host names the server, as in --host http://127.0.0.1:8000.")
        models = choose_models(options.models, list_models(environment.host))
        pairs = itertools.product(read_texts(options.texts), models)
        ClassifyUser.requests = ((model, text) for text, model in itertools.cycle(pairs))
    except CommandError as error:
        print(f"locust: {error}", file=sys.stderr)
        environment.process_exit_code = error.exit_code
        if environment.web_ui is None:
            environment.runner.quit()
        else:
            environment.runner.stop()
