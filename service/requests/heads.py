"""
The heads of a model with several, as a request names them.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.artifact import Manifest
from service.errors import InvalidInput


def check_heads(manifest: Manifest, names: Sequence[str]) -> None:
    """Raise InvalidInput unless each of these is another head of the model."""
    if not manifest.heads:
        raise InvalidInput(
            "The model has one head; leave heads out. /info lists the heads of each model.",
            param="heads",
        )
    for place, name in enumerate(names):
        if name not in manifest.heads:
            raise InvalidInput(
                f"heads[{place}] is no head of the model; it has {', '.join(manifest.heads)}.",
                param=f"heads[{place}]",
            )
        if name in names[:place]:
            raise InvalidInput(f"heads[{place}] repeats an earlier head.", param=f"heads[{place}]")
