"""install.sh is pip install that outlasts a registry which breaks off in the middle of a
package.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread

WHEEL = "patience-1.0-py3-none-any.whl"
# What pip is told to ask for by itself in one go: the package, and once its rest.
BY_PIP = 2


def wheel() -> bytes:
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("patience.py", "virtue = True\n" + "#" * 10_000)
        archive.writestr(
            "patience-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: patience\nVersion: 1.0\n",
        )
        archive.writestr(
            "patience-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("patience-1.0.dist-info/RECORD", "")
    return held.getvalue()


@contextmanager
def a_registry_that_breaks_off(times: int) -> Iterator[tuple[str, list[str]]]:
    """The address of a registry of one package, and the paths it was asked for."""
    asked: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path != f"/{WHEEL}":
                found = self.path == "/simple/patience/"
                self.send(
                    200 if found else 404, "text/html", f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()
                )
            else:
                breaks = asked.count(self.path) <= times
                self.send(200, "application/zip", wheel(), 100 if breaks else None)

        def send(self, status: int, kind: str, body: bytes, until: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:until])

        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/", asked
        server.shutdown()


def install(
    registry: str, folder: Path, package: str = "patience"
) -> subprocess.CompletedProcess[str]:
    options = (
        "--isolated",
        "--no-cache-dir",
        "--no-deps",
        "--disable-pip-version-check",
        "--resume-retries",
        "1",
        "--index-url",
        registry,
        "--target",
        str(folder),
    )
    return subprocess.run(
        ["sh", "install.sh", sys.executable, "--quiet", *options, package],
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "INSTALL_WAITS": "0 0"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_package_is_installed_after_a_registry_broke_off_for_longer_than_pip_waits(
    tmp_path: Path,
) -> None:
    with a_registry_that_breaks_off(times=BY_PIP + 1) as (registry, _):
        done = install(registry, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "patience.py").is_file()
    assert "A registry broke off; asking again in 0 s" in done.stderr


def test_a_registry_that_only_breaks_off_is_given_up_with_what_pip_says(tmp_path: Path) -> None:
    with a_registry_that_breaks_off(times=1_000) as (registry, asked):
        done = install(registry, tmp_path)
    assert done.returncode == 1
    assert "incomplete-download" in done.stderr
    assert asked.count(f"/{WHEEL}") == 3 * BY_PIP


def test_a_package_that_there_is_not_is_asked_for_once(tmp_path: Path) -> None:
    with a_registry_that_breaks_off(times=0) as (registry, asked):
        done = install(registry, tmp_path, "haste")
    assert done.returncode == 1
    assert "No matching distribution found for haste" in done.stderr
    assert "asking again" not in done.stderr
    assert asked == ["/simple/haste/"]
