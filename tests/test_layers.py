"""Which package may import which: imports flow one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

# What each top-level package may import of ours. `command` and `atomic`
# import nothing: every package may use them.
ALLOWED: dict[str, set[str]] = {
    "command.py": set(),
    "atomic.py": set(),
    "client": {"command", "proof.plans.answers", "proof.plans.dialects"},
    "graphs": {"command"},
    "service": {"command"},
    "training": {"command", "atomic"},
    "export": {
        "command",
        "atomic",
        "graphs",
        "service.artifact",
        "service.checkpoints.source",
        "service.classifier",
        "service.errors",
        "service.runtimes",
        "service.host.cpus",
        "service.self_check",
        "service.answers",
    },
    "proof": {"command", "atomic", "graphs", "service.artifact", "service.runtimes.forms"},
    "loadtests": {"command", "proof.plans", "proof.evidence.store"},
    "benchmarks": {"command", "atomic", "graphs", "service", "export", "proof", "training"},
}
# What each sub-package may import of its own top-level package, itself excluded. Modules of the top
# level stand above all sub-packages, except those that are listed here.
INNER: dict[str, set[str]] = {
    "service.host": {"service.errors"},
    "service.requests": {"service.errors", "service.artifact"},
    "service.checkpoints": {"service.artifact", "service.host"},
    "service.batching": {"service.errors"},
    "service.telemetry": {"service.host", "service.batching"},
    "service.runtimes": {
        "service.errors",
        "service.artifact",
        "service.host",
        "service.batching.shapes",
        "service.batching.packing",
    },
    "service.tokenization": {
        "service.errors",
        "service.artifact",
        "service.answers",
        "service.schemas",
        "service.classifier",
        "service.host",
        "service.requests",
        "service.batching.requests",
    },
    "service.loading": {
        "service.artifact",
        "service.classifier",
        "service.errors",
        "service.host",
        "service.runtimes",
        "service.self_check",
        "service.settings",
    },
    "service.workload": {
        "service.artifact",
        "service.classifier",
        "service.host",
        "service.runtimes",
    },
    "service.http.transport": {"service.errors"},
    "service.http.dialects": {
        "service.errors",
        "service.artifact",
        "service.answers",
        "service.schemas",
        "service.classifier",
        "service.requests",
        "service.batching.requests",
    },
    "service.http": {
        "service.errors",
        "service.artifact",
        "service.requests",
        "service.checkpoints.source",
        "service.schemas",
        "service.settings",
        "service.registry",
        "service.shadow",
        "service.state",
        "service.batching.requests",
        "service.host",
        "service.telemetry",
        "service.tokenization",
    },
    "service.plain": {
        "service.artifact",
        "service.answers",
        "service.classifier",
        "service.loading",
        "service.runtimes.auto",
        "service.self_check",
        "service.settings",
    },
    "proof.plans": set(),
    "proof.evidence": {"proof.plans"},
    "proof.work": {"proof.plans", "proof.evidence"},
    "proof.verdict": {"proof.plans", "proof.evidence", "proof.work"},
    "proof.reports": {"proof.plans", "proof.evidence", "proof.verdict", "proof.work"},
    "proof.measuring": {
        "proof.plans",
        "proof.evidence",
        "proof.verdict",
        "proof.reports",
        "proof.work",
    },
    "proof.sizing": {"proof.plans", "proof.evidence", "proof.measuring"},
    "export.checkpoint": set(),
    "export.graph": {"export.checkpoint"},
    "export.checks": {"export.checkpoint", "export.graph", "export.texts"},
    "benchmarks.harness": set(),
}
# Only the server and its start know HTTP.
KNOW_HTTP = {Path("service/server.py"), Path("service/__main__.py")}
MAX_MODULES = 14
"""Modules of a folder, dunder files not counted: `ls` reads like a table of contents."""
FLAT = {"training"}
"""Packages that are not divided: the modules are the steps of one loop."""
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
    "jinja2",
    "tomli_w",
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


def is_within(name: str, packages: Iterable[str]) -> bool:
    """Return whether a module is one of the packages, or in one of them."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_its_layer_allows(package: str) -> None:
    name = package.removesuffix(".py")
    files = [Path(package)] if package.endswith(".py") else list(Path(package).rglob("*.py"))
    assert files
    for file in files:
        crossing = {module for module in imports(file) if module.split(".")[0] in OURS - {name}}
        wrong = {module for module in crossing if not is_within(module, ALLOWED[package])}
        assert not wrong, f"{file} reaches across: {sorted(wrong)}"


@pytest.mark.parametrize("package", INNER)
def test_a_sub_package_imports_only_what_its_layer_allows(package: str) -> None:
    top = package.split(".")[0]
    files = list(Path(package.replace(".", "/")).rglob("*.py"))
    assert files
    inner = {other for other in INNER if other.startswith(f"{package}.")}
    for file in files:
        if is_within(".".join(file.with_suffix("").parts), inner):
            continue  # It has a line of its own.
        crossing = {module for module in imports(file) if is_within(module, {top})}
        wrong = {each for each in crossing if not is_within(each, {package} | INNER[package])}
        assert not wrong, f"{file} reaches across: {sorted(wrong)}"


def test_every_sub_package_has_its_layer() -> None:
    for top in ("service", "proof", "export"):
        for path in Path(top).rglob("__init__.py"):
            package = ".".join(path.parent.parts)
            assert package == top or package in INNER, f"{package} is missing in INNER"


def test_only_the_server_knows_http() -> None:
    for file in (
        set(Path("service").rglob("*.py")) - KNOW_HTTP - set(Path("service/http").rglob("*"))
    ):
        assert not [name for name in imports(file) if is_within(name, {"service.http"})], file


def test_a_folder_reads_like_a_table_of_contents() -> None:
    for package in ("service", "proof", "export", "benchmarks", "graphs", "client", "training"):
        if package in FLAT:
            continue
        for folder in {path.parent for path in Path(package).rglob("*.py")}:
            modules = [path for path in folder.glob("*.py") if not path.stem.startswith("__")]
            assert len(modules) <= MAX_MODULES, f"{folder} holds {len(modules)} modules"


def test_every_package_says_what_it_is_and_what_it_does_not_know() -> None:
    for top in ("service", "proof", "export", "graphs", "training", "client"):
        for path in Path(top).rglob("__init__.py"):
            header = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert len(header.split()) >= 8, f"{path} says too little: {header!r}"


def test_the_service_starts_without_anything_the_base_install_lacks() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({NOT_IN_BASE!r}))\n"
        "import service.__main__, service.server, service.runtimes.openvino\n"
        "service.__main__.main(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MODEL" in done.stdout


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


def test_there_is_no_module_for_odds_and_ends() -> None:
    names = {path.stem for package in ALLOWED for path in Path(package).rglob("*.py")}
    assert not names & {"utils", "helpers", "common", "misc", "manager"}
