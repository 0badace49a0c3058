"""
What is exported and served holds on processors without AVX-512, VNNI and bf16 too: every other
machine that clouds rent.

The engine is held to AVX2 in a process of its own, for it looks at the variable once. It is
oneDNN's, on whose answer OpenVINO's own kernels choose too. On a processor of that kind the
variable changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.export.corpus import FAMILIES

# What transformers answers of each family, as test_corpus.py asks it.
AS_TRANSFORMERS = tuple(
    f"tests/export/test_corpus.py::test_a_checkpoint_is_answered_as_the_pipeline_answers_it_or_refused[{family.name}"
    " (4)]"
    for family in FAMILIES
)
MODULES = (
    "tests/export/test_families.py",
    "tests/export/test_company.py",
    "tests/export/test_gate.py",
    "tests/export/test_packed.py",
    "tests/export/test_export.py",
    "tests/service/runtimes/test_runtimes.py",
    "tests/service/test_self_check.py",
)
HELD = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.timeout(1800)
def test_families_gates_and_parity_hold_on_avx2() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *MODULES,
            *AS_TRANSFORMERS,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=HELD,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_engine_really_is_held_to_avx2() -> None:
    code = (
        "import numpy as np, openvino as ov; from openvino import opset13 as ops\nx ="
        " ops.parameter([-1, 64], np.float32)\ncompiled ="
        " ov.Core().compile_model(ov.Model([ops.gelu(ops.exp(x), 'erf')], [x]), 'CPU',"
        " {'INFERENCE_PRECISION_HINT': ov.Type.f32})\ncompiled(np.ones((4, 64),"
        " np.float32))\nprint(*{node.get_rt_info()['primitiveType'].astype(str) for node in"
        " compiled.get_runtime_model().get_ordered_ops()})"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import command; {code}"],
        capture_output=True,
        text=True,
        check=False,
        env=HELD,
    )
    assert "avx2" in done.stdout, done.stderr
    assert "avx512" not in done.stdout
