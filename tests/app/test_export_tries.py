"""`lora-engine export`: every format of one adapter, read by the libraries that they are for."""

import json
import shlex
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import peft
import pytest
import torch
from small_ggufs import byte_level, save_model
from tries import MISTAKE, Try, check, run, tries

from lora_engine.app.export import EXPORT_REPORT
from lora_engine.export import gguf
from lora_engine.export.adapter import read_adapter
from lora_engine.export.lint import lint, room_for
from lora_engine.export.llama_cpp import LlamaCpp
from lora_engine.export.verify import load_plain, with_adapters
from lora_engine.models.load.origin import Base, read_base

ROW = [5 + (7 * i) % 380 for i in range(40)]


def save_adapter(base: Path, folder: Path, **settings) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "down_proj"], **settings}
    )
    model = peft.get_peft_model(load_plain(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """base/, adapter/, dora/ and rows.jsonl, to be copied."""
    place = tmp_path_factory.mktemp("export")
    save_model(place / "base", byte_level("qwen2"))
    save_adapter(place / "base", place / "adapter")
    save_adapter(place / "base", place / "dora", use_dora=True)
    rows = [{"text": f"the capital of {name} is here, {i} times"} for i, name in enumerate("abc")]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def place(folder, material):
    """The working folder is a copy of `material`."""
    shutil.copytree(material, folder, dirs_exist_ok=True)
    return folder


def export(capfd, format, *more, adapter="adapter"):
    arguments = ["export", adapter, "--base", "base", "--data", "rows.jsonl", "--to", "out"]
    return run(capfd, *arguments, "--format", format, *more)


def report_of(folder, name="out"):
    report = json.loads((folder / name / EXPORT_REPORT).read_text())
    assert set(report["files"]) == {path.name for path in (folder / name).iterdir()}
    return report


def test_hugging_face(place, capfd):
    from transformers import AutoModelForCausalLM

    status, printed, _ = export(capfd, "hf", "--dtype", "bfloat16")
    assert status == 0 and "verified on" in printed
    assert report_of(place)["merged"]["dtypes"] == ["bfloat16"]
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.bfloat16
    assert (place / "out/generation_config.json").is_file()
    # A whole model is exported as it is.
    status, _, _ = run(capfd, "export", "out", "--format", "hf", "--to", "again")
    assert status == 0
    assert (place / "again/model.safetensors").read_bytes() == (
        place / "out/model.safetensors"
    ).read_bytes()


def test_gguf(place, capfd):
    pytest.importorskip("xllamacpp")
    status, printed, _ = export(capfd, "gguf", "--type", "f32")
    assert status == 0 and "llama.cpp on" in printed
    report = report_of(place)
    assert report["verified"]["top1"] == 1.0 and report["verified"]["logprob"] < 0.01
    assert report["verified"]["conversations"] == 4
    assert "llama-server -m model-f32.gguf" in (place / "out/README.md").read_text()
    modelfile = (place / "out/Modelfile").read_text()
    assert modelfile.startswith("FROM ./model-f32.gguf\nTEMPLATE") and "<|im_end|>" in modelfile


def test_what_a_gguf_type_loses_is_told_apart_from_what_llama_cpp_rounds(place, capfd):
    pytest.importorskip("xllamacpp")
    status, printed, told = export(capfd, "gguf", "--type", "f16")
    assert status == 0, told
    assert "the file's weights in float32: transformers agrees at" in printed
    verified = report_of(place)["verified"]
    exact, weights = verified["exact"], verified["weights"]
    assert exact["top1"] >= 0.99 and exact["top1_decided"] == 1.0 and exact["logprob"] < 0.01
    assert weights["positions"] == exact["positions"] == verified["positions"]
    assert 0 < report_of(place)["farthest"]["lost"] < 1e-3
    assert 0 < weights["logprob"] < 0.1
    assert not (place / "out/exact.gguf").exists()


def test_weights_that_llama_cpp_takes_for_others_are_refused(place, capfd, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("lora_engine.export.gguf.restored", lambda name, tensor, config: tensor)
    status, _, told = export(capfd, "gguf", "--type", "f16")
    assert status == 2 and "are usual for the file's weights in float32" in told
    assert not (place / "out").exists()


def of_another(setting, value):
    """Settings of a model that has another value there."""
    add = gguf.add_settings

    def added(writer, config, file_type):
        other = type(config)(**{**config.to_dict(), setting: value})
        add(writer, other, file_type)

    return "add_settings", added


def of_one_tensor(change):
    """Values of one of the file's tensors that are changed."""
    encode = gguf.encode

    def encoded(tensor, kind, name):
        return encode(change(tensor) if name == "blk.1.ffn_up.weight" else tensor, kind, name)

    return "encode", encoded


# Of a wrong export, what it changes: the likeliest token hardly says so of the first two.
FAULTS = {
    "one matrix is 4 % too large": (lambda: of_one_tensor(lambda w: 1.04 * w), "values are 4"),
    "rows of it are exchanged": (
        lambda: of_one_tensor(lambda w: w.roll(1, 0)),
        "% off the weights",
    ),
    "another rms_norm_eps": (lambda: of_another("rms_norm_eps", 0.05), "in float32"),
    "another base of the rotation": (
        lambda: of_another("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        "in float32",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_wrong_anywhere_is_not_put_in_place(place, capfd, monkeypatch, fault):
    pytest.importorskip("xllamacpp")
    make, words = FAULTS[fault]
    monkeypatch.setattr(gguf, *make())
    status, _, told = export(capfd, "gguf", "--type", "q8_0")
    assert status == MISTAKE and words in told, told
    assert not (place / "out").exists()


def test_a_gguf_adapter_beside_its_base(place, capfd):
    pytest.importorskip("xllamacpp")
    plain = ["export", "base", "--format", "gguf", "--type", "f32", "--no-verify", "--to", "b"]
    assert run(capfd, *plain)[0] == 0
    status, printed, _ = export(capfd, "gguf-lora")
    assert status == 0 and "llama.cpp on" in printed
    assert report_of(place)["verified"]["top1"] == 1.0  # and base.gguf is not left there
    assert "llama-server -m BASE.gguf --lora adapter.gguf" in (place / "out/README.md").read_text()
    engine = LlamaCpp(place / "b/model-f32.gguf", adapter=place / "out/adapter.gguf", context=256)
    model = with_adapters(load_plain(place / "base"), [(read_adapter(place / "adapter"), 1.0)])
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ROW])).logits[0].log_softmax(-1)
        off = load_plain(place / "base")(input_ids=torch.tensor([ROW])).logits[0].log_softmax(-1)
    token, logprob = engine.likeliest(ROW)[0]
    assert token == int(logprobs[-1].argmax())
    assert logprob == pytest.approx(float(logprobs[-1, token]), abs=0.02)
    assert abs(float(off[-1, token]) - logprob) > 0.1  # the adapter is what makes it so


def test_a_gguf_adapter_of_another_scale_is_not_put_in_place(place, capfd, monkeypatch):
    pytest.importorskip("xllamacpp")
    write = gguf.write_gguf_adapter

    def altered(adapter, *arguments, **named):
        layers = {n: replace(x, scaling=-9 * x.scaling) for n, x in adapter.low_rank.items()}
        return write(replace(adapter, low_rank=layers), *arguments, **named)

    monkeypatch.setattr(gguf, "write_gguf_adapter", altered)
    status, _, told = export(capfd, "gguf-lora")
    assert status == MISTAKE and "llama.cpp computes something else" in told
    assert not (place / "out").exists()


def test_a_server_is_told_the_hub_s_name_of_the_base(place, capfd):
    """Not a name that is known here alone."""
    path = place / "adapter/base.json"
    known = asdict(read_base(place / "adapter") or Base("base"))
    path.write_text(json.dumps({**known, "hub_id": "someone/base"}))
    status, printed, _ = run(
        capfd, "export", "adapter", "--base", "smollm2", "--format", "vllm", "--to", "an adapter"
    )
    assert status == 0
    command = report_of(place, "an adapter")["command"]
    assert shlex.split(command)[:3] == ["vllm", "serve", "someone/base"]
    assert shlex.split(command)[-1] == "an adapter=an adapter" and command in printed


def test_servers_with_adapters(place, capfd):
    status, printed, _ = export(capfd, "vllm")
    assert status == 0
    assert "vllm serve base --enable-lora --max-lora-rank 8 --lora-modules out=out" in printed
    assert report_of(place)["lint"] == []
    assert peft.PeftModel.from_pretrained(load_plain(place / "base"), place / "out")
    status, printed, _ = export(capfd, "peft", "--overwrite", adapter="dora")
    assert status == 0 and "servers do not take it: it is DoRA" in printed


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"r": 600}, "rank 600 is more than 512"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is lm_head"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is set"),
        ({"target_modules": ["embed_tokens"]}, "on model.embed_tokens"),
        ({"target_modules": ["lm_head"]}, "an adapter on lm_head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore")
def test_lint(material, tmp_path, settings, problem):
    model = peft.get_peft_model(
        load_plain(material / "base"),
        peft.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **settings}),
    )
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert any(problem in line for line in lint(adapter))
    assert room_for(adapter) == (512 if settings.get("r") else 8)


