"""Files and folders are replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from atomic import atomic_directory, atomic_file, recover_directory, write_text_atomic


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "facts.json"
    write_text_atomic(target, "old")
    write_text_atomic(target, "new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_stays_as_it_was_when_the_block_raises(tmp_path: Path) -> None:
    target = tmp_path / "facts.json"
    target.write_text("old")
    with pytest.raises(OSError, match="disk"):
        write_half(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]


def write_half(target: Path) -> None:
    """Fail within the block that writes a file."""
    with atomic_file(target) as draft:
        draft.write_text("half of the n")
        raise OSError("the disk is full")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "run") as draft:
            (draft / text).write_text(text)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_of_two_writers_of_the_same_folder_the_second_keeps_the_first_ones(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "run", keep_existing=True) as second:
        (second / "second").touch()
        with atomic_directory(tmp_path / "run", keep_existing=True) as first:
            (first / "first").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_stays_as_it_was_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "run"):
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_replacement_that_was_killed_half_way_is_undone(tmp_path: Path) -> None:
    (tmp_path / ".run-old").mkdir()
    recover_directory(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
