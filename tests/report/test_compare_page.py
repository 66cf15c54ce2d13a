"""Runs side by side: what differs, what is best and where that cannot be said, page and curves."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from lora_engine.app.config import load_config
from lora_engine.errors import UserError
from lora_engine.report.compare import (
    charts,
    comparison_json,
    comparison_page,
    differing_settings,
    figures,
    measured_alike,
    read_runs,
    run_style,
    samples,
)
from lora_engine.report.template import COMPARISON, page_path

PROMPTS = ["say <1>", "say <2>"]


def save_run(
    folder: Path, *settings: str, loss: float = 1.5, finished: bool = True, **summary: object
) -> str:
    """A run's folder with twenty steps; its path."""
    folder.mkdir(parents=True)
    config = load_config("demo", settings).model_dump(mode="json")
    config["train"]["output_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": 0, "heldout_loss": 3.0, "heldout_accuracy": 0.4}]
    rows += [{"step": s, "loss": 3 - s / 20, "learning_rate": 1e-3} for s in range(1, 21)]
    rows += [{"step": 20, "heldout_loss": loss, "heldout_accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        whole = {
            "model": "tiny <b>", "method": "LoRA", "data": "rows", "finished": "2026-01-02 03:04",
            "heldout_loss_before": 3.0, "heldout_loss_after": loss, "best_step": 20,
            "loss_unit": "nats per supervised token", "heldout_accuracy_after": 0.5,
            "heldout_metrics_after": {"rewards/margins": 0.25}, "train_tokens": 12345,
            "train_seconds": 60.0, "tokens_per_second": 200.0, "peak_memory_bytes": 10**9,
            "trainable_parameters": 4_884_480,
            "samples": [{"prompt": prompt, "origin": "", "after": f"{folder.name} <{loss}>",
                         "reference": "r"} for prompt in PROMPTS],
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps({**whole, **summary}))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return read_runs(
        [
            save_run(tmp_path / "a"),
            save_run(tmp_path / "b", "lora.r=8", "train.learning_rate=0.5", loss=1.25),
            save_run(tmp_path / "c", "lora.r=8", loss=1.2, finished=False),
        ]
    )


def test_settings_that_differ_are_told_and_no_others(runs):
    told = dict(differing_settings(runs))
    assert set(told) == {"lora.r", "train.learning_rate"}
    assert told["lora.r"][1:] == ["8", "8"] and told["lora.r"][0] != "8"
    assert told["train.learning_rate"][1] == "0.5"
    assert differing_settings(runs[:1] * 2) == []


def test_figures_are_the_runs_own_and_the_best_is_marked(runs):
    found = {figure.name: figure for figure in figures(runs)}
    assert found["Held-out loss after"].texts == ["1.5000", "1.2500", "–"]
    assert found["Held-out loss after"].best == {1}
    assert found["Lowest held-out loss"].best == {2}, "of one that is not finished as well"
    assert found["Accuracy after"].best == set(), "both are the same"
    assert found["rewards/margins after"].texts == ["0.2500", "0.2500", "–"]
    assert found["Trained weights"].texts == ["4.88 M", "4.88 M", "–"]
    assert found["Training time"].best == set(), "machines are not compared"
    assert found["Steps"].values == [20, 20, 20]
    assert "Loss on the probe after" not in found


def test_a_loss_that_is_no_log_probability_of_tokens_has_no_perplexity(tmp_path):
    runs = read_runs(
        [save_run(tmp_path / "a"), save_run(tmp_path / "b", loss_unit="", loss=-0.7)]
    )  # fmt: skip
    found = {figure.name: figure for figure in figures(runs)}
    assert found["Perplexity after"].texts == ["4.482", "–"]
    (tmp_path / "b/summary.json").unlink()
    assert figures(read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))


