"""A corpus of malformed records: each ends in one line with its file and its line."""

import gzip
import json
import random
import re

import pyarrow
import pytest

from lora_engine.data.listing import LINES
from lora_engine.data.records import read_records
from lora_engine.errors import UserError

GOOD = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
SURROGATE = "half a character"


def chat(*messages: object, **fields: object) -> bytes:
    return json.dumps({"messages": list(messages), **fields}).encode()


def said(role: str, content: object, **keys: object) -> dict[str, object]:
    return {"role": role, "content": content, **keys}


def row(**fields: object) -> bytes:
    return json.dumps(fields).encode()


USER, BOT = said("user", "a"), said("assistant", "b")
IDS = [1, 2, 3]

# The second of three lines of a .jsonl file, and words of what is said of it.
LINES_OF_JSON = {
    # syntax
    "cut short": (GOOD[:40], "is not valid JSON"),
    "cut in a string": (b'{"text": "a', "is not valid JSON: Unterminated string"),
    "cut in an escape": (b'{"text": "a\\u12"}', r"is not valid JSON: Invalid \u"),
    "two values": (GOOD + GOOD, "is not valid JSON: Extra data"),
    "trailing comma": (b'{"text": "a",}', "is not valid JSON"),
    "single quotes": (b"{'text': 'a'}", "is not valid JSON"),
    "a comment": (b'{"text": "a"} // b', "is not valid JSON: Extra data"),
    "no quotes": (b"{text: a}", "is not valid JSON"),
    "Python's None": (b'{"text": None}', "is not valid JSON"),
    "undefined": (b'{"text": undefined}', "is not valid JSON"),
    "a tab in a string": (b'{"text": "a\tb"}', "is not valid JSON: Invalid control character"),
    "a NUL": (b'{"text": "a\0b"}', "is not valid JSON: Invalid control character"),
    "NULs alone": (b"\0" * 64, "is not valid JSON"),
    "a BOM in the middle": (b"\xef\xbb\xbf" + GOOD, "is not valid JSON"),
    "plain text": (b"Hello there", "is not valid JSON"),
    "a heading": (b"text,label", "is not valid JSON"),
    "deep lists": (b'{"text": ' + b"[" * 100_000, "is nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "is nested too deeply"),
    "a giant integer": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "too many digits"),
    "a huge line cut short": (b'{"text": "' + b"a" * 3_000_000, "is not valid JSON"),
    "a key twice": (b'{"text": "a", "text": "b"}', "names the key 'text' twice"),
    "a key twice inside": (
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "names the key 'content' twice",
    ),
    # encodings
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "is not UTF-8 text"),
    "half a character of UTF-8": (b'{"text": "\xf0\x9f"}', "is not UTF-8 text"),
    "overlong UTF-8": (b'{"text": "\xc0\xaf"}', "is not UTF-8 text"),
    "a surrogate as CESU": (b'{"text": "\xed\xa0\xbd"}', "is not UTF-8 text"),
    "UTF-16 without a mark": ('{"text": "a"}'.encode("utf-16-le"), "is not valid JSON"),
    "a lone surrogate": (rb'{"text": "a\ud83d"}', SURROGATE),
    "surrogates in the wrong order": (rb'{"text": "\ude00\ud83d"}', SURROGATE),
    "a surrogate in a message": (
        rb'{"messages": [{"role": "user", "content": "\udc00"}]}',
        f"message 1 holds {SURROGATE}",
    ),
    "a surrogate in a call": (
        chat(USER, said("assistant", "", tool_calls=[{"function": {"name": "\udc00"}}])),
        SURROGATE,
    ),
    "a surrogate in a completion": (rb'{"prompt": "a", "completion": "\ud800"}', SURROGATE),
    "a surrogate in an adapter": (rb'{"text": "a", "adapter": "\ud800"}', SURROGATE),
    # the value of a line
    "a list": (b'["text"]', "expected an object with fields, got a list"),
    "a string": (b'"text"', "got a string"),
    "a number": (b"12", "got a number"),
    "null": (b"null", "got nothing"),
    "true": (b"true", "got true or false"),
    "NaN": (b"NaN", "got a number"),
    "no fields": (b"{}", "has no fields that hold anything"),
    "nulls alone": (b'{"text": null}', "has no fields that hold anything"),
    "unknown fields": (
        row(frage="a", antwort="b"),
        "is of no known format: has 'frage', 'antwort'",
    ),
    "a misspelt field": (row(txt="a"), "did you mean text?"),
    # types
    "text a number": (row(text=1), "'text' must be a string, got a number"),
    "text NaN": (b'{"text": NaN}', "'text' must be a string, got a number"),
    "text a list": (row(text=["a"]), "'text' must be a string, got a list"),
    "text an object": (row(text={"a": 1}), "'text' must be a string, got an object"),
    "completion true": (row(prompt="a", completion=True), "'completion' must be a string"),
    "prompt a list": (row(prompt=["a"], completion="b"), "'prompt' must be a string, got a list"),
    "messages a number": (row(messages=3), "'messages' must be a non-empty list, got a number"),
    "messages empty": (row(messages=[]), "'messages' must be a non-empty list, got an empty list"),
    "messages text": (row(messages="hello"), "'messages' must be a non-empty list, got a string"),
    "messages broken JSON text": (row(messages="[{"), "'messages' is text that is not valid JSON"),
    "a message a string": (chat("a"), "message 1: expected an object, got a string"),
    "a message null": (chat(USER, None), "message 2: expected an object, got nothing"),
    "no role": (chat({"content": "a"}), "message 1: 'role' must be a string such as 'user'"),
    "an empty role": (chat(said("", "a")), "message 1: 'role' must be a string"),
    "role a number": (chat(said(1, "a")), "message 1: 'role' must be a string"),
    "no content": (chat({"role": "user"}), "message 1: 'content' must be a string, got nothing"),
    "content a number": (chat(said("user", 1)), "message 1: 'content' must be a string"),
    "content an object": (chat(said("user", {"a": 1})), "message 1: 'content' must be a string"),
    "parts that are none": (chat(said("user", [1])), "message 1: 'content' must be a string"),
    "a part without text": (
        chat(said("user", [{"type": "text"}])),
        "message 1: 'content' must be a string",
    ),
    "an image": (
        chat(said("user", [{"type": "image"}])),
        "message 1: holds 'image', and only text",
    ),
    "audio": (chat(USER, BOT, audio=["a.wav"]), "holds 'audio', and only text"),
    "the second message": (
        chat(said("user", "a", x=[[[[]]]] * 2, y={"": 1}), said("assistant", 2)),
        "message 2: 'content' must be a string, got a number",
    ),
    "a deep message": (
        chat(said("user", "a", x=json.loads("[" * 99 + "]" * 99))),
        "message 1 is nested more than 64 levels deep",
    ),
    "a weight of text": (
        chat(USER, said("assistant", "b", weight="x")),
        "'weight' must be a number",
    ),
    "a negative weight": (row(text="a", weight=-0.5), "'weight' must be a number of 0 or more"),
    "an infinite weight": (b'{"text": "a", "weight": Infinity}', "'weight' must be a number"),
    "an adapter that is a number": (row(text="a", adapter=1), "'adapter' must be a string"),
    "tools that are no JSON": (
        chat(USER, BOT, tools="{"),
        "'tools' is text that is not valid JSON",
    ),
    "tools that are a number": (chat(USER, BOT, tools=1), "'tools' must be a list"),
    "a tool that is a number": (chat(USER, BOT, tools=[1]), "'tools' must hold objects"),
    "two systems": (chat(said("system", "a"), USER, BOT, system="b"), "keep one of them"),
    # ShareGPT
    "an unknown speaker": (
        row(conversations=[{"from": "narrator", "value": "a"}]),
        "message 1: is from 'narrator'",
    ),
    "a speaker twice": (
        row(conversations=[{"from": "human", "role": "user", "value": "a"}]),
        "message 1: has both 'role' and 'from'",
    ),
    "a call that is no JSON": (
        row(conversations=[{"from": "function_call", "value": "f(x)"}]),
        "message 1: its function call is text that is not valid JSON",
    ),
    "a call without a name": (
        row(conversations=[{"from": "function_call", "value": "{}"}]),
        "message 1: a function call needs a 'name'",
    ),
    # Alpaca and the like
    "a history of strings": (
        row(instruction="a", output="b", history=["c", "d"]),
        "'history' must hold pairs",
    ),
    "an output that is a list": (row(instruction="a", output=["b"]), "'output' must be a string"),
    "two formats": (row(instruction="a", output="b", response="c"), "fits alpaca"),
    "a prompt and a text": (row(prompt="a", text="b"), "fits prompts ('prompt') and text ('text')"),
    # preferences
    "chosen alone": (row(prompt="a", chosen="b"), "has 'chosen', but no 'rejected'"),
    "rejected a number": (
        row(prompt="a", chosen="b", rejected=1),
        "'rejected' must be a string or",
    ),
    "no words in common": (row(chosen="a", rejected="b"), "begin with no words in common"),
    "scores too few": (
        row(prompt="a", responses=["b", "c"], scores=[1]),
        "a score for each of its 2",
    ),
    "a score of text": (
        row(prompt="a", responses=["b", "c"], scores=["good", "bad"]),
        "has a score that is no number but a string",
    ),
    "a label that is null": (
        row(prompt="a", completion="b", label=None),
        "'label' is empty, and might have said",
    ),
    "a tree": (
        row(prompt={"role": "prompter", "text": "a", "replies": []}),
        "is a tree of messages and their 'replies'",
    ),
    # tokens
    "tokens of text": (row(input_ids=["a"]), "'input_ids' must hold whole numbers"),
    "tokens of fractions": (row(input_ids=[1.5]), "'input_ids' must hold whole numbers"),
    "no tokens": (
        row(input_ids=[]),
        "'input_ids' must be a list of whole numbers, got an empty list",
    ),
    "labels too few": (row(input_ids=IDS, labels=[1]), "'labels' has 1 entries, 'input_ids' 3"),
    "labels moved": (row(input_ids=IDS, labels=[2, 3, -100]), "'labels' must repeat 'input_ids'"),
    "a mask of 2": (row(input_ids=IDS, loss_mask=[0, 1, 2]), "'loss_mask' must hold 0 and 1 alone"),
    "padding inside": (row(input_ids=IDS, attention_mask=[1, 0, 1]), "has a 0 between two 1s"),
}

