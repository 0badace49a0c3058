"""
The only place that knows an exporter: a torch classifier becomes a plain fp32 ONNX graph through optimum.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from pathlib import Path

from torch import nn

from command import BadInput

OPSET = 18


def export_onnx(model: nn.Module, tokenizer: Path, target: Path) -> None:
    """Writes `model` as one .onnx file with symbolic batch and sequence length."""
    # optimum warns of shapes that tracing fixes; verification shows whether one mattered.
    logging.getLogger("optimum").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from optimum.exporters.onnx import main_export

        plain, exported = Path(folder) / "model", Path(folder) / "onnx"
        model.save_pretrained(plain)                                                # type: ignore[operator]
        for path in tokenizer.parent.glob("*token*.json"):
            shutil.copy(path, plain)
        try:
            main_export(
                str(plain), exported, task="text-classification", framework="pt", library_name="transformers",
                opset=OPSET, device="cpu", dtype="fp32", do_validation=False, no_post_process=True, local_files_only=True,
            )
        except (ValueError, NotImplementedError, KeyError) as error:
            raise BadInput(f"optimum cannot export this model: {str(error).splitlines()[0]}") from None
        weights = exported / "model.onnx_data"
        if weights.exists():
            raise BadInput("The graph passes ONNX's limit of 2 GiB for one file; such models are not supported.")
        shutil.move(exported / "model.onnx", target)
