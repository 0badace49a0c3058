"""What no linter counts: how dense the code is, and names that say nothing of what they hold.

python -m tests.test_style      print the figures
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = (
    "benchmarks",
    "client",
    "export",
    "graphs",
    "loadtests",
    "proof",
    "service",
    "training",
)
SOURCES = [
    Path("atomic.py"),
    Path("command.py"),
    *(path for package in PACKAGES for path in sorted(Path(package).rglob("*.py"))),
]
VAGUE = {
    "asked",
    "found",
    "given",
    "kept",
    "one",
    "own",
    "said",
    "theirs",
    "told",
    "what",
    "where",
    "why",
}
"""Participles and pronouns: as the whole name of a variable, a parameter, a field or a function."""
MAX_VAGUE = 19
"""Well-kept projects bind such a name once in hundreds of lines; this one did 527 times."""
MAX_NODES_PER_LINE = 6.5
"""Nodes of the syntax tree for each line of code; well-kept projects have 3.7 to 6.5."""


def test_names_say_what_they_hold() -> None:
    vague = [f"{path}: {name}" for path in SOURCES for name in bound_names(parsed(path))]
    assert len(vague) <= MAX_VAGUE, vague


def test_code_is_no_denser_than_in_well_kept_projects() -> None:
    density = {package: nodes_per_line(package) for package in PACKAGES}
    assert {
        package: dense for package, dense in density.items() if dense > MAX_NODES_PER_LINE
    } == {}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_module_public_class_and_function_has_a_docstring_that_begins_with_a_sentence(
    path: Path,
) -> None:
    tree = parsed(path)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
    ]
    for node in (tree, *public):
        paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].rstrip()
        name = getattr(node, "name", "the module")
        assert paragraph.endswith((".", "?", ":")), f"{path}: {name}: {paragraph!r}"


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def bound_names(tree: ast.Module) -> Iterator[str]:
    """Yield the vague names that a module gives to something."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                pass
            case ast.Attribute(attr=name, ctx=ast.Store()):
                pass
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                pass
            case _:
                continue
        if name.strip("_") in VAGUE:
            yield name.strip("_")


def nodes_per_line(package: str) -> float:
    """Nodes of the syntax tree by lines of code; nodes that only qualify another are left out."""
    nodes = lines = 0
    for path in Path(package).rglob("*.py"):
        tree = parsed(path)
        helpers = (ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop, ast.alias)
        nodes += sum(not isinstance(node, helpers) for node in ast.walk(tree))
        lines += len(code_lines(path.read_text(encoding="utf-8"), tree))
    return nodes / lines


def code_lines(source: str, tree: ast.Module) -> list[str]:
    """Lines that are neither empty, nor a comment alone, nor of a docstring."""
    described: set[int] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                described |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [
        line
        for number, line in enumerate(source.splitlines(), start=1)
        if number not in described and line.strip() and not line.lstrip().startswith("#")
    ]


def main() -> None:
    for package in PACKAGES:
        print(f"{package:12} {nodes_per_line(package):.2f} nodes per line")
    vague = [f"{path}: {name}" for path in SOURCES for name in bound_names(parsed(path))]
    print(f"{len(vague)} vague names: {vague}")


if __name__ == "__main__":
    main()
