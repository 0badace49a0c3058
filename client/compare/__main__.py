"""
Starts drbert-compare, which is client/compare/commands.py.

It is a module of its own, so that a missing package ends the command with its exit code.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """Run the console script drbert-compare."""
    finish("client.compare.commands:main")


if __name__ == "__main__":
    run()
