"""Two test processes that want the same compiled thing get one, whole."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from built_once import built_once

PARTS = 50


def _fill(folder: Path) -> None:
    """Takes long enough for the other processes to arrive."""
    folder.mkdir()
    for i in range(PARTS):
        (folder / f"{i}").write_text(str(os.getpid()))
    with (folder.parent / "builders").open("a") as file:
        file.write("one\n")


def _build(folder: Path) -> int:
    return len(list(built_once(folder, _fill).iterdir()))


def test_processes_build_a_folder_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        found = pool.map(_build, [tmp_path / "made"] * 16)
    assert found == [PARTS] * 16
    assert (tmp_path / "builders").read_text() == "one\n"


def test_threads_build_a_folder_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: built_once(tmp_path / "made", _fill), range(8)))
    assert (tmp_path / "builders").read_text() == "one\n"


@pytest.mark.parametrize("left", ["file", "folder"])
def test_what_a_killed_process_left_is_made_anew(tmp_path: Path, left: str) -> None:
    unfinished = tmp_path / "made.unfinished"
    if left == "file":
        unfinished.write_text("half")
        made = built_once(tmp_path / "made", lambda path: path.touch(exist_ok=False))
        assert made.read_text() == ""
    else:
        (unfinished / "half").mkdir(parents=True)
        assert len(list(built_once(tmp_path / "made", _fill).iterdir())) == PARTS


def test_a_build_that_fails_is_tried_again(tmp_path: Path) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no compiler")

    with pytest.raises(RuntimeError, match="no compiler"):
        built_once(tmp_path / "made", fails)
    assert not (tmp_path / "made").exists()
    assert built_once(tmp_path / "made", lambda path: path.touch(exist_ok=False)).read_text() == ""