WORDS = random.Random(0).randbytes(2000).hex("\n", 20).split()  # that hardly pack
GOOD_LINES = "".join(f'{{"text": "{word}"}}\n' for word in WORDS).encode()
PACKED = gzip.compress(GOOD_LINES)
ZSTD = pyarrow.Codec("zstd").compress(GOOD_LINES, asbytes=True)

# A whole file, where the line has to point, and words of it.
FILES = {
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl: ", "is UTF-16 text"),
    "UTF-16 in a table": (
        "a.csv",
        "text\na".encode("utf-16-be"),
        "a.csv:",
        "holds a NUL, which no text does",
    ),
    "a zip": ("a.jsonl", b"PK\x03\x04" + bytes(99), "a.jsonl: ", "is a zip archive"),
    "gzip by another name": ("a.jsonl", b"\x1f\x8b" + bytes(9), "a.jsonl: ", "is compressed"),
    "Arrow by another name": ("a.jsonl", b"ARROW1\0\0", "a.jsonl: ", "name it .arrow"),
    "an object for a list": ("a.json", b'{"data": []}', "a.json:1", "expected a JSON list"),
    "lines for a list": ("a.json", GOOD + b"\n" + GOOD, "a.json:1", "one per line is .jsonl"),
    "a list that ends": ("a.json", b"[\n" + GOOD + b",\n" + GOOD, "a.json:3", "is not followed by"),
    "a list without commas": (
        "a.json",
        b"[" + GOOD + b"\n" + GOOD + b"]",
        "a.json:1",
        "not followed",
    ),
    "text behind a list": ("a.json", b"[" + GOOD + b"]\n\nx", "a.json:3", "stands behind the end"),
    "Latin-1 in a list": ("a.json", b'[\n{"text": "\xe9"}]', "a.json:2", "is not UTF-8 text"),
    "a bad record in a list": ("a.json", b'[\n{"text": 1}]', "a.json:2", "'text' must be a string"),
    "more cells": ("a.csv", b"text\na,b\n", "a.csv:2", "has more cells than the header's 1"),
    "an open quote": ("a.csv", b'text\n"a\nb\n', "a.csv:3", "is not valid CSV"),
    "a quote inside": ("a.csv", b'text\n"a" b\n', "a.csv:2", "is not valid CSV"),
    "Latin-1 in a table": ("a.csv", b"text\na\n\xe9\n", "a.csv:3", "is not UTF-8 text"),
    "columns that are unknown": ("a.csv", b"frage,antwort\na,b\n", "a.csv:2", "of no known format"),
    "a table without a column": (
        "a.tsv",
        b"prompt\tcompletion\na\n",
        "a.tsv:2",
        "completion|answer",
    ),
    "UTF-32": ("a.jsonl", GOOD.decode().encode("utf-32"), "a.jsonl: ", "is UTF-32 text"),
    "a NUL in a table": ("a.csv", b"text\na\nb\0c\n", "a.csv:3", "holds a NUL"),
    "UTF-16 in a document": ("a.txt", "Hello.".encode("utf-16-le"), "a.txt:1", "holds a NUL"),
    "a list in one line": (
        "a.json",
        b'[{"text": "a"}, {"text": 1}, {"text": "b"}]',
        "a.json:1 (record 2): ",
        "'text' must be a string",
    ),
    "a line that ends": (
        "a.json",
        b'[{"text": "a"}, {"text": "b"}, {"te',
        "a.json:1 (record 3): ",
        "is not valid JSON: Unterminated string",
    ),
    "Latin-1 in a line": (
        "a.json",
        b'[{"text": "a"}, {"text": "\xe9"}]',
        "a.json:1: ",
        r"is not UTF-8 text \(byte 27 of the text\)",
    ),
    "gzip cut short": ("a.jsonl.gz", PACKED[:-400], "a.jsonl.gz: ", r"\.gz file.*before byte \d+"),
    "a list in gzip cut short": ("a.json.gz", PACKED[:-400], "a.json.gz: ", "before byte"),
    "a table in gzip cut short": ("a.csv.gz", PACKED[:-400], "a.csv.gz", "header|before byte"),
    "a document in gzip cut short": ("a.txt.gz", PACKED[:-400], "a.txt.gz: ", "before byte"),
    "gzip that is damaged": (
        "a.jsonl.gz",
        PACKED[:300] + bytes(9) + PACKED[309:],
        "a.jsonl.gz: ",
        "is not a readable .gz file",
    ),
    "gzip and more": ("a.jsonl.gz", PACKED + b"more", "a.jsonl.gz: ", "Not a gzipped file"),
    "gzip twice": ("a.jsonl.gz", gzip.compress(PACKED), "a.jsonl.gz: ", "what it packs is compr"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz: ", "is not a readable .gz file"),
    "zstd cut short": ("a.jsonl.zst", ZSTD[:-400], "a.jsonl.zst: ", "Truncated.*before byte"),
    "zstd that is damaged": (
        "a.jsonl.zst",
        ZSTD[:600] + bytes(99) + ZSTD[699:],
        "a.jsonl.zst: ",
        "is not a readable .zst file",
    ),
    "zstd and more": ("a.jsonl.zst", ZSTD + b"more than it", "a.jsonl.zst: ", "not a readable"),
    "a list in zstd cut short": ("a.json.zst", ZSTD[:-400], "a.json.zst", "JSON list|before byte"),
    "gzip named zstd": ("a.jsonl.zst", PACKED, "a.jsonl.zst: ", "is not a readable .zst file"),
    "a page named Parquet": ("a.parquet", b"<!doctype html>" * 9, "a.parquet: ", "not a readable"),
    "lines named a list": ("a.json", GOOD + b"\n" + GOOD, "a.json:1", "one per line is .jsonl"),
    "a list named lines": ("a.jsonl", b"[" + GOOD + b"]", "a.jsonl:1", "got a list"),
    "columns for records": ("a.json", b'{"text": ["a", "b"]}', "a.json:1", "expected a JSON list"),
    "semicolons": ("a.csv", b"prompt;completion\na;b\n", "a.csv:2", "of no known format"),
    "a line before the header": ("a.csv", b"sep=,\ntext,x\n", "a.csv:2", "of no known format"),
    "a score that is none": (
        "a.jsonl",
        b'{"prompt": "a", "responses": ["b", "c"], "scores": [NaN, 1]}',
        "a.jsonl:1",
        "no number but nan",
    ),
    "Latin-1 in a document": ("a.txt", b"a\n\xe9", "a.txt:2", "is not UTF-8 text"),
}


@pytest.mark.parametrize(("line", "words"), LINES_OF_JSON.values(), ids=LINES_OF_JSON)
def test_a_line_of_json(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([GOOD, line, GOOD]))
    with pytest.raises(UserError) as caught:
        read_records(path)
    text = str(caught.value)
    start = f"{path}: 1 of 3 records cannot be used, mend or remove them: {path}:2: "
    assert text.startswith(start) and words in text
    assert "\n" not in text and len(text) < len(start) + 400


@pytest.mark.parametrize(("name", "content", "place", "words"), FILES.values(), ids=FILES)
def test_a_file(tmp_path, name, content, place, words):
    (tmp_path / name).write_bytes(content)
    if "answer" in words:  # a prompt alone is a record, which the objective refuses
        (record,) = read_records(tmp_path / name)
        assert (record.kind, record.origin) == ("prompt", f"{tmp_path / place}")
        return
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / name)
    text = str(caught.value)
    assert str(tmp_path / place) in text and re.search(words, text)
    assert "\n" not in text


