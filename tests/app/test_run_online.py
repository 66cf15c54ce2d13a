"""Runs of a configuration that learn from what the model writes, and what is said of mistakes."""

import json

import pytest
import torch
from finetune_runs import Recorder, interrupt, read_metrics, run
from safetensors.torch import load_file, save_file
from tiny_model import exchange_tokens, save_tiny_model

from lora_engine.app.config import load_config
from lora_engine.app.config_yaml import shipped_configs
from lora_engine.app.finetune import examine_data
from lora_engine.app.objectives import ONLINE, objective_of
from lora_engine.app.reward_model import made_rewards
from lora_engine.errors import UserError
from lora_engine.objectives import GRPO, PPO
from lora_engine.testing import byte_tokenizer
from lora_engine.training.online.named import rewards_of

REWARDS = """
def vowels(completions):
    return [sum(letter in "aeiou" for letter in text) / 6 for text in completions]

def lengths(completions):
    return [1 + len(text) / 6 for text in completions]
"""
SECTIONS = """
objective: {name}
rewards: [{{reward: "judges.py:vowels", weight: 2}}, {{reward: format, pattern: '[a-z]*'}}]
rollout: {{prompts: 4, generations: {generations}, max_new_tokens: 6}}
"""


@pytest.fixture
def online(settings):
    """A folder with prompts, a reward and run.yaml; a function that names the objective."""
    rows = [{"prompt": f"double {i}:", "answer": f" {i}{i}"} for i in range(40)]
    (settings / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (settings / "judges.py").write_text(REWARDS)
    config = settings / "run.yaml"
    before = config.read_text()

    def named(name):
        generations = 4 if name == "grpo" else 1
        config.write_text(before + SECTIONS.format(name=name, generations=generations))
        return settings

    return named


@pytest.mark.parametrize("name", list(ONLINE))
def test_a_run_tells_of_its_rewards(online, name):
    folder = online(name)
    summary = run("train.max_steps=3", "samples.count=1").summary
    assert summary["objective"] == name
    assert summary["heldout_accuracy_after"] is None
    before, after = summary["heldout_metrics_before"], summary["heldout_metrics_after"]
    assert before.keys() == after.keys() >= {"reward", "rewards/vowels/mean", "rewards/format/mean"}
    assert summary["heldout_loss_before"] == -before["reward"]
    steps = [line for line in read_metrics(folder / "out") if "loss" in line]
    own = {"reward", "entropy", "rollout_seconds", "clip_ratio/region_mean"}
    own |= {"frac_reward_zero_std"} if name == "grpo" else {"kl", "value_loss"}
    assert all(own <= step.keys() for step in steps)
    page = (folder / "out/report.html").read_text()
    assert '<h2 id="completions">' in page and "first round" in page and "round 3" in page
    assert "Rewards/vowels" not in page and "rewards/vowels/mean" in page
    assert "Token accuracy" not in page and "Held-out loss" not in page
    assert "held-out reward" in (folder / "out/adapter/README.md").read_text()
    assert (folder / "out/completions.jsonl").is_file()
    (sample,) = summary["samples"]
    assert sample["reference"].strip() and sample["prompt"].startswith("double")


def test_an_interrupted_run_goes_on_to_the_same_completions(online):
    folder = online("ppo")
    overrides = ["train.max_steps=4", "samples.count=0", "rollout.passes=2"]
    run(*overrides, "train.output_dir=whole")
    run(*overrides, observer=Recorder(3, interrupt))
    run(*overrides, resume=True)
    one, two = ((folder / part / "completions.jsonl").read_text() for part in ("out", "whole"))
    assert one == two
    weights = [folder / part / "adapter/adapter_model.safetensors" for part in ("out", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_of_ppo_goes_on_with_the_values_of_another(online):
    folder = online("ppo")
    last = ["samples.count=0", "train.final_weights=last", "rewards=['judges.py:lengths']"]
    run("train.max_steps=3", "train.output_dir=first", *last)
    config = folder / "run.yaml"
    config.write_text(config.read_text().replace("lora: {r: 4, alpha: 8}\n", ""))
    run("model.adapter=first", "train.max_steps=1", "train.learning_rate=1e-9", *last)
    kept = [
        load_file(folder / part / "adapter/value_head.safetensors") for part in ("first", "out")
    ]
    assert kept[0]["v_head.summary.weight"].abs().max() > 1e-4
    for name, tensor in kept[0].items():
        torch.testing.assert_close(kept[1][name], tensor, rtol=0, atol=1e-6)


def test_the_data_are_shown(online):
    online("grpo")
    training, heldout = examine_data(load_config("run.yaml"))
    assert dict(training.roles) == {"prompt": 32}
    assert (training.num_targets, heldout.num_examples) == (0, 8)


def test_a_reward_model_judges(online, settings):
    pairs = [{"prompt": f"double {i}:", "chosen": f" {i}{i}", "rejected": " no"} for i in range(20)]
    (settings / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run("objective=reward", "data.train=pairs.jsonl", "train.output_dir=judge", "samples.count=0")
    folder = online("grpo")
    overrides = ["rewards=[{reward: judge, weight: 0.5}]", "train.max_steps=1", "samples.count=0"]
    run(*overrides)
    lines = [json.loads(line) for line in (folder / "out/completions.jsonl").open()]
    values = {line["rewards"]["judge"] for line in lines}
    assert len(values) > 3
    assert all(line["reward"] == 0.5 * line["rewards"]["judge"] for line in lines)
    (judge,) = made_rewards(["judge"], byte_tokenizer(), "cpu")
    assert rewards_of([judge])[0].positions == 512


def test_a_broken_reward_model_is_one_line(online, settings, tmp_path):
    """Or one of another model: none of them judges with numbers that mean nothing."""
    pairs = [{"prompt": f"double {i}:", "chosen": f" {i}{i}", "rejected": " no"} for i in range(20)]
    (settings / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    run("objective=reward", "data.train=pairs.jsonl", "train.output_dir=judge", "samples.count=0")
    folder = online("grpo")
    weights, about = (
        folder / "judge/adapter" / name
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    whole, tensors, said = weights.read_bytes(), load_file(weights), about.read_text()
    (head,) = (name for name in tensors if "score" in name)
    part = next(name for name in tensors if "lora_A" in name)

    def without(name):
        save_file({n: x for n, x in tensors.items() if n != name}, weights)

    def another(**config):
        save_tiny_model(tmp_path / "other", initializer_range=0.1, **config)
        return tmp_path / "other"

    def other_tokens():
        exchange_tokens(another())
        (folder / "judge/adapter/base.json").unlink()

    tries = {
        "cannot be read, get the complete file": lambda: weights.write_bytes(whole[:-9]),
        "has no adapter_model.safetensors": weights.unlink,
        "judge has no scalar head; get the complete adapter": lambda: without(head),
        "": lambda: without(part),
        "holds values that are not finite": lambda: save_file(
            {**tensors, head: tensors[head] * torch.nan}, weights
        ),
        "is not JSON": lambda: about.write_text("{"),
        "is not the adapter of a reward model": lambda: about.write_text(
            said.replace("SEQ_CLS", "CAUSAL_LM")
        ),
        "is trained on tiny, whose weight files had other contents; give that": another,
        "has another vocabulary than the model that is trained, whose token 70 is": other_tokens,
    }
    for message, spoil in tries.items():
        spoil()
        base = ", base: other" if spoil in (another, other_tokens) else ""
        overrides = [f"rewards=[{{reward: judge{base}}}]", "train.max_steps=1", "samples.count=0"]
        with pytest.raises(UserError) as caught:
            run(*overrides)
        assert message in str(caught.value) and "judge" in str(caught.value), message
        assert "\n" not in str(caught.value)
        weights.write_bytes(whole)
        about.write_text(said)
    assert not (folder / "out").exists(), "nothing was begun"


def test_a_run_is_resumed_with_the_same_settings_of_a_reward(online):
    online("grpo")
    last = ["train.max_steps=1", "samples.count=0"]
    run("rewards=[{reward: regex, pattern: a}]", *last)
    with pytest.raises(UserError, match=r"made with rewards=.*pattern a.*, now .*pattern b"):
        run("rewards=[{reward: regex, pattern: b}]", *last, resume=True)


WRONG = {
    "no rewards": (["objective=grpo"], "objective: grpo learns from rewards, and there are none"),
    "not online": (["rewards=[json_valid]"], "rewards: objective sft does not learn from rewards"),
    "a rollout": (["rollout.prompts=3"], "rollout: objective sft writes no completions; leave it"),
    "a reward": (
        ["objective=grpo", "rewards=[json_vald]"],
        "rewards[0]: no reward 'json_vald'; did you mean json_valid?",
    ),
    "a folder": (
        ["objective=grpo", "rewards=[runs/none]"],
        "rewards: runs/none: no such folder; give that of a reward model",
    ),
    "a temperature": (
        ["objective.name=grpo", "objective.temperature=0.5", "rewards=[json_valid]"],
        "objective.temperature: is rollout.temperature; set that instead",
    ),
    "an engine": (
        ["objective=grpo", "rewards=[json_valid]", "rollout.engine=vlm"],
        "rollout.engine: expected lora_engine or vllm, got 'vlm'",
    ),
    "no tokens": (
        ["objective=grpo", "rewards=[json_valid]", "rollout.max_new_tokens=0"],
        "rollout.max_new_tokens: expected a whole number from 1 to 1,000,000, got 0",
    ),
    "a weight": (
        ["objective=grpo", "rewards=[{reward: json_valid, weight: 1" + "0" * 400 + "}]"],
        "rewards[0]: weight: expected a number, got 1000",
    ),
    "a switch": (
        ["objective.name=ppo", "objective.whiten=3", "rewards=[json_valid]"],
        "objective.whiten: expected true or false, got 3",
    ),
    "all weights": (
        ["objective=ppo", "rewards=[json_valid]", "lora="],
        "lora: objective ppo trains an adapter here; give lora",
    ),
    "a key": (
        ["objective=grpo", "rewards=[json_valid]", "rollout.generation=4"],
        "rollout.generation: unknown key; did you mean rollout.generations?",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_mistake_is_one_line(settings, name):
    overrides, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        load_config("run.yaml", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_names():
    assert objective_of({"name": "grpo", "loss_type": "gspo"}) == GRPO(loss_type="gspo")
    assert objective_of({"name": "ppo", "whiten": False}) == PPO(whiten=False)


@pytest.mark.parametrize("name", list(ONLINE))
def test_a_shipped_config_is_named_by_its_objective(name):
    assert name in shipped_configs()
    config = load_config(name)
    assert objective_of(config.objective).name == name
    assert str(config.train.output_dir) == f"runs/{name}"
