"""
PyTorch on the same GPU: what its matrix products reach, and the same model in fp16, eager and as
CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.engine import inputs, seconds
from benchmarks.gpu.rig import POSITIONS, Rig
from benchmarks.harness.checkpoints import SIZES
from benchmarks.harness.findings import Findings, Table
from benchmarks.harness.flops import attention_flops
from command import Unavailable

BATCHES = (1, 8, 32)
LENGTH = 128


def measure(rig: Rig) -> Findings:
    """The engine's time by torch's, and its share of the best matrix product."""
    try:
        import torch
    except ImportError:
        raise Unavailable(
            "PyTorch is not installed; pip install torch, a build for CUDA 13."
        ) from None
    if not rig.rehearsal and not torch.cuda.is_available():
        raise Unavailable(
            f"PyTorch {torch.__version__} cannot use this GPU; install a build for CUDA 13."
        )
    peak = _peak(torch, rig.rehearsal)
    model = _model(torch, rig)
    rows, values = [], dict[str, Any](peak_flops=peak)
    length = min(LENGTH, POSITIONS[rig.size])
    for size in [size for size in BATCHES if size in rig.engine().grid.batch_sizes]:
        given = inputs(rig, size, length)
        ours = seconds(lambda given=given: rig.engine().start(given)())  # type: ignore[misc]
        eager = seconds(_eager(torch, model, given))
        graph = eager if rig.rehearsal else seconds(_captured(torch, model, given))
        share = _flops(rig, size, length) / float(np.median(ours)) / peak
        values[f"{size}x{length}"] = {
            "ours_ms": (ours * 1e3).tolist(),
            "eager_ms": (eager * 1e3).tolist(),
            "graph_ms": (graph * 1e3).tolist(),
            "share": share,
        }
        middle = [float(np.median(times)) for times in (ours, eager, graph)]
        rows.append(
            [
                f"{size} × {length}",
                *(f"{ms * 1e3:.3f}" for ms in middle),
                f"{middle[1] / middle[0]:.2f}",
                f"{middle[2] / middle[0]:.2f}",
                f"{share:.0%}",
            ]
        )
    return Findings(
        "torch",
        f"How does the engine stand beside PyTorch {torch.__version__} and the GPU's matrix"
        " products?",
        [
            Table(
                "",
                (
                    "batch × length",
                    "ours, ms",
                    "torch eager, ms",
                    "torch CUDA graph, ms",
                    "eager by ours",
                    "graph by ours",
                    "ours, of the peak",
                ),
                rows,
                f"Peak: {peak / 1e12:.0f} TFLOP/s, the best large fp16 product of this run. Copies"
                " to and from the GPU are counted on all sides.",
            )
        ],
        (),
        values,
    )


def _peak(torch: Any, rehearsal: bool) -> float:
    """FLOP/s of the best large matrix product."""
    device, dtype, sizes = (
        ("cpu", torch.float32, (256,)) if rehearsal else ("cuda", torch.float16, (4096, 8192))
    )
    best = 0.0
    for n in sizes:
        left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

        def product(left: Any = left, right: Any = right) -> None:
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()

        best = max(best, 2 * n**3 / float(np.median(seconds(product, 20))))
    return best


def _model(torch: Any, rig: Rig) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=8000, max_position_embeddings=POSITIONS[rig.size], **SIZES[rig.size])
    ).eval()
    return model if rig.rehearsal else model.half().cuda()


def _eager(torch: Any, model: Any, given: Any) -> Callable[[], object]:
    device = next(model.parameters()).device

    def run() -> object:
        with torch.inference_mode():
            return (
                model(**{name: torch.from_numpy(array).to(device) for name, array in given.items()})
                .logits.float()
                .cpu()
            )

    return run


def for_capture(torch: Any, given: Any) -> dict[str, Any]:
    """The inputs with the mask in a shape that transformers takes as it is.

    Of a mask (B, L) it asks whether anything is masked at all, and a captured graph can ask
    nothing.
    """
    import transformers

    held = {name: torch.from_numpy(array) for name, array in given.items()}
    mask = held["attention_mask"]
    before_5 = int(transformers.__version__.partition(".")[0]) < 5
    return {
        **held,
        "attention_mask": mask[:, None, :] if before_5 else mask[:, None, None, :].bool(),
    }


def _captured(torch: Any, model: Any, given: Any) -> Callable[[], object]:
    """The same as one CUDA graph, its input copied to where it was when the graph was captured."""
    held = {name: tensor.cuda() for name, tensor in for_capture(torch, given).items()}
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            model(**held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        logits = model(**held).logits.float()

    def run() -> object:
        for name, tensor in for_capture(torch, given).items():
            held[name].copy_(tensor)
        graph.replay()
        return logits.cpu()

    return run


def _flops(rig: Rig, size: int, length: int) -> int:
    sizes = SIZES[rig.size]
    own = attention_flops(sizes["num_hidden_layers"], sizes["hidden_size"], length)
    return size * (rig.artifacts["bert"].manifest.flops_per_token * length + own)
