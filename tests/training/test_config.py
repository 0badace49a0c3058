"""A config that cannot work is refused by name, and is recorded as earlier runs recorded it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import BadInput
from tests.training.factories import CONFIGS
from training.config import read_config, with_defaults


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('[decoder]\ndesign = "dream"', "design 'dream' is unknown; known are none, plain"),
        ("[decoder]\nlayers = 3", "does not go with layers = 3"),
        (
            '[decoder]\ndesign = "plain"\nlayers = 2\nunmasked_first = 0.5',
            "unmasked_first belongs to gua and drbert",
        ),
        (
            '[decoder]\ndesign = "gua"\nlayers = 2\ndecoder_share = 0.5',
            "decoder_share belongs to mix and drbert",
        ),
        (
            '[decoder]\ndesign = "mae"\nlayers = 2\n[encoder]\nfamily = "convbert"',
            "uses BERT's own layers",
        ),
        (
            '[decoder]\ndesign = "retro"\nlayers = 1\n[encoder]\nfamily = "convbert"',
            "uses BERT's own layers",
        ),
        (
            '[decoder]\ndesign = "plain"\nlayers = 2\nrebuilt = 0.5',
            "visible and rebuilt belong to retro",
        ),
        ("[encoder]\nheads = 3", "not a multiple of heads 3"),
        ("[encoder]\nembedding_size = 64", "BERT's embeddings are as wide as the encoder"),
        ('[encoder]\nfamily = "convbert"\nheads = 1', "heads = 1 is odd"),
        ('[encoder]\nfamily = "convbert"\nkernel_size = 4', "kernel_size = 4 has no middle"),
        ("[encoder]\ngroups = 2", 'groups = 2 needs family "convbert"'),
        (
            '[encoder]\ninitialisation = "xavier"',
            "initialisation 'xavier' is unknown; known are bert, neighbours",
        ),
        ('[encoder]\nfamily = "convbert"', "ConvBERT's convolution sees neighbours already"),
        (
            '[encoder]\nfamily = "electra"\nembedding_size = 128',
            "needs embeddings as wide as the encoder; embedding_size = 128, hidden_size = 256",
        ),
        ("[encoder]\nhidden_size = 260\nheads = 4", "hidden_size 260 over heads 4 is odd"),
        ('[objective]\nname = "rtd"', 'take family "electra" or "convbert"'),
        (
            (
                '[objective]\nname = "rtd"\n[encoder]\nfamily = "electra"\n[decoder]\ndesign ='
                ' "plain"\nlayers = 2'
            ),
            "does not support a decoder",
        ),
        ("[objective]\nmask_rate = 1.0", "mask_rate = 1.0 must be less than 1"),
        ("[objective]\nwhole_words = 1", "whole_words = 1 is not of type bool"),
        ("[optimisation]\naccumulate = 3", "batch_size 8 is not a multiple of accumulate 3"),
        (
            "[optimisation]\ncheckpoint_every = 1000\naverage = 9",
            "average = 9 is more than the 8 saves of 8000 steps",
        ),
        ('[data]\ndataset = "wikitext"', "either text .shards. or dataset"),
        ("[data]\nvocabulary_size = 70000", "does not fit 16-bit ids"),
        ("[data]\ntext = [1]", r"is not of type list\[str\]"),
        ("[data]\ncolour = 1", "unknown key 'colour'; known are held_out, text"),
        ("[colour]\nx = 1", r"unknown section \[colour\]"),
        ('[encoder]\nlayers = "two"', "is not of type int"),
        ("[encoder]\nheads = 0", "heads = 0 must be at least 1"),
        ("[optimisation]\nsteps = 100", "warmup_steps = 200 must be less than steps = 100"),
        ("[optimisation]\nseed = -1", "seed = -1 must be at least 0"),
        ("[encoder]\ndropout = 1.5", "dropout = 1.5 must be less than 1"),
        (
            '[objective]\nname = "rtd"\ngenerator_width = 0.001\n[encoder]\nfamily = "electra"',
            "generator_width = 0.001 of hidden_size 256 leaves no generator",
        ),
        (
            "[data]\nsequence_length = 512",
            ("as many positions as there are columns; sequence_length = 512, hidden_size = 256"),
        ),
        ("encoder = 3", "encoder = 3 is outside any section"),
        ("[encoder]\nlayer = 3", "unknown key 'layer'; known are layers, hidden_size"),
        ("[decoder]\nunmasked_first = 1.5", "unmasked_first = 1.5 must be at most 1"),
        ("[objective]\nmask_rate = 0", "mask_rate = 0 must be greater than 0"),
        ("[", "is not TOML"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(
    tmp_path: Path, change: str, words: str
) -> None:
    (tmp_path / "c.toml").write_text(f'extends = "{CONFIGS / "bert-mini.toml"}"\n{change}\n')
    with pytest.raises(BadInput, match=words):
        read_config(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[encoder]\nlayers = 2", r"\[data\] missing key 'held_out'"),
        ("data = 3", r"\[data\] is 3, which is not a table"),
    ],
)
def test_a_file_that_extends_none_must_hold_every_section(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(BadInput, match=words):
        read_config(tmp_path / "c.toml")


FIXED = """
[data]
text = ["wiki-*.txt.gz"]
held_out = ["valid.txt.gz"]
[encoder]
layers = 2
hidden_size = 32
heads = 4
intermediate_size = 64
dropout = 0
[decoder]
design = "drbert"
layers = 2
unmasked_first = 0.5
[optimisation]
steps = 12
batch_size = 8
peak_learning_rate = 3e-3
warmup_steps = 2
clip_norm = 1
"""


def test_a_config_is_recorded_as_runs_before_recorded_it(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(FIXED)
    # A run is resumed only if its recorded config equals this one, integers and all.
    assert json.dumps(read_config(tmp_path / "c.toml").as_dict()) == (
        '{"data": {"held_out": ["valid.txt.gz"], "text": ["wiki-*.txt.gz"], "dataset": "",'
        ' "dataset_config": "", "dataset_split": "train", "text_column": "text", "tokenizer": "",'
        ' "vocabulary_size": 8192, "sequence_length": 128}, "encoder": {"layers": 2,'
        ' "hidden_size": 32, "heads": 4, "intermediate_size": 64, "family": "bert",'
        ' "embedding_size": 0, "kernel_size": 9, "groups": 1, "dropout": 0,'
        ' "initialisation": "bert"}, "optimisation": {"steps": 12, "batch_size": 8,'
        ' "peak_learning_rate": 0.003, "warmup_steps": 2, "accumulate": 1, "beta2": 0.98,'
        ' "weight_decay": 0.01, "clip_norm": 1, "precision": "auto", "seed": 0,'
        ' "checkpoint_every": 200, "average": 1}, "objective": {"name": "mlm", "mask_rate": 0.15,'
        ' "whole_words": false, "generator_width": 0.25, "detection_weight": 50.0},'
        ' "decoder": {"design": "drbert", "layers": 2, "unmasked_first": 0.5,'
        ' "decoder_share": 1.0, "visible": 1.0, "rebuilt": 1.0}}'
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_bundled_config_can_be_read(path: Path) -> None:
    assert read_config(path).optimisation.steps > 0


@pytest.mark.parametrize("design", ["plain", "gua", "mix", "drbert", "emd", "mae", "retro"])
def test_the_designs_differ_from_the_reference_in_the_decoder_alone(design: str) -> None:
    vanilla, enhanced = (
        read_config(CONFIGS / f"{name}-mini.toml").as_dict() for name in ("bert", design)
    )
    assert vanilla.pop("decoder") != enhanced.pop("decoder")
    assert vanilla == enhanced


def test_a_recorded_config_has_the_defaults_of_keys_that_came_later() -> None:
    config = read_config(CONFIGS / "drbert-mini.toml").as_dict()
    recorded = json.loads(json.dumps(config))
    del recorded["decoder"]["visible"]
    del recorded["objective"]["whole_words"]
    assert recorded != config
    assert with_defaults(recorded) == config
    recorded["decoder"]["of_another_version"] = 1
    assert with_defaults(recorded) != config
