"""OpenVINO on the CPU, the default engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from service.artifact import UnquantizedPrecision
from service.host import cpus
from service.runtimes import Inputs, Logits, RuntimeUnavailable
from service.runtimes.forms import Form, forms

log = logging.getLogger(__name__)

_HINTS = {"f32": ov.Type.f32, "bf16": ov.Type.bf16}


def compiled(
    model: Path | ov.Model, precision: str, threads: int, extra_options: Mapping[str, Any] = {}
) -> ov.CompiledModel:
    """Return a model that computes in `precision` what it does not quantize.

    `extra_options` are further options of OpenVINO. Raises its RuntimeError if it cannot compile.
    """
    core = ov.Core()
    graph = core.read_model(model) if isinstance(model, Path) else model
    options = {
        # Without this hint OpenVINO chooses bf16 by itself.
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # A graph's time must not depend on its weights. A matrix product over subnormals, which
        # change no answer, took 150 times as long without this option, and no longer with it.
        "CPU_DENORMALS_OPTIMIZATION": not selects_integers(graph),
        **extra_options,
    }
    # The engine's threads inherit the mode from the thread that compiles, and that thread keeps it.
    # So a thread of its own compiles, and no other code runs with flushed subnormals.
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as compiling:
        return compiling.submit(core.compile_model, graph, OpenVinoRuntime.device, options).result()


def selects_integers(graph: ov.Model) -> bool:
    """Return whether a graph selects between integers.

    OpenVINO selects wrongly while it flushes subnormals to zero. Its AVX2 code compares the
    condition as a float, and an integer 1 has the bits of a subnormal: flushed, it is 0, so every
    selection takes the other branch. Subgraphs are not searched; a graph that has one counts as
    selecting.
    """
    nodes = graph.get_ordered_ops()
    if any(node.get_type_name() in ("If", "Loop", "TensorIterator") for node in nodes):
        return True
    return any(
        node.get_type_name() == "Select" and node.output(0).get_element_type().is_integral()
        for node in nodes
    )


class OpenVinoRuntime:
    """A compiled model on the CPU."""

    name = "openvino"
    device = "CPU"
    in_flight = 1

    def __init__(
        self,
        model: Path,
        precision: str,
        threads: int,
        lowest_unquantized: UnquantizedPrecision | None = None,
        packs: bool = False,
        narrows: bool = True,
    ) -> None:
        """Compile a model.

        `lowest_unquantized` is the lowest precision for what an int8 graph does not quantize, the
        one in which its gate was passed; None: any. With `packs` the graph reads several texts in
        a row, if `pack` supports it. With `narrows` the last layer is computed for first tokens
        only.
        """
        native = cpus.native_precisions()
        self.unquantized_precision: UnquantizedPrecision | None = None
        """Precision of what an int8 graph does not quantize; None for other graphs."""
        if precision == "i8":
            # Native bf16 is the fastest. Emulated, it would cost more time than int8 saves.
            fast = "bf16" in native and lowest_unquantized != "f32"
            self.unquantized_precision = "bf16" if fast else "f32"
        self.computes_in = computed = self.unquantized_precision or precision
        try:
            form, graph = _compiled_form(forms(model, packs, narrows), computed, threads)
        except RuntimeError as error:
            raise RuntimeUnavailable(
                f"OpenVINO cannot run {model.name} in {precision} on this CPU: {error}"
            ) from None
        self.grid = form.grid
        self.graph_digest: str | None = form.digest
        in_use = graph.get_property("INFERENCE_PRECISION_HINT")
        if in_use != _HINTS[computed]:
            raise RuntimeUnavailable(
                f"OpenVINO was asked for {computed} and uses {in_use.get_type_name()}; choose"
                " another --variant."
            )
        if precision not in native:
            log.warning("this CPU emulates the precision", extra={"precision": precision})
        self.precision = precision
        self.flush_to_zero = bool(graph.get_property("CPU_DENORMALS_OPTIMIZATION"))
        self._request = graph.create_infer_request()
        self._read: Inputs = {}
        self._places = {
            name: place for place, port in enumerate(graph.inputs) for name in port.get_names()
        }

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch and return a function that waits for its logits."""
        if self.grid.supports_packing and "position_ids" not in inputs:
            places = _unpacked_places(*inputs["input_ids"].shape)
            inputs = {**inputs, **{name: places[name] for name in places if name in self._places}}
        # One tensor at a time and without copies: passing all arrays by name takes as long as a
        # small model's run.
        for name, array in inputs.items():
            self._request.set_input_tensor(self._places[name], ov.Tensor(array, shared_memory=True))
        # The request holds no reference to the arrays that it reads.
        self._read = inputs
        self._request.start_async()
        return self._wait

    def _wait(self) -> Logits:
        self._request.wait()
        # A copy: the tensor belongs to the request, which the next batch overwrites.
        return np.array(self._request.get_output_tensor(0).data, np.float32)


def _compiled_form(
    possible: Iterator[Form], precision: str, threads: int
) -> tuple[Form, ov.CompiledModel]:
    """Return the first form that can be compiled; the RuntimeError of the last if none can."""
    for form in possible:
        try:
            return form, compiled(form.graph, precision, threads)
        except Exception as error:
            if form.log_without is None:
                raise
            form.log_without(f"{type(error).__name__}: {error}")
    raise AssertionError("the last form is that of the export")


def _unpacked_places(rows: int, length: int) -> Inputs:
    """Return the further inputs of a packed graph, (B, L) and (B, 1), for one text in each row."""
    return {
        "position_ids": np.tile(np.arange(length), (rows, 1)),
        "first_tokens": np.zeros((rows, 1), np.int64),
    }
