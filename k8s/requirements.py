"""
Prints the requirements of pyproject.toml, one a line, for pip to install with their hashes.

pip cannot check the hash of a local folder, so the project itself is not among them.

    python3 requirements.py               # the service
    python3 requirements.py gpu,tracing  # and two extras
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = project["optional-dependencies"]
REFERENCE = re.compile(rf"{project['name']}\[([\w,-]+)\]")
"""A requirement that stands for other extras, as drbert-serve[client,tracing]."""


def requirements(extra: str) -> Iterator[str]:
    """Yield the requirements of an extra, and of the extras that it refers to."""
    for requirement in EXTRAS[extra]:
        reference = REFERENCE.fullmatch(requirement)
        if reference is None:
            yield requirement
            continue
        for name in reference[1].split(","):
            yield from requirements(name)


def main() -> None:
    """Print the requirements without duplicates; exit with a message for an unknown extra."""
    extras = [extra for extra in ",".join(sys.argv[1:]).split(",") if extra]
    unknown = sorted(set(extras) - set(EXTRAS))
    if unknown:
        sys.exit(
            f"pyproject.toml has no extra {', '.join(unknown)}; its extras are {', '.join(EXTRAS)}."
        )
    lines: list[str] = [*project["dependencies"]]
    for extra in extras:
        lines += requirements(extra)
    print(*dict.fromkeys(lines), sep="\n")


main()
