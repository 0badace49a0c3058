"""
Markers for tests that need something which some machines lack.

These are the only reasons for which a test may be skipped.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from proof.work.counters import unavailable_reason

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CRDS = SHARED.with_name("crds")

shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ../shared, the project's research data"
)
crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason="needs ../shared/crds, strict schemas of custom resources"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
helm = pytest.mark.skipif(
    shutil.which("helm") is None, reason="needs the program helm, version 3 or 4"
)
no_gpu = pytest.mark.skipif(
    Path("/proc/driver/nvidia").is_dir(), reason="needs a machine without an NVIDIA driver"
)
chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium, in which reports are opened")
strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="needs strace, which records system calls"
)
counted_instructions = pytest.mark.skipif(
    shutil.which("valgrind") is None and unavailable_reason() is not None,
    reason="needs hardware counters of instructions, or Valgrind from Debian",
)
# A string is evaluated when the test is about to run, so that others need not wait for it.
package_index = pytest.mark.skipif(
    "not __import__('tests.requirements', fromlist=['index_is_reachable']).index_is_reachable()",
    reason="needs an index of Python packages",
)
wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="needs wrk, Debian's HTTP benchmark")

# tests/debian.sh installs Debian's programs next to Python, where they start no daemon.
PROGRAM_PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
PROMETHEUS, PROMTOOL = (
    shutil.which(tool, path=PROGRAM_PATH) or "" for tool in ("prometheus", "promtool")
)
prometheus = pytest.mark.skipif(
    not (PROMETHEUS and PROMTOOL), reason="needs Prometheus and promtool"
)
HAS_BUILD_TOOLS = os.geteuid() == 0 and all(
    map(shutil.which, ("buildah", "mmdebstrap", "runc", "unshare"))
)
# Root in a container often has no permission to mount.
MAY_MOUNT = (
    HAS_BUILD_TOOLS
    and subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode
    == 0
)
# Layers of both images took 2.5 GB when they were built.
HAS_ROOM_FOR_IMAGES = shutil.disk_usage(".").free > 4e9
containers = pytest.mark.skipif(
    not (MAY_MOUNT and HAS_ROOM_FOR_IMAGES),
    reason="needs root with permission to mount, 4 GB of free disk, and Debian's buildah,"
    " mmdebstrap and runc",
)
GRAFANA = Path(sys.prefix, "grafana", "node_modules")
grafana = pytest.mark.skipif(
    shutil.which("node") is None or not GRAFANA.is_dir(),
    reason="needs node, and @grafana/schema from npm",
)
CYCLONEDX = Path(sys.prefix, "sbom", "bin", "cyclonedx-py")
TRANSFORMERS_5 = Path(sys.prefix, "transformers5")
transformers_5 = pytest.mark.skipif(
    not (TRANSFORMERS_5 / "transformers").is_dir(), reason="needs transformers 5 from PyPI"
)
sbom = pytest.mark.skipif(not CYCLONEDX.exists(), reason="needs cyclonedx-bom from PyPI")


@functools.cache
def index_is_reachable() -> bool:
    """Return whether pip finds packages."""
    command = [sys.executable, "-m", "pip", "index", "versions", "pip"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
