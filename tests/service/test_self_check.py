"""The self-check at start: a variant whose answers differ from those of the exporting host is
refused if it was requested, and passed over by `auto`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service import self_check
from service.artifact import MANIFEST, Artifact, Variant, manifest_checksum, read_artifact
from service.classifier import Classifier
from service.http.info import service_info
from service.runtimes import RuntimeUnavailable
from service.runtimes.auto import load
from service.runtimes.openvino import OpenVinoRuntime
from service.self_check import AnswersDiffer, check
from service.settings import Settings
from service.state import ServiceState
from tests.factories import PROBE, write_artifact
from tests.service.test_server import start


def changed(artifact: Artifact, change: Any) -> Artifact:
    """Return the artifact with a manifest that `change` edited, with a new checksum."""
    path = artifact.path(MANIFEST)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values | {"seal": manifest_checksum(values)}))
    return read_artifact(artifact.directory)


def with_logits(
    values: dict[str, Any], variant: str, logits: Mapping[str, list[list[float]]]
) -> None:
    values["variants"][variant]["self_check"] = {"logits": logits, "tolerance": 1e-3}


def with_a_wrong_bf16(values: dict[str, Any]) -> None:
    """Add a variant that `auto` prefers on any processor, with recorded answers that are wrong."""
    values["variants"]["cpu-int8"] = values["variants"]["cpu-fp32"] | {
        "self_check": {"logits": {"f32": [[5.0, 5.0]]}, "tolerance": 1e-3}
    }


def loaded_service(artifact: Artifact, variant: str = "auto") -> ServiceState:
    service = ServiceState({"reviews": artifact}, Settings(warm_up_s=0), variant)
    service.lifecycle.load()
    return service


def test_a_self_check_that_passed_is_shown_in_info(artifact: Artifact) -> None:
    model = service_info(loaded_service(artifact))["models"]["reviews"]
    assert model["self_check"] == {"texts": 1, "largest_difference": 0.0, "tolerance": 1e-3}
    assert model["flush_to_zero"] is True
    assert model["flushed_weights"] == 0


def test_a_requested_variant_that_answers_differently_here_is_refused(
    artifact: Artifact,
) -> None:
    wrong = changed(
        artifact, lambda values: with_logits(values, "cpu-fp32", {"f32": [[0.0, 1.01]]})
    )
    with pytest.raises(AnswersDiffer) as refused:
        loaded_service(wrong, "cpu-fp32")
    message = str(refused.value)
    assert message.startswith("cpu-fp32 answers differently on this processor (")
    assert "a logit differs by 0.01, and at most 0.001 is rounding" in message
    assert refused.value.exit_code == 69


def test_auto_passes_over_a_variant_that_answers_differently_here_and_says_why(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    service = loaded_service(changed(artifact, with_a_wrong_bf16))
    loaded = service.registry.loaded["reviews"]
    assert loaded.choice.variant == "cpu-fp32"
    assert "cpu-int8: cpu-int8 answers differently on this processor" in loaded.choice.reason
    [record] = [
        record for record in caplog.records if record.message == "a variant failed its self-check"
    ]
    assert record.levelname == "ERROR"


def test_if_every_variant_answers_differently_the_start_fails(artifact: Artifact) -> None:
    wrong = changed(artifact, lambda values: with_logits(values, "cpu-fp32", {"f32": [[0.0, 2.0]]}))
    with pytest.raises(
        RuntimeUnavailable, match=r"holds nothing that this host can run.*answers differently"
    ):
        loaded_service(wrong)


def test_an_artifact_that_fails_ends_the_command_with_69(artifact: Artifact) -> None:
    changed(artifact, lambda values: with_logits(values, "cpu-fp32", {"f32": [[0.0, 2.0]]}))
    process = start(str(artifact.directory), "--variant", "cpu-fp32", "--port", "0")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 69
    assert output.splitlines()[-1].startswith(
        "drbert-serve: cpu-fp32 answers differently on this processor"
    )


def test_a_tokenizer_that_reads_a_probe_differently_is_refused(artifact: Artifact) -> None:
    other = PROBE.model_copy(update={"input_ids": [2, 5, 3]}).model_dump()
    wrong = changed(artifact, lambda values: values.update(probes=[other]))
    with pytest.raises(
        AnswersDiffer, match="The tokenizer reads a text of the self-check differently"
    ):
        loaded_service(wrong, "cpu-fp32")


def test_a_precision_that_was_not_verified_is_refused(artifact: Artifact) -> None:
    wrong = changed(
        artifact, lambda values: with_logits(values, "cpu-fp32", {"bf16": [[0.0, 1.0]]})
    )
    with pytest.raises(
        AnswersDiffer,
        match=r"cpu-fp32 was verified in bf16, and this processor .* computes it in f32",
    ):
        loaded_service(wrong, "cpu-fp32")


def test_an_engine_that_is_wrong_in_a_batch_alone_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = Classifier(artifact, OpenVinoRuntime(artifact.path("model.onnx"), "f32", 1))
    right = self_check.answers(classifier, artifact.manifest.probes)[0]
    monkeypatch.setattr(self_check, "answers", lambda *_: (right, right + 1))
    with pytest.raises(AnswersDiffer, match="a logit differs by 1,"):
        check(classifier, "cpu-fp32")


def test_an_engine_that_answers_nan_is_refused(artifact: Artifact) -> None:
    poison = {
        "text": "poison",
        "text_pair": None,
        "input_ids": [2, 10, 3],
        "token_type_ids": [0, 0, 0],
    }
    wrong = changed(artifact, lambda values: values.update(probes=[poison]))
    with pytest.raises(
        AnswersDiffer,
        match=(
            r"cannot compute the self-check on this processor .*ModelOutputInvalid: The model"
            r" answered NaN or infinity"
        ),
    ):
        loaded_service(wrong, "cpu-fp32")


def test_an_artifact_of_the_previous_version_is_served_with_a_warning(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    def older(values: dict[str, Any]) -> None:
        values["schema_version"] = 2
        del values["probes"], values["flushed_weights"]
        for variant in values["variants"].values():
            del variant["self_check"]

    service = loaded_service(changed(artifact, older))
    assert service_info(service)["models"]["reviews"]["self_check"] is None
    assert any("holds no self-check" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    ("agreement", "verified", "lowest"),
    [
        (None, None, None),
        (None, ["f32"], "f32"),
        (None, ["bf16", "f32"], None),
        ("f32", ["bf16", "f32"], "f32"),
        ("bf16", ["bf16", "f32"], "bf16"),
    ],
)
def test_int8_computes_unquantized_parts_in_no_lower_precision_than_verified(
    artifact: Artifact,
    agreement: str | None,
    verified: list[str] | None,
    lowest: str | None,
) -> None:
    values = artifact.manifest.variants["cpu-fp32"].model_dump()
    values["self_check"] = (
        None
        if verified is None
        else {"logits": {name: [[0.0, 1.0]] for name in verified}, "tolerance": 1e-3}
    )
    if agreement is not None:
        counted = {
            "texts": 1,
            "agreeing": 1,
            "lower_bound": 1.0,
            "wanted": 0.9,
            "accuracy": None,
            "accuracy_of_fp32": None,
        }
        values["gate"]["agreement"] = counted | {"rest": agreement}
    assert Variant.model_validate(values).lowest_unquantized_precision == lowest


def test_a_text_is_checked_alone_and_in_a_batch(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "reviews")
    classifier = Classifier(
        artifact, load(artifact, loaded_service(artifact).registry.loaded["reviews"].choice, 1)
    )
    alone, batched = self_check.answers(
        classifier,
        [PROBE, PROBE.model_copy(update={"input_ids": [2, 5, 5, 3], "token_type_ids": [0] * 4})],
    )
    assert alone.tolist() == batched.tolist() == [[0.0, 1.0], [2.0, 0.0]]
