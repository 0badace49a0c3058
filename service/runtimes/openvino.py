"""
OpenVINO on the CPU: the default engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from service.artifact import Rest
from service.batching.shapes import CPU, PACKED
from service.host import cpus
from service.runtimes import Inputs, Logits, RuntimeUnavailable
from service.runtimes.packed import NotPackable, pack

log = logging.getLogger(__name__)

_HINTS = {"f32": ov.Type.f32, "bf16": ov.Type.bf16}


def compiled(
    model: Path | ov.Model, precision: str, threads: int, more: Mapping[str, Any] = {}
) -> ov.CompiledModel:
    """A graph that computes in `precision` what it does not quantise, with `more` options.
    RuntimeError from OpenVINO if it cannot.
    """
    core = ov.Core()
    graph = core.read_model(model) if isinstance(model, Path) else model
    options = {
        # Set in every variant: without one OpenVINO takes bf16 by itself.
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # One graph must take one time whatever its weights: a matrix product over subnormals, which
        # change no answer, was measured to take 150 times as long without this, and no longer than
        # any other with it.
        "CPU_DENORMALS_OPTIMIZATION": not selects_integers(graph),
        **more,
    }
    # In a thread of its own: the engine's threads take the setting from the one that compiles, and
    # it would keep it for everything else it computes.
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as compiling:
        return compiling.submit(core.compile_model, graph, OpenVinoRuntime.device, options).result()


def selects_integers(graph: ov.Model) -> bool:
    """Return whether a graph chooses between integers, which OpenVINO gets wrong while it flushes
    subnormals to zero.

    Its code for AVX2 compares the condition as a float, and an integer 1 has the bits of a
    subnormal: flushed, it is 0, so every choice falls on the other branch. Subgraphs are not
    searched: a graph with any counts as one that chooses.
    """
    nodes = graph.get_ordered_ops()
    if any(node.get_type_name() in ("If", "Loop", "TensorIterator") for node in nodes):
        return True
    return any(
        node.get_type_name() == "Select" and node.output(0).get_element_type().is_integral()
        for node in nodes
    )


class OpenVinoRuntime:
    name = "openvino"
    device = "CPU"
    in_flight = 1

    def __init__(
        self,
        model: Path,
        precision: str,
        threads: int,
        rest: Rest | None = None,
        packs: bool = False,
    ) -> None:
        """`rest` is the lowest precision for what an int8 graph does not quantise, the one its gate
        was passed in; None: any.

        With `packs` the graph reads several texts in a row, if it is made as `pack` knows it.
        """
        # The fastest that the processor has: bf16 where it is native; emulated it would undo what
        # int8 gains.
        native = cpus.native_precisions()
        self.rest: Rest | None = (
            ("bf16" if "bf16" in native and rest != "f32" else "f32") if precision == "i8" else None
        )
        self.computes_in = computed = self.rest or precision
        self.grid = CPU
        try:
            graph = self._packed(model, computed, threads) if packs else None
            if graph is None:
                graph = compiled(model, computed, threads)
        except RuntimeError as error:
            raise RuntimeUnavailable(
                f"OpenVINO cannot run {model.name} in {precision} on this CPU: {error}"
            ) from None
        in_use = graph.get_property("INFERENCE_PRECISION_HINT")
        if in_use != _HINTS[computed]:
            raise RuntimeUnavailable(
                f"OpenVINO was asked for {computed} and took {in_use.get_type_name()}; choose"
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

    def _packed(self, model: Path, precision: str, threads: int) -> ov.CompiledModel | None:
        """The graph that reads several texts in a row, whose grid is then this runtime's; None if
        it cannot be made to.
        """
        read = ov.Core().read_model(model)
        try:
            pack(read)
            graph = compiled(read, precision, threads)
        except (
            Exception
        ) as reason:  # Shared rows are only faster: whatever is in their way, a row each is right.
            why = (
                f"the graph is not known: {reason}"
                if isinstance(reason, NotPackable)
                else f"{type(reason).__name__}: {reason}"
            )
            log.warning("every text has a row of its own", extra={"why": why})
            return None
        self.grid = PACKED
        return graph

    def start(self, inputs: Inputs) -> Callable[[], Logits]:
        if self.grid.supports_packing and "first_tokens" not in inputs:
            inputs = {**inputs, **_alone_in_their_rows(*inputs["input_ids"].shape)}
        # Tensor by tensor and without copies: handing over the arrays by name costs as much as a
        # small model.
        for name, array in inputs.items():
            self._request.set_input_tensor(self._places[name], ov.Tensor(array, shared_memory=True))
        # The request does not keep what it reads.
        self._read = inputs
        self._request.start_async()
        return self._wait

    def _wait(self) -> Logits:
        self._request.wait()
        # A copy: the tensor belongs to the request, which the next batch overwrites.
        return np.array(self._request.get_output_tensor(0).data, np.float32)


def _alone_in_their_rows(rows: int, length: int) -> Inputs:
    """What a graph that packs is told besides of texts that share no row."""
    return {
        "position_ids": np.tile(np.arange(length), (rows, 1)),
        "first_tokens": np.arange(0, rows * length, length),
    }
