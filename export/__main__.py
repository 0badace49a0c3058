"""
Starts the command line of export.

It is a module of its own so that a missing package ends with an exit code, as every error does.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """Run the console script drbert-export."""
    finish("export.commands:main")


if __name__ == "__main__":
    run()
