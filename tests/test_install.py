"""install.sh retries pip install when a registry closes the connection within a package."""

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
# pip requests the package, and the rest of it once more (--resume-retries 1).
REQUESTS_PER_INSTALL = 2


def wheel() -> bytes:
    """Return a wheel of one module that is larger than the part which a broken transfer sends."""
    content = BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
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
    return content.getvalue()


@contextmanager
def unreliable_registry(failures: int) -> Iterator[tuple[str, list[str]]]:
    """Serve a registry of one package whose first transfers break off.

    Yield its address and the list of requested paths.
    """
    requests: list[str] = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if self.path != f"/{WHEEL}":
                status = 200 if self.path == "/simple/patience/" else 404
                self.send(status, "text/html", f'<a href="/{WHEEL}">{WHEEL}</a>'.encode())
            else:
                breaks = requests.count(self.path) <= failures
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
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/", requests
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


def test_a_package_is_installed_after_more_failures_than_pip_retries(
    tmp_path: Path,
) -> None:
    with unreliable_registry(failures=REQUESTS_PER_INSTALL + 1) as (registry, _):
        done = install(registry, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "patience.py").is_file()
    assert "The registry closed the connection; retrying in 0 s" in done.stderr


def test_the_error_of_pip_is_shown_when_every_retry_fails(tmp_path: Path) -> None:
    with unreliable_registry(failures=1_000) as (registry, requests):
        done = install(registry, tmp_path)
    assert done.returncode == 1
    assert "incomplete-download" in done.stderr
    assert requests.count(f"/{WHEEL}") == 3 * REQUESTS_PER_INSTALL


def test_a_package_that_does_not_exist_is_requested_once(tmp_path: Path) -> None:
    with unreliable_registry(failures=0) as (registry, requests):
        done = install(registry, tmp_path, "haste")
    assert done.returncode == 1
    assert "No matching distribution found for haste" in done.stderr
    assert "retrying" not in done.stderr
    assert requests == ["/simple/haste/"]