def test_metrics_of_objectives_are_ranked_and_drawn_where_two_runs_have_them(tmp_path):
    def save(name, objective, **metrics):
        path = save_run(
            tmp_path / name, f"objective={objective}", heldout_metrics_after=metrics, loss=1.0
        )  # fmt: skip
        rows = [{"step": s, **metrics, "rewards/margins": 0.1 * s} for s in range(1, 9)]
        rows += [{"step": s, "heldout_rewards/margins": 0.1 * s} for s in (4, 8)]
        with (tmp_path / name / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return path

    pairs = [
        save("one", "dpo", **{"rewards/accuracies": 0.5, "logps/chosen": -9.0}),
        save("two", "dpo", **{"rewards/accuracies": 0.75, "logps/chosen": -8.0, "kl": 0.1}),
    ]
    runs = read_runs(pairs)
    found = {figure.name: figure for figure in figures(runs)}
    assert found["rewards/accuracies after"].best == {1}
    assert found["logps/chosen after"].best == set(), "neither is better"
    titles = [chart.title for chart in charts(runs)]
    assert {"rewards/accuracies", "logps/chosen", "rewards/margins"} <= set(titles)
    assert "kl" not in titles, "one run alone has it"
    (margins,) = (chart for chart in charts(runs) if chart.title == "rewards/margins")
    assert margins.note == "held-out" and len(margins.series) == 2
    other = read_runs([pairs[0], save("three", "simpo", **{"rewards/accuracies": 0.9})])
    assert not any(figure.best for figure in figures(other))


@pytest.mark.parametrize(
    ("settings", "alike"),
    [
        (("train.seed=5",), True),
        (("data.cache=false",), True),
        (("data.eval_fraction=0.5",), False),
        (("data.max_length=77",), False),
        (("objective=dpo",), False),
        (("model.path=elsewhere",), False),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_losses_of_other_things_are_not_ranked(tmp_path, settings, alike):
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b", *settings, loss=1.25)])
    assert measured_alike(runs) == alike
    found = {figure.name: figure for figure in figures(runs)}
    assert found["Held-out loss after"].best == ({1} if alike else set())
    assert ("none is called the best" in comparison_page(runs)) == (not alike)


def test_other_training_data_are_no_other_held_out_data(tmp_path):
    one, two = ("data.eval=held.jsonl",), ("data.train=more.jsonl",)
    runs = read_runs([save_run(tmp_path / "a", *one), save_run(tmp_path / "b", *one, *two)])
    assert measured_alike(runs)


def test_every_curve_has_a_line_of_each_run(runs):
    drawn = {chart.title: chart for chart in charts(runs)}
    assert list(drawn) == ["Training loss", "Held-out loss", "Held-out accuracy", "Learning rate"]
    for chart in drawn.values():
        assert [series.name for series in chart.series] == ["a", "b", "c"]
        assert len({series.style for series in chart.series}) == 3
    assert len({series.path for series in drawn["Training loss"].series}) == 1
    assert len({series.path for series in drawn["Held-out loss"].series}) == 3
    assert all(series.dots for series in drawn["Held-out loss"].series)


def test_a_run_that_is_shorter_so_far_is_smoothed_like_the_longer_one(tmp_path):
    longer, shorter = (Path(save_run(tmp_path / name)) for name in "ab")
    rows = [{"step": s, "loss": 3 + (s % 2)} for s in range(1, 201)]
    for folder, count in ((longer, 200), (shorter, 20)):
        lines = [json.dumps(row) + "\n" for row in rows[:count]]
        (folder / "metrics.jsonl").write_text("".join(lines))
    long, short = charts(read_runs([str(longer), str(shorter)]))[0].series
    assert long.points[:20] == short.points


def test_more_runs_than_colours_are_dashed():
    assert len({run_style(number) for number in range(16)}) == 16
    assert run_style(8) == "run0 dashed"


def test_samples_are_those_that_two_runs_answered(tmp_path, runs):
    assert [one["prompt"] for one in samples(runs)] == PROMPTS
    assert samples(runs)[0]["answers"] == ["a <1.5>", "b <1.25>", None]
    assert samples(runs[:1]) == [] and samples(runs[1:]) == []


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "path", "br"):
            assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)


def test_the_page_is_whole_and_takes_nothing_from_elsewhere(runs):
    html = comparison_page(runs)
    page = Page(html)
    text = " ".join(" ".join(page.texts).split())
    assert page.links == [] and "url(" not in html and "@import" not in html
    for shown in (
        "3 runs",
        "lora.r",
        "tiny <b>",
        "not finished",
        "a <1.5>",
        "(not asked)",
        "1.2500",
    ):
        assert shown in text
    assert "<b>," not in html and "prefers-color-scheme: dark" in html
    colours = set(re.findall(r"var\(--run(\d)\)", html))
    assert colours == set("01234567")


def test_what_a_terminal_would_obey_is_spelled_out(tmp_path):
    runs = read_runs([save_run(tmp_path / "a"), save_run(tmp_path / "b\u202e")])
    assert "\u202e" not in comparison_page(runs)


def test_json_has_numbers(runs):
    found = json.loads(json.dumps(comparison_json(runs)))
    assert [run["finished"] for run in found["runs"]] == [True, True, False]
    assert found["figures"]["Held-out loss after"] == {"values": [1.5, 1.25, None], "best": [1]}
    assert found["settings"]["lora.r"][1:] == ["8", "8"]


def test_folders_of_one_name_are_told_apart(tmp_path):
    paths = [save_run(tmp_path / "one" / "run"), save_run(tmp_path / "two" / "run")]
    assert [run.name for run in read_runs(paths)] == ["one/run", "two/run"]


def test_a_last_line_that_is_not_whole_is_left_out_and_another_is_refused(tmp_path):
    path = Path(save_run(tmp_path / "a", finished=False)) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 21, "lo')
    (run,) = read_runs([str(tmp_path / "a")])
    assert run.metrics[-1]["step"] == 20
    path.write_text('{"step"\n' + whole)
    with pytest.raises(UserError, match=r"metrics.jsonl:1: is no line of metrics"):
        read_runs([str(tmp_path / "a")])


def test_a_page_replaces_a_page_and_nothing_else(tmp_path, runs):
    page = tmp_path / "page.html"
    assert page_path(str(page), COMPARISON) == page
    page.write_text(comparison_page(runs))
    assert page_path(str(page), COMPARISON) == page
    page.write_text("<html>mine</html>")
    with pytest.raises(UserError, match="holds something else"):
        page_path(str(page), COMPARISON)
