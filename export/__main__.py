"""
Exports a fine-tuned checkpoint to an artifact: see export/commands.py.

Apart, so that a package that is not installed ends with its exit code like everything else.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """The console script drbert-export."""
    finish("export.commands:main")


if __name__ == "__main__":
    run()
