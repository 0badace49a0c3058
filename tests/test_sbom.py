"""A software bill of materials, as `make sbom` writes it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.utils import canonicalize_name

from tests import requirements


@requirements.sbom
def test_the_bill_lists_the_installed_packages_and_fits_its_schema(tmp_path: Path) -> None:
    command = re.search(r"^SBOM := \S+ (.*)$", Path("Makefile").read_text(), re.M)
    assert command
    output = tmp_path / "full.json"
    # --validate fails where the file does not fit CycloneDX's schema.
    subprocess.run(
        [requirements.CYCLONEDX, *command[1].split(), "--output-file", output, sys.executable],
        capture_output=True,
        check=True,
    )
    bill = json.loads(output.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "drbert-serve"
    listed = {
        (canonicalize_name(component["name"]), component["version"])
        for component in bill["components"]
    }
    # Not from sys.path: setuptools adds the folder of its bundled packages once it is imported.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {
        (canonicalize_name(each.name), each.version)
        for each in importlib.metadata.distributions(path=folders)
    }
    assert listed | {("drbert-serve", importlib.metadata.version("drbert-serve"))} == installed
    assert {"fastapi", "openvino", "tokenizers"} <= {name for name, _ in listed}
    assert all(
        component["purl"].startswith("pkg:pypi/")
        for component in bill["components"]
        if component["name"] != "drbert-serve"
    )
