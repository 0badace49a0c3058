"""Who may import whom: the house has walls, and imports flow one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# What each top-level package may import of ours. `command` and `atomic`
# import nothing: every package may use them.
ALLOWED: dict[str, set[str]] = {
    "command.py": set(),
    "atomic.py": set(),
    "client": {"command"},
    "graphs": {"command"},
    "service": {"command"},
    "training": {"command", "atomic"},
    "export": {
        "command",
        "atomic",
        "graphs",
        "service.artifact",
        "service.classifier",
        "service.errors",
        "service.runtimes",
        "service.host.cpus",
        "service.self_check",
        "service.answers",
    },
    "proof": {"command", "atomic", "graphs", "service.artifact"},
    "loadtests": {"command", "proof.plans", "proof.evidence.store"},
    "benchmarks": {"command", "atomic", "graphs", "service", "export", "proof", "training"},
}
OURS = {name.removesuffix(".py") for name in ALLOWED} | {"tests"}

# What the base install does not bring.
NOT_IN_BASE = (
    "onnxruntime",
    "torch",
    "transformers",
    "onnx",
    "safetensors",
    "scipy",
    "pyarrow",
    "locust",
    "tqdm",
)


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            # `from service import answers` names a module of the package.
            inner = [
                f"{module}.{alias.name}"
                for alias in node.names
                if Path(module.replace(".", "/"), f"{alias.name}.py").exists()
            ]
            yield from inner or [module]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_its_place_allows(room: str) -> None:
    own = room.removesuffix(".py")
    files = [Path(room)] if room.endswith(".py") else list(Path(room).rglob("*.py"))
    assert files
    for file in files:
        crossing = {name for name in imports(file) if name.split(".")[0] in OURS - {own}}
        wrong = {
            name
            for name in crossing
            if not any(
                name == allowed or name.startswith(f"{allowed}.") for allowed in ALLOWED[room]
            )
        }
        assert not wrong, f"{file} reaches across: {sorted(wrong)}"


def test_the_service_starts_without_anything_the_base_install_lacks() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({NOT_IN_BASE!r}))\n"
        "import service.__main__, service.server, service.runtimes.openvino\n"
        "service.__main__.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ARTIFACT" in done.stdout


def test_the_load_generator_reads_plans_and_writes_rows_without_the_judges_libraries() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('scipy', 'pyarrow', 'onnx', 'torch')))\n"
        "import proof.plans.schedule, proof.evidence.store"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loadtests_holds_locustfiles_only() -> None:
    for file in Path("loadtests").rglob("[!_]*.py"):
        assert "class " in file.read_text(), (
            f"{file}: `locust -f loadtests/` loads every file there"
        )


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    names = {path.stem for room in ALLOWED for path in Path(room).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc", "manager"}
