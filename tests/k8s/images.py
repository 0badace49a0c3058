"""
Builds the images of the Dockerfile without a container engine: with buildah in a chroot, on a base
by mmdebstrap.

All files lie under build/image. Layers stay there, so a second build reuses those that have not
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
# Names of the images in the chart, by the targets of the Dockerfile.
NAMES = {"service": "drbert-serve", "proof": "drbert-proof"}
# Folders of /usr/share that Debian's slim images leave out.
NOT_IN_SLIM = ("doc", "man", "locale", "info", "lintian")
# Options of pip on this host that a build needs too.
PIP_OPTIONS = ("cert", "index-url", "extra-index-url", "find-links", "proxy", "trusted-host")


def build(target: str, **arguments: str) -> str:
    """Build a target of the Dockerfile and return the name of the image."""
    name = f"localhost/{NAMES[target]}:{version()}"
    build_arguments = {"BASE": make_base(), "VERSION": version(), "REVISION": revision()}
    build_arguments |= arguments
    command = [
        "build",
        "--isolation",
        "chroot",
        "--network",
        "host",
        "--pull=never",
        "--layers",
    ]
    for key, value in build_arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    try:
        # The first build has no mounts: a mount leaves its empty folder in stages that run in
        # parallel, and that folder ends up in the image.
        buildah(*command, "--target", "python", ".")
        buildah(*command, "--target", target, "--tag", name, *pip_mounts(), ".")
    except AssertionError:
        buildah("rm", "--all")  # a step that fails leaves its container mounted
        raise
    return name


def version() -> str:
    """Return the project's version."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return str(project["version"])


def revision() -> str:
    """Return the commit that is checked out, with -dirty if files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"


def make_base() -> str:
    """Build the base image from Debian's packages and return its name.

    It replaces the base of the Dockerfile, whose registry may be out of reach, without its digest.
    """
    base = re.search(
        r"^ARG BASE=(\w+:(\w+)-slim)(@sha256:\w+)?$", Path("Dockerfile").read_text(), re.M
    )
    assert base, "The Dockerfile has no ARG BASE=…:RELEASE-slim"
    name, release = f"localhost/{base[1]}", base[2]
    if name in output_of(*BUILDAH, "images", "--format", "{{.Name}}:{{.Tag}}").split():
        return name
    FOLDER.mkdir(parents=True, exist_ok=True)
    archive = FOLDER / "base.tar"
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in NOT_IN_SLIM]
    output_of(
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


def pip_mounts() -> Iterator[str]:
    """Yield buildah's options that mount the settings of pip on this host into a build.

    pip then uses the same indexes and certificates. Mounts are no part of the image.
    """
    settings = re.findall(
        r"^(?:global|:env:)\.([a-z-]+)=(.*)$",
        output_of(sys.executable, "-m", "pip", "config", "list"),
        re.M,
    )
    options = {
        key: " ".join(str(ast.literal_eval(value)).split())
        for key, value in settings
        if key in PIP_OPTIONS
    }
    file = FOLDER.resolve() / "pip.conf"
    file.touch(mode=0o600)  # the URL of an index may hold a password
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in options.items()))
    yield from ("--volume", f"{file}:/etc/pip.conf:ro")
    folders: set[Path] = set()
    for word in " ".join(options.values()).split():
        folder = Path(word.removeprefix("file://"))
        # An index that is a folder has its files next to it.
        if word.startswith("file://"):
            folder = folder.parent
        if folder.is_absolute() and folder.exists():
            folders.add(folder)
    for folder in sorted(folders):
        yield from ("--volume", f"{folder}:{folder}:ro")


@contextmanager
def unpacked(image: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the root folder of a container of the image, and the image's configuration."""
    container = buildah("from", "--pull-never", image).strip()
    try:
        inspected = json.loads(buildah("inspect", "--type", "container", container))
        yield Path(buildah("mount", container).strip()), inspected["OCIv1"]["config"]
    finally:
        buildah("rm", container)


def size_mb(root: Path) -> int:
    """Return the disk space of a folder in MB; files with several names count once."""
    sizes: dict[int, int] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        sizes[status.st_ino] = status.st_blocks * 512
    return round(sum(sizes.values()) / 1e6)


# An overlay cannot lie on an overlay: inside a container, STORAGE_DRIVER=vfs copies instead.
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
    return output_of(*BUILDAH, *arguments)


def output_of(*command: str) -> str:
    """Run a command and return its output; AssertionError with its messages if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)} ended with"
        f" {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
