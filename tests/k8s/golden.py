"""
Writes what every profile renders to, so that a review shows the effect of a change to the chart.

    python -m tests.k8s.golden      (make chart-golden)
"""

from __future__ import annotations

from pathlib import Path

from tests.k8s import helm
from tests.k8s.profiles import PROFILES

FOLDER = Path("k8s/rendered")


def golden(profile: str) -> str:
    """Return the profile's objects as text, template by template, and the notes of Helm."""
    files = helm.rendered_files(PROFILES[profile])
    [notes] = [text for path, text in files.items() if path.endswith("NOTES.txt")]
    lines = [
        f"# Made by `make chart-golden` from the profile {profile}, as release {helm.NAME} in"
        f" namespace {helm.NAMESPACE}."
    ]
    for path, text in sorted(files.items()):
        body = text.strip().removeprefix("---").strip()
        if path.endswith(".yaml") and body:
            lines.append(f"---\n# {path}\n{body}")
    lines.append("---")
    for line in notes.splitlines():
        lines.append(f"# {line}".rstrip())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for removed in {path.stem for path in FOLDER.glob("*.yaml")} - set(PROFILES):
        (FOLDER / f"{removed}.yaml").unlink()
    for name in PROFILES:
        (FOLDER / f"{name}.yaml").write_text(golden(name))
