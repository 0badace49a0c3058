"""`auto` takes the engine that is measured to be the faster one, and remembers it.

Both engines really load and answer; only the clock is a fake one, which each engine sets forward.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.artifact import Artifact
from service.host import memory
from service.http.info import service_info
from service.loading import engine_rates
from service.runtimes import Inputs, Logits, Runtime, RuntimeUnavailable
from service.runtimes.auto import EngineRate, load
from service.settings import Settings
from service.state import ServiceState

NAMES = ("openvino", "onnxruntime")
LOAD = "service.loading.engine.load"
"""The function by which the module loads an engine."""


class Clock:
    """A clock that stands still while no engine runs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.loads: list[str] = []
        self.seconds = dict.fromkeys(NAMES, 1e-3)
        """Seconds of a batch, by engine."""
        self.seconds_a_text = dict.fromkeys(NAMES, 1e-4)

    def loaded(self, load: Callable[..., Runtime], *arguments: Any) -> Runtime:
        """Return an engine, really loaded, that sets this clock forward."""
        runtime = load(*arguments)
        self.loads.append(runtime.name)
        start = runtime.start

        def timed(inputs: Inputs) -> Callable[[], Logits]:
            texts = len(inputs["input_ids"])
            self.now_s += self.seconds[runtime.name] + texts * self.seconds_a_text[runtime.name]
            return start(inputs)

        runtime.start = timed  # type: ignore[method-assign]
        return runtime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    new_process(monkeypatch)
    faked = Clock()
    monkeypatch.setattr(LOAD, lambda *arguments: faked.loaded(load, *arguments))
    monkeypatch.setattr(time, "perf_counter", lambda: faked.now_s)
    return faked


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the measurements of this process."""
    monkeypatch.setattr(engine_rates, "_of_this_process", {})


def info(artifact: Artifact, variant: str = "auto", **settings: Any) -> dict[str, Any]:
    """Return what /info says about the artifact's model, once it is loaded."""
    settings = {"warm_up_s": 0, "measure_engines": True} | settings
    service = ServiceState({"reviews": artifact}, Settings(**settings), variant)
    service.lifecycle.load()
    model = service_info(service)["models"]["reviews"]
    assert isinstance(model, dict)
    return model


