"""
An artifact without its weights, small enough to be carried anywhere, and grown again where it is
measured.

    strip(artifact, skeleton)   where export is installed: keeps the graphs, and of each large
                                weight its shape, mean and spread
    grow(skeleton, artifact)    anywhere: draws weights of that kind, and seals a whole artifact
                                with one variant or more

A graph's time depends on no weight, so random ones are as good; its answers mean nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput
from service.artifact import MANIFEST, Manifest, read_manifest, sealed, sha256

SKELETON = "skeleton.json"
# What is smaller stays in the graph.
LARGE_BYTES = 4096
_DTYPES = {"float32": np.float32, "float16": np.float16}


def strip(artifact: Path, skeleton: Path, variants: Sequence[str]) -> None:
    """Writes those variants of `artifact` without their weights to the new folder `skeleton`; they
    are .onnx files.
    """
    manifest = read_manifest(artifact)
    skeleton.mkdir(parents=True)
    shutil.copy(artifact / "tokenizer.json", skeleton)
    kept = {name: manifest.variants[name] for name in variants}
    weights = {
        file: _strip(artifact / file, skeleton / file)
        for variant in kept.values()
        for file in variant.files
    }
    told = manifest.model_copy(
        update={
            "variants": {
                name: variant.model_copy(
                    update={
                        "files": [f for file in variant.files for f in (file, weights_of(file))]
                    }
                )
                for name, variant in kept.items()
            },
        }
    )
    (skeleton / SKELETON).write_text(
        json.dumps({"manifest": told.model_dump(), "weights": weights}) + "\n"
    )


def grow(skeleton: Path, target: Path, seed: int) -> Path:
    """A whole artifact of `skeleton` in the new folder `target`, its weights drawn from `seed`."""
    try:
        told = json.loads((skeleton / SKELETON).read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{skeleton} is no skeleton of an artifact ({error}); `python -m benchmarks gpu --pack"
            f" {skeleton.parent}` makes some."
        ) from None
    target.mkdir(parents=True)
    for path in skeleton.iterdir():
        if path.name != SKELETON:
            shutil.copy(path, target)
    draw = np.random.default_rng(seed)
    for file, tensors in told["weights"].items():
        with (target / weights_of(file)).open("wb") as out:
            for tensor in tensors:
                drawn = (
                    draw.standard_normal(tensor["count"], np.float32) * tensor["deviation"]
                    + tensor["mean"]
                )
                out.write(drawn.astype(_DTYPES[tensor["dtype"]]).tobytes())
    files = {path.name: sha256(path) for path in sorted(target.iterdir())}
    # The self-check holds the answers of the weights that are gone.
    variants = {
        name: variant | {"self_check": None}
        for name, variant in told["manifest"]["variants"].items()
    }
    manifest = sealed(
        Manifest.model_validate(
            told["manifest"] | {"files": files, "variants": variants, "probes": []}
        )
    )
    (target / MANIFEST).write_text(manifest.model_dump_json())
    return target


def weights_of(file: str) -> str:
    return f"{file}.weights"


def _strip(source: Path, target: Path) -> list[dict[str, Any]]:
    """Writes the graph with its large weights told to lie in a file of their own, one after the
    other, and says what they are like.
    """
    import onnx
    from onnx import external_data_helper, numpy_helper

    model = onnx.load(source)
    found: list[dict[str, Any]] = []
    offset = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < LARGE_BYTES or array.dtype.name not in _DTYPES:
            continue
        wide = array.astype(np.float64)
        found.append(
            {
                "count": array.size,
                "dtype": array.dtype.name,
                "mean": float(wide.mean()),
                "deviation": float(wide.std()),
            }
        )
        external_data_helper.set_external_data(
            tensor, weights_of(source.name), offset=offset, length=array.nbytes
        )
        tensor.ClearField("raw_data")
        offset += array.nbytes
    target.write_bytes(model.SerializeToString())
    return found
