"""A shadow model answers a share of the first model's texts, and no caller waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from command import BadUsage
from service.__main__ import parse_arguments, shadow_pairing
from service.artifact import Artifact, Task
from service.http.context import HttpContext, RequestHooks, request_limits
from service.http.routes import build_app
from service.settings import Settings
from service.shadow import Pairing, Shadow
from service.state import ServiceState
from tests.factories import write_artifact
from tests.service.http.test_routes import classify, stuck, until


@pytest.fixture
def second(tmp_path: Path) -> Artifact:
    """An artifact with the labels in the other order: it never agrees with the first one."""
    return write_artifact(tmp_path / "second", labels=["POSITIVE", "NEGATIVE"])


@asynccontextmanager
async def shadowed(
    first: Artifact, second: Artifact, fraction: float = 1.0
) -> AsyncIterator[tuple[httpx.AsyncClient, ServiceState]]:
    settings = Settings(warm_up_s=0)
    service = ServiceState({"first": first, "second": second, "third": first}, settings)
    service.lifecycle.load()
    shadow = Shadow(service, Pairing("second", "first", fraction), request_limits(settings))
    app = build_app(HttpContext(service, RequestHooks(shadow=shadow)))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as client:
        yield client, service
    await service.lifecycle.drain()


def shadow_count(service: ServiceState, outcome: str) -> float:
    return (
        service.metrics.registry.get_sample_value(
            "drbert_shadow_texts_total", {"model": "second", "of": "first", "outcome": outcome}
        )
        or 0.0
    )


async def test_texts_are_answered_by_both_and_their_agreement_is_counted(
    artifact: Artifact, second: Artifact
) -> None:
    async with shadowed(artifact, second) as (client, service):
        answer = (await classify(client, {"input": ["good", "bad bad"]})).json()
        await classify(client, {"input": "good", "model": "third"})  # has no shadow
        await until(lambda: shadow_count(service, "differed") == 2)
        cost = service.metrics.registry.get_sample_value(
            "drbert_shadow_inference_seconds_total", {"model": "second"}
        )
    assert answer["model"] == "first"
    assert [result["label"] for result in answer["data"]] == ["POSITIVE", "NEGATIVE"]
    assert shadow_count(service, "agreed") == 0
    assert cost is not None
    assert cost > 0


async def test_two_models_with_the_same_answers_agree(artifact: Artifact, tmp_path: Path) -> None:
    async with shadowed(artifact, write_artifact(tmp_path / "twin")) as (client, service):
        await classify(client, {"input": ["good", "bad " * 40], "window": {}})
        await until(lambda: shadow_count(service, "agreed") == 2)


async def test_a_share_of_the_requests_is_shadowed(artifact: Artifact, second: Artifact) -> None:
    async with shadowed(artifact, second, 0.3) as (client, service):
        for _ in range(60):
            await classify(client, {"input": "good"})
        await until(lambda: not service.batcher.queue.background)
        await asyncio.sleep(0)
    assert 5 <= shadow_count(service, "differed") <= 35


async def test_no_live_text_waits_for_a_shadow(artifact: Artifact, second: Artifact) -> None:
    async with shadowed(artifact, second) as (client, service):
        order: list[str] = []
        for loaded in service.registry.loaded.values():

            def start(
                batch: object,
                layout: object = None,
                *,
                name: str = loaded.name,
                begin: object = loaded.classifier.start,
            ) -> object:
                order.append(name)
                return begin(batch, layout)  # type: ignore[operator]

            loaded.classifier.start = start  # type: ignore[method-assign, assignment]
        async with stuck(service):
            first = asyncio.create_task(classify(client, {"input": "good"}))
            await until(
                lambda: service.lifecycle.active_requests == 1 and service.batcher.waiting == 0
            )
            # Like a shadow text of an earlier answer: it waits, and then live texts arrive.
            hidden = service.registry.loaded["second"]
            item = hidden.classifier.encode("good")
            shadow = asyncio.create_task(
                service.batcher.submit(hidden.key, [item], background=True)
            )
            await until(lambda: len(service.batcher.queue.background) == 1)
            more = [asyncio.create_task(classify(client, {"input": "bad " * n})) for n in (1, 9)]
            await until(lambda: service.batcher.waiting == 2)
        assert {response.status_code for response in await asyncio.gather(first, *more)} == {200}
        await shadow
        await until(lambda: shadow_count(service, "differed") == 3)
    # Two texts of different lengths are two batches.
    assert order[:4] == ["first", "first", "first", "second"]


async def test_shadow_texts_above_the_limit_are_dropped(
    artifact: Artifact, second: Artifact
) -> None:
    async with shadowed(artifact, second) as (client, service):
        service.batcher.queue.max_background = 3
        await classify(client, {"input": ["good"] * 4})
        await until(lambda: shadow_count(service, "dropped") == 4)


TASKS: dict[str, Task] = {"bert": "single_label", "drbert": "multi_label", "stars": "regression"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", None, 0.1), "No model is called 'other'; there are bert, drbert, stars"),
        (("drbert", "other", 0.1), "No model is called 'other'"),
        (("bert", None, 0.1), "'bert' cannot shadow itself"),
        (("drbert", "bert", 0.0), "--fraction 0 is not a share"),
        (("drbert", "bert", 1.5), "--fraction 1.5 is not a share"),
        ((None, "bert", 0.1), "--shadow-of names the model that --shadow shadows"),
        (
            ("stars", "bert", 0.1),
            (
                "'stars' returns a number, and --shadow counts whether two models return the"
                " same label"
            ),
        ),
        (("bert", "stars", 0.1), "'stars' returns a number"),
    ],
)
def test_an_invalid_pairing_is_refused(
    arguments: tuple[str | None, str | None, float], message: str
) -> None:
    with pytest.raises(BadUsage, match=message):
        shadow_pairing(*arguments, TASKS)


@pytest.mark.parametrize("option", ["--shadow-of", "--of"])
def test_shadow_of_keeps_its_former_name(option: str) -> None:
    options = parse_arguments(["bert=a", "drbert=b", "--shadow", "drbert", option, "bert"])
    assert options.shadow_of == "bert"


def test_the_former_name_of_shadow_of_is_hidden_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    output = capsys.readouterr().out
    assert "--shadow-of NAME" in output
    assert "--of " not in output.replace("--shadow-of ", "")


def test_the_first_model_is_shadowed_unless_another_is_named() -> None:
    assert shadow_pairing("drbert", None, 0.1, TASKS) == Pairing("drbert", "bert", 0.1)
    assert shadow_pairing(None, None, 0.1, TASKS) is None


async def test_a_regression_model_that_replaces_the_shadow_never_counts_as_agreed(
    artifact: Artifact, tmp_path: Path
) -> None:
    stars = write_artifact(tmp_path / "stars", labels=["stars"], task="regression")
    async with shadowed(artifact, write_artifact(tmp_path / "twin")) as (client, service):
        service.registry.add("second", stars)
        await classify(client, {"input": ["good", "bad"]})
        await until(lambda: shadow_count(service, "dropped") == 2)
    assert shadow_count(service, "agreed") == shadow_count(service, "differed") == 0
