"""Training and held-out examples as the `data` section describes them."""

import json

import datasets as hub
import pytest
from small_tokenizers import make_byte_level

from lora_engine.app import datasets
from lora_engine.app.config_data import DataConfig
from lora_engine.data.dataset import prepare
from lora_engine.data.records import read_records, split_heldout
from lora_engine.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return make_byte_level()


@pytest.fixture
def files(tmp_path):
    """Two files of pairs, and one with columns of its own."""
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"prompt": f"{name} {i}", "completion": f" {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"frage": f"c {i}", "antwort": str(i)} for i in range(20)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def prepared(tokenizer, **data):
    return datasets.prepare_data(DataConfig(**data), tokenizer)


def origins(dataset) -> list[str]:
    return [example.origin for example in dataset]


def test_records_are_split_as_split_heldout_splits_them(tokenizer, files):
    path = str(files / "a.jsonl")
    train, heldout = prepared(tokenizer, train=path, eval_fraction=0.2, seed=3)
    expected = split_heldout(read_records(path), 0.2, seed=3)
    assert [origins(train), origins(heldout)] == [[r.origin for r in side] for side in expected]
    assert (train.name, heldout.name) == (f"{path}, training", f"{path}, held out")
    limited = prepared(tokenizer, train=path, eval_fraction=0.2, seed=3, eval_limit=2)[1]
    assert origins(limited) == origins(heldout)[:2]


@pytest.mark.parametrize("stream", [False, True])
def test_the_limit_counts_examples_of_long_texts(tokenizer, tmp_path, stream):
    texts = [f"Text {i}. " + f"Sentence {i} of many. " * 40 for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = {"train": str(tmp_path / "a.jsonl"), "max_length": 32, "stream": stream}
    whole = prepared(tokenizer, **options, eval_fraction=0.3)[1]
    limited = prepared(tokenizer, **options, eval_fraction=0.3, eval_limit=5)[1]
    assert len(whole) > 40 and list(limited) == list(whole)[:5]


def test_several_sources_with_columns_of_their_own(tokenizer, files):
    columns = {"user": "frage", "assistant": "antwort"}
    sources = [str(files / "b.jsonl"), {"path": str(files / "c.jsonl"), "columns": columns}]
    train, heldout = prepared(tokenizer, train=sources, eval_fraction=0.2)
    assert dict(train.formats).keys() == {"prompt-completion", "turn"}
    assert train.num_records + heldout.num_records == 30
    limited = [{"path": str(files / "a.jsonl"), "limit": 4}, str(files / "b.jsonl")]
    train, heldout = prepared(tokenizer, train=limited, eval_fraction=0.2)
    assert train.num_records + heldout.num_records == 14


def test_a_mixture_keeps_held_out_records_out_of_training(tokenizer, files):
    sources = [
        {"path": str(files / "a.jsonl"), "weight": 1},
        {"path": str(files / "b.jsonl"), "weight": 3},
    ]
    train, heldout = prepared(tokenizer, train=sources, eval_fraction=0.25)
    assert not set(origins(train)) & set(origins(heldout))
    of_b = sum("b.jsonl" in origin for origin in origins(train))
    assert of_b / len(train) == pytest.approx(0.75, abs=0.02)
    assert len(train) == train.num_records and not train.duplicates
    assert [(source, taken) for source, _, taken in train.mixture] == [
        (sources[0]["path"], len(train) - of_b),
        (sources[1]["path"], of_b),
    ]


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"train": []}, "train names no source"),
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "a weight to some sources only"),
        ({"train": "a", "columns": {"usr": "b"}}, "'usr' is no field of any format; did you mean"),
        ({"train": [{"path": "a", "template": "b"}]}, "template: names no column"),
    ],
)
def test_settings_that_cannot_be_meant(data, line):
    with pytest.raises(ValueError, match=line):
        DataConfig(**data)


