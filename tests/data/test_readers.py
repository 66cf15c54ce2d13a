"""Lines end where each format says, and whatever a file holds is told in one line."""

import csv
import gzip
import json
import os
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lora_engine.data.records import read_records
from lora_engine.errors import UserError

# Line ends to str.splitlines, and to nobody else; "\r" is one in CSV outside quotes.
NO_LINE_ENDS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"


def texts(path) -> list[tuple[str, int]]:
    """(text, line) of every record."""
    return [(r.text, int(r.origin.rpartition(":")[2])) for r in read_records(path)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_jsonl_ends_lines_at_line_feeds_only(tmp_path, end, encoding):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": NO_LINE_ENDS + "\r\n"}, ensure_ascii=False), "", '{"text":\r"b"}']
    path.write_bytes(end.join(rows).encode(encoding))
    assert texts(path) == [(NO_LINE_ENDS + "\r\n", 1), ("b", 3)]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_ends_lines_at_line_ends_outside_quotes_only(tmp_path, end, encoding):
    path = tmp_path / "a.csv"
    cells = [NO_LINE_ENDS, f'"{NO_LINE_ENDS}"', f'"a{end}b"', '"a ""b"""', "c"]
    path.write_bytes(end.join(["text", *cells, ""]).encode(encoding))
    expected = [
        (NO_LINE_ENDS, 2),
        (NO_LINE_ENDS, 3),
        (f"a{end}b", 5),
        ('a "b"', 6),
        ("c", 7),
    ]
    assert texts(path) == expected
    with path.open(encoding=encoding, newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == [text for text, _ in expected]


def test_json_counts_line_feeds_only(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"text": NO_LINE_ENDS}, {"text": "b"}], indent=0, ensure_ascii=False)
    )
    assert texts(path) == [(NO_LINE_ENDS, 2), ("b", 5)]


GOOD = b'{"text": "a"}\n'
NESTED = b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DIGITS = b'{"text": "a", "x": ' + b"9" * 100_000 + b"}"
PARQUET = "is a Parquet file; name it .parquet"
FILES = {
    "deep": ("a.jsonl", GOOD + NESTED, r"a\.jsonl:2: is nested too deeply$"),
    "digits": ("a.jsonl", GOOD + DIGITS, r"a\.jsonl:2: holds a number with too many digits$"),
    "deep-list": ("a.json", b"[\n" + NESTED + b"]", r"a\.json:2: is nested too deeply$"),
    "digits-list": ("a.json", b"[" + DIGITS + b"]", r"a\.json:1 \(record 1\): holds a number with"),
    "key-twice": ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: names the key 'text' tw"),
    "nul": ("a.jsonl", GOOD + b'{"text": "\0"}', r"a\.jsonl:2: is not valid JSON: Invalid control"),
    "nuls": ("a.jsonl", GOOD + b"\0" * 99, r"a\.jsonl:2: is not valid JSON: Expecting value"),
    "long": ("a.jsonl", b'{"text": "' + b"a" * 5_000_000, r"a\.jsonl:1: is not valid JSON"),
    "two-values": ("a.jsonl", b"{} {}", r"a\.jsonl:1: is not valid JSON: Extra data"),
    "gzip": (
        "a.jsonl",
        gzip.compress(GOOD),
        r"a\.jsonl: is compressed \(gzip\); let its name end in \.gz",
    ),
    "gzip-csv": ("a.csv", gzip.compress(b"text\na\n"), r"a\.csv: is compressed \(gzip\)"),
    "parquet": ("a.json", b"PAR1\x15\x04", rf"a\.json: {PARQUET}"),
    "utf-16": ("a.jsonl", GOOD.decode().encode("utf-16"), r"a\.jsonl: is UTF-16 text; save it as"),
    "latin-1": ("a.csv", "text\né\n".encode("latin-1"), r"a\.csv:2: is not UTF-8 text"),
    "empty": ("a.jsonl", b"", r"a\.jsonl: holds no records"),
    "empty-json": ("a.json", b"", r"a\.json:1: expected a JSON list"),
    "empty-csv": ("a.csv", b"", r"a\.csv: holds no records"),
    "header-only": ("a.csv", b"text\n", r"a\.csv: holds no records"),
    "empty-parquet": ("a.parquet", b"", r"a\.parquet: is not a readable Parquet file"),
    "behind-the-list": ("a.json", b'[{"text": "a"}]\n[]', r"a\.json:2: stands behind the end of"),
    "column-twice": ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the header names 'text' more than"),
    "no-header": ("a.csv", b"\ntext\na\n", r"a\.csv:1: is empty; the first line has to name"),
    "bad-header": ("a.csv", b'"te"xt\na\n', r"a\.csv:1: the header is not valid CSV"),
    "open-quote": (
        "a.csv",
        b'text\na\n"b\nc\n',
        r"a\.csv:4: is not valid CSV: .* begins in line 3",
    ),
    "surrogate-key": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "", "tool_calls": [{"\\udc00": 1}]}]}',
        r"a\.jsonl:1: message 1 holds half a character \(the lone surrogate U\+DC00\)",
    ),
    "deep-message": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "a", "x": ' + b"[" * 99 + b"]" * 99 + b"}]}",
        r"a\.jsonl:1: message 1 is nested more than 64 levels deep",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_numbers_that_json_lacks_are_read_as_python_writes_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN, "top": -Infinity}')
    assert read_records(tmp_path / "a.jsonl")[0].text == "a"


