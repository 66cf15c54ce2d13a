"""What a run learned over packed bits is measured, asked and merged over the same bits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from tries import CONFIG, RECORDS, run

from lora_engine import load_model
from lora_engine.app.deploy import merge
from lora_engine.app.evaluate import evaluate
from lora_engine.app.export import export
from lora_engine.app.serve import open_models
from lora_engine.app.writing import open_writer
from lora_engine.errors import UserError
from lora_engine.export.verify import load_plain
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.serving.requests import Limits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a model whose four bits are far from it, and a run over them, to be copied."""
    from lora_engine.app.config import load_config
    from lora_engine.app.finetune import finetune

    place = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        save_tiny_model(place / "tiny", initializer_range=0.2)
        (place / "rows.jsonl").write_text(RECORDS)
        (place / "run.yaml").write_text(CONFIG)
        changes = ["model.quantize=fp4", "model.quantize_skip=[lm_head, k_proj]"]
        finetune(load_config("run.yaml", [*changes, "train.learning_rate=0.01"]))
    return place


@pytest.fixture
def packed(folder, trained):
    """The working folder is a copy of `trained`."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return folder


def summary_of(folder):
    return json.loads((folder / "run/summary.json").read_text())


def decoded(folder):
    """The base's weights by name, as its bits decode to."""
    model, _ = load_model(
        folder / "tiny", dtype="float32", device="cpu", quantize="fp4",
        quantize_skip=["lm_head", "k_proj"],
    )  # fmt: skip
    return {
        f"{name}.weight": module.quantized.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def test_it_is_measured_as_it_was_trained(packed):
    summary = summary_of(packed)
    report = evaluate("run", dtype="float32", device="cpu")
    for side, when in (("base", "before"), ("adapter", "after")):
        loss = report[side]["loss"]["value"]
        assert loss == pytest.approx(summary[f"heldout_loss_{when}"], rel=1e-5), side
    assert report["trained_over"]["format"] == "fp4"
    # Beside the adapter alone the base is what its files hold.
    dense = evaluate("tiny", adapter="run/adapter", data="rows.jsonl", dtype="float32")
    over = evaluate("tiny", adapter="run", data="rows.jsonl", dtype="float32")
    assert dense["trained_over"] is None
    assert abs(dense["base"]["loss"]["value"] - over["base"]["loss"]["value"]) > 1e-3


def test_it_writes_as_it_was_trained(packed):
    writer = open_writer("run", dtype="float32", device="cpu")
    served, worker = open_models("run", limits=Limits(), dtype="float32", device="cpu")
    assert [one.name for one in served] == ["run", "tiny"]
    for model in (writer.model, worker.model):
        linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
        assert len(linears) == len(decoded(packed))


@pytest.mark.parametrize("form", ["merge", "hf"])
def test_it_is_merged_into_what_its_bits_decode_to(packed, form):
    said = []
    make = merge if form == "merge" else lambda *a, **k: export(*a, format="hf", **k)
    report = make("run", "merged", tell=said.append)
    assert "its linears in fp4 as the run had them" in said[-1]
    assert report["trained_over"]["format"] == "fp4"
    found, adapter = (
        load_file("merged/model.safetensors"),
        load_file("run/adapter/adapter_model.safetensors"),
    )
    weights = decoded(packed)
    assert len(weights) == 12
    for name, weight in weights.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = (adapter[f"{stem}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(found[name], weight + 32 / 2 * b @ a, rtol=1e-5, atol=1e-6)
    # So it computes what the run did.
    loss = evaluate("merged", data="rows.jsonl", dtype="float32")["model"]["loss"]["value"]
    over = evaluate("run", data="rows.jsonl", dtype="float32")["adapter"]["loss"]["value"]
    assert loss == pytest.approx(over, rel=1e-5)
    assert not (packed / "merged/unpacked").exists()
    assert "quantization_config" not in json.loads((packed / "merged/config.json").read_text())
    assert load_plain(packed / "merged").config.tie_word_embeddings is not None


def test_a_base_that_is_packed_already_is_not_packed_again(packed):
    model, tokenizer = load_model("tiny", dtype="float32", device="cpu", quantize="fp4",
                                  quantize_skip=["lm_head", "k_proj"])  # fmt: skip
    model.save_pretrained("bits")
    tokenizer.save_pretrained("bits")
    (packed / "run/adapter/base.json").unlink()  # which has the other files' contents
    own = evaluate("run", data="rows.jsonl", dtype="float32")["adapter"]["loss"]["value"]
    found = evaluate("bits", adapter="run", data="rows.jsonl", dtype="float32")
    assert found["adapter"]["loss"]["value"] == pytest.approx(own, rel=1e-5)


def test_one_that_was_trained_over_another_base_s_bits_is_not_served_beside(packed, capfd):
    status, _, told = run(capfd, "serve", "tiny", "--adapter", "one=run", "--port", "0")
    assert status == 2
    assert (
        "was trained over the base in fp4, it is as its files have it here; give run/adapter"
        in told
    )
    with pytest.raises(UserError, match="as its files have it, it is in fp4 here"):
        open_models("run", adapters=["two=run/adapter"], limits=Limits())