MISTAKES = [
    Try("no such format", ["export", "adapter", "--to", "m", "--format", "ggfu"],
        ["--format", "did you mean gguf"]),
    Try("no such type", ["export", "adapter", "--to", "m", "--format", "gguf", "--type", "q3"],
        ["--type", "q3"]),
    Try("no format", ["export", "adapter", "--to", "m"], ["--format"]),
    Try("no adapter", ["export", "base", "--to", "m", "--format", "vllm"],
        ["whole model", "--format hf"]),
    Try("dora for servers",
        ["export", "dora", "--base", "base", "--to", "m", "--format", "vllm"], ["DoRA", "merges"]),
    Try("dora for llama.cpp",
        ["export", "dora", "--base", "base", "--to", "m", "--format", "gguf-lora", "--no-verify"],
        ["DoRA", "--format gguf"]),
    Try("weighted adapter",
        ["export", "adapter", "--adapter", "default=0.5", "--base", "base", "--to", "m",
         "--format", "peft"], ["without a weight"]),
    Try("a type of what has none",
        ["export", "adapter", "--base", "base", "--to", "m", "--format", "hf", "--type", "q4_k"],
        ["--type q4_k: is of --format gguf, not of hf"]),
    Try("a dtype of what has none",
        ["export", "adapter", "--base", "base", "--to", "m", "--format", "gguf",
         "--dtype", "float32"], ["--dtype float32: is of --format hf, not of gguf"]),
    Try("a base of a whole model",
        ["export", "base", "--base", "adapter", "--to", "m", "--format", "hf"],
        ["--base adapter: base is a whole model"]),
    Try("an adapter of a whole model",
        ["export", "base", "--adapter", "one", "--to", "m", "--format", "hf"],
        ["--adapter one: base is a whole model"]),
    Try("into the adapter",
        ["export", "adapter", "--base", "base", "--to", "adapter/more", "--format", "peft"],
        ["adapter is what is read"]),
    Try("no such base", ["export", "adapter", "--base", "none/", "--to", "m", "--format", "hf"],
        ["none/"]),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(place, capfd, entry):
    assert entry.status == MISTAKE
    check(capfd, place, entry)
    assert not (place / "m").exists()
