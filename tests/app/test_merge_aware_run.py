"""A run whose adapter learns over the weights that it is served in: what was trained is served."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_runs import Recorder, interrupt, run
from safetensors.torch import load_file
from tiny_model import save_tiny_model
from tries import RECORDS

import lora_engine
from lora_engine.app.config import load_config
from lora_engine.app.deploy import merge
from lora_engine.app.evaluate import evaluate
from lora_engine.app.export import export
from lora_engine.app.serve import open_models
from lora_engine.app.writing import open_writer
from lora_engine.errors import EngineWarning, UserError
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.ops import QuantizedWeight
from lora_engine.serving.requests import Limits

SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
CONFIG = """\
model: {path: tiny, dtype: DTYPE, device: cpu, quantize: nf4}
data: {train: rows.jsonl, eval_fraction: 0.2}
lora: {r: 4, merge_aware: true}
train: {output_dir: run, max_steps: 4, tokens_per_batch: 64, learning_rate: 0.02, save_every: 2,
        checkpointing: layer}
samples: {count: 1, max_new_tokens: 2}
evaluation: {probe: null}
"""


def prepared(place: Path, dtype: str) -> Path:
    torch.set_num_threads(1)
    save_tiny_model(place / "tiny", dtype=torch.float32, **SIZES)
    (place / "rows.jsonl").write_text(RECORDS)
    (place / "run.yaml").write_text(CONFIG.replace("DTYPE", dtype))
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in float32, and a merge-aware run over it in bfloat16."""
    place = prepared(tmp_path_factory.mktemp("aware"), "bfloat16")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run()
    return place


@pytest.fixture
def aware(folder: Path, trained: Path) -> Path:
    """The working folder is a copy of `trained`."""
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    return folder


def summary_of(folder: str = "run") -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return summary


def aware_linears(model: Any) -> dict[str, MergeAwareLinear]:
    return {
        n.removeprefix("base_model.model.").removesuffix(".base_layer"): m
        for n, m in model.named_modules()
        if isinstance(m, MergeAwareLinear)
    }


def test_the_merged_folder_holds_bit_for_bit_what_training_computed_with(aware: Path) -> None:
    said: list[str] = []
    report = merge("run", "merged", tell=said.append)
    model = open_writer("run", device="cpu").model
    linears, stored = aware_linears(model), load_file("merged/model.safetensors")
    assert len(linears) == 14 and not any("note:" in line for line in said)
    for name, linear in linears.items():
        ours = linear.mergeable.merged(linear._adapters())
        written = QuantizedWeight.from_state_dict(stored, f"{name}.weight")
        for part, tensor in ours.tensors.items():
            assert torch.equal(tensor, written.tensors[part]), (name, part)
    assert report["packed"]["format"] == "nf4" and report["trained_for"]["format"] == "nf4"
    assert report["verified"]["kl"] < 1e-4 < report["verified"]["kl_without"]
    assert json.loads(Path("run/adapter/trained_over.json").read_text()) == {
        "merge_aware": True,
        "formats": ["nf4"],
        "quantize": "nf4",
        "double_quant": False,
        "quantize_skip": ["lm_head"],
        "dtype": "bfloat16",
    }


def test_what_was_measured_in_training_is_what_the_merged_model_has(aware: Path) -> None:
    merge("run", "merged")
    report = evaluate("run", device="cpu")
    after = summary_of()["heldout_loss_after"]
    assert report["adapter"]["loss"]["value"] == pytest.approx(after, rel=2e-3)
    assert report["base"]["loss"]["value"] == pytest.approx(
        summary_of()["heldout_loss_before"], rel=2e-3
    )
    own = evaluate("run", data="rows.jsonl")["adapter"]["loss"]["value"]
    served = evaluate("merged", data="rows.jsonl", dtype="bfloat16")["model"]["loss"]["value"]
    assert served == pytest.approx(own, rel=2e-3)


def test_in_plain_pytorch_the_losses_are_the_same_to_the_last_bit(aware: Path) -> None:
    merge("run", "merged")
    model = open_writer("run", device="cpu").model
    lora_engine.restore(model)
    served, _ = lora_engine.load_model("merged", dtype="bfloat16", device="cpu")
    ids = torch.arange(40)[None] % 90 + 3
    with torch.no_grad():
        losses = [m(input_ids=ids, labels=ids).loss for m in (model, served.eval())]
    assert torch.equal(*losses)


