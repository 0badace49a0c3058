"""
Runs an image by runc as a node would run the chart's container: under its securityContext, with
/tmp as the one place to write.

It shares the host's network, so what it serves is to listen on 127.0.0.1.
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

from tests.k8s.images import FOLDER, said, unpacked

# The chart's securityContext of pod and container, which the tests of the chart hold it to.
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
    name: str
    process: subprocess.Popen[str]

    def run(self, *command: str) -> str:
        """What a command inside prints."""
        return said(*RUNC, "exec", self.name, *command)

    def send(self, signal: str) -> None:
        said(*RUNC, "kill", self.name, signal)


@contextmanager
def container(
    image: str,
    arguments: Sequence[str],
    *,
    command: Sequence[str] | None = None,
    environment: Mapping[str, str] | None = None,
    mounts: Mapping[Path, str] | None = None,
) -> Iterator[Container]:
    """A running container of the image, which is gone afterwards.

    `command` takes the place of the image's entrypoint, as in a pod; `mounts` says where folders of
    the host are, to be read only.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (
        unpacked(image) as (root, told),
        TemporaryDirectory(prefix="bundle-", dir=FOLDER) as folder,
    ):
        bundle, name = Path(folder), Path(folder).name
        variables = [
            *told["Env"],
            *(f"{name}={value}" for name, value in (environment or {}).items()),
        ]
        words = [*(command or told["Entrypoint"]), *arguments]
        (bundle / "config.json").write_text(
            json.dumps(config(bundle, root, told, words, variables, mounts or {}))
        )
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
    told: Mapping[str, Any],
    words: Sequence[str],
    variables: Sequence[str],
    mounts: Mapping[Path, str],
) -> dict[str, Any]:
    """runc's own proposal, changed to what Kubernetes makes of the securityContext."""
    assert SECURITY["capabilities"] == {"drop": ["ALL"]}
    said(*RUNC, "spec", "--bundle", str(bundle))
    chosen: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    chosen["root"] = {"path": str(root), "readonly": SECURITY["readOnlyRootFilesystem"]}
    chosen["process"] |= {
        "terminal": False,
        "args": list(words),
        "env": list(variables),
        "cwd": told.get("WorkingDir", "/"),
        "user": {"uid": SECURITY["runAsUser"], "gid": SECURITY["runAsGroup"]},
        "noNewPrivileges": not SECURITY["allowPrivilegeEscalation"],
        "capabilities": {
            kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")
        },
    }
    chosen["mounts"] += [
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
    # No network of its own, and no limits: both are the node's to give.
    chosen["linux"]["namespaces"] = [
        space
        for space in chosen["linux"]["namespaces"]
        if space["type"] not in ("network", "cgroup")
    ]
    chosen["linux"].pop("resources", None)
    return chosen


RUNC = ("runc", "--root", str(FOLDER.resolve() / "running"))
