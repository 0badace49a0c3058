"""The documentation names files, paths and headings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.settings import Settings

PAGES = [
    *sorted(Path().glob("*.md")),
    *sorted(Path("docs").glob("*.md")),
    Path("k8s/README.md"),
    Path("k8s/runbooks.md"),
]
LINK = re.compile(r"\]\((?![a-z]+:)([^)#]*)#?([^)]*)\)")
REPOSITORY_PATH = re.compile(
    r"`((?:service|export|proof|graphs|training|client|loadtests|benchmarks|tests|k8s|examples|docs)"
    r"/[\w./-]*)`"
)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page} links to {target}#{anchor}"


# The changelog names files that were renamed.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_every_path_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    for path in REPOSITORY_PATH.findall(page.read_text(encoding="utf-8")):
        assert Path(path).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    settings = {f"DRBERT_{name.upper()}" for name in Settings.model_fields}
    settings.add("DRBERT_API_KEY")  # of drbert-classify
    named = set(re.findall(r"DRBERT_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))
    assert named <= settings, named - settings


def test_every_module_in_the_pictures_of_the_architecture_exists() -> None:
    text = Path("docs/architecture.md").read_text(encoding="utf-8")
    pictures = re.findall(r"^```mermaid\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    files = re.findall(r'\["([\w/]+(?:\.py|/)(?=[<, ]))(?:, ([\w/]+\.py))?', " ".join(pictures))
    assert len(files) > 10
    for first, second in files:
        for name in filter(None, (first, second)):
            sibling = Path(first).parent / name
            candidates = [Path(name), Path("service", name), Path("service", sibling)]
            assert any(path.exists() for path in candidates), name
