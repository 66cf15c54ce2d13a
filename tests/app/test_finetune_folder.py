"""What a run leaves alone in its folder."""

import pytest
from finetune_runs import everything_in, read_metrics, run

from lora_engine.errors import UserError


def test_used_folder_is_not_touched_without_being_told(settings):
    run()
    before = {path: path.read_bytes() for path in (settings / "out").glob("*.*")}
    with pytest.raises(UserError, match="out: already holds a run; continue it with --resume"):
        run()
    assert {path: path.read_bytes() for path in (settings / "out").glob("*.*")} == before
    run("train.overwrite=true", "train.max_steps=3")
    assert len(read_metrics(settings / "out")) == 3


def test_a_run_that_cannot_begin_leaves_the_earlier_one_whole(settings):
    run()
    before = {path.name for path in (settings / "out").iterdir()}
    assert {"summary.json", "report.html", "samples_before.json"} <= before
    (settings / "bad.jsonl").write_text('{"messages": "none"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        run("train.overwrite=true", "data.train=bad.jsonl")
    assert {path.name for path in (settings / "out").iterdir()} == before


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "report.html", "metrics.jsonl"])
def test_files_that_were_there_before_stay(settings, name):
    (settings / "out").mkdir()
    (settings / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"out/{name}: was not written by this run: move it away"):
        run("train.overwrite=true")
    assert everything_in(settings / "out") == {settings / "out" / name: b"mine"}


def test_the_folder_of_data_and_config_may_be_the_runs(settings):
    before = everything_in(settings)
    run("train.output_dir=.", "train.max_steps=1", "samples.count=0")
    run("train.output_dir=.", "train.max_steps=2", "samples.count=0", "train.overwrite=true")
    assert before.items() <= everything_in(settings).items()


def test_a_run_does_not_discard_the_model_it_begins_with(settings):
    run("lora=null", "train.max_steps=1", "samples.count=0")
    before = everything_in(settings / "out")
    with pytest.raises(UserError, match="the run in out holds out/adapter, the model to begin"):
        run("model.path=out/adapter", "train.overwrite=true")
    assert everything_in(settings / "out") == before