def test_it_is_asked_as_it_was_trained(aware: Path) -> None:
    _, worker = open_models("run", limits=Limits(), device="cpu")
    assert len(aware_linears(worker.model)) == 14
    shutil.copytree("run", "other")
    with pytest.raises(UserError, match="is merge-aware, which is served alone"):
        open_models("run", adapters=["other=other"], limits=Limits(), device="cpu")
    _, worker = open_models("tiny", adapters=["other=other"], limits=Limits(), device="cpu")
    assert len(aware_linears(worker.model)) == 14


def test_another_form_than_it_was_trained_for_is_said(aware: Path) -> None:
    said: list[str] = []
    merge("run", "other", quantize="int8", tell=said.append)
    assert "merged into, in nf4; what is written now, int8, is something else" in said[0]
    said.clear()
    report = merge("run", "dense", quantize="none", dtype="float32", tell=said.append)
    assert "16 bits, is something else" in said[0] and report["packed"] is None
    for format in ("hf", "gguf", "gguf-lora"):
        with pytest.raises(UserError, match="first: lora-engine merge, then export"):
            export("run", "exported", format=format)
    with pytest.raises(UserError, match="vLLM would have the adapter beside its base"):
        export("run", "exported", format="vllm")
    export("run", "exported", format="peft")
    assert Path("exported/trained_over.json").is_file()


def test_a_run_resumes_to_the_same_weights(folder: Path) -> None:
    prepared(folder, "float32")
    whole = run("train.output_dir=whole")
    assert run(observer=Recorder(at_step=2, action=interrupt)).summary is None
    with pytest.raises(UserError, match=r"merge_aware"):
        run("model.quantize=int8", resume=True)
    again = run(resume=True)
    assert whole.summary is not None and again.summary is not None
    assert again.summary["heldout_loss_after"] == whole.summary["heldout_loss_after"]
    one, other = (load_file(f"{at}/adapter/adapter_model.safetensors") for at in ("run", "whole"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())
    plain = run("train.output_dir=plain", "accelerate=false", "train.checkpointing=null")
    assert plain.summary is not None
    assert plain.summary["heldout_loss_after"] == pytest.approx(
        whole.summary["heldout_loss_after"], rel=1e-2
    )


def test_going_on_with_an_adapter_keeps_what_it_learned_over_or_says_so(aware: Path) -> None:
    config = CONFIG.replace("DTYPE", "bfloat16").replace("lora: {r: 4, merge_aware: true}\n", "")
    config = config.replace("path: tiny,", "path: tiny, adapter: run,").replace("run,", "run,")
    Path("run.yaml").write_text(config.replace("output_dir: run", "output_dir: next"))
    outcome = run()
    assert outcome.summary is not None and outcome.summary["config"]["lora"]["merge_aware"]
    with pytest.raises(UserError, match=r"is merge-aware; .* give the format"):
        run("model.quantize=null", "train.output_dir=third")
    with pytest.warns(EngineWarning, match="merged into, in nf4, and goes on over int8"):
        run("model.quantize=int8", "lora.merge_aware=false", "train.output_dir=fourth")


def test_an_adapter_over_packed_bits_goes_on_over_others_with_a_warning(folder: Path) -> None:
    prepared(folder, "float32")
    run("lora.merge_aware=false")
    assert not json.loads(Path("run/adapter/trained_over.json").read_text())["merge_aware"]
    text = Path("run.yaml").read_text().replace("lora: {r: 4, merge_aware: true}\n", "")
    Path("run.yaml").write_text(text)
    with pytest.warns(EngineWarning, match="learned over nf4, and goes on over weights in float32"):
        run("model.quantize=null", "model.adapter=run", "train.output_dir=next")
    with warnings.catch_warnings():  # over the same bits there is nothing to tell
        warnings.simplefilter("error", EngineWarning)
        run("model.adapter=run", "train.output_dir=third")


REFUSED = {
    "no format": (["model.quantize=null"], "give the format that is served as model.quantize"),
    "dropout": (["lora.dropout=0.1"], "what is served has no dropout"),
    "several": (["lora.adapters={a: {}, b: {}}"], "merged with one adapter"),
    "elsewhere": (["model.offload_host=true"], "offload"),
    "reward": (["objective=reward"], "scalar head"),
    "kept": (["model.quantize=null", "model.keep_quantized=true"], "give the format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(folder: Path, name: str) -> None:
    (folder / "run.yaml").write_text(CONFIG.replace("DTYPE", "float32"))
    options, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as told:
        load_config("run.yaml", options)
    assert "\n" not in str(told.value)
