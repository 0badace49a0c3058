"""What the README shows is what one gets."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.peers.chart import draw, read_rates
from export.pipeline import export
from service.artifact import Artifact, read_artifact
from tests.service.test_server import running
from training.card import write_card

README = Path("README.md").read_text()
PERFORMANCE = Path("docs/performance.md").read_text()
TRAINING = Path("docs/training.md").read_text()
CHECKPOINTS = Path("examples/checkpoints")
TWINS = ("bert-mini-sst2", "drbert-mini-sst2")
EXAMPLES = {"bert-mini-sst2": 872, "drbert-mini-sst2": 872, "drbert-mini-clinc150": 3000}
"""The shipped classifiers, and how many examples each was measured on."""


@pytest.fixture(scope="module")
def drbert(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("artifacts") / "drbert"
    export(str(CHECKPOINTS / "drbert-mini-sst2"), folder)
    return read_artifact(folder)


def serving_fp32(
    artifact: Artifact, **environment: str
) -> AbstractContextManager[tuple[str, subprocess.Popen[str]]]:
    """The variant of the documents' answers, whatever this processor would choose."""
    return running(f"drbert={artifact.directory}", "--variant", "cpu-fp32", **environment)


@pytest.fixture
def answer(drbert: Artifact) -> Iterator[dict[str, Any]]:
    command = re.search(r"^\$ (curl .*localhost:8000/classify.*)$", README, re.M)
    assert command, "the README shows no request"
    served = f"drbert-mini-sst2={drbert.directory}"
    with running(served, "--variant", "cpu-fp32") as (url, _):
        arguments = shlex.split(command[1].replace("localhost:8000", url.removeprefix("http://")))
        yield json.loads(subprocess.run(arguments, capture_output=True, check=True).stdout)


def without_what_changes(value: Any) -> Any:
    """Numbers to five digits, and neither ids nor dates: engines differ in the last bits."""
    if isinstance(value, dict):
        return {k: without_what_changes(v) for k, v in value.items() if k not in ("id", "created")}
    if isinstance(value, list):
        return [without_what_changes(v) for v in value]
    return round(value, 5) if isinstance(value, float) else value


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what verification checks
def test_the_readmes_request_gives_the_readmes_answer(answer: dict[str, Any]) -> None:
    shown = re.search(r"^\$ curl .*\n(\{(?:.*\n)*?\})\n", README, re.M)
    assert shown, "the README shows no answer"
    assert without_what_changes(answer) == without_what_changes(json.loads(shown[1]))


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what verification checks
def test_every_dialects_request_gives_the_answer_that_the_docs_show(drbert: Artifact) -> None:
    shown = re.findall(r"^\$ (curl .*)\n(.*)$", Path("docs/dialects.md").read_text(), re.M)
    assert len(shown) == 6
    for dialect in ("native", "infinity"):
        with serving_fp32(drbert, DRBERT_CLASSIFY_DIALECT=dialect) as (url, _):
            for command, answer in shown:
                if ("/classify" in command) == (dialect == "infinity"):
                    arguments = shlex.split(
                        command.replace("localhost:8000", url.removeprefix("http://"))
                    )
                    done = subprocess.run(arguments, capture_output=True, check=True)
                    assert without_what_changes(json.loads(done.stdout)) == without_what_changes(
                        json.loads(answer)
                    ), command


@pytest.mark.filterwarnings("ignore")  # torch's tracer warns of what verification checks
def test_every_request_of_the_api_reference_gives_the_answer_that_it_shows(
    drbert: Artifact,
) -> None:
    shown = re.findall(r"^\$ (curl .*)\n(\{.*)$", Path("docs/api.md").read_text(), re.M)
    assert len(shown) == 5
    with serving_fp32(drbert) as (url, _):
        for command, expected in shown:
            arguments = shlex.split(command.replace("localhost:8000", url.removeprefix("http://")))
            done = subprocess.run(arguments, capture_output=True, check=True)
            answer = without_what_changes(json.loads(done.stdout))
            assert answer == without_what_changes(json.loads(expected)), command
        shown_code = re.search(
            r"```python\n(.*?)```\n\n```\n(.*?)```", Path("docs/api.md").read_text(), re.S
        )
        assert shown_code
        code = shown_code[1].replace("http://localhost:8000", url)
        printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert printed.stdout.decode() == shown_code[2]


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z/.-]+):", Path("Makefile").read_text(), re.M))
    named = {
        target
        for line in re.findall(r"(?:^|`|\$ )make ([a-z/. -]+)", README, re.M)
        for target in line.split("  ")[0].split()
    }
    assert {"install", "wheel", "demo", "test"} <= named <= targets


