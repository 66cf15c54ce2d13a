"""A run of every objective that a configuration can name, on a tiny model, and what it is told."""

import json

import pytest
import torch
from finetune_runs import Recorder, interrupt, read_metrics, run
from safetensors.torch import load_file

from lora_engine.app.config import load_config
from lora_engine.app.config_yaml import shipped_configs
from lora_engine.app.finetune import examine_data
from lora_engine.app.objectives import OBJECTIVES, objective_of
from lora_engine.errors import UserError
from lora_engine.objectives import DPO, KTO, ORPO, SFT, Distill

PAIR = {"prompt": "double {i}:", "chosen": " {i}{i}", "rejected": " no, {i} is enough"}
JUDGED = {"prompt": "double {i}:", "completion": " {i}{i}", "label": True}
PLAIN = {"prompt": "double {i}:", "completion": " {i}{i}"}
ROWS = {"pairs": PAIR, "labelled": JUDGED, "plain": PLAIN}


def write_rows(folder, kind, count=40):
    rows = []
    for i in range(count):
        row = {k: v.format(i=i) if isinstance(v, str) else v for k, v in ROWS[kind].items()}
        if kind == "labelled" and i % 2:
            row |= {"completion": " no", "label": False}
        rows.append(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def kind_of(name):
    return objective_of(name).reads.examples


def test_names_and_settings():
    assert objective_of("sft") == SFT()
    assert objective_of({"name": "dpo", "loss_type": "ipo", "beta": 1}) == DPO("ipo", beta=1.0)
    assert objective_of({"name": "orpo", "beta": "2e-1"}) == ORPO(beta=0.2)
    assert objective_of({"name": "distill", "teacher": "big", "beta": 0.5}) == Distill("big", 0.5)
    assert objective_of("kto") == KTO()


WRONG = {
    "a name": ("dop", "run.yaml:8: objective: no objective 'dop'; did you mean dpo?"),
    "no name": ("{beta: 0.1}", "run.yaml:8: objective.name: no objective None; there is sft, "),
    "another name": (
        "{name: rainbow}",
        "objective.name: no objective 'rainbow'; there is sft, domain",
    ),
    "a key": (
        "{name: dpo, betas: 0.1}",
        "objective.betas: unknown key; did you mean objective.beta?",
    ),
    "no keys": ("{name: sft, beta: 1}", "objective.beta: unknown key; sft takes no settings"),
    "a switch": ("{name: dpo, beta: yes}", "objective.beta: expected a number, got True"),
    "a choice": (
        "{name: dpo, loss_type: sigmod}",
        "objective.loss_type: expected sigmoid or sigmoid_norm or hinge or ipo or robust, got "
        "'sigmod'; did you mean sigmoid?",
    ),
    "a range": ("{name: dpo, beta: 0}", "objective.beta: expected a number > 0, got 0.0"),
    "a list": ("[dpo]", "objective: expected text or values by name, got ['dpo']"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_mistake_is_one_line_with_its_place(settings, name):
    text, message = WRONG[name]
    config = settings / "run.yaml"
    config.write_text(config.read_text() + f"objective: {text}\n")
    with pytest.raises(UserError) as caught:
        load_config("run.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("run.yaml:")


def test_a_setting_can_be_given_on_the_command_line(settings):
    config = load_config("run.yaml", ["objective.name=dpo", "objective.beta=0.5"])
    assert objective_of(config.objective) == DPO(beta=0.5)
    with pytest.raises(UserError, match=r"^command line: objective\.beta: expected a number > 0"):
        load_config("run.yaml", ["objective.name=dpo", "objective.beta=0"])
    with pytest.raises(UserError, match=r"^command line: lora: objective reward trains an adapter"):
        load_config("run.yaml", ["objective=reward", "lora="])


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in ("sft", "distill")])
def test_every_objective_runs_and_learns(settings, name):
    write_rows(settings, kind_of(name))
    summary = run(
        f"objective={name}", "train.max_steps=8", "train.tokens_per_batch=400", "samples.count=1"
    ).summary
    assert summary["objective"] == name
    assert summary["heldout_loss_after"] < summary["heldout_loss_before"]
    before, after = summary["heldout_metrics_before"], summary["heldout_metrics_after"]
    page = (settings / "out/report.html").read_text()
    if kind_of(name) == "pairs":
        if name != "cpo":  # which learns the chosen answers first
            assert after["rewards/margins"] > before["rewards/margins"]
        assert "rewards/margins" in page
        assert "rewards/margins" in read_metrics(settings / "out")[0]
    if name == "dpo":
        assert summary["heldout_loss_before"] == pytest.approx(0.6931, abs=1e-3)
        assert f"held-out loss, {DPO().unit} |" in (settings / "out/adapter/README.md").read_text()
    assert ("Pair accuracy" in page) == (name == "reward")
    assert len(summary["samples"]) == (name != "reward")


def test_a_reward_models_head_is_saved_as_a_classifiers(settings, saved_model):
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    write_rows(settings, "pairs")
    summary = run("objective=reward", "train.max_steps=8", "train.tokens_per_batch=400").summary
    folder = settings / "out/adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert any("score" in name for name in load_file(folder / "adapter_model.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(saved_model, num_labels=1)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    won = 0
    for i in range(40):
        row = {key: value.format(i=i) for key, value in PAIR.items()}
        values = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                values.append(model(input_ids=torch.tensor([ids])).logits.item())
        won += values[0] > values[1]
    assert won / 40 == pytest.approx(summary["heldout_accuracy_after"], abs=0.1)
    assert won > 30


def test_a_teacher_is_loaded_by_its_path(settings, saved_model):
    teacher = settings / "teacher"
    from tiny_model import save_tiny_model

    save_tiny_model(teacher, initializer_range=0.1)
    write_rows(settings, "plain")
    observer = Recorder()
    overrides = ["objective.name=distill", f"objective.teacher={teacher}", "train.max_steps=8"]
    summary = run(*overrides, observer=observer).summary
    assert f"loading the teacher, {teacher}" in observer.stages
    before, after = summary["heldout_metrics_before"], summary["heldout_metrics_after"]
    assert 0 < after["divergence"] < 0.9 * before["divergence"]


def test_a_teacher_of_another_vocabulary_is_refused(settings):
    """Of as many tokens: the sizes of the heads would not tell."""
    from tiny_model import exchange_tokens, save_tiny_model

    exchange_tokens(save_tiny_model(settings / "teacher"))
    write_rows(settings, "plain")
    with pytest.raises(UserError, match=r"objective.teacher: teacher: has another vocabulary than"):
        run("objective.name=distill", "objective.teacher=teacher", "train.max_steps=1")


@pytest.mark.parametrize("name", ["kto", "reward"])
def test_an_interrupted_run_goes_on_to_the_same_bits(settings, name):
    write_rows(settings, kind_of(name))
    overrides = [f"objective={name}", "train.max_steps=3", "samples.count=0"]
    run(*overrides, "train.output_dir=whole")
    run(*overrides, observer=Recorder(2, interrupt))
    run(*overrides, resume=True)
    files = (settings / folder / "adapter/adapter_model.safetensors" for folder in ("out", "whole"))
    one, two = map(load_file, files)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UserError, match=r"made with .* \(objective\).* change it back to continue"):
        other = "domain" if name == "reward" else "dpo"
        write_rows(settings, kind_of(other))
        run(f"objective={other}", resume=True)


def test_records_of_another_kind_are_told_of(settings):
    with pytest.raises(UserError, match="objective dpo learns from records of 'chosen' and"):
        run("objective=dpo")


def test_the_data_are_shown_with_both_answers(settings):
    write_rows(settings, "pairs")
    training, _ = examine_data(load_config("run.yaml", ["objective=dpo"]))
    assert dict(training.roles) == {"chosen": 32, "rejected": 32}
    assert [sample.origin.rpartition(", ")[2] for sample in training.samples[:2]] == [
        "chosen",
        "rejected",
    ]


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n in OBJECTIVES])
def test_a_shipped_config_is_named_by_its_objective(name):
    config = load_config(name)
    assert objective_of(config.objective).name == name
    assert str(config.train.output_dir) == f"runs/{name}"
