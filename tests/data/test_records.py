import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.data.records import Record, read_records, split_heldout
from lora_engine.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
PAIR = {"prompt": "a\nb", "completion": "c"}
TEXT = {"text": "é漢"}


def contents(records: list[Record]) -> list[tuple]:
    return [(r.kind, r.messages, r.prompt, r.completion, r.text) for r in records]


EXPECTED = [
    ("messages", tuple(CHAT["messages"]), "", "", ""),
    ("completion", (), "a\nb", "c", ""),
    ("text", (), "", "", "é漢"),
]


def columns(rows) -> datasets.Dataset:
    """A table with every row's fields; a row's absent ones are null."""
    fields = {field: None for row in rows for field in row}
    return datasets.Dataset.from_list([fields | row for row in rows])


def write(path, kind, rows):
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        getattr(columns(rows), f"to_{kind}")(str(path))
    return path


@pytest.mark.parametrize(
    ("kind", "origins"),
    [("jsonl", [1, 3, 5]), ("json", [2, 14, 18]), ("parquet", [1, 2, 3])],
    ids=["jsonl", "json", "parquet"],
)
def test_files_hold_all_kinds_of_records(tmp_path, kind, origins):
    path = write(tmp_path / f"mixed.{kind}", kind, [CHAT, PAIR, TEXT])
    for source in (path, str(path)):
        records = read_records(source)
        assert contents(records) == EXPECTED
        assert [record.origin for record in records] == [f"{path}:{line}" for line in origins]


@pytest.mark.parametrize("row", [CHAT, PAIR, TEXT], ids=["messages", "completion", "text"])
def test_any_record_may_name_its_adapter(row):
    named, unnamed = read_records([{**row, "adapter": "french"}, {**row, "adapter": None}])
    assert (named.adapter, unnamed.adapter) == ("french", "")
    with pytest.raises(UserError, match="record:0: 'adapter' must be a string, got a number"):
        read_records([{**row, "adapter": 3}])


def test_csv(tmp_path):
    path = write(
        tmp_path / "pairs.csv", "csv", [PAIR, {"prompt": "x" * 200_000, "completion": "y"}]
    )
    records = read_records(path)
    assert contents(records)[0] == EXPECTED[1]
    assert len(records[1].prompt) == 200_000
    assert [record.origin for record in records] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    "source",
    [
        [CHAT, PAIR, TEXT],
        [Record(k, messages=m, prompt=p, completion=c, text=t) for k, m, p, c, t in EXPECTED],
        columns([CHAT, PAIR, TEXT]),
        datasets.DatasetDict(train=columns([CHAT, PAIR, TEXT])),
    ],
    ids=["dicts", "records", "dataset", "dataset-dict"],
)
def test_data_in_memory(source):
    records = read_records(source)
    assert contents(records) == EXPECTED
    assert [record.origin for record in records] == ["record:0", "record:1", "record:2"]


BAD_LINES = {
    b'{"text": "good"}': None,
    b'{"text": ': "is not valid JSON: Expecting value (column 10)",
    b'{"text": "\xff"}': "is not UTF-8 text (byte 11)",
    b'["text"]': "expected an object with fields, got a list",
    b'{"frage": "a", "antwort": "b"}': "is of no known format: has 'frage', 'antwort'",
    b'{"chosen": "a"}': "has 'chosen', but no 'rejected' to compare it with",
    b'{"prompt": "a", "completion": 3}': "'completion' must be a string, got a number",
    b'{"messages": []}': "'messages' must be a non-empty list, got an empty list",
    b'{"messages": "hi"}': "'messages' must be a non-empty list, got a string",
    b'{"messages": [{"content": "a"}]}': "message 1: 'role' must be a string such as 'user', "
    "got nothing",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": [1]}]}': (
        "message 2: 'content' must be a string, got a list"
    ),
    b'{"messages": ["hi"]}': "message 1: expected an object, got a string",
}


