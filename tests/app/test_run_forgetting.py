"""Runs that are watched and kept from forgetting, from their configuration to the report."""

import json
from html import unescape

import pytest
from finetune_runs import Recorder, interrupt, run

from lora_engine.app.config import load_config
from lora_engine.app.datasets import prepare_data
from lora_engine.data.stream import StreamedDataset
from lora_engine.errors import UserError
from lora_engine.models.load.load import load_tokenizer


@pytest.fixture
def texts(settings):
    """settings, with probe.jsonl and old.jsonl, of ten records each."""
    for name in ("probe", "old"):
        rows = [{"text": f"the {name} has text {i}"} for i in range(10)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (settings / f"{name}.jsonl").write_text(lines)
    return settings


HELP = (
    "evaluation.probe=probe.jsonl",
    "data.replay={path: old.jsonl, fraction: 0.2}",
    "train.kl_to_base=0.05",
    "train.stop_on_forgetting=50",
    "samples.count=0",
)


def measured(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "heldout_loss" in line]


def test_a_run_tells_what_it_forgot(texts):
    summary = run(*HELP).summary
    losses = [line["probe_loss"] for line in measured(texts / "out")]
    assert len(losses) == 3 and losses[0] == summary["probe_loss_before"]
    assert summary["probe_loss_after"] in losses
    assert summary["train_examples"] == 48 + 12
    page = unescape((texts / "out/report.html").read_text())
    assert "Forgetting" in page and "Loss on the probe" in page and ">kl_to_base<" in page
    assert "loss on the probe, nats per token" in (texts / "out/adapter/README.md").read_text()
    saved = load_config(texts / "out/config.yaml")
    assert saved.data.replay.fraction == 0.2 and saved.evaluation.probe == "probe.jsonl"


def test_a_run_that_is_cut_off_goes_on_with_the_same_examples(texts):
    run(*HELP, "train.output_dir=whole")
    run(*HELP, "train.output_dir=cut", observer=Recorder(3, interrupt))
    run(*HELP, "train.output_dir=cut", resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (texts / "whole" / weights).read_bytes() == (texts / "cut" / weights).read_bytes()
    assert measured(texts / "whole") == measured(texts / "cut")


def test_the_shipped_probe_is_measured_unless_there_is_none(settings):
    summary = run("evaluation.probe=shipped", "train.max_steps=1", "samples.count=0").summary
    assert summary["probe_loss_before"] > 0
    assert load_config("demo").evaluation.probe == "shipped"


def test_a_stream_replays_too_and_holds_none_of_it_out(texts):
    config = load_config("run.yaml", [HELP[1], "data.stream=true", "data.stream_buffer=20"])
    tokenizer = load_tokenizer(config.model.path)
    train, heldout = prepare_data(config.data, tokenizer)
    assert isinstance(train, StreamedDataset)
    place, origins = train.stream.begin, []
    for _ in range(5):
        dataset, place = train.stream.buffer(place)
        origins += [example.origin for example in dataset]
    old = [origin for origin in origins if origin.startswith("old.jsonl")]
    assert len(old) == pytest.approx(
        20, abs=6
    )  # of the 100 records that were read, before holding out
    assert len(set(old)) == 10
    assert heldout and all(example.origin.startswith("rows.jsonl") for example in heldout)
    assert not {example.origin for example in heldout} & set(origins)
    numbers = [int(example.origin.split(":")[1]) for example in heldout]
    assert max(numbers) > 20  # of buffers after the first one, in which old.jsonl came to its end


@pytest.mark.slow
def test_a_stream_with_replay_is_resumed_bit_for_bit(texts):
    stream = ("data.stream=true", "data.stream_buffer=16", *HELP)
    run(*stream, "train.output_dir=whole")
    run(*stream, "train.output_dir=cut", observer=Recorder(3, interrupt))
    run(*stream, "train.output_dir=cut", resume=True)
    weights = "adapter/adapter_model.safetensors"
    assert (texts / "whole" / weights).read_bytes() == (texts / "cut" / weights).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stop_on_forgetting=0.1"], "stop_on_forgetting: is told by evaluation.probe; give"),
        (["lora=null", "train.kl_to_base=0.1"], "kl_to_base: compares with the .*; give lora"),
        (["objective=distill", "train.kl_to_base=0.1"], "kl_to_base: objective distill is drawn"),
        (
            [
                "objective=grpo",
                "rewards=[json_valid]",
                "data.replay={path: old.jsonl, fraction: 0.1}",
            ],
            "data.replay: objective grpo learns from what the model writes; leave it out",
        ),
        (["train.kl_to_base=0"], r"kl_to_base: expected a number > 0"),
        (
            ["evaluation.prob=a.jsonl"],
            "evaluation.prob: unknown key; did you mean",
        ),
        (["evaluation.probe=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["data.replay={path: nowhere.jsonl, fraction: 0.1}"], "nowhere.jsonl: no such file"),
        (
            ["data.stream=true", "data.replay={path: docstrings, fraction: 0.1}"],
            "docstrings: data.stream reads files; set data.stream: false",
        ),
        (["train.best_by=acuracy"], "best_by: acuracy is not measured .* did you mean accuracy"),
    ],
    ids=[
        *("no probe", "no adapter", "a teacher", "online", "a term of nothing", "misspelt"),
        *("probe is not there", "replay is not there", "stream of no file", "no such measure"),
    ],
)
def test_what_cannot_be_is_one_line(texts, overrides, message):
    with pytest.raises(UserError, match=message) as raised:
        run(*overrides, "samples.count=0")
    assert "\n" not in str(raised.value)
    assert not (texts / "out" / "adapter").exists()
