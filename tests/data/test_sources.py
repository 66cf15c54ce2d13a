"""Where records come from: files, packed ones, folders, patterns, several, text and Arrow."""

import gzip
import json

import datasets
import pyarrow
import pytest
import zstandard

from lora_engine.data.readers import file_kind
from lora_engine.data.records import read_records
from lora_engine.errors import UserError


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source, **options) -> list[str]:
    return [record.text for record in read_records(source, **options)]


PACKED = {
    "a.jsonl.gz": gzip.compress(lines("a")) + gzip.compress(lines("b")),
    "a.jsonl.zst": zstandard.compress(lines("a")) + zstandard.compress(lines("b")),
    "a.csv.gz": gzip.compress(b"text\na\nb\n"),
    "a.json.zst": zstandard.compress(b'[{"text": "a"}, {"text": "b"}]'),
    "a.tsv": b"text\tn\na\t1\nb\t2\n",
    "a.ndjson": lines("a", "b"),
}


@pytest.mark.parametrize("name", PACKED)
def test_files_of_each_kind(tmp_path, name):
    (tmp_path / name).write_bytes(PACKED[name])
    assert texts(tmp_path / name) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_that_is_damaged(tmp_path, name):
    for content in (PACKED[name][: len(PACKED[name]) - 9], b"no archive"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: is not a readable .* get it anew") as caught:
            read_records(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JSONL", ".jsonl"), ("a.b.csv.GZ", ".csv"), ("a.gz", ""), ("a.parquet.gz", ""), ("a", "")],
)
def test_what_a_name_says(tmp_path, name, kind):
    assert file_kind(tmp_path / name) == kind


def test_a_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffOne.\r\n\r\nTwo é.\n".encode())
    (record,) = read_records(tmp_path / "a.txt")
    assert (record.text, record.format) == ("One.\r\n\r\nTwo é.\n", "text")
    assert record.origin == f"{tmp_path / 'a.txt'}:1"


def test_a_folder_is_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl.gz", ".hidden.jsonl", "__pycache__/c.jsonl", "notes.doc"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(lines(name)) if name.endswith("gz") else lines(name))
    (tmp_path / "README.md").write_text("About the data.")
    assert texts(tmp_path) == ["a/z.jsonl.gz", "b.jsonl"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text("The only one.")
    assert texts(tmp_path / "docs") == ["The only one."]


def test_a_folder_of_splits_is_not_trained_on_whole(tmp_path):
    for name in ("train-0", "train-1", "test-0", "validation"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(name))
    assert texts(tmp_path) == ["train-0", "train-1"]
    assert texts(tmp_path, split="val") == ["validation"]
    with pytest.raises(UserError, match="has no files of the split 'dpo'; there is test"):
        read_records(tmp_path, split="dpo")


def test_patterns_and_several_sources(tmp_path):
    for name in ("a1", "a2", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(name))
    assert texts(f"{tmp_path}/a*.jsonl") == ["a1", "a2"]
    assert texts([tmp_path / "b.jsonl", f"{tmp_path}/a?.jsonl"]) == ["b", "a1", "a2"]
    with pytest.raises(UserError, match=r"c\*\.jsonl: matches no file that can be read"):
        read_records(f"{tmp_path}/c*.jsonl")
    with pytest.raises(UserError, match="is a folder without data"):
        (tmp_path / "empty").mkdir()
        read_records(tmp_path / "empty")


def test_datasets_on_disk(tmp_path):
    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "dict")
    assert texts(tmp_path / "one") == ["a", "b"]
    assert texts(str(tmp_path / "dict"), split="test") == ["a"]
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(UserError, match="one: is not a readable dataset, save it anew"):
        read_records(tmp_path / "one")


@pytest.mark.parametrize("kind", ["new_file", "new_stream"])
def test_arrow_files(tmp_path, kind):
    table = pyarrow.table({"text": ["a", "b"]})
    with getattr(pyarrow.ipc, kind)(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a", "b"]
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 no more")
    with pytest.raises(UserError, match=r"a\.arrow: is not a readable Arrow file"):
        read_records(tmp_path / "a.arrow")
