"""Tokens kept on disk: found again by what decides them, whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small_tokenizers import make_byte_level

from lora_engine.data import cache
from lora_engine.data.chunks import chunks_of
from lora_engine.data.formats.columns import Layout
from lora_engine.data.recipe import Recipe
from lora_engine.data.tokenising import tokenise

RECIPE = Recipe(max_length=20)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(9)) + "{oops\n")
    return path


def done(file, tokenizer):
    return tokenise(chunks_of(file, None)[1], RECIPE, tokenizer)


def origins(tokenised) -> list[str]:
    return [tokenised.store.origin(i) for i in range(len(tokenised.store))]


def test_what_was_kept_is_found_again(tokenizer, file, tmp_path):
    folder, key = tmp_path / "cache", cache.key_of([file], RECIPE, tokenizer)
    assert cache.load(folder, key) is None
    first = done(file, tokenizer)
    assert cache.save(folder, key, first)
    again = cache.load(folder, key)
    assert again is not None and again.problems == first.problems != []
    assert origins(again) == origins(first)
    assert again.store.example(3, "") == first.store.example(3, "")
    assert cache.save(folder, key, first)  # another process was first
    assert [path.name for path in folder.iterdir()] == [key]


def test_whatever_decides_the_tokens_is_in_the_key(tokenizer, file):
    keys = {cache.key_of([file], RECIPE, tokenizer)}
    for recipe in (
        replace(RECIPE, max_length=21),
        replace(RECIPE, on_too_long="drop"),
        replace(RECIPE, loss_on="all"),
        replace(RECIPE, layout=Layout(columns={"text": "a"})),
    ):
        keys.add(cache.key_of([file], recipe, tokenizer))
    keys.add(cache.key_of([file], RECIPE, make_byte_level("{{ messages[0].content }}")))
    keys.add(cache.key_of([file], RECIPE, make_byte_level(eos_token="</s>")))
    file.write_text(file.read_text().replace("word 3", "wort 3"))
    keys.add(cache.key_of([file], RECIPE, tokenizer))
    assert len(keys) == 8
    assert cache.key_of([file], RECIPE, make_byte_level()) in keys  # an equal tokenizer


@pytest.mark.parametrize("name", ["ids.npy", "about.json", "problems.json"])
def test_a_damaged_entry_is_none(tokenizer, file, tmp_path, name):
    cache.save(tmp_path / "cache", "k", done(file, tokenizer))
    path = tmp_path / "cache/k" / name
    path.write_bytes(path.read_bytes()[:-5])
    assert cache.load(tmp_path / "cache", "k") is None
    assert not (tmp_path / "cache/k").exists()  # and is made anew


def test_what_a_killed_process_leaves_is_no_entry(tokenizer, file, tmp_path, monkeypatch):
    folder = tmp_path / "cache"

    class Killed(BaseException):
        pass

    def die(path):
        raise Killed

    monkeypatch.setattr(cache, "_sync", die)
    with pytest.raises(Killed):
        cache.save(folder, "k", done(file, tokenizer))
    (left,) = folder.iterdir()
    assert cache.load(folder, "k") is None and left.name.startswith(".unfinished")
    monkeypatch.undo()
    assert cache.save(folder, "k", done(file, tokenizer)) and left.exists()  # it may be at work
    os.utime(left, (time.time() - 90_000,) * 2)
    cache.save(folder, "other", done(file, tokenizer))
    assert not left.exists()


def sized(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_was_read_least_recently_makes_room(tokenizer, file, tmp_path):
    folder, tokenised = tmp_path / "cache", done(file, tokenizer)
    assert cache.save(folder, "a", tokenised)
    limit = int(3.5 * sized(folder))
    for name in ("b", "c"):
        assert cache.save(folder, name, tokenised, limit=limit)
    for age, name in enumerate(("b", "c", "a")):
        os.utime(folder / name, (time.time() - 90 + age,) * 2)
    held = cache.load(folder, "b")  # the oldest by its writing, not by its reading
    assert held is not None
    assert cache.save(folder, "d", tokenised, limit=limit)
    assert {path.name for path in folder.iterdir()} == {"a", "b", "d"}
    assert sized(folder) <= limit
    assert cache.save(folder, "e", tokenised, limit=int(1.5 * sized(folder / "a")))
    assert [path.name for path in folder.iterdir()] == ["e"]
    assert held.store.example(3, "").input_ids  # its files are gone, its arrays are not
    assert not cache.save(folder, "f", tokenised, limit=10)
    assert [path.name for path in folder.iterdir()] == ["e"]  # nothing went for one too large


def test_a_full_disk_keeps_nothing_and_leaves_nothing(tokenizer, file, tmp_path, monkeypatch):
    def full(path, values):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    assert not cache.save(tmp_path / "cache", "k", done(file, tokenizer))
    assert list((tmp_path / "cache").iterdir()) == []


WORKER = """
import sys, time
from pathlib import Path
from small_tokenizers import make_byte_level
from lora_engine.data import cache
from lora_engine.data.chunks import chunks_of
from lora_engine.data.recipe import Recipe
from lora_engine.data.tokenising import tokenise
folder, file = map(Path, sys.argv[1:])
done = tokenise(chunks_of(file, None)[1], Recipe(), make_byte_level())
print("ready", flush=True)
sys.stdin.readline()
while True:
    for key in "abcde":
        if cache.load(folder, key) is None:
            cache.save(folder, key, done, limit=6 * done.store.num_bytes)
        print(key, flush=True)
"""


def test_processes_that_are_killed_at_work_leave_no_entry_that_is_not_whole(
    tokenizer, file, tmp_path
):
    file.write_text("".join(json.dumps({"text": f"word {i} " * 300}) + "\n" for i in range(60)))
    folder, env = tmp_path / "cache", {**os.environ, "PYTHONPATH": "tests/support:."}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout.readline() == b"ready\n"
    for worker in workers:
        worker.stdin.write(b"\n")
        worker.stdin.flush()
    for worker in workers:
        for _ in range(40):
            worker.stdout.readline()
        worker.kill()
        worker.communicate()
    expected = [
        len(example)
        for example in examples_of(tokenise(chunks_of(file, None)[1], Recipe(), tokenizer))
    ]
    whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert whole
    for path in whole:
        entry = cache.load(folder, path.name)
        assert entry is not None and [len(example) for example in examples_of(entry)] == expected


def examples_of(tokenised) -> list:
    return [tokenised.store.example(i, "") for i in range(tokenised.store.num_examples)]


def test_a_folder_that_cannot_be_written_keeps_nothing(tokenizer, file, tmp_path):
    (tmp_path / "a file").write_text("")
    assert not cache.save(tmp_path / "a file", "k", done(file, tokenizer))
