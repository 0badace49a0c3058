"""
Runs an image by runc as a node runs the chart's container: under its securityContext, where only
/tmp can be written.

The container shares the host's network, so its server has to listen on 127.0.0.1.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.k8s.images import FOLDER, output_of, unpacked

# The securityContext of the chart's pods and containers; the tests of the chart check it.
SECURITY: dict[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "runAsGroup": 10001,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class Container:
    """A container that runs."""

    name: str
    process: subprocess.Popen[str]
    """The process of runc; its stdout is the output of the container."""

    def run(self, *command: str) -> str:
        """Run a command in the container and return its output."""
        return output_of(*RUNC, "exec", self.name, *command)

    def send(self, signal: str) -> None:
        """Send a signal to the first process of the container."""
        output_of(*RUNC, "kill", self.name, signal)


@contextmanager
def container(
    image: str,
    arguments: Sequence[str],
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[Path, str] | None = None,
) -> Iterator[Container]:
    """Run a container of the image for the length of the block.

    `command` replaces the image's entrypoint, as in a pod. `mounts` maps folders of the host to
    paths in the container, where they are read-only.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        unpacked(image) as (root, image_config),
        TemporaryDirectory(prefix="bundle-", dir=FOLDER) as folder,
    ):
        bundle, name = Path(folder), Path(folder).name
        variables = list(image_config["Env"])
        for variable, value in (environment or {}).items():
            variables.append(f"{variable}={value}")
        words = [*(command or image_config["Entrypoint"]), *arguments]
        runc_config = config(bundle, root, image_config, words, variables, mounts or {})
        (bundle / "config.json").write_text(json.dumps(runc_config))
        process = subprocess.Popen(
            [*RUNC, "run", "--bundle", str(bundle), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        try:
            yield Container(name, process)
        finally:
            subprocess.run([*RUNC, "delete", "--force", name], capture_output=True, check=False)
            process.kill()
            process.__exit__(None, None, None)


def config(
    bundle: Path,
    root: Path,
    image_config: Mapping[str, Any],
    words: Sequence[str],
    variables: Sequence[str],
    mounts: Mapping[Path, str],
) -> dict[str, Any]:
    """Return runc's default configuration, changed as Kubernetes applies the securityContext."""
    assert SECURITY["capabilities"] == {"drop": ["ALL"]}
    output_of(*RUNC, "spec", "--bundle", str(bundle))
    runc_config: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    runc_config["root"] = {"path": str(root), "readonly": SECURITY["readOnlyRootFilesystem"]}
    runc_config["process"] |= {
        "terminal": False,
        "args": list(words),
        "env": list(variables),
        "cwd": image_config.get("WorkingDir", "/"),
        "user": {"uid": SECURITY["runAsUser"], "gid": SECURITY["runAsGroup"]},
        "noNewPrivileges": not SECURITY["allowPrivilegeEscalation"],
        "capabilities": {
            kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
        },
    }
    runc_config["mounts"] += [
        {
            "destination": "/tmp",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "nodev", "mode=1777"],
        },
        *(
            {
                "destination": inside,
                "type": "none",
                "source": str(folder.resolve()),
                "options": ["rbind", "ro"],
            }
            for folder, inside in mounts.items()
        ),
    ]
    # The container uses the host's network and has no limits; a node would set both.
    runc_config["linux"]["namespaces"] = [
        space
        for space in runc_config["linux"]["namespaces"]
        if space["type"] not in ("network", "cgroup")
    ]
    runc_config["linux"].pop("resources", None)
    return runc_config


RUNC = ("runc", "--root", str(FOLDER.resolve() / "running"))
