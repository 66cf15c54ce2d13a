"""Files are read in chunks that say how far reading has come, in bytes as they are on disk."""

import csv
import gzip
import json
import random
from itertools import accumulate

import pyarrow
import pyarrow.parquet
import pytest

from lora_engine.data.chunks import chunks_of

DRAW = random.Random(0)
TEXTS = [DRAW.randbytes(100 + i % 40).hex(" ", 4) for i in range(6000)]  # that hardly pack


def write_json(path, **how):
    path.write_text(json.dumps([{"text": text} for text in TEXTS], **how))


def write_table(path):
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows.writerows([["text"], *([text] for text in TEXTS)])


def write_packed(path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    with gzip.open(path, "wb") as file:
        file.write(lines.encode())


def write_zstd(path):
    rows = [{"text": text} for text in TEXTS * 4]  # it is unpacked a megabyte at a time
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(json.dumps(rows).encode())


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)


def write_arrow(path, make):
    table = pyarrow.table({"text": TEXTS})
    with make(str(path), table.schema) as file:
        file.write_table(table, max_chunksize=300)


FILES = {
    "lines": ("a.jsonl", lambda path: path.write_text("".join(f'"{t}"\n' for t in TEXTS))),
    "lines, packed": ("a.jsonl.gz", write_packed),
    "a list in one line": ("a.json", write_json),
    "a list over lines": ("a.json", lambda path: write_json(path, indent=1)),
    "a list, packed": ("a.json.zst", write_zstd),
    "csv": ("a.csv", write_table),
    "tsv": ("a.tsv", write_table),
    "parquet": ("a.parquet", write_parquet),
    "arrow": ("a.arrow", lambda path: write_arrow(path, pyarrow.ipc.new_file)),
    "arrow, a stream": ("a.arrow", lambda path: write_arrow(path, pyarrow.ipc.new_stream)),
    "text": ("a.txt", lambda path: path.write_text("\n\n".join(TEXTS))),
}


@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_what_is_read_grows_to_the_size_of_the_file(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr("lora_engine.data.chunks.BYTES", 20_000)
    monkeypatch.setattr("lora_engine.data.json_list.PIECE", 10_000)
    monkeypatch.setattr("lora_engine.data.documents.PIECE", 10_000)
    path = tmp_path / name
    write(path)
    chunks = list(chunks_of(path, None)[1])
    done = list(accumulate(chunk.size for chunk in chunks))
    assert done == sorted(done) and done[-1] == path.stat().st_size
    assert len(set(done)) > 4
    half = next(i for i, read in enumerate(done) if read >= done[-1] / 2)
    read = list(accumulate(len(chunk.rows) + len(chunk.lines) for chunk in chunks))
    assert 0.3 < read[half] / read[-1] < 0.8


def test_large_rows_make_small_chunks(tmp_path):
    rows = [{"text": "word " * 60_000}] * 12
    (tmp_path / "a.json").write_text(json.dumps(rows))
    counts = [len(chunk.rows) for chunk in chunks_of(tmp_path / "a.json", None)[1]]
    assert sum(counts) == 12 and max(counts) < 9
    assert [len(c.rows) for c in chunks_of(rows, None)[1]] == [12, 0]  # of no known size
