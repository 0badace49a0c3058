from __future__ import annotations

from pathlib import Path

import pytest

from command import BadInput
from tests.training.factories import CONFIGS
from training.config import read_config


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
            "reaches into BERT's own layers",
        ),
        ("[encoder]\nheads = 3", "no multiple of heads 3"),
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
            "knows no decoder",
        ),
        ("[objective]\nmask_rate = 1.0", "mask_rate = 1.0 is not between 0 and 1"),
        ("[objective]\nwhole_words = 1", "whole_words = 1 is not of type bool"),
        ("[optimisation]\naccumulate = 3", "batch_size 8 is no multiple of accumulate 3"),
        ('[data]\ndataset = "wikitext"', "either text .shards. or dataset"),
        ("[data]\nvocabulary_size = 70000", "does not fit 16-bit ids"),
        ("[data]\ntext = [1]", r"is not of type list\[str\]"),
        ("[data]\ncolour = 1", "no key 'colour'"),
        ("[colour]\nx = 1", r"unknown section \[colour\]"),
        ('[encoder]\nlayers = "two"', "is not of type int"),
        ("[encoder]\nheads = 0", "heads = 0 is not 1 at least"),
        ("[optimisation]\nsteps = 100", "warmup_steps = 200 leaves nothing of 100 steps"),
        ("[optimisation]\nseed = -1", "seed = -1 is negative"),
        ("[encoder]\ndropout = 1.5", "dropout = 1.5 is no probability"),
        (
            '[objective]\nname = "rtd"\ngenerator_width = 0.001\n[encoder]\nfamily = "electra"',
            "generator_width = 0.001 of hidden_size 256 leaves no generator",
        ),
        (
            "[data]\nsequence_length = 512",
            (
                "as many positions apart as there are columns; sequence_length = 512, hidden_size"
                " = 256"
            ),
        ),
        ("[", "is not TOML"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(
    tmp_path: Path, change: str, words: str
) -> None:
    (tmp_path / "c.toml").write_text(f'extends = "{CONFIGS / "bert-mini.toml"}"\n{change}\n')
    with pytest.raises(BadInput, match=words):
        read_config(tmp_path / "c.toml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_that_comes_along_can_be_read(path: Path) -> None:
    assert read_config(path).optimisation.steps > 0


@pytest.mark.parametrize("design", ["plain", "gua", "mix", "drbert", "emd", "mae"])
def test_the_designs_differ_from_the_reference_in_the_decoder_alone(design: str) -> None:
    vanilla, enhanced = (
        read_config(CONFIGS / f"{name}-mini.toml").as_dict() for name in ("bert", design)
    )
    assert vanilla.pop("decoder") != enhanced.pop("decoder")
    assert vanilla == enhanced