def test_all_of_them_in_one_file_are_listed_up_to_a_limit(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [line for line, _ in LINES_OF_JSON.values()]
    path.write_bytes(b"\n".join([GOOD, *bad]))
    with pytest.raises(UserError) as caught:
        read_records(path)
    first, *rest = str(caught.value).splitlines()
    assert f": {len(bad)} of {len(bad) + 1} records cannot be used" in first
    assert len(rest) == LINES + 1
    assert [line.startswith(f"  {path}:{n}: ") for n, line in enumerate(rest[:5], start=2)] == [
        True
    ] * 5
    assert re.fullmatch(r"  and \d+ other problems", rest[-1])


FINE = {
    "CRLF": (GOOD + b"\r\n" + GOOD + b"\r\n", 2),
    "a BOM": (b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, 2),
    "blank lines": (b"\n" + GOOD + b"\n \t\r\n\n" + GOOD + b"\n\n", 2),
    "line ends of Unicode": ('{"text": "a\u2028b\u2029c\x85d"}'.encode(), 1),
    "NaN where nobody reads": (b'{"text": "a", "score": NaN, "top": -Infinity}', 1),
    "an escaped pair": (rb'{"text": "\ud83d\ude00"}', 1),
    "an escaped NUL": (rb'{"text": "a\u0000b"}', 1),
    "a huge line": (b'{"text": "' + b"a " * 1_000_000 + b'"}', 1),
    "several formats": (GOOD + b'\n{"text": "a"}\n{"prompt": "a", "completion": "b"}', 3),
}


@pytest.mark.parametrize(("content", "count"), FINE.values(), ids=FINE)
def test_what_only_looks_malformed_is_read(tmp_path, content, count):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert len(read_records(tmp_path / "a.jsonl")) == count
