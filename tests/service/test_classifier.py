"""The classifier: encoding, logits of both runtimes, and the choice of a variant."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.artifact import Artifact, Gate
from service.classifier import Classifier, Truncate
from service.errors import InvalidInput, ModelOutputInvalid
from service.runtimes import Runtime, RuntimeUnavailable, auto
from service.runtimes.auto import Choice, Host, choose, load
from service.runtimes.onnxruntime import OnnxRuntime
from service.runtimes.openvino import OpenVinoRuntime


@pytest.fixture(params=["openvino", "onnxruntime"])
def runtime(request: pytest.FixtureRequest, artifact: Artifact) -> Runtime:
    return load(artifact, Choice("cpu-fp32", request.param, "test"), threads=1)


def test_both_runtimes_give_the_same_logits(artifact: Artifact, runtime: Runtime) -> None:
    classifier = Classifier(artifact, runtime)
    logits = classifier.predict(
        [classifier.encode("good good"), classifier.encode("bad film a b c")]
    )
    assert logits.tolist() == [[0.0, 2.0], [1.0, 0.0]]


def test_a_result_is_not_overwritten_by_the_next_batch(
    artifact: Artifact, runtime: Runtime
) -> None:
    classifier = Classifier(artifact, runtime)
    first = classifier.predict([classifier.encode("good")])
    classifier.predict([classifier.encode("bad")])
    assert first.tolist() == [[0.0, 1.0]]


def test_nan_is_an_error_and_not_an_answer(artifact: Artifact, runtime: Runtime) -> None:
    classifier = Classifier(artifact, runtime)
    with pytest.raises(ModelOutputInvalid, match="NaN or infinity"):
        classifier.predict([classifier.encode("poison")])


def test_a_wrong_number_of_labels_is_an_error(artifact: Artifact, runtime: Runtime) -> None:
    changed = Artifact(
        artifact.directory, artifact.manifest.model_copy(update={"labels": ["a", "b", "c"]})
    )
    classifier = Classifier(changed, runtime)
    with pytest.raises(ModelOutputInvalid, match=r"shape \(1, 2\); expected \(1, 3\)"):
        classifier.predict([classifier.encode("good")])


def test_a_pair_is_encoded_with_its_types(artifact: Artifact, runtime: Runtime) -> None:
    encoded = Classifier(artifact, runtime).encode("good film", "bad")
    assert list(encoded.type_ids) == [0, 0, 0, 0, 1, 1]


def test_a_too_long_text_is_refused_only_if_it_must_not_be_truncated(
    artifact: Artifact, runtime: Runtime
) -> None:
    classifier = Classifier(artifact, runtime)
    assert classifier.encode("good " * 14, truncate="none").tokens == 16
    with pytest.raises(InvalidInput, match="17 tokens, the model reads 16"):
        classifier.encode("good " * 15, truncate="none")


def test_warm_up_runs_at_least_one_shape_and_ends_in_time(
    artifact: Artifact, runtime: Runtime
) -> None:
    classifier = Classifier(artifact, runtime)
    assert classifier.warm_up(0) >= 1
    assert classifier.warm_up(60) == len(list(classifier.shapes.by_work()))


def test_openvino_reports_the_precision_that_it_uses(artifact: Artifact) -> None:
    assert OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1).precision == "f32"


def test_onnx_runtime_refuses_what_it_would_run_in_fp32(artifact: Artifact) -> None:
    with pytest.raises(RuntimeUnavailable, match=r"not model\.onnx in bf16"):
        OnnxRuntime(artifact.path("model.onnx"), "bf16", 1)


def test_auto_chooses_the_variant_that_passed_its_accuracy_gate(artifact: Artifact) -> None:
    held = artifact.manifest.variants["cpu-fp32"]
    failed = held.model_copy(
        update={"gate": held.gate.model_copy(update={"status": "failed", "reason": "too far off"})}
    )
    both = Artifact(
        artifact.directory,
        artifact.manifest.model_copy(update={"variants": {"cpu-bf16": failed, "cpu-fp32": held}}),
    )
    choice = choose(both)
    assert choice.variant == "cpu-fp32"
    assert "too far off" in choice.reason
    none = Artifact(
        artifact.directory, artifact.manifest.model_copy(update={"variants": {"cpu-fp32": failed}})
    )
    with pytest.raises(RuntimeUnavailable, match="too far off"):
        choose(none)


CPUS = {
    "Cascade Lake": ("flags\t\t: fpu avx2 avx512f avx512_vnni", "cpu-int8"),
    "Sapphire Rapids": (
        "flags\t\t: fpu avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8",
        "cpu-int8",
    ),
    "Haswell": ("flags\t\t: fpu avx2 fma", "cpu-fp32"),
    "Graviton 3": ("Features\t: fp asimd asimddp i8mm bf16", "cpu-int8"),
    "one that says nothing": ("", "cpu-fp32"),
}


@pytest.mark.parametrize("cpu", CPUS)
def test_auto_chooses_the_fastest_gated_variant_that_the_processor_supports(
    cpu: str, artifact: Artifact, tmp_path: Path
) -> None:
    flags, best = CPUS[cpu]
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    choice = choose(with_all_precisions(artifact), host=Host(tmp_path / "cpuinfo"))
    assert choice.variant == best
    assert (best == "cpu-int8") == (choice.reason == "the fastest variant in the artifact")
    if best == "cpu-fp32":
        assert "cpu-int8: this CPU has no instructions for i8 (avx512_vnni" in choice.reason


def test_auto_never_chooses_an_int8_variant_without_a_passed_gate(
    artifact: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text("flags : avx512_vnni avx512_bf16\n")
    held = with_all_precisions(artifact)
    ungated = held.manifest.variants["cpu-int8"].model_copy(
        update={"gate": Gate(status="ungated", reason="no texts to gate it with")}
    )
    variants = held.manifest.variants | {"cpu-int8": ungated}
    choice = choose(
        Artifact(held.directory, held.manifest.model_copy(update={"variants": variants})),
        host=Host(tmp_path / "cpuinfo"),
    )
    assert choice.variant == "cpu-bf16"
    assert "no texts to gate it with" in choice.reason


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("is_installed", [True, False])
def test_int8_by_onnx_runtime_is_chosen_if_that_engine_is_asked_for(
    cpu: str,
    is_installed: bool,
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, best = CPUS[cpu]
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    host = Host(tmp_path / "cpuinfo")
    held = with_all_precisions(artifact)
    portable = held.manifest.variants["cpu-int8"].model_copy(update={"runtime": "onnxruntime"})
    manifest = held.manifest.model_copy(
        update={"variants": held.manifest.variants | {"cpu-int8-ort": portable}}
    )
    both = Artifact(held.directory, manifest)
    if not is_installed:
        monkeypatch.setattr(auto, "_installed", lambda package: package != "onnxruntime")
        with pytest.raises(RuntimeUnavailable, match="onnxruntime is not installed; run"):
            choose(both, "cpu-int8-ort", host=host)
    for runtime in ("auto", "openvino"):
        choice = choose(both, runtime=runtime, host=host)
        assert (choice.variant, choice.runtime) == (best, "openvino")
    if is_installed:
        choice = choose(both, runtime="onnxruntime", host=host)
        assert (choice.variant, choice.runtime) == ("cpu-int8-ort", "onnxruntime")
    with pytest.raises(RuntimeUnavailable, match="cpu-int8-ort runs by ONNX Runtime, and openvino"):
        choose(both, "cpu-int8-ort", "openvino", host)


def with_all_precisions(artifact: Artifact) -> Artifact:
    held = artifact.manifest.variants["cpu-fp32"]
    variants = {
        "cpu-fp32": held,
        "cpu-bf16": held.model_copy(update={"precision": "bf16"}),
        "cpu-int8": held.model_copy(update={"precision": "i8"}),
    }
    return Artifact(artifact.directory, artifact.manifest.model_copy(update={"variants": variants}))


def test_a_named_variant_that_the_artifact_lacks_is_an_error(artifact: Artifact) -> None:
    with pytest.raises(RuntimeUnavailable, match="holds no variant 'cpu-int8'; it holds cpu-fp32"):
        choose(artifact, "cpu-int8")
    assert choose(artifact, "cpu-fp32", "onnxruntime").runtime == "onnxruntime"


@pytest.mark.parametrize("truncate", ["right", "left", "none"])
@pytest.mark.parametrize("pair", [None, "bad film"])
def test_tokens_are_the_same_with_the_gil_released(
    artifact: Artifact, runtime: Runtime, pair: str | None, truncate: Truncate
) -> None:
    classifier = Classifier(artifact, runtime)
    for text in (
        ("good film a b c", "a " * 7) if truncate == "none" else ("good film a b c", "a b " * 40)
    ):
        assert classifier.encode(text, pair, truncate, release_gil=True) == classifier.encode(
            text, pair, truncate
        )
