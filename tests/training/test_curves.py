"""The loss curves are complete, reproducible and distinguishable."""

from __future__ import annotations

from pathlib import Path

import pytest

from command import Unavailable
from tests.training.factories import TEXT, tiny
from training.curves import COLOURS, DASHES, line_styles, main
from training.pretrain import pretrain


def test_runs_are_drawn_together_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("none", "drbert"):
        pretrain(tiny(name, tmp_path / f"{name}.toml"), TEXT, tmp_path / name)
    for out in ("first.svg", "second.svg"):
        assert (
            main([str(tmp_path / "none"), str(tmp_path / "drbert"), "--out", str(tmp_path / out)])
            == 0
        )
    assert (tmp_path / "first.svg").read_text() == (tmp_path / "second.svg").read_text()
    assert "without context" in (tmp_path / "first.svg").read_text()


def test_a_run_without_a_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/log.csv").write_text("step,tokens,loss,held_out_loss\n")
    with pytest.raises(Unavailable, match=r"log\.csv has no step yet"):
        main([str(tmp_path / "begun"), "--out", str(tmp_path / "x.svg")])
    with pytest.raises(Unavailable, match=r"log\.csv does not exist"):
        main([str(tmp_path), "--out", str(tmp_path / "x.svg")])


def test_seeds_of_a_design_share_its_colour_and_its_one_label() -> None:
    drawn = list(line_styles({"none": [Path("a"), Path("b")], "drbert": [Path("c")]}))
    assert drawn == [
        ("none", "none, 2 seeds", COLOURS[0], DASHES[0], Path("a")),
        ("none", "_nolegend_", COLOURS[0], DASHES[1], Path("b")),
        ("drbert", "drbert", COLOURS[1], DASHES[0], Path("c")),
    ]
