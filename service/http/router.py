"""
The paths on which texts are classified, each in its dialect.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Scope

from service.http.dialects.huggingface import HuggingFace
from service.http.dialects.infinity import Infinity
from service.http.dialects.kserve import KServe
from service.http.dialects.native import Native
from service.http.dialects.open_inference import OpenInference
from service.http.dialects.tei import Tei
from service.http.endpoint import Around, Classify
from service.registry import Models


class Classifications:
    """The paths on which a text can be classified, each in its dialect."""

    def __init__(self, models: Models, around: Around) -> None:
        native = Classify(models, around, Native())
        chosen = (
            Classify(models, around, Infinity())
            if models.settings.classify_dialect == "infinity"
            else native
        )
        hugging_face, text_embeddings = (
            Classify(models, around, dialect, "inputs") for dialect in (HuggingFace(), Tei())
        )
        self._fixed: dict[str, ASGIApp] = {
            "/v1/classify": native,
            "/classify": chosen,
            "/predict": text_embeddings,
            "/": text_embeddings if models.settings.root_dialect == "tei" else hugging_face,
        }
        open_inference = Classify(models, around, OpenInference(), "text")
        named: dict[str, ASGIApp] = {
            "/models/{model}": hugging_face,
            "/v1/models/{model}:predict": Classify(models, around, KServe(), "instances"),
            "/v2/models/{model}/versions/{version}/infer": open_inference,
            "/v2/models/{model}/infer": open_inference,
        }
        # A model's name may hold slashes, as a hub's do.
        self._named = [
            (
                re.compile(
                    route.replace("{model}", "(?P<model>.+)").replace(
                        "{version}", "(?P<version>[^/]+)"
                    ),
                    re.DOTALL,
                ),
                route,
                app,
            )
            for route, app in named.items()
        ]

    def at(self, scope: Scope) -> ASGIApp | None:
        """What answers a POST there; the path's route, and the model and version that it names, are
        noted in the scope's state.
        """
        if scope["method"] != "POST":
            return None
        path: str = scope["path"]
        if path in self._fixed:
            return self._fixed[path]
        for pattern, route, app in self._named:
            if found := pattern.fullmatch(path):
                scope["state"].update(found.groupdict(), route=route)
                return app
        return None
