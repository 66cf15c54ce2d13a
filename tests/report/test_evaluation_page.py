"""The page about an evaluation says what was measured, with its intervals, safely."""

import re

import pytest

from lora_engine.report.evaluation_page import evaluation_page


def measured(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def texts(loss: float) -> dict[str, object]:
    share = measured(0.5, 0.25, 0.75)
    return {
        "examples": 1234, "targets": 5678, "loss": measured(loss, loss - 0.5, loss + 0.5),
        "perplexity": measured(7.0, 6.0, 8.0), "accuracy": share,
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, object]:
    sides = {
        side: {
            **texts(loss),
            "groups": {"<hard>": texts(loss + 1), "easy\u202e": texts(loss - 1)},
            "metrics": {"rougeL": measured(0.123456, 0.05, 0.2), "mine:<own>": {"value": 7.0}},
            "answers": 40,
        }
        for side, loss in (("base", 3.0), ("adapter", 2.0))
    }
    answer = {"prompt": "ask\n<1>", "reference": "r", "base": "</p><script>", "adapter": ""}
    sides["base"]["groups"]["<hard>"]["metrics"] = {"rougeL": measured(0.01, 0.0, 0.02)}
    return {
        "data": "held <out>.jsonl", "source": "tiny", "adapter_folder": "run/adapter", **sides,
        "difference": measured(-1.0, -1.5, -0.5),
        "samples": [answer, {**answer, "prompt": "ask\n<2>"}],
    }  # fmt: skip


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html[html.index("<body>") :]).split())


def test_measures_groups_metrics_and_answers(report):
    html = evaluation_page(report)
    text = plain(html)
    for shown in (
        "1,234 examples, 5,678 tokens", "With the adapter the loss is \u22121.0000",
        "3.0000 2.5000 to 3.5000", "2.0000 1.5000 to 2.5000", "50.0% 25.0% to 75.0%",
        "&lt;hard&gt;", "4.0000", "easy\\u202e",
        "rougeL 0.1235 0.05 to 0.2", "rougeL 0.01 0 to 0.02 \u2013",
        "mine:&lt;own&gt; 7 7", "of 40 prompts", "2 &lt;2&gt; ask", "(nothing)",
        "held &lt;out&gt;.jsonl", "&lt;/p&gt;&lt;script&gt;",
    ):  # fmt: skip
        assert shown in text, shown
    assert "<script" not in html and "prefers-color-scheme: dark" in html
    assert not re.search(r'(src|href)="', html)
    assert "could show" not in text


def test_both_sides_of_a_row_lie_on_one_scale(report):
    html = evaluation_page(report)
    spans = re.findall(r'left:([\d.]+)%;width:([\d.]+)%"></i><u style="left:([\d.]+)%', html)
    base, adapter = ([float(x) for x in span] for span in spans[:2])
    assert adapter == [4.0, 46.0, 27.0], "from 1.5, the least, to 2.5, the middle of 1.5 to 3.5"
    assert base == [50.0, 46.0, 73.0]


def test_a_difference_that_may_be_none_is_said_to_be(report):
    report["difference"] = measured(-0.1, -0.3, 0.1)
    assert "no difference that these rows could show" in plain(evaluation_page(report))


def test_a_model_alone_and_questions_with_choices():
    share = measured(0.5, 0.5, 0.5)
    part = {"questions": 7, "accuracy": share, "accuracy_per_byte": share}
    report = {"data": "d", "source": "s", "model": part, "samples": []}
    text = plain(evaluation_page(report))
    assert "7 questions" in text and "by byte of the choice" in text and "Loss" not in text
    both = {"base": part, "adapter": part, "adapter_folder": "a"}
    report = {"data": "d", "source": "s", **both, "samples": []}
    report["difference"] = measured(0.25, 0.1, 0.5)
    assert "the accuracy is +25.0% (+10.0% to +50.0%)" in plain(evaluation_page(report))
