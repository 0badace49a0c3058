"""
Runs an image by runc as a node would run the chart's container: under its securityContext, with /tmp as the one place to write.

It shares the host's network, so what it serves is to listen on 127.0.0.1.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.k8s.images import FOLDER, said, unpacked

# The chart's securityContext of pod and container, which the tests of the chart hold it to.
SECURITY: dict[str, Any] = {
    "runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
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
    image: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, mounts: Mapping[Path, str] | None = None
) -> Iterator[Container]:
    """A running container of the image, which is gone afterwards. `mounts` says where folders of the host are, to be read only."""
    name = f"drbert-{image.rpartition('/')[2].partition(':')[0]}"
    bundle = FOLDER / "bundles" / name
    bundle.mkdir(parents=True, exist_ok=True)
    with unpacked(image) as (root, told):
        command = [*told["Entrypoint"], *arguments]
        variables = [*told["Env"], *(f"{name}={value}" for name, value in (environment or {}).items())]
        (bundle / "config.json").write_text(json.dumps(config(root, told, command, variables, mounts or {})))
        process = subprocess.Popen(
            [*RUNC, "run", "--bundle", str(bundle), name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
        )
        try:
            yield Container(name, process)
        finally:
            subprocess.run([*RUNC, "delete", "--force", name], capture_output=True, check=False)
            process.kill()
            process.__exit__(None, None, None)


def config(root: Path, told: Mapping[str, Any], command: Sequence[str], variables: Sequence[str], mounts: Mapping[Path, str]) -> dict[str, Any]:
    """runc's own proposal, changed to what Kubernetes makes of the securityContext."""
    assert SECURITY["capabilities"] == {"drop": ["ALL"]}
    chosen: dict[str, Any] = proposal()
    chosen["root"] = {"path": str(root), "readonly": SECURITY["readOnlyRootFilesystem"]}
    chosen["process"] |= {
        "terminal": False, "args": command, "env": list(variables), "cwd": told.get("WorkingDir", "/"),
        "user": {"uid": SECURITY["runAsUser"], "gid": SECURITY["runAsGroup"]}, "noNewPrivileges": not SECURITY["allowPrivilegeEscalation"],
        "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
    }
    chosen["mounts"] += [
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        *({"destination": inside, "type": "none", "source": str(folder.resolve()), "options": ["rbind", "ro"]} for folder, inside in mounts.items()),
    ]
    # No network of its own, and no limits: both are the node's to give.
    chosen["linux"]["namespaces"] = [space for space in chosen["linux"]["namespaces"] if space["type"] not in ("network", "cgroup")]
    chosen["linux"].pop("resources", None)
    return chosen


def proposal() -> dict[str, Any]:
    folder = FOLDER / "bundles"
    (folder / "config.json").unlink(missing_ok=True)
    said(*RUNC, "spec", "--bundle", str(folder))
    proposed: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return proposed


RUNC = ("runc", "--root", str(FOLDER.resolve() / "running"))
