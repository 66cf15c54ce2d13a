"""report.html says what the run's files say, safely and without the network."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora_engine import report
from lora_engine.app.config import load_config
from lora_engine.errors import UserError
from lora_engine.report.page import charts, comparisons, render_report, write_report
from lora_engine.text import bytes_text, duration_text
from lora_engine.training.run.folder import RunFolder

VOID = {"meta", "path", "br", "link"}


@pytest.fixture
def summary():
    return {
        "model": "tiny",
        "method": "LoRA of rank 4",
        "data": "rows.jsonl",
        "device": "cpu",
        "train_examples": 1234,
        "eval_examples": 56,
        "steps": 20,
        "stopped": "finished",
        "loss_unit": "nats per supervised token",
        "accuracy_of": "tokens",
        "finished": "2026-01-02 03:04",
        "heldout_loss_before": 3.0,
        "heldout_loss_after": 1.5,
        "heldout_accuracy_before": 0.4,
        "heldout_accuracy_after": 0.65,
        "train_tokens": 94817,
        "train_seconds": 186.2,
        "tokens_per_second": 509.3,
        "peak_memory_bytes": 2_460_000_000,
        "trainable_parameters": 4_884_480,
        "parameters": 139_399_680,
        "coverage": "layer 0: all <fused>",
        "config": load_config("demo").model_dump(mode="json"),
        "samples": [
            {
                "origin": "os.py:7",
                "prompt": "Document this.\ndef f(): pass",
                "before": "</p><script>alert('x')</script>",
                "after": "",
                "reference": "Do nothing & return.",
            },
            {
                "origin": "",
                "prompt": "Document this.\ndef g(): pass",
                "before": "b",
                "after": "a",
                "reference": "r",
            },
        ],
        "machine": {"hardware": {"processor": "Some <CPU>"}, "software": {"torch": "2.13"}},
    }


@pytest.fixture
def metrics():
    rows = [{"step": 0, "heldout_loss": 3.0, "heldout_accuracy": 0.4}]
    for step in range(1, 21):
        rows.append(
            {
                "step": step,
                "loss": 3 - step / 20,
                "learning_rate": 5e-4,
                "grad_norm": 1.0,
                "tokens": 1000,
                "supervised_tokens": 100,
                "tokens_per_second": 500.0,
                "peak_memory_bytes": 2_000_000_000,
            }
        )
    return [*rows, {"step": 20, "heldout_loss": 1.5, "heldout_accuracy": 0.65}]


class Page(HTMLParser):
    """Checks that tags close in order; collects tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_the_page_tells_what_became_of_the_data(summary):
    summary["data_accounts"] = [
        {
            "name": "<rows>",
            "records": 5,
            "examples": 3,
            "findings": [{"text": "dropped, <why>", "count": 2, "origins": ["rows:1", "rows:2"]}],
            "ignored": {"weight<b>": 5},
        },
        {"name": "held", "records": 1, "examples": 1, "findings": [], "ignored": {}},
    ]
    page = render_report(summary, [])
    for expected in (
        "<h3>&lt;rows&gt;</h3>",
        "3 of 5 records are learned from:",
        "<li>dropped, &lt;why&gt;: 2 (rows:1, rows:2)</li>",
        "<li>not read: weight&lt;b&gt; (5)</li>",
        "1 of 1 records are learned from; nothing was dropped, cut or left unread.",
    ):
        assert expected in page


def test_page_is_well_formed_and_says_the_numbers(summary, metrics):
    page = Page(render_report(summary, metrics))
    for said in (
        "1,234 training examples",
        "56 held out",
        "3.000 1.500 \N{MINUS SIGN}50%",
        "20.09 4.48 \N{MINUS SIGN}78%",
        "40.0% 65.0% +25.0 points",
        "509 tokens per second",
        "3 min 6 s 20 steps, 94,817 tokens",
        "2.46 GB of the whole process",
        "4.88 M of 139 M, 3.50%",
        "Some <CPU>",
        "layer 0: all <fused>",
        "tokens_per_batch 1600",
    ):
        assert said in page.text, said
    assert page.tags.count("svg") == 6
    assert page.tags.count("article") == 2


def test_memory_on_a_gpu_is_the_gpus(summary, metrics):
    assert "2.46 GB on the GPU" in Page(render_report({**summary, "device": "cuda"}, metrics)).text


def test_what_the_model_wrote_is_text_not_markup(summary, metrics):
    html = render_report(summary, metrics)
    assert "<script>alert" not in html
    page = Page(html)
    assert page.tags.count("script") == 1
    assert "</p><script>alert('x')</script>" in page.text
    assert "(nothing)" in page.text


def test_page_needs_no_other_file(summary, metrics):
    html = render_report(summary, metrics)
    attributes = dict(Page(html).attributes)
    assert not {"src", "href", "srcset", "action"} & set(attributes)
    assert not re.search(r"https?://|url\(|@import|import\(|fetch\(", html)


def test_charts_follow_the_metrics(metrics):
    drawn = {chart.title: chart for chart in charts(metrics, "nats per pair", "tokens")}
    assert list(drawn) == [
        "Loss",
        "Token accuracy",
        "Learning rate",
        "Gradient norm",
        "Throughput",
        "Peak memory",
    ]
    assert drawn["Loss"].note == "nats per pair"
    raw, smooth, heldout = drawn["Loss"].series
    assert len(raw.points) == len(smooth.points) == 20
    assert list(heldout.points) == [(0, 3.0), (20, 1.5)]
    assert all(chart.x_range == (0, 20) for chart in drawn.values())


