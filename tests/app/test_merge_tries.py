"""`lora-engine merge`: of a run, of an adapter, and of what is neither."""

import json
import shutil
from pathlib import Path

from tiny_model import save_tiny_model
from tries import MISTAKE, Try, check, run, snapshot, tries

import lora_engine
from lora_engine.app.deploy import MERGE_REPORT
from lora_engine.models.quantized.linear import QuantizedLinear


def test_a_run_is_merged_verified_and_loaded_by_transformers(finished, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    status, printed, _ = run(capfd, "merge", "run", "--to", "out/merged")
    assert status == 0
    report = json.loads((finished / "out/merged" / MERGE_REPORT).read_text())
    assert report["verified"]["rows"] == "rows.jsonl, held out"
    assert report["verified"]["kl"] <= 1e-6 and report["verified"]["top1"] == 1.0
    assert report["adapters"] == {"default": 1.0}
    assert "verified on" in printed and "out/merged" in printed
    files = {path.name for path in (finished / "out/merged").iterdir()}
    assert files == set(report["files"])
    assert {"model.safetensors", "tokenizer.json", "README.md", "chat_template.jinja"} <= files
    AutoModelForCausalLM.from_pretrained("out/merged")
    assert AutoTokenizer.from_pretrained("out/merged").encode("hi")
    card = (finished / "out/merged/README.md").read_text()
    assert "## Figures" in card and "PeftModel" not in card and "from_pretrained(folder)" in card

    before = snapshot(finished)
    status, _, told = run(capfd, "merge", "run", "--to", "out/merged")
    assert status == MISTAKE and "is not empty" in told
    assert snapshot(finished) == before
    assert run(capfd, "merge", "run", "--to", "out/merged", "--overwrite", "--no-verify")[0] == 0
    report = json.loads((finished / "out/merged" / MERGE_REPORT).read_text())
    assert report["verified"] is None


def test_a_run_is_merged_into_packed_bits(finished, capfd):
    status, printed, _ = run(
        capfd, "merge", "run", "--to", "packed", "--quantize", "int8", "--no-verify"
    )  # fmt: skip
    assert status == 0 and "14 linears in int8" in printed
    report = json.loads((finished / "packed" / MERGE_REPORT).read_text())
    assert report["packed"]["error"] < 0.01
    files = {path.name for path in (finished / "packed").iterdir()}
    assert files == set(report["files"]) and "tokenizer.json" in files
    model, _ = lora_engine.load_model("packed")
    assert sum(isinstance(m, QuantizedLinear) for m in model.modules()) == 14


def test_an_adapter_alone_is_merged_with_the_base_that_is_given(finished, capfd):
    status, _, _ = run(
        capfd, "merge", "run/adapter", "--base", "tiny", "--to", "merged", "--data", "rows.jsonl"
    )  # fmt: skip
    assert status == 0
    report = json.loads((finished / "merged" / MERGE_REPORT).read_text())
    assert report["verified"]["rows"] == "rows.jsonl"


def test_an_adapter_that_was_left_half_written_is_none(finished, capfd):
    shutil.copytree("run/adapter", "adapters/one")
    shutil.copytree("run/adapter", "adapters/.tmp-two-123")
    arguments = ("merge", "adapters", "--base", "tiny", "--no-verify")
    assert run(capfd, *arguments, "--to", "merged")[0] == 0
    report = json.loads((finished / "merged" / MERGE_REPORT).read_text())
    assert report["adapters"] == {"one": 1.0}


def test_a_run_of_rewards_is_compared_on_the_prompts_that_it_held_out(finished, capfd):
    rows = "".join(json.dumps({"prompt": f"say {i}", "answer": str(i)}) + "\n" for i in range(9))
    (finished / "rows.jsonl").write_text(rows)
    config = finished / "run/config.yaml"
    text = config.read_text().replace("objective: sft", "objective: grpo")
    config.write_text(text.replace("rewards: null", "rewards: [exact_match]"))
    status, printed, told = run(capfd, "merge", "run", "--to", "merged")
    assert status == 0 and "of rows.jsonl, held out" in printed, told
    (finished / "rows.jsonl").unlink()
    status, _, told = run(capfd, "merge", "run", "--to", "other")
    assert status == 2 and "no such file" in told and "or give --data to compare on others" in told


def test_the_chosen_adapter_s_tokenizer_reads_the_rows(finished, capfd):
    """Adapters in one folder may be of different runs."""
    for name in ("one", "two"):
        shutil.copytree("run/adapter", f"adapters/{name}")
    (finished / "adapters/one/chat_template.jinja").write_text("{{ raise_exception('not mine') }}")
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (finished / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    arguments = ("merge", "adapters", "--base", "tiny", "--to", "merged", "--data", "chats.jsonl")
    status, _, told = run(capfd, *arguments, "--adapter", "two")
    assert status == 0, told
    template = (finished / "merged/chat_template.jinja").read_text()
    assert template == (finished / "run/adapter/chat_template.jinja").read_text()


def test_weights_that_compute_something_else_are_not_put_in_place(finished, capfd, monkeypatch):
    from lora_engine.export import weights

    monkeypatch.setattr(weights, "delta_rows", lambda layer, a, b: layer.b[a:b] @ layer.a * 3)
    status, _, told = run(capfd, "merge", "run", "--to", "merged")
    assert status == MISTAKE
    assert "do not compute what the adapter does" in told and "nothing was written" in told
    assert not (finished / "merged").exists()


def other_base(folder: Path) -> None:
    shutil.rmtree(folder / "tiny")
    save_tiny_model(folder / "tiny", seed=1)


MISTAKES = [
    Try("no such run", ["merge", "nothing", "--to", "m"], ["nothing", "no such folder"]),
    Try("not a folder", ["merge", "rows.jsonl", "--to", "m"], ["rows.jsonl", "is a file"]),
    Try("empty name", ["merge", "", "--to", "m"], ["RUN", "is empty"]),
    Try("no adapter in it", ["merge", "empty", "--to", "m"], ["empty", "holds no adapter"],
        prepare=lambda folder: (folder / "empty").mkdir()),
    Try("a whole model", ["merge", "tiny", "--to", "m"], ["tiny", "is a whole model"]),
    Try("a run that is not done", ["merge", "run", "--to", "m"], ["run", "--resume"],
        prepare=lambda folder: shutil.rmtree(folder / "run/adapter")),
    Try("the base is gone", ["merge", "run", "--to", "m"], ["tiny"],
        prepare=lambda folder: shutil.move(folder / "tiny", folder / "moved")),
    Try("another base", ["merge", "run", "--to", "m"], ["tiny", "is not the base", "--base"],
        prepare=other_base),
    Try("a base that is none", ["merge", "run", "--base", "rows.jsonl", "--to", "m"],
        ["rows.jsonl", "is not a model"]),
    Try("no adapter of the name", ["merge", "run", "--adapter", "defualt", "--to", "m"],
        ["defualt", "did you mean default"]),
    Try("no number", ["merge", "run", "--adapter", "default=much", "--to", "m"],
        ["default=much", "no weight"]),
    Try("no dtype", ["merge", "run", "--dtype", "int8", "--to", "m"], ["int8", "use float32"]),
    Try("no such format", ["merge", "run", "--quantize", "nf5", "--to", "m"],
        ["--quantize", "nf5", "did you mean nf4"]),
    Try("scales of what is not packed", ["merge", "run", "--double-quant", "--to", "m"],
        ["--double-quant", "add --quantize nf4"]),
    Try("scales that the format has not",
        ["merge", "run", "--quantize", "fp8", "--double-quant", "--to", "m"],
        ["--quantize", "double_quant is of nf4"]),
    Try("no data", ["merge", "run", "--data", "none.jsonl", "--to", "m"], ["none.jsonl"]),
    Try("no --to", ["merge", "run"], ["--to"]),
    Try("--to is empty", ["merge", "run", "--to", ""], ["--to", "is empty"]),
    Try("--to is a file", ["merge", "run", "--to", "rows.jsonl"], ["rows.jsonl", "is a file"]),
    Try("--to is a link to nothing", ["merge", "run", "--to", "link"], ["link: is a link"],
        prepare=lambda folder: (folder / "link").symlink_to("nowhere")),
    Try("four bits take what the adapter gave", ["merge", "run", "--to", "m", "--quantize", "nf4"],
        ["of what the adapter changes is lost", "nothing was written to m",
         "use --quantize int8, or no --quantize"]),
    Try("--to is the run", ["merge", "run", "--to", "run", "--overwrite"],
        ["was not written by this command"]),
    Try("--to is the adapter", ["merge", "run", "--to", "run/adapter", "--overwrite"],
        ["run/adapter is what is read"]),
    Try("--to is in the adapter", ["merge", "run/adapter", "--to", "run/adapter/merged"],
        ["run/adapter is what is read"]),
    Try("--to is the base", ["merge", "run", "--to", "tiny", "--overwrite"],
        ["tiny is what is read"]),
    Try("--to is the working folder", ["merge", "run", "--to", "."], ["is the working folder"]),
    Try("a broken adapter", ["merge", "run", "--to", "m"], ["adapter_model.safetensors"],
        prepare=lambda f: (f / "run/adapter/adapter_model.safetensors").write_bytes(b"x")),
    Try("weights cut off", ["merge", "run", "--to", "m"], ["tiny"],
        prepare=lambda f: (f / "tiny/model.safetensors").write_bytes(b"x" * 99)),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)
