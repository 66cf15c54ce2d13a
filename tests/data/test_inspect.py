import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lora_engine.data.dataset import prepare
from lora_engine.data.inspect import Bin, length_histogram, report, sample
from lora_engine.data.show import render


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def reports(tokenizer):
    rows = [
        pair("a", "b"),
        pair("Hello", "é漢"),
        pair("a", "b"),
        pair("a", ""),
        pair("c", "d" * 40),
    ]
    train = prepare(rows, tokenizer, max_length=16)
    evaluation = prepare([pair("a", "b"), pair("Hello", "x"), pair("new", "[red]y")], tokenizer)
    return report(train, tokenizer), report(evaluation, tokenizer, train=train, num_samples=9)


def test_report_counts(reports):
    train, evaluation = reports
    assert (train.num_records, train.num_examples) == (5, 4)
    assert train.kinds == (("completion", 5),)
    assert train.truncated == ("record:4",)
    assert [d.origin for d in train.dropped] == ["record:3"]
    assert [(d.origin, d.first) for d in train.duplicates] == [("record:2", "record:0")]
    assert train.leakage is None
    assert evaluation.leakage.examples == (("record:0", "record:0"),)
    assert evaluation.leakage.prompts == (("record:1", "record:1"),)
    assert (train.length_min, train.length_max) == (3, 16)
    assert train.length_common == 0
    assert sum(entry.count for entry in train.histogram) == 4
    assert (len(train.samples), len(evaluation.samples)) == (3, 3)


def test_report_counts_what_all_examples_begin_with(tokenizer):
    rows = [pair("ab", "c"), pair("abd", "e"), pair("abf", "e")]
    common = report(prepare(rows, tokenizer), tokenizer)
    assert common.length_common == 2
    assert "all begin with      the same 2 tokens" in printed([common])


def test_report_counts_examples_by_adapter(tokenizer):
    rows = [{**pair(f"a{i}", "b"), "adapter": "one" if i < 3 else "two"} for i in range(5)]
    assert "examples            5 (3 for one, 2 for two)" in printed(
        [report(prepare(rows, tokenizer), tokenizer)]
    )


def test_names_are_not_markup(tokenizer):
    rows = [{**pair("a", "b"), "adapter": "a[red]"}]
    dataset = replace(prepare(rows, tokenizer), name="a[b].jsonl")
    text = printed([report(dataset, tokenizer)])
    assert "1 for a[red]" in text and " a[b].jsonl " in text


def test_report_says_what_is_not_read_and_what_is_plain_text(tokenizer):
    rows = [{**pair(f"{i}<|im_end|>", "b"), "score": 1} for i in range(5)]
    text = printed([report(prepare(rows, tokenizer), tokenizer)])
    assert "not read: score (5)" in text
    said = " ".join(text.split())
    assert "'<|im_end|>' in its text encoded as plain text, not as control tokens;" in said
    assert "'text': 5 record:0 record:1 record:2 … and 2 more" in said


def test_samples_show_whole_characters_and_special_tokens(tokenizer):
    dataset = prepare([pair("é", "漢")], tokenizer)
    assert sample(dataset[0], tokenizer).runs == (("é", False), ("漢<|im_end|>", True))


def printed(reports, **options) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), **options)
    console.print(render(reports))
    return console.export_text(styles=bool(options))


def test_render_says_all_findings(reports):
    text = printed(reports)
    for expected in (
        "records             5 (5 completion)",
        "truncated to max_length: 1\n  record:4",
        "dropped, nothing to learn from: the answer is empty: 1\n  record:3",
        "duplicates (kept): 1\n  record:2 repeats record:0",
        "also in the training data: 1\n  record:0 is record:0",
        "prompt also in the training data: 1\n  record:1 as record:1",
        "dropped: 0",
        "[red]y",  # text from the data is not markup
    ):
        assert expected in text


def test_supervised_tokens_are_coloured(reports):
    text = printed(reports[1:], force_terminal=True, color_system="standard")
    learned, other = (
        "\x1b[32mx\x1b[0m",
        "\x1b[4;32m<|im_end|>\x1b[0m",
    )
    assert learned + other in text
    assert "\x1b[32mHello" not in text


def test_long_lists_are_shortened_but_counted(tokenizer):
    dataset = prepare([pair("a", "b")] * 31, tokenizer)
    text = printed([report(dataset, tokenizer)])
    assert "duplicates (kept): 30\n" in text and "… and 27 more" in text


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(1, 12))
def test_histogram_counts_every_length_once(lengths, bins):
    histogram = length_histogram(np.array(lengths), bins)
    assert len(histogram) <= bins + 1
    assert sum(entry.count for entry in histogram) == len(lengths)
    for entry in histogram:
        assert entry.count == sum(entry.low <= n < entry.high for n in lengths)
    assert all(a.high == b.low for a, b in pairwise(histogram))


def test_histogram_has_round_bins():
    assert length_histogram(np.array([3, 12, 47])) == (
        Bin(0, 5, 1),
        Bin(5, 10, 0),
        Bin(10, 15, 1),
        *(Bin(low, low + 5, 0) for low in range(15, 45, 5)),
        Bin(45, 50, 1),
    )