def test_all_malformed_lines_are_listed(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(BAD_LINES))
    with pytest.raises(UserError) as caught:
        read_records(path)
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}: 11 of 12 records cannot be used, mend or remove them:"
    problems = [(line, p) for line, p in enumerate(BAD_LINES.values(), start=1) if p]
    assert len(rest) == len(problems)
    for shown, (line, problem) in zip(rest, problems, strict=True):
        assert shown.startswith(f"  {path}:{line}: ") and problem in shown


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"text": "a"}', r"a\.json:1: expected a JSON list"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', r"a\.json:2: is not valid JSON: .*line 2"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', r"a\.json:1 .record 1.: is not followed by"),
        ("a.json", "[]", r"a\.json: holds no records"),
        ("a.json", '[{"text": "a"}', r"a\.json:1 .record 1.: is not followed by"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no records"),
        ("a.csv", "prompt,completion\na,b,c\n", r"a\.csv:2: has more cells than the header's 2"),
        ("a.csv", 'prompt,completion\na,"b" c\n', r"a\.csv:2: is not valid CSV"),
        ("a.parquet", "no", r"a\.parquet: is not a readable Parquet file"),
        ("a.doc", "no", r"cannot read \.doc; use \.jsonl, \.ndjson, \.json, \.parquet, \.csv"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(tmp_path / name)


def test_all_broken_csv_lines_are_listed(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,completion\na,"b" c\nd,e\nf,g,h\ni,"j" k\n')
    with pytest.raises(UserError, match="3 of 4 records") as caught:
        read_records(tmp_path / "a.csv")
    lines = [line.split(": ")[0].rpartition(":")[2] for line in str(caught.value).splitlines()[1:]]
    assert lines == ["2", "4", "5"]


def test_text_that_is_not_utf8_names_the_line(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    with pytest.raises(UserError, match=r"a\.json:2: is not UTF-8"):
        read_records(tmp_path / "a.json")


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl", "jsonl", [TEXT])
    with pytest.raises(
        UserError, match=r"trian\.jsonl: no such file; did you mean .*train\.jsonl\?"
    ):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match="did you mean docstrings"):
        read_records("docstring")


def test_what_the_hub_says_becomes_one_line(monkeypatch):
    def refuse(name, split):
        raise ConnectionError(f"Couldn't reach {name!r}\non the Hub, split {split}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError) as caught:
        read_records("someone/chats")
    assert str(caught.value) == (
        "someone/chats: no such file, and not loadable from the Hugging Face hub: "
        "Couldn't reach 'someone/chats'"
    )


def test_a_hub_dataset_is_read_by_its_split(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([TEXT])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records("someone/texts", split="test")[0].origin == "someone/texts:0"
    read_records("someone/texts")
    assert asked == [("someone/texts", "test"), ("someone/texts", "train")]


def test_an_unknown_split_lists_the_known_ones():
    data = datasets.DatasetDict(train=datasets.Dataset.from_list([TEXT]))
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        read_records(data, split="test")


def test_has_answer():
    assert read_records([CHAT])[0].has_answer()
    assert not Record("completion", prompt="a", completion=" \n").has_answer()
    assert not Record("text", text="").has_answer()
    assert not read_records([{"messages": CHAT["messages"][:1]}])[0].has_answer()
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert read_records([{"messages": [called]}])[0].has_answer()


records = st.lists(
    st.builds(
        lambda text, group: Record("text", text=text, group=group),
        st.text(alphabet="abc", max_size=3),
        st.sampled_from(["", "g1", "g2", "g3"]),
    ),
    min_size=12,
    max_size=40,
)


@given(records, st.floats(0.1, 0.6), st.integers(0, 9))
def test_split_keeps_groups_and_equal_contents_on_one_side(given_records, fraction, seed):
    try:
        train, heldout = split_heldout(given_records, fraction, seed=seed)
    except UserError:
        return  # too few groups to hold out this much
    assert sorted(r.text for r in train + heldout) == sorted(r.text for r in given_records)
    assert 1 <= len(heldout) <= max(1, round(fraction * len(given_records)))
    assert not {r.text for r in train} & {r.text for r in heldout}


@given(st.integers(0, 9))
def test_split_keeps_every_group_on_one_side(seed):
    grouped = [
        Record("text", text=f"{g} {i}", group=f"group {g}") for g in range(9) for i in range(4)
    ]
    train, heldout = split_heldout(grouped, 0.3, seed=seed)
    assert not {r.group for r in train} & {r.group for r in heldout}
    assert len(heldout) == 8  # two groups of four come nearest to 10.8 from below
    assert train == [r for r in grouped if r in train]


def test_split_depends_on_contents_and_seed_not_on_order():
    texts = [Record("text", text=str(i)) for i in range(100)]
    _, heldout = split_heldout(texts, 0.1)
    assert len(heldout) == 10
    assert split_heldout(texts[::-1], 0.1)[1] == heldout
    assert split_heldout(texts, 0.1, seed=1)[1] != heldout


@pytest.mark.parametrize(
    ("count", "fraction"), [(1, 0.5), (5, 0.0), (5, 1.0)], ids=["one-record", "none", "all"]
)
def test_an_impossible_split_says_so(count, fraction):
    with pytest.raises(UserError, match=r"held-out fraction|cannot hold out"):
        split_heldout([Record("text", text=str(i)) for i in range(count)], fraction)


def test_an_impossible_split_counts_equal_records_once():
    repeated = [Record("text", text=text) for text in ("a", "b", "c") * 4]
    message = (
        r"5% of the records \(12, or 3 where those of the same content or group count as one\)"
    )
    with pytest.raises(UserError, match=message):
        split_heldout(repeated, 0.05)


def test_one_mistake_with_many_values_is_told_once():
    rows = [{"text": value} for value in (*range(30), 0.5, 1e9)]
    with pytest.raises(UserError) as caught:
        read_records(rows)
    assert str(caught.value) == (
        "data: 32 of 32 records cannot be used, mend or remove them: "
        "record:0, record:1, record:2 and 29 more: 'text' must be a string, got a number"
    )


def test_a_field_without_a_value_is_not_one_that_is_there():
    with pytest.raises(UserError, match=r"is of no known format: has 'completion'; say what"):
        read_records([{"prompt": None, "completion": "a"}])
    with pytest.raises(UserError, match=r"has no fields that hold anything"):
        read_records([{}])


def test_what_a_columnar_source_lacks_is_not_there_at_any_depth(tmp_path):
    """Its objects have the fields of all, null where absent; lists keep their elements."""

    def chat(arguments, tools):
        function = {"name": "f", "arguments": arguments}
        asked = {"role": "user", "content": "a"}
        calls = [{"type": "function", "function": function}]
        answer = {"role": "assistant", "content": "b", "tool_calls": calls}
        return {"messages": [asked, answer], "tools": tools}

    def tool(**parameters):
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    rows = [
        chat({"in": "Bern"}, [tool(type="object", needs=["in"])]),
        chat({"at": {"x": 1}, "list": ["a", None]}, [tool(also={"default": 2})]),
    ]
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = [(record.messages, record.given) for record in read_records(rows)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"))
    for source in (path, dataset, str(tmp_path / "saved")):
        got = [(record.messages, record.given) for record in read_records(source)]
        assert got == expected


def test_nulls_that_a_json_file_spells_out_stay(tmp_path):
    call = {"function": {"name": "f", "arguments": {"in": None}}}
    path = tmp_path / "chats.jsonl"
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    path.write_text(json.dumps({"messages": [message]}))
    assert read_records(path)[0].messages[0]["tool_calls"] == [call]
