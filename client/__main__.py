"""
Starts the client, which is client/classify.py.

It is a module of its own, so that a missing package ends the command with its exit code.
"""

from __future__ import annotations

from command import finish


def run() -> None:
    """Run the console script drbert-classify."""
    finish("client.classify:main")


if __name__ == "__main__":
    run()
