"""Outcomes in flat arrays, worked out by one process or several: the same examples."""

import json

import pytest

from lora_engine.data.chunks import Chunk, chunks_of
from lora_engine.data.dataset import prepare
from lora_engine.data.recipe import Recipe, Tokenising
from lora_engine.data.records import read_records
from lora_engine.data.store import OutcomeStore, joined, store_of
from lora_engine.errors import UserError

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes", "x": 1},
        ]
    },
    {"prompt": "a", "completion": "", "score": 2},
    {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 0.5},
    {"text": "word " * 30, "adapter": "é"},
    {"text": "Hello<|im_end|>", "weight": 0.5},
]


def outcomes(tokenizer, rows=ROWS):
    work = Tokenising(Recipe(max_length=12), tokenizer)
    return [work.outcome(record) for record in read_records(rows)]


def examples(store: OutcomeStore):
    return [
        store.example(number, store.origin(record))
        for record in range(len(store))
        for number in store.examples_of(record)
    ]


@pytest.mark.parametrize("how", ["one", "joined", "files"])
def test_a_store_gives_back_what_it_was_given(tokenizer, tmp_path, how):
    given = outcomes(tokenizer)
    store = store_of(given)
    if how == "joined":
        store = joined([store_of(given[:2]), store_of(()), store_of(given[2:])])
    elif how == "files":
        store.save(tmp_path)
        store = OutcomeStore.load(tmp_path)
    assert len(store) == len(given)
    for number, outcome in enumerate(given):
        about = (outcome.kind, outcome.format, outcome.dropped, outcome.ignored)
        assert store.about(number) == about
        assert (store.origin(number), store.key(number)) == (outcome.origin, outcome.key)
        assert store.group(number) == outcome.group
    assert examples(store) == [example for outcome in given for example in outcome.examples]
    assert store.num_examples == sum(len(outcome.examples) for outcome in given) > len(given)


def test_a_damaged_store_is_not_loaded(tokenizer, tmp_path):
    store_of(outcomes(tokenizer)).save(tmp_path)
    content = (tmp_path / "ids.npy").read_bytes()
    (tmp_path / "ids.npy").write_bytes(content[:-40])
    with pytest.raises(ValueError):
        OutcomeStore.load(tmp_path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    rows = [{"prompt": f"question {i} ", "completion": f"answer {i * i}"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_several_processes_give_the_same_in_the_same_order(tokenizer, file, monkeypatch):
    monkeypatch.setattr("lora_engine.data.chunks.BYTES", 500)
    told = []
    one = prepare(file, tokenizer)
    two = prepare(file, tokenizer, processes=2, progress=lambda *done: told.append(done))
    assert list(two) == list(one)
    assert len(told) > 4 and told[-1] == (file.stat().st_size, 60)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_problems_found_by_several_processes_are_all_listed(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_engine.data.chunks.BYTES", 50)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{oops\n' * 8)
    with pytest.raises(UserError, match=r"8 of 16 .*a\.jsonl:2, .*:4, .*:6 and 5 more: is not"):
        prepare(path, tokenizer, processes=2)


def test_a_limit_reads_no_further(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{oops\n')
    assert len(prepare(path, tokenizer, limit=2)) == 2
    name, chunks = chunks_of(path, None)
    assert name == str(path) and [len(c.lines) for c in chunks] == [3]
    assert list(Chunk().parsed()) == []
