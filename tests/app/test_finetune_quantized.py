"""Runs whose base weights are in packed bits."""

import json

import pytest
from finetune_runs import Recorder, interrupt, run

from lora_engine import load_model
from lora_engine.errors import UserError


class Watching(Recorder):
    """Remembers what was read of the model's files."""

    def on_load(self, read, total):
        self.read = read / total


def test_a_run_on_packed_weights_learns_and_resumes(settings):
    observer = Watching()
    options = ("model.quantize=nf4", "model.double_quant=true", "train.save_every=2")
    whole = run(*options, "train.output_dir=whole", observer=observer)
    assert observer.read == 1.0
    summary = whole.summary
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    assert summary["coverage"] is not None
    assert run(*options, observer=Recorder(at_step=2, action=interrupt)).summary is None
    again = run(*options, resume=True)
    assert again.summary["heldout_loss_after"] == summary["heldout_loss_after"]


def test_a_folder_that_is_quantised_already_trains_as_it_is(settings, saved_model):
    run("model.quantize=int4", "train.output_dir=first", "samples.count=0")
    model, tokenizer = load_model(saved_model, dtype="float32", device="cpu", quantize="int4")
    model.save_pretrained("packed")
    tokenizer.save_pretrained("packed")
    run("model.path=packed", "train.output_dir=second", "samples.count=0")
    first, second = (
        json.loads((settings / name / "summary.json").read_text())["heldout_loss_after"]
        for name in ("first", "second")
    )
    assert first == second
    with pytest.raises(UserError, match=r"packed: its weights are in packed bits, .* give lora"):
        run("model.path=packed", "lora=null", "train.output_dir=third")
