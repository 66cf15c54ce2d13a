"""`model.adapter`: a run goes on with an adapter, as it is, or says why it cannot."""

import json
import math
import shutil

import pytest
import torch
from finetune_runs import run
from safetensors.torch import load_file, save_file

from lora_engine.errors import UserError


def begun(settings) -> dict:
    """A finished run of `settings`, kept as the folder first/."""
    summary = run("train.final_weights=last", "samples.count=0").summary
    (settings / "out").rename(settings / "first")
    text = (settings / "run.yaml").read_text()
    (settings / "run.yaml").write_text(text.replace("lora: {r: 4, alpha: 8}\n", ""))
    return summary


def test_a_run_goes_on_where_the_adapter_s_ended(settings):
    before = begun(settings)
    outcome = run("model.adapter=first", "train.final_weights=last", "samples.count=0")
    summary = outcome.summary
    assert summary["heldout_loss_before"] == pytest.approx(before["heldout_loss_after"], rel=1e-6)
    assert summary["heldout_loss_after"] < before["heldout_loss_after"]
    assert summary["method"] == "LoRA of rank 4"
    old, new = (
        load_file(settings / f / "adapter/adapter_model.safetensors") for f in ("first", "out")
    )
    assert old.keys() == new.keys()
    assert any(not torch.equal(old[name], new[name]) for name in old)
    scales = [
        json.loads((settings / f / "adapter/adapter_config.json").read_text())["lora_alpha"]
        for f in ("first", "out")
    ]
    assert scales == [8, 8]


def test_it_is_resumed_with_the_adapter_that_it_began_with(settings):
    begun(settings)
    run("model.adapter=first/adapter", "train.max_steps=2", "samples.count=0")
    going_on = ("model.adapter=first/adapter", "train.max_steps=4", "samples.count=0")
    path = settings / "first/adapter/adapter_model.safetensors"
    whole = path.read_bytes()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"model\.adapter"):
        run(*going_on, resume=True)
    path.write_bytes(whole)
    assert run(*going_on, resume=True).result.steps == 4


def test_the_reference_is_the_adapter_that_it_began_with(settings):
    begun(settings)
    rows = [{"prompt": f"double {i}", "chosen": f"{i} {i}", "rejected": f"{i}"} for i in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (settings / "pairs.jsonl").write_text(lines)
    compared = ("model.adapter=first", "objective=dpo", "data.train=pairs.jsonl", "samples.count=0")
    summary = run(*compared).summary
    assert summary["heldout_loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"] - 1e-4
    adapter = settings / "out/adapter"
    assert not [path for path in adapter.iterdir() if path.is_dir()]
    old, new = (
        load_file(path / "adapter_model.safetensors")
        for path in (settings / "first/adapter", adapter)
    )
    assert old.keys() == new.keys() and any(not torch.equal(old[n], new[n]) for n in old)
    saved = load_file(settings / "out/checkpoints/step-00000004/weights.safetensors")
    assert not [name for name in saved if "frozen_reference" in name]


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "q_proj" in name and "lora_B" in name)]
    save_file(tensors, path)


def wider(path):
    save_file({n: torch.cat([t, t], 1) for n, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.adapter=gone"], "gone: no such folder; give the folder of a run"),
        (["model.adapter=rows.jsonl"], "rows.jsonl: is a file; give the folder of a run"),
        (["lora.r=8"], r"lora: the adapter in first keeps its settings \(r 4, alpha 8\); leave"),
        (["train.output_dir=first", "train.overwrite=true"], "holds first, the adapter to begin"),
    ],
)
def test_what_cannot_be_gone_on_with_is_one_line(settings, overrides, message):
    begun(settings)
    with pytest.raises(UserError, match=message):
        run(*["model.adapter=first", "samples.count=0", *overrides])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_tensor, "is not a pair of matrices"),
        (wider, "first/adapter"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read"),
    ],
)
def test_a_damaged_adapter_is_one_line(settings, change, message):
    begun(settings)
    change(settings / "first/adapter/adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as told:
        run("model.adapter=first", "samples.count=0")
    assert "\n" not in str(told.value)


def test_several_adapters_name_their_folders(settings):
    begun(settings)
    for name in ("a", "b"):
        shutil.copytree(settings / "first/adapter", settings / "several" / name)
    with pytest.raises(UserError, match=r"give one of .*several/a, .*several/b"):
        run("model.adapter=several")
