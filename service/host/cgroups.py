"""
The cgroups of this process, which may limit its processors and its memory.

In a container with a cgroup namespace of its own, its cgroup is the mount's root. Under systemd, or
in the host's namespace, it is a path below the mount.
"""

from __future__ import annotations

from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def folders(controller: str, mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> list[Path]:
    """Return the folders of this process's cgroup and of its ancestors, each of which may limit it.

    `controller` is cpu or memory, of which version 1 has a hierarchy each. `mount` is where cgroups
    are mounted; `membership` lists those of this process.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    paths = {mount: None, mount / controller: None}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = mount / controller if controllers else mount
        relative = Path(path.lstrip("/"))
        paths |= {root / part: None for part in (relative, *relative.parents)}
    return list(paths)
