"""
What every profile renders to, kept in the repository so that a review sees what a change does.

    python -m tests.k8s.golden      write the files anew (make chart-golden)
"""

from __future__ import annotations

from pathlib import Path

from tests.k8s import helm
from tests.k8s.profiles import PROFILES

FOLDER = Path("k8s/rendered")


def golden(profile: str) -> str:
    """The profile's objects as text, template by template, and what Helm says in the end."""
    files = helm.rendered_files(PROFILES[profile])
    [notes] = [text for path, text in files.items() if path.endswith("NOTES.txt")]
    parts = [
        f"---\n# {path}\n{body}"
        for path, text in sorted(files.items())
        if path.endswith(".yaml") and (body := text.strip().removeprefix("---").strip())
    ]
    return (
        "\n".join(
            [
                (
                    f"# Made by `make chart-golden` from the profile {profile}, as release"
                    f" {helm.NAME} in namespace {helm.NAMESPACE}."
                ),
                *parts,
                "---",
                *(f"# {line}".rstrip() for line in notes.splitlines()),
            ]
        )
        + "\n"
    )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for gone in {path.stem for path in FOLDER.glob("*.yaml")} - set(PROFILES):
        (FOLDER / f"{gone}.yaml").unlink()
    for name in PROFILES:
        (FOLDER / f"{name}.yaml").write_text(golden(name))
