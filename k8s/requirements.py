"""
Prints what pyproject.toml requires, with the extras named (commas in between): pip checks hashes of
these, and of no local folder.

    python3 requirements.py            # the service
    python3 requirements.py gpu,tracing
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = project["optional-dependencies"]
# An extra that is made of others: drbert-serve[client,tracing].
OWN = re.compile(rf"{project['name']}\[([\w,-]+)\]")


def needed(extra: str) -> list[str]:
    """Return the requirements of an extra, those of the extras that it names included."""
    inner = [(need, OWN.fullmatch(need)) for need in EXTRAS[extra]]
    return [
        one
        for need, own in inner
        for one in (
            [need] if own is None else [each for name in own[1].split(",") for each in needed(name)]
        )
    ]


wanted = [extra for argument in sys.argv[1:] for extra in argument.split(",") if extra]
unknown = set(wanted) - set(EXTRAS)
if unknown:
    sys.exit(
        f"pyproject.toml has no extra {', '.join(sorted(unknown))}; there are {', '.join(EXTRAS)}."
    )
print(
    *dict.fromkeys(
        [*project["dependencies"], *(need for extra in wanted for need in needed(extra))]
    ),
    sep="\n",
)
