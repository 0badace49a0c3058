"""
Several classifiers on one encoder become one model, whose heads answer as the classifiers do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from command import BadInput, BadUsage
from export.commands import main
from export.graph.variants import DEFAULT_VARIANTS
from export.pipeline import Quantization, export
from graphs.canonical import split
from graphs.files import read_graph
from proof.commands import main as prove
from proof.verdict.identity import compare, describe_body, have_same_body
from service.artifact import read_artifact
from tests.export.corpus import FAMILIES, MAX_TOKENS, SENTENCES
from tests.export.factories import write_checkpoint as write_bert
from tests.export.test_families import PACKED_FAMILIES, write_checkpoint
from tests.service.http.test_routes import classify, client_of

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's tracer warns of what verification checks

HEADS = {
    "tone": (2, None),
    "topics": (5, "multi_label_classification"),
    "stars": (1, "regression"),
}
PASSES = ["BERT", "RoBERTa", "DistilBERT", "ELECTRA", "ALBERT", "MPNet", "DeBERTa-v2, v3", "XLNet"]


def write_heads(name: str, folder: Path) -> dict[str, str]:
    """Write a checkpoint for each of HEADS, on one encoder; return their folders by head."""
    family = next(row for row in FAMILIES if row.name == name)
    body = write_checkpoint(family, folder / "body")
    encoder = AutoModelForSequenceClassification.from_pretrained(body).float()
    prefix = f"{encoder.base_model_prefix}."
    checkpoints = {}
    for seed, (head, (labels, problem)) in enumerate(HEADS.items()):
        config = AutoConfig.from_pretrained(body)
        config.id2label = {index: f"{head} {index}" for index in range(labels)}
        config.label2id = {label: index for index, label in config.id2label.items()}
        config.problem_type = problem
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        shared = {
            key: value
            for key, value in encoder.state_dict().items()
            if key.startswith(prefix) and ".pooler." not in key
        }
        model.load_state_dict(shared, strict=False)
        target = folder / head
        model.save_pretrained(target)
        for path in body.iterdir():
            if not (target / path.name).exists():
                (target / path.name).write_bytes(path.read_bytes())
        checkpoints[head] = str(target)
    return checkpoints


@pytest.mark.parametrize("name", PASSES)
async def test_every_head_answers_as_its_own_checkpoint_alone_and_in_company(
    name: str, tmp_path: Path
) -> None:
    checkpoints = write_heads(name, tmp_path)
    manifest = export(checkpoints, tmp_path / "artifact", variants=["cpu-fp32"])
    artifact = read_artifact(tmp_path / "artifact")
    assert manifest.task == "heads"
    expected = {}
    for head, folder in checkpoints.items():
        export(folder, tmp_path / f"alone-{head}", variants=["cpu-fp32"])
        async with client_of(read_artifact(tmp_path / f"alone-{head}")) as (client, _):
            expected[head] = (await classify(client, {"input": SENTENCES})).json()["data"]
    async with client_of(artifact) as (client, service):
        [loaded] = service.registry.loaded.values()
        assert (loaded.classifier.packing is not None) == (name in PACKED_FAMILIES)
        body = {"input": SENTENCES, "heads": list(HEADS)}
        together = (await classify(client, body)).json()["data"]
        one = (await classify(client, {"input": SENTENCES, "model": f"{loaded.name}/stars"})).json()
    for index, answer in enumerate(together):
        for head, answers in expected.items():
            assert answer["heads"][head]["label"] == answers[index]["label"]
            assert answer["heads"][head]["probs"] == pytest.approx(
                answers[index]["probs"], abs=1e-5
            )
        assert one["data"][index]["probs"] == answer["heads"]["stars"]["probs"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_heads("BERT", tmp_path_factory.mktemp("heads"))


async def test_each_head_gives_transformers_logits_for_a_text_or_a_pair_by_itself(
    bert: dict[str, str], tmp_path: Path
) -> None:
    export(bert, tmp_path / "artifact", variants=["cpu-fp32"])
    items: list[Any] = [*SENTENCES[:4], {"text": SENTENCES[0], "text_pair": SENTENCES[1]}]
    async with client_of(read_artifact(tmp_path / "artifact")) as (client, _):
        for item in items:
            body = {"input": item, "heads": list(HEADS), "activation": "none"}
            [answer] = (await classify(client, body)).json()["data"]
            for head, folder in bert.items():
                texts = (item["text"], item["text_pair"]) if isinstance(item, dict) else (item,)
                encoded = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
                model = AutoModelForSequenceClassification.from_pretrained(folder).float().eval()
                with torch.no_grad():
                    expected = model(**encoded).logits[0].tolist()
                assert answer["heads"][head]["probs"] == pytest.approx(expected, abs=1e-3)


def test_the_encoder_is_in_the_graph_once(bert: dict[str, str], tmp_path: Path) -> None:
    manifest = export(bert, tmp_path / "several", variants=["cpu-fp32"])
    alone = export(bert["tone"], tmp_path / "tone", variants=["cpu-fp32"])
    assert manifest.encoder_digest == alone.encoder_digest
    assert manifest.flops_per_token == alone.flops_per_token
    _, head = split(read_graph(tmp_path / "several" / "model.onnx"))
    assert [node.operator for node in head.nodes].count("Gemm") == 6, "a pooler and a layer each"
    weights = [
        int(np.prod(each.dims))
        for each in onnx.load(tmp_path / "several" / "model.onnx").graph.initializer
        if each.name.startswith("heads.")
    ]
    assert manifest.parameters == alone.parameters + sum(weights)
    assert [each.checkpoint for each in manifest.heads.values()] == ["tone", "topics", "stars"]
    assert manifest.labels[:3] == ["tone/tone 0", "tone/tone 1", "topics/topics 0"]


def test_every_variant_is_gated_with_all_heads(bert: dict[str, str], tmp_path: Path) -> None:
    gate = tmp_path / "gate.txt"
    gate.write_text("\n".join(f"{text} {number}" for number in range(9) for text in SENTENCES))
    variants = [*DEFAULT_VARIANTS, "cpu-int8", "cpu-int8-ort", "cuda-fp16", "tensorrt-fp16"]
    manifest = export(
        bert, tmp_path / "artifact", variants=variants, quantization=Quantization(gate=gate)
    )
    assert list(manifest.variants) == variants
    agreement = manifest.variants["cpu-int8"].gate.agreement
    assert agreement is not None
    assert set(agreement.labels) == set(manifest.labels[:7]), "the number has no label"
    for name in ("cpu-fp32", "cuda-fp16", "tensorrt-fp16"):
        assert manifest.variants[name].gate.status == "passed", manifest.variants[name].gate


def test_folders_with_onnx_graphs_become_heads_too(bert: dict[str, str], tmp_path: Path) -> None:
    folders = {}
    for head in ("tone", "topics"):
        export(bert[head], tmp_path / f"alone-{head}", variants=["cpu-fp32"])
        folder = tmp_path / head
        folder.mkdir()
        for path in Path(bert[head]).iterdir():
            if path.suffix != ".safetensors":
                (folder / path.name).write_bytes(path.read_bytes())
        graph = tmp_path / f"alone-{head}" / "model.onnx"
        (folder / "model.onnx").write_bytes(graph.read_bytes())
        folders[head] = str(folder)
    manifest = export(folders, tmp_path / "artifact", variants=["cpu-fp32"])
    assert list(manifest.heads) == ["tone", "topics"]
    assert manifest.variants["cpu-fp32"].gate.status == "passed"


def test_an_encoder_that_was_trained_further_is_refused_with_its_first_weight(
    bert: dict[str, str], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert["topics"])
    with torch.no_grad():
        # As merged adapters do it: a matrix, which the exporter renames, and no bias.
        model.bert.encoder.layer[1].output.dense.weight.add_(0.01)
    other = tmp_path / "other"
    model.save_pretrained(other)
    for path in Path(bert["topics"]).iterdir():
        if not (other / path.name).exists():
            (other / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        BadInput, match=r"tone and topics differ, first in /bert/encoder/layer\.1/output/"
    ):
        export(
            {"tone": bert["tone"], "topics": str(other)},
            tmp_path / "artifact",
            variants=["cpu-fp32"],
        )
    assert not (tmp_path / "artifact").exists()


def test_classifiers_that_read_texts_differently_are_refused(
    bert: dict[str, str], tmp_path: Path
) -> None:
    shorter = tmp_path / "shorter"
    shorter.mkdir()
    for path in Path(bert["topics"]).iterdir():
        (shorter / path.name).write_bytes(path.read_bytes())
    settings = (shorter / "tokenizer_config.json").read_text()
    changed = settings.replace(f'"model_max_length": {MAX_TOKENS}', '"model_max_length": 9')
    assert changed != settings
    (shorter / "tokenizer_config.json").write_text(changed)
    with pytest.raises(BadInput, match="differ in their length limit: 9 and"):
        export({"tone": bert["tone"], "topics": str(shorter)}, tmp_path / "artifact")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["CHECKPOINT", "OUT", "--head", "b=CHECKPOINT"], "names no head"),
        (["a=CHECKPOINT", "OUT", "--head", "a=CHECKPOINT"], "Two heads are called 'a'"),
        (["a=CHECKPOINT", "OUT", "--head", "b/c=CHECKPOINT"], "cannot be the name of a head"),
        (["a=CHECKPOINT", "OUT", "--head", "b="], "names no head"),
        (["a=CHECKPOINT", "OUT", "--head", "load=CHECKPOINT"], "no verb of the API"),
        (["a=C", "OUT", "--head", "b=C", "--keep-decoder"], "--keep-decoder is for a model with"),
        (["a=C", "OUT", "--head", "b=C", "--task", "regression"], "--task is for a model with one"),
    ],
)
def test_a_command_line_without_the_names_of_heads_is_refused(
    arguments: list[str], words: str
) -> None:
    with pytest.raises(BadUsage, match=words):
        main(arguments)


def test_what_training_left_in_a_tokenizer_keeps_no_heads_apart(
    bert: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(bert["topics"]).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(other / "tokenizer.json"))
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding()
    tokenizer.save(str(other / "tokenizer.json"))
    manifest = export(
        {"tone": bert["tone"], "topics": str(other)}, tmp_path / "artifact", variants=["cpu-fp32"]
    )
    assert list(manifest.heads) == ["tone", "topics"]


def test_heads_of_very_different_size_are_each_checked_by_their_own(
    bert: dict[str, str], tmp_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert["stars"])
    with torch.no_grad():
        model.classifier.weight.mul_(300)
    large = tmp_path / "large"
    model.save_pretrained(large)
    for path in Path(bert["stars"]).iterdir():
        if not (large / path.name).exists():
            (large / path.name).write_bytes(path.read_bytes())
    manifest = export(
        {"tone": bert["tone"], "price": str(large)}, tmp_path / "artifact", variants=["cpu-bf16"]
    )
    check = manifest.variants["cpu-bf16"].self_check
    assert check is not None
    tone, price = check.tolerances
    assert tone < price == check.tolerance


def test_identity_says_that_two_classifiers_have_the_same_body(
    bert: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tone, topics = tmp_path / "tone", tmp_path / "topics"
    for head, folder in (("tone", tone), ("topics", topics)):
        export(bert[head], folder, variants=["cpu-fp32"])
    assert not compare(tone, topics)["same"]
    assert describe_body(tone, topics).startswith("same body")
    assert describe_body(tone, tone) == "", "they are the same model"
    assert have_same_body(tone, tone)
    other = tmp_path / "other"
    export(str(write_checkpoint(FAMILIES[1], tmp_path / "roberta")), other, variants=["cpu-fp32"])
    assert describe_body(tone, other) == ""
    capsys.readouterr()
    prove(["identity", str(tone), str(topics), "--json"])
    assert json.loads(capsys.readouterr().out)["same_body"] is True


def test_an_encoder_with_more_layers_is_no_same_body_in_either_order(tmp_path: Path) -> None:
    checkpoint = write_bert(tmp_path / "checkpoint")
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    export(str(checkpoint), plain, variants=["cpu-fp32"])
    export(str(checkpoint), kept, variants=["cpu-fp32"], keep_decoder=True)
    for first, second in ((plain, kept), (kept, plain)):
        assert not have_same_body(first, second)
        assert describe_body(first, second) == ""
