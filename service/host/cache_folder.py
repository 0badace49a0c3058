"""The user's cache folder: $XDG_CACHE_HOME/drbert-serve, or ~/.cache/drbert-serve."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return the folder of that name in the user's cache, which may not exist yet.

    Raises RuntimeError for a user without a home folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "drbert-serve" / name
