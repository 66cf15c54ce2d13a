"""Tokens kept on disk: found again by what decides them, whole or not at all."""

import json
import os
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


def test_a_folder_that_cannot_be_written_keeps_nothing(tokenizer, file, tmp_path):
    (tmp_path / "a file").write_text("")
    assert not cache.save(tmp_path / "a file", "k", done(file, tokenizer))