def test_the_faster_engine_is_taken_and_info_shows_both_rates(
    artifact: Artifact, clock: Clock
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    model = info(artifact)
    assert (model["variant"], model["runtime"]) == ("cpu-fp32", "onnxruntime")
    assert model["why"].startswith("faster than cpu-fp32 by openvino; measured on 20")
    assert [rate["runtime"] for rate in model["rates"]] == list(NAMES)
    assert [rate["alone_ms"] for rate in model["rates"]] == [4.1, 1.1]
    assert "cpu-fp32 by onnxruntime" in model["why"]


def test_the_usual_engine_stays_unless_another_is_clearly_faster(
    artifact: Artifact, clock: Clock
) -> None:
    clock.seconds = {"openvino": 1.05e-3, "onnxruntime": 1e-3}
    model = info(artifact)
    assert model["runtime"] == "openvino"
    assert model["why"].startswith("the fastest variant in the artifact; measured on 20")


def test_an_engine_that_is_faster_alone_and_slower_together_is_weighed_by_both(
    artifact: Artifact, clock: Clock
) -> None:
    clock.seconds = {"openvino": 2e-3, "onnxruntime": 1e-3}
    clock.seconds_a_text = {"openvino": 1e-4, "onnxruntime": 1e-3}
    model = info(artifact)
    alone, together = (
        [rate[name] for rate in model["rates"]] for name in ("alone_ms", "texts_per_s")
    )
    assert alone[0] > alone[1]
    assert together[0] > together[1]
    assert model["runtime"] == "openvino"


def test_a_measurement_is_kept_and_the_next_start_loads_one_engine(
    artifact: Artifact, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    first = info(artifact)
    assert clock.loads == ["openvino", "onnxruntime"]
    clock.loads.clear()
    new_process(monkeypatch)
    assert info(artifact) == first
    assert clock.loads == ["onnxruntime"]
    [file] = (tmp_path / "cache/drbert-serve/engines").iterdir()
    for content in ("{", file.read_text().replace("4.1", "0")):
        file.write_text(content)
        clock.loads.clear()
        new_process(monkeypatch)
        assert info(artifact)["runtime"] == "onnxruntime"
        assert clock.loads == ["openvino", "onnxruntime"]
    clock.loads.clear()
    new_process(monkeypatch)
    assert info(artifact)["runtime"] == "onnxruntime"
    assert clock.loads == ["onnxruntime"]


def test_the_first_of_two_processes_decides(
    artifact: Artifact, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one measures at the same time, and writes its file first."""
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    measure = engine_rates.measure

    def measure_meanwhile(*arguments: Any) -> list[EngineRate]:
        rates = measure(*arguments)
        monkeypatch.setattr(engine_rates, "measure", measure)
        new_process(monkeypatch)
        clock.seconds = {"openvino": 1e-3, "onnxruntime": 4e-3}
        assert info(artifact)["runtime"] == "openvino"
        return rates

    monkeypatch.setattr(engine_rates, "measure", measure_meanwhile)
    assert info(artifact)["runtime"] == "openvino"


def test_two_models_of_one_graph_get_the_same_engine(
    artifact: Artifact, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    info(artifact)
    clock.loads.clear()
    new_process(monkeypatch)
    clock.seconds = {"openvino": 1e-3, "onnxruntime": 4e-3}
    retrained = Artifact(
        artifact.directory, artifact.manifest.model_copy(update={"labels": ["bad", "good"]})
    )
    assert info(retrained)["runtime"] == "onnxruntime"
    assert clock.loads == ["onnxruntime"]


@pytest.mark.parametrize("token_s", [1e-5, 1e-3, 1e-2])
def test_a_measurement_takes_less_than_two_seconds_of_a_base_model(
    artifact: Artifact, clock: Clock, token_s: float
) -> None:
    # BERT-base in fp32 takes about a millisecond for a token on one processor.
    clock.seconds = dict.fromkeys(NAMES, 16 * token_s)
    clock.seconds_a_text = dict.fromkeys(NAMES, 16 * token_s)
    model = info(artifact)
    assert len(model["rates"]) == 2
    if token_s <= 1e-3:
        assert clock.now_s < 2


def test_a_model_that_is_loaded_while_others_answer_is_not_measured(
    artifact: Artifact, clock: Clock, tmp_path: Path
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    service = ServiceState(
        {"reviews": artifact}, Settings(warm_up_s=0, measure_engines=True), "auto"
    )
    service.registry.add("late", artifact, is_serving=True)
    choice = service.registry.loaded["late"].choice
    assert choice.runtime == "openvino"
    assert choice.reason.endswith("not measured, the service answered requests meanwhile")
    assert not (tmp_path / "cache").exists()
    # What an earlier start has measured counts.
    service.registry.add("first", artifact)
    service.registry.add("later", artifact, is_serving=True)
    assert service.registry.loaded["later"].choice.runtime == "onnxruntime"


@pytest.mark.parametrize("settings", [{"threads": 2}, {"max_batch_size": 1}])
def test_other_settings_are_measured_anew(
    settings: dict[str, Any], artifact: Artifact, clock: Clock
) -> None:
    info(artifact, threads=1)
    clock.loads.clear()
    info(artifact, **({"threads": 1} | settings))
    assert clock.loads == ["openvino", "onnxruntime"]


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("cpu-fp32", {}),
        ("auto", {"runtime": "openvino"}),
        ("auto", {"measure_engines": False}),
    ],
)
def test_what_is_named_is_not_measured(
    artifact: Artifact, clock: Clock, variant: str, settings: dict[str, Any]
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    model = info(artifact, variant, **settings)
    assert model["runtime"] == "openvino"
    assert model["rates"] == []
    assert clock.loads == ["openvino"]


def test_two_engines_are_not_loaded_where_memory_is_short(
    artifact: Artifact, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 0)
    model = info(artifact)
    assert model["why"].endswith("not measured, there is too little memory to load two engines")
    assert clock.loads == ["openvino"]


def test_an_engine_that_cannot_be_loaded_leaves_the_usual_one(
    artifact: Artifact,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(LOAD, without_onnx_runtime)
    model = info(artifact)
    assert model["runtime"] == "openvino"
    assert model["why"].endswith("not measured, RuntimeUnavailable while measuring")
    assert "an engine cannot be measured" in caplog.text


def without_onnx_runtime(held: Artifact, choice: Any, *rest: Any) -> Runtime:
    if choice.runtime == "onnxruntime":
        raise RuntimeUnavailable("libonnxruntime.so: cannot open shared object file")
    return load(held, choice, *rest)


def test_an_engine_that_was_measured_and_is_gone_is_passed_over(
    artifact: Artifact,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock.seconds = {"openvino": 4e-3, "onnxruntime": 1e-3}
    assert info(artifact)["runtime"] == "onnxruntime"
    monkeypatch.setattr(LOAD, without_onnx_runtime)
    assert info(artifact)["runtime"] == "openvino"
    assert "an engine cannot be used" in caplog.text


def test_where_the_cache_cannot_be_written_every_start_measures(
    artifact: Artifact, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        clock.loads.clear()
        new_process(monkeypatch)
        assert info(artifact)["runtime"] == "openvino"
        assert clock.loads == ["openvino", "onnxruntime"]
    clock.loads.clear()
    assert info(artifact)["runtime"] == "openvino"
    assert clock.loads == ["openvino"]


def test_an_engine_with_wrong_answers_is_passed_over_for_the_other_one(
    artifact: Artifact, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(held: Artifact, choice: Any, *rest: Any) -> Runtime:
        runtime = clock.loaded(load, held, choice, *rest)
        if choice.runtime == "openvino":
            start = runtime.start
            runtime.start = lambda inputs: lambda: start(inputs)() + 1  # type: ignore[method-assign]
        return runtime

    monkeypatch.setattr(LOAD, wrong)
    assert info(artifact)["runtime"] == "onnxruntime"
    assert info(artifact, measure_engines=False)["runtime"] == "onnxruntime"


def test_a_rate_reads_as_a_sentence() -> None:
    rate = EngineRate(variant="cpu-int8", runtime="openvino", alone_ms=1.234, texts_per_s=1234.5)
    assert str(rate) == "cpu-int8 by openvino 1,234 texts/s, and a text alone in 1.2 ms"
    assert json.loads(rate.model_dump_json())["texts_per_s"] == 1234.5
