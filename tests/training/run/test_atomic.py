import os

import pytest

from lora_engine.training.run.atomic import new_folder, remove_folder, remove_leftovers


def test_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "target") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not (tmp_path / "deep" / "target").exists()
    assert (tmp_path / "deep" / "target" / "sub" / "file").read_text() == "x"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["target"]


@pytest.mark.parametrize("umask,mode", [(0o022, 0o644), (0o077, 0o600)], ids=["open", "private"])
def test_files_that_were_made_private_are_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "target") as folder:
            (folder / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "target" / "weights").stat().st_mode & 0o777 == mode


def test_replaces_what_was_there(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "target") as folder:
            (folder / text).write_text(text)
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["new"]


def test_failure_leaves_the_old_one(tmp_path):
    with new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_leftovers_of_killed_processes_go(tmp_path):
    mine = (".tmp-other-1", ".old-target", ".tmp-target-x", "target")
    for name in (".tmp-target-1", ".old-target-2", *mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    my_files = (".tmp-a.json-x", ".tmp-b.json-abcd_123", "a.json")
    for name in (".tmp-a.json-abcd_123", *my_files):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, r"target|a\.json")
    remove_leftovers(tmp_path / "absent", "target")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*mine, *my_files])


def test_remove_folder(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    remove_folder(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