def test_every_python_command_the_readme_names_exists() -> None:
    for module in sorted(set(re.findall(r"python -m ([a-z_.]+)", README))):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, f"python -m {module}"


def test_every_console_script_the_readme_names_exists() -> None:
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    code = re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", README, re.M | re.S)
    named = set(re.findall(r"(?<![\w/=-])drbert-[a-z]+\b(?![\w/.-])", " ".join(map("".join, code))))
    # An image and a wheel have names of this form, too.
    assert {"drbert-serve", "drbert-compare", "drbert-prove", "drbert-classify"} <= named
    assert named <= scripts.keys()
    for script in sorted(named):
        done = subprocess.run(
            [Path(sys.executable).with_name(script), "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0, script


def test_every_file_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert Path(target).exists(), target


@pytest.mark.parametrize(("name", "examples"), EXAMPLES.items())
def test_a_card_says_what_was_measured_through_the_service(name: str, examples: int) -> None:
    measured = json.loads((CHECKPOINTS / name / "evaluation.json").read_text())
    assert measured["examples"] == examples
    card = (CHECKPOINTS / name / "README.md").read_text()
    assert f"**{measured['accuracy']:.4f} ({measured['date']})**" in card
    assert (
        f"{measured['accuracy']:.2%} ({round(measured['accuracy'] * examples):,} of {examples:,})"
        in TRAINING
    )
    assert "## Limitations" in card


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_card_is_what_its_files_say(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("config.json", "training.json", "evaluation.json"):
        shutil.copy(CHECKPOINTS / name / file, folder)
    write_card(folder, name)
    assert (folder / "README.md").read_text() == (CHECKPOINTS / name / "README.md").read_text()


def test_the_twins_differ_in_nothing_but_the_decoder() -> None:
    described = [json.loads((CHECKPOINTS / twin / "training.json").read_text()) for twin in TWINS]
    settings = [d["pretraining"]["config"] for d in described]
    assert settings[0].pop("decoder") != settings[1].pop("decoder")
    assert settings[0] == settings[1]
    assert described[0]["pretraining"]["sources"] == described[1]["pretraining"]["sources"]
    fine = [
        {
            k: v
            for k, v in d["finetuning"].items()
            if k in ("epochs", "batch_size", "learning_rate", "seed")
        }
        for d in described
    ]
    assert fine[0] == fine[1]


def test_the_pipeline_example_names_what_there_is() -> None:
    text = Path("examples/ci/verify-claim.yml").read_text()
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["verify-claim"]["steps"]
    assert any(
        "verify-claim artifacts/bert artifacts/drbert" in step.get("run", "") for step in steps
    )
    for path in re.findall(r"(?:examples/checkpoints|evidence/published)/[\w-]+", text):
        assert Path(path).is_dir(), path
    for command in ("verify-claim", "report"):
        done = subprocess.run(
            [sys.executable, "-m", "proof", command, "--help"], capture_output=True, check=False
        )
        assert done.returncode == 0


def test_the_peers_table_is_what_the_benchmark_measured() -> None:
    measured = {
        finding["name"]: finding["tables"]
        for finding in json.loads(Path("benchmarks/RESULTS.json").read_text())["findings"]
    }
    rows = re.findall(
        r"^\| ([^|]+) \| (fp32|int8|bf16) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|"
        r" ([^|]*) \|$",
        PERFORMANCE,
        re.M,
    )
    assert len(rows) == len(measured["peers mini"][0]["rows"])
    for server, _, *cells in rows:
        for place, size in enumerate(("mini", "base")):
            rates, ratios = measured[f"peers {size}"]
            [rate] = [row[4] for row in rates["rows"] if row[0] == server]
            most = [
                max(i for i, name in enumerate(ratios["columns"]) if name.startswith(start))
                for start in ("our best", "ours in")
            ]
            ratio = next(
                ([row[i] for i in most] for row in ratios["rows"] if row[0] == server), ["", ""]
            )
            assert [cells[place], cells[2 + place], cells[4 + place]] == [rate, *ratio], (
                server,
                size,
            )


def test_the_chart_shows_what_the_benchmark_measured() -> None:
    results = json.loads(Path("benchmarks/RESULTS.json").read_text())
    assert draw(read_rates(results)) == Path("docs/peers.svg").read_text()


def test_the_readme_is_read_in_a_few_minutes() -> None:
    assert len(README.splitlines()) <= 150
