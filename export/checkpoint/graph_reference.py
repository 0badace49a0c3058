"""
The reference for a graph that was exported elsewhere: what ONNX Runtime answers by that graph.

Nobody has compared it with torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from command import BadInput, Unavailable, first_line, how_to_install
from export.checkpoint.reference import Reference


class GraphReference(Reference):
    """An ONNX graph and its tokenizer, as ONNX Runtime runs it without any optimisation."""

    engine = "ONNX Runtime"
    can_emulate_bf16 = False

    def __init__(
        self,
        graph: Path,
        tokenizer: PreTrainedTokenizerFast,
        max_tokens: int,
        embedding_rows: int,
        labels_tokens: bool,
    ) -> None:
        try:
            import onnxruntime as ort
        except ModuleNotFoundError:
            raise Unavailable(
                "An ONNX graph is compared with itself by ONNX Runtime, which is not installed;"
                f" {how_to_install('portable')}."
            ) from None
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        # As in the service: ONNX Runtime sets this for all sessions of a process by its first one.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            self._session: Any = ort.InferenceSession(graph, options)
        except Exception as error:  # It raises a class of its own for each of its codes.
            raise BadInput(f"ONNX Runtime cannot run {graph}: {first_line(error)}") from None
        self.inputs = tuple(each.name for each in self._session.get_inputs())
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.embedding_rows = embedding_rows
        self.labels_tokens = labels_tokens

    def _answer(self, inputs: dict[str, npt.NDArray[np.int64]]) -> npt.NDArray[np.float32]:
        zeros = np.zeros_like(inputs["input_ids"])
        # A tokenizer without types leaves them to the model, which takes the first type.
        arrays = {name: inputs.get(name, zeros) for name in self.inputs}
        try:
            return np.asarray(self._session.run(None, arrays)[0][0])
        except Exception as error:
            raise RuntimeError(first_line(error)) from error

    def _accepts(self, name: str) -> bool:
        return name in self.inputs
