"""
What some tests need and some machines lack: the only reasons for which a test may be skipped.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CRDS = SHARED.with_name("crds")

shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared, the project's research data")
crds = pytest.mark.skipif(not CRDS.is_dir(), reason="needs ../shared/crds, strict schemas of custom resources")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
helm = pytest.mark.skipif(shutil.which("helm") is None, reason="needs the program helm, version 3 or 4")
gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs a GPU")
chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium, which opens reports")
wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk, Debian's HTTP benchmark")
