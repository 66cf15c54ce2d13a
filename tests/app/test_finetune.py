"""A whole run on a tiny model: its files, its numbers, and what stops it before it begins."""

import json
import shutil
from html import unescape

import peft
import pytest
import torch
from finetune_runs import Recorder, measure_by_the_first_three, read_metrics, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_engine.app.config import load_config
from lora_engine.app.finetune import examine_data, finetune
from lora_engine.errors import UserError

REQUIRED = {
    "heldout_loss_before",
    "heldout_loss_after",
    "heldout_accuracy_before",
    "heldout_accuracy_after",
    "train_tokens",
    "train_seconds",
    "tokens_per_second",
    "peak_memory_bytes",
    "samples",
}


@pytest.mark.parametrize("accelerate", ["true", "false"])
def test_run_leaves_its_files_and_learns(settings, accelerate):
    observer = Recorder()
    outcome = run(f"accelerate={accelerate}", "train.max_steps=8", observer=observer)
    folder = settings / "out"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == outcome.summary
    assert set(summary) >= REQUIRED
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    assert summary["train_tokens"] == sum(row["tokens"] for row in read_metrics(folder))
    assert (summary["train_examples"], summary["eval_examples"]) == (48, 12)
    assert [set(sample) for sample in summary["samples"]] == 3 * [
        {"origin", "prompt", "before", "after", "reference"}
    ]
    assert all(sample["origin"].startswith("rows.jsonl:") for sample in summary["samples"])
    assert observer.steps == list(range(1, 9))
    assert observer.evals == [0, 2, 4, 6, 8]
    assert "rows.jsonl" in (folder / "report.html").read_text()
    assert load_config(folder / "config.yaml") == load_config(
        "run.yaml", [f"accelerate={accelerate}", "train.max_steps=8"]
    )
    assert (summary["coverage"] is not None) == (accelerate == "true")


def test_a_run_says_what_it_does_not_learn_from(settings):
    rows = [
        {"prompt": f"{i}:", "completion": "" if i % 8 == 0 else f"{i}<end>", "score": i + 1}
        for i in range(40)
    ]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    observer = Recorder()
    measure_by_the_first_three(settings)
    summary = run(observer=observer).summary
    told = [
        "rows.jsonl, training: 35 of 40 records are learned from",
        "  dropped, nothing to learn from: the answer is empty: 5 "
        "(rows.jsonl:1, rows.jsonl:9, rows.jsonl:17 and 2 more)",
        "  already ends in '<end>', gets no second end: 35 "
        "(rows.jsonl:2, rows.jsonl:3, rows.jsonl:4 and 32 more)",
        "  not read: score (40)",
    ]
    assert observer.told[:4] == told
    training, heldout = summary["data_accounts"]
    assert (training["records"], training["examples"]) == (40, 35)
    assert training["ignored"] == {"score": 40} and heldout["ignored"] == {"score": 3}
    assert training["findings"][0]["count"] == 5
    page = unescape((settings / "out/report.html").read_text())
    assert all(line.strip() in page for line in told[1:])


def test_a_token_without_an_embedding_stops_the_run_before_it_begins(settings, saved_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    shutil.copytree(saved_model, settings / "grown")
    tokenizer.save_pretrained(settings / "grown")
    measure_by_the_first_three(settings)
    rows = [{"text": "fine"}] * 2 + [{"text": "a <extra> b"}]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: token {size} \('<extra>'\) is beyond"):
        run("model.path=grown")
    assert not (settings / "out").exists()


def test_adapter_gives_peft_the_same_answers(settings, saved_model):
    summary = run("train.final_weights=last").summary
    base = AutoModelForCausalLM.from_pretrained(saved_model, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, settings / "out/adapter")
    from lora_engine.app.finetune import prepare_data
    from lora_engine.evaluation.samples import choose_prompts, generate

    tokenizer = AutoTokenizer.from_pretrained(saved_model)
    _, heldout = prepare_data(load_config("run.yaml").data, tokenizer)
    prompts = choose_prompts(heldout, tokenizer, 3)
    texts = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert texts == [sample["after"] for sample in summary["samples"]]
    with model.disable_adapter():
        texts = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert texts == [sample["before"] for sample in summary["samples"]]


def test_adapter_names_its_base_and_carries_its_tokenizer(settings, saved_model):
    summary = run("data.train=" + str(settings / "rows.jsonl"), "samples.count=0").summary
    folder = settings / "out/adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(saved_model).chat_template
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- training: `rows.jsonl, training`, 48 examples" in card
    assert f"| {summary['heldout_loss_before']:.4f} | {summary['heldout_loss_after']:.4f} |" in card
    assert str(settings) not in card and str(saved_model.parent) not in card


def test_several_adapters_learn_at_once(settings, saved_model):
    rows = [
        {"prompt": f"{i}:", "completion": f"{i}" * times, "adapter": name}
        for i in range(30)
        for name, times in (("twice", 2), ("thrice", 3))
    ]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = "lora.adapters={twice: {}, thrice: {r: 2, learning_rate: 0.005}}"
    outcome = run(adapters, "train.max_steps=8")
    assert outcome.summary["heldout_loss_after"] < outcome.summary["heldout_loss_before"]
    assert outcome.summary["method"] == "LoRA: twice (rank 4), thrice (rank 2)"
    folder = settings / "out/adapter"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["thrice", "twice"]
    logits = {}
    for name, rank in (("twice", 4), ("thrice", 2)):
        base = AutoModelForCausalLM.from_pretrained(saved_model, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, folder / name)
        assert model.peft_config["default"].r == rank
        logits[name] = model(torch.arange(8)[None]).logits
        with model.disable_adapter():
            assert not torch.allclose(model(torch.arange(8)[None]).logits, logits[name])
    assert not torch.allclose(logits["twice"], logits["thrice"])
    rows[5]["adapter"] = "twce"
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"rows.jsonl:6: no adapter 'twce'.* did you mean twice"):
        run(adapters, "train.overwrite=true")


def test_full_fine_tuning(settings):
    outcome = run("lora=null", "samples.count=0", "train.max_steps=2")
    assert outcome.summary["parameters"] == outcome.summary["trainable_parameters"]
    assert outcome.summary["samples"] == []
    AutoModelForCausalLM.from_pretrained(settings / "out/adapter")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[q_prj]", "lora.target_modules: .*q_prj"),
        ("data.train=row.jsonl", "row.jsonl: no such file; did you mean rows.jsonl?"),
        ("model.path=./gone", "./gone: no such model folder or file; check the path"),
        ("train.output_dir=rows.jsonl", "rows.jsonl: is a file, train.output_dir must be a folder"),
    ],
)
def test_mistake_stops_before_training(settings, override, message):
    with pytest.raises(UserError, match=message):
        run(override)
    assert not (settings / "out").exists()


def test_data_names_what_is_beyond_the_models_vocabulary(settings, saved_model):
    grown = settings / "grown"
    shutil.copytree(saved_model, grown)
    tokenizer = AutoTokenizer.from_pretrained(grown)
    tokenizer.add_tokens(["double"])
    tokenizer.save_pretrained(grown)
    config = load_config("run.yaml", [f"model.path={grown}"])
    with pytest.raises(UserError, match=r"48 of 48 records .*: token 261 .* of 261 rows"):
        examine_data(config)
    with pytest.raises(UserError, match=r"48 of 48 records .*: token 261 .* of 261 rows"):
        finetune(config)
