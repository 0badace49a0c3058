"""
Weightless artifacts: small enough to carry to a machine where nothing can be exported.

    remove_weights(artifact, folder)      where export is installed: keep the graphs, and of each
                                          large weight only its size, mean and deviation
    randomize_weights(folder, artifact)   anywhere: draw weights from these figures and write a
                                          whole artifact with a valid checksum

A graph's time does not depend on its weights, so random ones serve. Its answers mean nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command import BadInput
from service.artifact import MANIFEST, Manifest, Variant, read_manifest, sha256, with_checksum

STATISTICS = "skeleton.json"
"""File of a weightless artifact with its manifest and the statistics of its weights."""
# A smaller tensor stays in the graph.
LARGE_BYTES = 4096
_DTYPES = {"float32": np.float32, "float16": np.float16}


def remove_weights(artifact: Path, folder: Path, variants: Sequence[str]) -> None:
    """Write the named variants of an artifact without their weights to the new folder `folder`.

    The variants' files must be ONNX files.
    """
    manifest = read_manifest(artifact)
    folder.mkdir(parents=True)
    shutil.copy(artifact / "tokenizer.json", folder)
    chosen = {name: manifest.variants[name] for name in variants}
    statistics = {}
    for variant in chosen.values():
        for file in variant.files:
            statistics[file] = _remove_weights(artifact / file, folder / file)
    external = {name: _with_weight_files(variant) for name, variant in chosen.items()}
    weightless = manifest.model_copy(update={"variants": external})
    (folder / STATISTICS).write_text(
        json.dumps({"manifest": weightless.model_dump(), "weights": statistics}) + "\n"
    )


def randomize_weights(folder: Path, target: Path, seed: int) -> Path:
    """Write a whole artifact to the new folder `target` and return that folder.

    `folder` is a weightless artifact; the weights are drawn from `seed`. Raises BadInput if
    `folder` is not a weightless artifact.
    """
    try:
        weightless = json.loads((folder / STATISTICS).read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{folder} is not a weightless artifact ({error}). Write some with `python -m"
            f" benchmarks gpu --pack {folder.parent}`."
        ) from None
    target.mkdir(parents=True)
    for path in folder.iterdir():
        if path.name != STATISTICS:
            shutil.copy(path, target)
    rng = np.random.default_rng(seed)
    for file, tensors in weightless["weights"].items():
        with (target / weights_file(file)).open("wb") as out:
            for tensor in tensors:
                normal = rng.standard_normal(tensor["count"], np.float32)
                weights = normal * tensor["deviation"] + tensor["mean"]
                out.write(weights.astype(_DTYPES[tensor["dtype"]]).tobytes())
    files = {path.name: sha256(path) for path in sorted(target.iterdir())}
    # The self-check holds the answers of the weights that were removed.
    variants = {
        name: variant | {"self_check": None}
        for name, variant in weightless["manifest"]["variants"].items()
    }
    changes = {"files": files, "variants": variants, "probes": []}
    manifest = with_checksum(Manifest.model_validate(weightless["manifest"] | changes))
    (target / MANIFEST).write_text(manifest.model_dump_json())
    return target


def weights_file(file: str) -> str:
    """Return the name of the file with the external weights of the graph `file`."""
    return f"{file}.weights"


def _with_weight_files(variant: Variant) -> Variant:
    files = []
    for file in variant.files:
        files += [file, weights_file(file)]
    return variant.model_copy(update={"files": files})


def _remove_weights(source: Path, target: Path) -> list[dict[str, Any]]:
    """Write a graph whose large weights lie in an external file, and return their statistics.

    The weights follow one another in that file, in the order of the statistics.
    """
    import onnx
    from onnx import external_data_helper, numpy_helper

    model = onnx.load(source)
    statistics: list[dict[str, Any]] = []
    offset = 0
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.nbytes < LARGE_BYTES or array.dtype.name not in _DTYPES:
            continue
        wide = array.astype(np.float64)
        statistics.append(
            {
                "count": array.size,
                "dtype": array.dtype.name,
                "mean": float(wide.mean()),
                "deviation": float(wide.std()),
            }
        )
        external_data_helper.set_external_data(
            tensor, weights_file(source.name), offset=offset, length=array.nbytes
        )
        tensor.ClearField("raw_data")
        offset += array.nbytes
    target.write_bytes(model.SerializeToString())
    return statistics