def test_large_sources_are_kept_in_the_cache(tokenizer, files, monkeypatch):
    monkeypatch.setattr(datasets, "PARALLEL_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))
    data = {"train": str(files / "a.jsonl"), "processes": 1}
    assert prepared(tokenizer, **data, cache=False) and not (files / "cache").exists()
    first = prepared(tokenizer, **data)
    assert len(list((files / "cache/lora_engine/data").iterdir())) == 1
    calls = []
    monkeypatch.setattr(datasets, "tokenise", lambda *a, **k: calls.append(a))
    again = prepared(tokenizer, **data)
    assert [list(side) for side in again] == [list(side) for side in first] and not calls


def test_what_is_wrong_is_told_from_the_cache_too(tokenizer, files, monkeypatch):
    monkeypatch.setattr(datasets, "PARALLEL_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(files / "cache"))
    (files / "a.jsonl").write_text('{"text": "a"}\n{oops\n' * 9)
    for _ in range(2):
        with pytest.raises(UserError, match=r"9 of 18 records .*a\.jsonl:2"):
            prepared(tokenizer, train=str(files / "a.jsonl"), processes=1)
        assert len(list((files / "cache/lora_engine/data").iterdir())) == 1


def test_progress_is_told(tokenizer, files):
    told = []
    datasets.prepare_data(
        DataConfig(train=str(files / "a.jsonl")), tokenizer, lambda *done: told.append(done)
    )
    size = (files / "a.jsonl").stat().st_size
    assert told == [(str(files / "a.jsonl"), size, size, 30)]


def test_documents_of_a_folder(tokenizer, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.md").write_text(f"# Part {number}\n\n" + "Some words. " * 30)
    train, heldout = prepared(tokenizer, train=str(tmp_path), eval_fraction=0.3, max_length=50)
    assert train.num_records == 3 and len(train) > 6
    whole = prepare(tmp_path, tokenizer, max_length=None)
    assert train.num_tokens + heldout.num_tokens == whole.num_tokens


def test_a_stream_and_what_is_held_out_of_it(tokenizer, files):
    train, heldout = prepared(
        tokenizer,
        train=str(files / "[ab].jsonl"),
        stream=True,
        stream_buffer=64,
        eval_fraction=0.2,
        processes=1,
    )
    assert not set(origins(train)) & set(origins(heldout))
    assert train.stream is not None and train.name.endswith("the first records)")
    with pytest.raises(UserError, match=r"docstrings: data\.stream reads files"):
        prepared(tokenizer, train="docstrings", stream=True)


def texts(data, count=300) -> set[str]:
    """What the first buffers of a stream say."""
    train, _ = data
    place, found = train.stream.begin, set()
    for _ in range(count // 64 + 1):
        dataset, place = train.stream.buffer(place)
        found |= {example.origin.rpartition(":")[2] for example in dataset or ()}
    return found


STREAM = {"stream": True, "stream_buffer": 64, "processes": 1}


def test_lists_and_saved_datasets_are_streamed(tokenizer, tmp_path):
    rows = [{"text": f"row {i} of the list"} for i in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    of_list = texts(prepared(tokenizer, train=str(tmp_path / "a.json"), **STREAM))
    assert len(of_list) > 250
    hub.DatasetDict(train=hub.Dataset.from_list(rows)).save_to_disk(str(tmp_path / "saved"))
    assert len(texts(prepared(tokenizer, train=str(tmp_path / "saved"), **STREAM))) > 250
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        prepared(tokenizer, train=str(tmp_path / "saved"), split="test", **STREAM)


def test_a_dataset_of_the_hub_is_streamed_from_its_copy_on_disk(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(300)))

    def load(name: str, split: str) -> hub.Dataset:
        """As `datasets` does with what it has copied from the hub."""
        assert name == "someone/texts"
        return hub.Dataset.from_json(str(path), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(hub, "load_dataset", load)
    train, heldout = prepared(tokenizer, train="someone/texts", **STREAM)
    assert len(texts((train, heldout))) > 250
    assert str(tmp_path / "cache") in train[0].origin
    whole = load("someone/texts", "train")
    for part in (
        whole.select(range(9)),
        whole.shuffle(seed=1),
        hub.Dataset.from_list([{"text": "a"}]),
    ):
        monkeypatch.setattr(hub, "load_dataset", lambda name, split, part=part: part)
        with pytest.raises(
            UserError, match=r"someone/texts: is a part of a dataset, which data.str"
        ):
            prepared(tokenizer, train="someone/texts", **STREAM)


def test_of_a_single_document_the_end_is_held_out(tokenizer, tmp_path):
    path = tmp_path / "book.md"
    path.write_text("".join(f"# {i}\n\n" + f"Line {i} of it. " * 9 + "\n\n" for i in range(40)))
    options = {"train": str(path), "max_length": 64}
    train, heldout = prepared(tokenizer, **options, eval_fraction=0.2)
    whole = prepare(str(path), tokenizer, max_length=64)
    assert [*train, *heldout] == list(whole)
    assert len(heldout) == round(0.2 * len(whole)) and heldout.name.endswith("held out")
    assert list(prepared(tokenizer, **options, eval_fraction=0.2, eval_limit=2)[1]) == heldout[:2]
    replay = {"path": str(path), "fraction": 0.5}
    assert len(prepared(tokenizer, **options, eval_fraction=0.2, replay=replay)[0]) == 2 * len(
        train
    )
    with pytest.raises(UserError, match="cannot hold out"):  # it is one example
        prepared(tokenizer, train=str(path), max_length=10**6)
