"""
The paths on which texts are classified, and the dialect of each.

This router stands in front of FastAPI, which answers all other paths: a call here takes 10 µs,
through a FastAPI handler 874 µs (median of interleaved calls on one core). FastAPI still describes
these paths in /openapi.json (service/http/openapi.py).
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Scope

from service.http.context import HttpContext
from service.http.dialects.huggingface import HuggingFace
from service.http.dialects.infinity import Infinity
from service.http.dialects.kserve import KServe
from service.http.dialects.native import Native
from service.http.dialects.open_inference import OpenInference
from service.http.dialects.rerank import Rerank, Score
from service.http.dialects.routers import OrtServer, SemanticRouter
from service.http.dialects.tei import Tei
from service.http.dialects.tokens import Pooling, Tokens
from service.http.endpoint import ClassifyEndpoint


class ClassifyRouter:
    """POST /classify, and the same under the paths of other servers."""

    def __init__(self, context: HttpContext) -> None:
        settings = context.service.settings
        native = ClassifyEndpoint(context, Native())
        hugging_face = ClassifyEndpoint(context, HuggingFace())
        tei = ClassifyEndpoint(context, Tei())
        kserve = ClassifyEndpoint(context, KServe())
        open_inference = ClassifyEndpoint(context, OpenInference())
        score = ClassifyEndpoint(context, Score())
        self._by_path: dict[str, ASGIApp] = {
            "/classify": {
                "native": native,
                "infinity": ClassifyEndpoint(context, Infinity()),
                "semantic-router": ClassifyEndpoint(context, SemanticRouter()),
                "ort-server": ClassifyEndpoint(context, OrtServer()),
            }[settings.classify_dialect],
            "/v1/classify": native,
            "/predict": tei,
            "/": tei if settings.root_dialect == "tei" else hugging_face,
            # An error may be found before it is known in which format a request is.
            "/rerank": ClassifyEndpoint(
                context,
                Rerank(accepts_tei=True, refuses_as_tei=settings.root_dialect == "tei"),
            ),
            "/v1/rerank": ClassifyEndpoint(context, Rerank()),
            "/v2/rerank": ClassifyEndpoint(context, Rerank(returns_documents=False)),
            "/score": score,
            "/v1/score": score,
            "/tokens": ClassifyEndpoint(context, Tokens()),
            "/v1/tokens": ClassifyEndpoint(context, Tokens()),
            "/pooling": ClassifyEndpoint(context, Pooling()),
        }
        self._by_pattern = [
            (_pattern(route), route, endpoint)
            for route, endpoint in (
                ("/models/{model}", hugging_face),
                ("/v1/models/{model}:predict", kserve),
                ("/v2/models/{model}/versions/{version}/infer", open_inference),
                ("/v2/models/{model}/infer", open_inference),
            )
        ]

    def match(self, scope: Scope) -> ASGIApp | None:
        """Return the endpoint for the scope's path; None if no texts are classified there.

        The route, the model and the version that the path names are written to the scope's state.
        """
        if scope["method"] != "POST":
            return None
        path: str = scope["path"]
        endpoint = self._by_path.get(path)
        if endpoint is not None:
            return endpoint
        for pattern, route, named in self._by_pattern:
            match = pattern.fullmatch(path)
            if match:
                scope["state"].update(match.groupdict(), route=route)
                return named
        return None


def _pattern(route: str) -> re.Pattern[str]:
    # A model's name may hold slashes, as a hub's do.
    expression = route.replace("{model}", "(?P<model>.+)")
    expression = expression.replace("{version}", "(?P<version>[^/]+)")
    return re.compile(expression, re.DOTALL)