def test_the_later_line_of_a_step_counts(metrics):
    again = {**metrics[5], "loss": 9.0}
    loss = charts([*metrics, again], "", "tokens")[0].series[0]
    assert dict(loss.points)[5] == 9.0
    assert len(loss.points) == 20


def test_nothing_measured_or_trained(summary):
    for key in ("loss", "accuracy"):
        summary[f"heldout_{key}_before"] = summary[f"heldout_{key}_after"] = None
    summary["samples"] = []
    page = Page(render_report(summary, []))
    assert "No step was recorded." in page.text
    assert "Samples" not in page.text
    assert "Perplexity" not in page.text


def test_comparison_judges_the_direction(summary):
    loss, perplexity, accuracy = comparisons(summary)
    assert loss.better and perplexity.better and accuracy.better
    summary |= {"heldout_loss_after": 3.5, "heldout_accuracy_after": 0.4}
    loss, _, accuracy = comparisons(summary)
    assert (loss.better, accuracy.better) == (False, None)
    summary |= {"heldout_loss_after": 3.006}
    assert comparisons(summary)[0].change == "+0.2%"
    summary |= {"heldout_loss_before": 800.0}
    assert comparisons(summary)[1].before == "inf"


def test_only_the_mean_of_log_probabilities_has_a_perplexity(summary):
    names = [row.name for row in comparisons({**summary, "loss_unit": "nats per pair"})]
    assert names == ["Held-out loss", "Token accuracy"]


def test_report_is_made_from_the_run_folder(tmp_path, summary, metrics):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    path = write_report(RunFolder(tmp_path))
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == render_report(summary, metrics)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "summary.json",
    ]


def test_folder_of_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is not a finished run, it has no .*summary\.json"):
        write_report(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.7, "1 min 0 s"),
        (186.2, "3 min 6 s"),
        (7300, "2 h 1 min"),
    ],
)
def test_duration_text(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 bytes"), (1_536_000_000, "1.54 GB"), (25.3e9, "25.3 GB")]
)
def test_bytes_text(size, text):
    assert bytes_text(size) == text


def look(style):
    """What the style sheet says of a line."""
    css = (Path(report.__file__).parent / "templates/report.css").read_text()
    return re.search(rf"^[^{{\n]*\.line\.{style}\b[^{{]*{{([^}}]*)}}", css, re.MULTILINE)[1]


def test_metrics_of_pairs_have_charts_and_are_compared(summary, metrics):
    drawn = charts(
        [
            {**row, f"{when}rewards/chosen": 2.0, f"{when}rewards/rejected": -1.0, f"{when}kl": 0.5}
            for row in metrics
            for when in ["heldout_" if "heldout_loss" in row else ""]
        ],
        "nats per pair",
        "tokens",
    )
    titles = [chart.title for chart in drawn]
    assert titles[2:4] == ["rewards", "kl"]
    assert [series.name for series in drawn[2].series] == ["chosen", "rejected"]
    assert [series.name for series in drawn[3].series][-1] == "held-out"
    for chart in drawn:  # lines of a chart look different
        looks = [look(series.style) for series in chart.series]
        assert len(set(looks)) == len(looks), chart.title
    shown = {"rewards/accuracies": 0.5, "rewards/margins": -0.25, "rewards/rejected": 0.0}
    summary |= {"heldout_metrics_before": shown}
    summary["heldout_metrics_after"] = {"rewards/accuracies": 0.75, "rewards/margins": 1.0}
    summary["heldout_accuracy_after"] = 0.2
    rows = {row.name: row for row in comparisons(summary)}
    assert rows["rewards/accuracies"].change == "+25.0 points" and rows["rewards/margins"].better
    assert rows["rewards/margins"].change == "+1.250"
    assert rows["Token accuracy, all answers"].better is None, "rejected ones are to be unlikely"
    summary["accuracy_of"] = "pairs"
    assert "rewards/accuracies" not in {row.name for row in comparisons(summary)}
    assert next(row for row in comparisons(summary) if row.name == "Pair accuracy").better is False
    del summary["accuracy_of"]  # of a run that did not say
    assert "Accuracy" in {row.name for row in comparisons(summary)}


def test_the_probe_has_a_curve_beside_the_loss_and_a_row(summary, metrics):
    for row, loss in zip((metrics[0], metrics[-1]), (2.0, 2.5), strict=True):
        row.update(probe_loss=loss, probe_accuracy=0.4)
    summary |= {"probe_loss_before": 2.0, "probe_loss_after": 2.5, "stopped": "forgetting"}
    summary |= {"warnings": ["stopped at step 20: <too much>"]}
    titles = [chart.title for chart in charts(metrics, summary["loss_unit"], "tokens")]
    assert titles[:2] == ["Loss", "Forgetting"]
    assert not [title for title in titles if "probe" in title]
    chart = charts(metrics, summary["loss_unit"], "tokens")[1]
    assert [(s.name, s.points) for s in chart.series] == [
        ("before training", [(0, 2.0), (20, 2.0)]),
        ("probe", [(0, 2.0), (20, 2.5)]),
    ]
    (row,) = (row for row in comparisons(summary) if row.name == "Loss on the probe")
    assert (row.before, row.after, row.change, row.better) == ("2.000", "2.500", "+25%", False)
    page = render_report(summary, metrics)
    assert "stopped at step 20: &lt;too much&gt;" in page
    assert "the model forgot too much" in page


def test_a_run_without_a_probe_has_no_such_curve(summary, metrics):
    assert "Forgetting" not in [
        chart.title for chart in charts(metrics, summary["loss_unit"], "tokens")
    ]
