import os
import threading
import time
from pathlib import Path

import pytest

from lora_engine.files import user_cache_dir
from lora_engine.models.load.cache import cached_folder


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("whole")


def test_built_once(tmp_path):
    calls = []

    def build(folder):
        calls.append(folder)
        fill(folder)

    target = tmp_path / "a" / "b"
    assert cached_folder(target, build) == cached_folder(target, build) == target
    assert len(calls) == 1
    assert (target / "inner" / "file").read_text() == "whole"
    assert target.stat().st_mode & 0o777 == 0o755


def test_files_that_were_made_private_can_be_read_by_others(tmp_path):
    folder = cached_folder(tmp_path / "a", lambda target: (target / "f").touch(mode=0o600))
    assert (folder / "f").stat().st_mode & 0o777 == 0o644


def test_nothing_remains_of_a_failed_build(tmp_path):
    def fail(folder):
        fill(folder)
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached_folder(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_builders_at_once_both_succeed(tmp_path):
    both_are_building = threading.Barrier(2, timeout=30)
    results = []

    def build(folder):
        fill(folder)
        both_are_building.wait()

    def run():
        results.append(cached_folder(tmp_path / "a", build))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / "a"] * 2
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    old, young = tmp_path / ".building-old", tmp_path / ".building-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "part").touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    cached_folder(tmp_path / "a", fill)
    assert not old.exists() and young.exists()


def test_user_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "lora_engine"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / ".cache" / "lora_engine"
