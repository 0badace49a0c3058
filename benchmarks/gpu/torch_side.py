"""
PyTorch on the same GPU: its matrix products, and the same model in fp16, eager and as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.engine import inputs, seconds
from benchmarks.gpu.gpu_setup import POSITIONS, GpuSetup
from benchmarks.harness.checkpoints import SIZES
from benchmarks.harness.findings import Findings, Table
from benchmarks.harness.flops import attention_flops
from command import Unavailable

BATCHES = (1, 8, 32)
LENGTH = 128


def measure(setup: GpuSetup) -> Findings:
    """Return the engine's time by torch's, and its share of the best matrix product."""
    try:
        import torch
    except ImportError:
        raise Unavailable(
            "PyTorch is not installed; install a build for CUDA 13 (pip install torch)."
        ) from None
    if not setup.dry_run and not torch.cuda.is_available():
        raise Unavailable(
            f"PyTorch {torch.__version__} cannot use this GPU; install a build for CUDA 13."
        )
    peak = _peak(torch, setup.dry_run)
    model = _model(torch, setup)
    rows, values = [], dict[str, Any](peak_flops=peak)
    length = min(LENGTH, POSITIONS[setup.size])
    for size in [size for size in BATCHES if size in setup.engine().grid.batch_sizes]:
        batch = inputs(setup, size, length)
        ours = seconds(lambda batch=batch: setup.engine().start(batch)())  # type: ignore[misc]
        eager = seconds(_eager(torch, model, batch))
        graph = eager if setup.dry_run else seconds(_captured(torch, model, batch))
        share = _flops(setup, size, length) / float(np.median(ours)) / peak
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
    columns = (
        "batch × length",
        "ours, ms",
        "torch eager, ms",
        "torch CUDA graph, ms",
        "eager by ours",
        "graph by ours",
        "ours, of the peak",
    )
    note = (
        f"Peak: {peak / 1e12:.0f} TFLOP/s, the best large fp16 product of this run. Copies to and"
        " from the GPU are counted on all sides."
    )
    return Findings(
        "torch",
        f"How does the engine compare with PyTorch {torch.__version__} and the GPU's matrix"
        " products?",
        [Table("", columns, rows, note)],
        (),
        values,
    )


def _peak(torch: Any, dry_run: bool) -> float:
    """Return the FLOP/s of the best large matrix product."""
    device, dtype, sizes = (
        ("cpu", torch.float32, (256,)) if dry_run else ("cuda", torch.float16, (4096, 8192))
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


def _model(torch: Any, setup: GpuSetup) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=8000, max_position_embeddings=POSITIONS[setup.size], **SIZES[setup.size]
        )
    ).eval()
    return model if setup.dry_run else model.half().cuda()


def _eager(torch: Any, model: Any, batch: Any) -> Callable[[], object]:
    device = next(model.parameters()).device

    def run() -> object:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            return model(**tensors).logits.float().cpu()

    return run


def for_capture(torch: Any, batch: Any) -> dict[str, Any]:
    """Return the inputs with a mask in a shape that transformers uses unchanged.

    For a mask of shape (B, L) it checks on the host whether anything is masked, which a captured
    graph cannot do.
    """
    import transformers

    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    mask = tensors["attention_mask"]
    before_5 = int(transformers.__version__.partition(".")[0]) < 5
    mask = mask[:, None, :] if before_5 else mask[:, None, None, :].bool()
    return {**tensors, "attention_mask": mask}


def _captured(torch: Any, model: Any, batch: Any) -> Callable[[], object]:
    """Return the same call as one CUDA graph, which copies its input to the captured buffers."""
    buffers = {name: tensor.cuda() for name, tensor in for_capture(torch, batch).items()}
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        for _ in range(3):
            model(**buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, stream=stream):
        logits = model(**buffers).logits.float()

    def run() -> object:
        for name, tensor in for_capture(torch, batch).items():
            buffers[name].copy_(tensor)
        graph.replay()
        return logits.cpu()

    return run


def _flops(setup: GpuSetup, size: int, length: int) -> int:
    sizes = SIZES[setup.size]
    attention = attention_flops(sizes["num_hidden_layers"], sizes["hidden_size"], length)
    return size * (setup.artifacts["bert"].manifest.flops_per_token * length + attention)
