"""
Export and service also work on processors without AVX-512, VNNI and bf16, which clouds rent too.

A process of its own limits the engine to AVX2, because the engine reads the variable once. The
variable is oneDNN's, and OpenVINO's own kernels follow oneDNN. On a processor without AVX-512 it
changes nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.export.corpus import FAMILIES

# The tests that compare each family's answers with transformers.
COMPARISONS = tuple(
    f"tests/export/test_corpus.py::test_a_checkpoint_is_answered_as_the_pipeline_answers_it_or_refused[{family.name}"
    " (4)]"
    for family in FAMILIES
)
MODULES = (
    "tests/export/test_families.py",
    "tests/export/test_batch_invariance.py",
    "tests/export/test_gate.py",
    "tests/export/test_narrowed.py",
    "tests/export/test_packed.py",
    "tests/export/test_export.py",
    "tests/service/runtimes/test_runtimes.py",
    "tests/service/test_self_check.py",
)
ENVIRONMENT = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.timeout(1800)
def test_families_gates_and_parity_hold_on_avx2() -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *MODULES,
            *COMPARISONS,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]


def test_the_engine_really_is_limited_to_avx2() -> None:
    code = (
        "import numpy as np, openvino as ov; from openvino import opset13 as ops\nx ="
        " ops.parameter([-1, 64], np.float32)\ncompiled ="
        " ov.Core().compile_model(ov.Model([ops.gelu(ops.exp(x), 'erf')], [x]), 'CPU',"
        " {'INFERENCE_PRECISION_HINT': ov.Type.f32})\ncompiled(np.ones((4, 64),"
        " np.float32))\nprint(*{node.get_rt_info()['primitiveType'].astype(str) for node in"
        " compiled.get_runtime_model().get_ordered_ops()})"
    )
    process = subprocess.run(
        [sys.executable, "-c", f"import command; {code}"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert "avx2" in process.stdout, process.stderr
    assert "avx512" not in process.stdout
