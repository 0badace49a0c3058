"""
Prints what pyproject.toml requires, with the extras named (commas in between), for the images' layer of requirements.

    python3 requirements.py            # the service
    python3 requirements.py gpu,tracing
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = [extra for argument in sys.argv[1:] for extra in argument.split(",") if extra]
unknown = set(extras) - set(project["optional-dependencies"])
if unknown:
    sys.exit(f"pyproject.toml has no extra {', '.join(sorted(unknown))}; there are {', '.join(project['optional-dependencies'])}.")
print(*project["dependencies"], *(need for extra in extras for need in project["optional-dependencies"][extra]), sep="\n")
