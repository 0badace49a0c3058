"""
Builds the images of the Dockerfile without a container engine: by buildah in a chroot, on a base by
mmdebstrap.

Everything lies under build/image. Layers are kept there, so that a second build takes what has not
changed.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path("build/image")
# As the chart calls what the Dockerfile's targets make.
NAMES = {"service": "drbert-serve", "proof": "drbert-proof"}
# As Debian's own slim images leave out.
NOT_IN_SLIM = ("doc", "man", "locale", "info", "lintian")
# What pip may be told on this host that a build needs too.
INDEXES = ("cert", "index-url", "extra-index-url", "find-links", "proxy", "trusted-host")


def build(target: str, **arguments: str) -> str:
    """The name of the image that a target of the Dockerfile makes."""
    name = f"localhost/{NAMES[target]}:{version()}"
    told = {"BASE": make_base(), "VERSION": version(), "REVISION": revision()} | arguments
    building = (
        "build",
        "--isolation",
        "chroot",
        "--network",
        "host",
        "--pull=never",
        "--layers",
        *(word for key, value in told.items() for word in ("--build-arg", f"{key}={value}")),
    )
    try:
        # First and without mounts, for a mount leaves its empty folder in what runs beside it, and
        # this ends in the image.
        buildah(*building, "--target", "python", ".")
        buildah(*building, "--target", target, "--tag", name, *as_pip_is_told(), ".")
    except AssertionError:
        buildah("rm", "--all")  # a step that fails leaves its container mounted
        raise
    return name


def version() -> str:
    stated: str = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    return stated


def revision() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def make_base() -> str:
    """The name of an image of Debian's packages, in the place of the one that the Dockerfile builds
    on; it has no digest of that one.
    """
    stated = re.search(
        r"^ARG BASE=(\w+:(\w+)-slim)(@sha256:\w+)?$", Path("Dockerfile").read_text(), re.M
    )
    assert stated, "The Dockerfile has no ARG BASE=…:RELEASE-slim"
    name, release = f"localhost/{stated[1]}", stated[2]
    if name in said(*BUILDAH, "images", "--format", "{{.Name}}:{{.Tag}}").split():
        return name
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = FOLDER / "base.tar"
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in NOT_IN_SLIM]
    said(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=ca-certificates",
        *excluded,
        '--customize-hook=rm "$1/etc/resolv.conf" "$1/etc/hostname"',
        release,
        str(archive),
    )
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, str(archive), "/")
    buildah("config", "--cmd", "/bin/bash", container)
    buildah("commit", "--quiet", container, name)
    buildah("rm", container)
    archive.unlink()
    return name


def as_pip_is_told() -> Iterator[str]:
    """Mounts by which pip in a build knows what pip on this host is told: its indexes, its
    certificates. They stay out of the image.
    """
    listed = re.findall(
        r"^(?:global|:env:)\.([a-z-]+)=(.*)$",
        said(sys.executable, "-m", "pip", "config", "list"),
        re.M,
    )
    options = {
        key: " ".join(str(ast.literal_eval(value)).split())
        for key, value in listed
        if key in INDEXES
    }
    file = FOLDER.resolve() / "pip.conf"
    file.touch(mode=0o600)  # an index may be told with a password
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in options.items()))
    yield from ("--volume", f"{file}:/etc/pip.conf:ro")
    # An index in a folder keeps its files beside it.
    places = [
        Path(word.removeprefix("file://")).parent if word.startswith("file://") else Path(word)
        for value in options.values()
        for word in value.split()
    ]
    for place in sorted({place for place in places if place.is_absolute() and place.exists()}):
        yield from ("--volume", f"{place}:{place}:ro")


@contextmanager
def unpacked(image: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The root of a container of the image, and what the image says of how to run it."""
    container = buildah("from", "--pull-never", image).strip()
    try:
        inspected = json.loads(buildah("inspect", "--type", "container", container))
        yield Path(buildah("mount", container).strip()), inspected["OCIv1"]["config"]
    finally:
        buildah("rm", container)


def size_mb(root: Path) -> int:
    return round(
        sum(
            path.lstat().st_blocks * 512
            for path in {p.lstat().st_ino: p for p in root.rglob("*")}.values()
        )
        / 1e6
    )


# Overlays do not lie on overlays: inside a container, STORAGE_DRIVER=vfs copies instead.
DRIVER = os.environ.get("STORAGE_DRIVER", "overlay")
BUILDAH = (
    "buildah",
    "--root",
    str(FOLDER.resolve() / "store"),
    "--runroot",
    str(FOLDER.resolve() / "run"),
    "--storage-driver",
    DRIVER,
)


def buildah(*arguments: str) -> str:
    return said(*BUILDAH, *arguments)


def said(*command: str) -> str:
    """What a command prints; its complaint where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with"
        f" {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