def table(tmp_path, **columns):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_file_cut_short(tmp_path):
    path = table(tmp_path, text=["a" * 1000] * 50)
    content = path.read_bytes()
    for keep in (4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(
            UserError, match=r"a\.parquet: is not a readable Parquet file"
        ) as caught:
            read_records(path)
        assert "\n" not in str(caught.value)


def test_parquet_columns_of_any_type(tmp_path):
    path = table(
        tmp_path,
        text=["a", "b"],
        when=pyarrow.array([0, None], pyarrow.timestamp("ms")),
        raw=pyarrow.array([b"x", b""], pyarrow.binary()),
        kind=pyarrow.array(["x", "y"]).dictionary_encode(),
        money=pyarrow.array([None, None], pyarrow.decimal128(5, 2)),
    )
    first, second = read_records(path)
    assert (first.ignored, second.ignored) == (("when", "raw", "kind"), ("kind",))


def test_parquet_text_that_is_not_utf8_names_the_row(tmp_path):
    broken = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(UserError, match=r"1 of 3 .*a\.parquet:2: holds a value that cannot be"):
        read_records(table(tmp_path, text=broken))


def test_mixed_columns_name_each_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": ["a"]}\n{"text": null}\n{"text": "a"}')
    with pytest.raises(UserError, match="3 of 4 records") as caught:
        read_records(tmp_path / "a.jsonl")
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()[1:]] == [
        "'text' must be a string, got a number",
        "'text' must be a string, got a list",
        "is of no known format: has no fields that hold anything",
    ]


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl: is a folder"):
        read_records(tmp_path / "folder.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(UserError, match=r"loop\.jsonl: "):
        read_records(tmp_path / "loop.jsonl")
    with pytest.raises(UserError, match="is not a path that can be read"):
        read_records("~nobody-of-this-name/a.jsonl")
    with pytest.raises(UserError, match=r"no such file|not a path"):
        read_records(tmp_path / ("a" * 5000 + ".jsonl"))
    with pytest.raises(UserError, match=r"no such file"):
        read_records("a\0b.jsonl")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl: is neither a file nor a link to one"):
        read_records(tmp_path / "pipe.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a home folder by its variable")
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    assert read_records("~/a.jsonl")[0].text == "a"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(GOOD)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: Permission denied"):
        read_records(tmp_path / "a.jsonl")


@pytest.mark.parametrize("source", [5, None, 1.5], ids=str)
def test_what_holds_no_records(source):
    with pytest.raises(UserError, match="expected records, or where to read them, got"):
        read_records(source)
