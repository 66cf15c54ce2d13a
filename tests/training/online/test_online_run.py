"""Online runs: what is written is rewarded and learned from, and a broken run goes on."""

import math
import multiprocessing
import random
import signal

import numpy as np
import pytest
import torch
from online_runs import (
    PROMPTS,
    TOKENIZER,
    completions,
    killed_in_a_rollout,
    online_trainer,
    vowels,
    writer,
)
from safetensors.torch import load_file
from training_helpers import SignalAtStep, assert_same_bits, lines, trainable
from transformers import AutoModelForCausalLM

import lora_engine
from lora_engine import TrainConfig, Trainer, UserError
from lora_engine.data.dataset import prepare
from lora_engine.data.records import Record
from lora_engine.data.render import Example
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.generation.engine import Completion
from lora_engine.models.load.scalar import VALUE_HEAD_FILE, add_value_head
from lora_engine.objectives.advantages import generalised_advantages
from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.ppo import PPO
from lora_engine.objectives.sft import SFT
from lora_engine.testing import tiny_llama
from lora_engine.training.online.config import RolloutConfig
from lora_engine.training.online.online import Online
from lora_engine.training.online.rewards import Reward
from lora_engine.training.online.rollouts import OwnEngine
from lora_engine.training.online.source import packed_groups
from lora_engine.training.state import Position


def source_of(folder, **settings):
    """The source of a run that has begun, and its model."""
    trainer = online_trainer(folder, **settings)
    source = trainer._train_source
    source.start(None)
    return source, trainer.model


def test_the_reward_rises(tmp_path):
    result = online_trainer(
        tmp_path, max_steps=6, learning_rate=0.03, rollout={"prompts": 8}, preflight=True
    ).fit()
    rewards = [line["reward"] for line in lines(tmp_path) if "reward" in line]
    assert len(rewards) == 6
    assert rewards[0] < 0.2
    assert min(rewards[-2:]) > 0.9
    before, after = result.heldout_metrics_before, result.heldout_metrics_after
    assert after["reward"] > before["reward"] + 0.2
    assert result.heldout_loss_after == -after["reward"]
    assert result.heldout_accuracy_after is None


def test_a_run_whose_held_out_reward_stays_keeps_what_it_learned(tmp_path):
    def of_training_prompts(prompts, completions):
        held_out = [record["prompt"] for record in PROMPTS[8:]]
        found = zip(prompts, vowels(completions), strict=True)
        return [0.0 if prompt in held_out else reward for prompt, reward in found]

    trainer = online_trainer(tmp_path, rewards=[of_training_prompts], eval_every=1)
    before = trainable(trainer.model)
    result = trainer.fit()
    assert result.heldout_metrics_before["reward"] == result.heldout_metrics_after["reward"] == 0
    assert result.best_step == result.steps == 4
    after = trainable(trainer.model)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_a_step_tells_of_its_rewards_and_completions(tmp_path):
    online_trainer(tmp_path, max_steps=1).fit()
    written = [one for one in completions(tmp_path) if one.get("round") == 0]
    assert [one["prompt"] for one in written[:4]] == [written[0]["prompt"]] * 4
    assert len(written) == 16
    groups = [written[first : first + 4] for first in range(0, 16, 4)]
    for one in written:
        assert one["reward"] == one["rewards"]["vowels"] == vowels([one["completion"]])[0]
    (step,) = (line for line in lines(tmp_path) if "reward" in line)
    rewards = torch.tensor([one["reward"] for one in written]).view(4, 4)
    assert step["reward"] == pytest.approx(rewards.mean().item())
    assert step["rewards/vowels/mean"] == pytest.approx(rewards.mean().item())
    assert step["reward_std"] == pytest.approx(rewards.std().item())
    assert (
        step["frac_reward_zero_std"] == sum(len({a["reward"] for a in g}) == 1 for g in groups) / 4
    )
    lengths = [one["tokens"] for one in written]
    assert step["completions/mean_length"] == pytest.approx(sum(lengths) / 16)
    cut = [one["finish"] == "length" for one in written]
    assert step["completions/clipped_ratio"] == pytest.approx(sum(cut) / 16)
    assert step["rollout_seconds"] > 0
    for group in groups:
        own = torch.tensor([one["reward"] for one in group])
        expected = (own - own.mean()) / (own.std() + 1e-4)
        torch.testing.assert_close(torch.tensor([one["advantage"] for one in group]), expected)
    heldout = [one for one in completions(tmp_path) if one.get("heldout")]
    assert [(one["step"], one["prompt"]) for one in heldout] == [
        (step, record["prompt"]) for step in (0, 1) for record in PROMPTS[8:]
    ]


def test_what_was_sampled_has_the_trainers_log_probabilities(tmp_path):
    source, model = source_of(tmp_path)
    source.share_prefixes = True
    batches, _ = source.take(Position(), 1)
    for batch in batches:
        assert batch.parents is not None, "the prompt of a group is computed once"
        with torch.no_grad():
            scores = target_scores(model, batch, GRPO())
        torch.testing.assert_close(
            scores.logprobs, batch.columns["old_logprobs"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_first_gradient_is_that_of_reinforce(tmp_path, loss_type):
    """r is 1, so that ∇ loss = −Σ A ∇ log p over the divisor of the loss."""
    model = writer(accelerate=False)
    trainer = online_trainer(
        tmp_path,
        model=model,
        objective=GRPO(loss_type=loss_type),
        max_steps=1,
        learning_rate=1e-9,
        max_grad_norm=None,
        held_out=None,
    )
    trainer.fit()
    (step,) = lines(tmp_path)
    written = trainer._train_source._round.answers
    for parameter in model.parameters():
        parameter.grad = None
    total = torch.zeros(())
    tokens = sum(len(one.token_ids) for one in written)
    for one in written:
        asked = TOKENIZER(PROMPTS[one.prompt]["prompt"])["input_ids"]
        ids = asked + list(one.token_ids)
        logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[len(asked) - 1 :, 0]
        divisor = {"grpo": len(own) * 16, "dapo": tokens, "dr_grpo": 16 * 6}[loss_type]
        total = total - one.columns["advantages"] * own.sum() / divisor
    total.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
    assert step["grad_norm"] == pytest.approx(torch.stack(squares).sum().sqrt().item(), rel=1e-3)


def test_each_pass_learns_from_every_group_once(tmp_path):
    source, _ = source_of(tmp_path, rollout={"minibatches": 2, "passes": 2})
    position, seen = Position(), []
    for _ in range(4):
        batches, position = source.take(position, 1)
        seen.append(sorted(origin for batch in batches for origin in batch.origins))
    assert position == Position(0, 4)
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3])
    assert len(set(seen[0] + seen[1])) == 4
    assert all(len(part) == 8 for part in seen)
    assert seen[0] != seen[2], "each pass shuffles anew"
    assert source.metrics(Position(0, 1))["reward"] >= 0
    assert source.metrics(Position(0, 2)) == {}


def test_packing_changes_nothing(tmp_path):
    models = []
    for name, tokens, shares in (("one", 4096, True), ("many", 32, False)):
        model = writer()
        online_trainer(
            tmp_path / name,
            model=model,
            max_steps=2,
            tokens_per_batch=tokens,
            share_prefixes=shares,
            final_weights="last",
        ).fit()
        models.append(trainable(model))
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], rtol=1e-3, atol=2e-4)
    one, many = (lines(tmp_path / name) for name in ("one", "many"))
    assert one[1]["grad_norm"] == pytest.approx(many[1]["grad_norm"], rel=1e-3)


def test_groups_are_packed_in_order_and_split_where_they_do_not_fit():
    groups = [[Example([0] * 6, [False] * 6)] * 3, [Example([0] * 4, [False] * 4)]]
    shared = packed_groups(groups, [4, 2], 10, share_prefixes=True)
    assert [len(batch) for batch in shared] == [3, 1]
    alone = packed_groups(groups, [4, 2], 10, share_prefixes=False)
    assert [len(batch) for batch in alone] == [1, 1, 2]
    tiny = packed_groups(groups, [4, 2], 3, share_prefixes=True)
    assert [len(batch) for batch in tiny] == [1, 1, 1, 1]


def test_truncated_completions_are_masked(tmp_path):
    source, _ = source_of(tmp_path, rollout={"mask_truncated": True, "max_new_tokens": 1})
    (batch,), _ = source.take(Position(), 1)
    assert batch.num_examples == 16
    lengths = [one["finish"] for one in completions(tmp_path)]
    assert [count > 0 for count in batch.target_counts] != [True] * 16
    assert sum(count > 0 for count in batch.target_counts) == lengths.count("stop")


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "reinforce", "bnpo"])
def test_completions_that_are_empty_or_never_end(tmp_path, monkeypatch, loss_type):
    """Of each group: no token at all, the end alone, and two that were cut. One step from the
    policy that wrote them is minus the advantage of each token, divided as the loss type does."""
    end = TOKENIZER.eos_token_id

    def run(self, requests, check):
        def of(ids, text, finish):
            return Completion(ids, (-1.0,) * len(ids), text, finish)

        return [
            [
                of((), "", "stop"),
                of((end,), "", "stop"),
                of((5, 6, 7, 8, 9, 10), "abcdef", "length"),
                of((11, 12, 13, 14, 15, 16), "uvwxyz", "length"),
            ]
            for _ in requests
        ]

    monkeypatch.setattr(OwnEngine, "run", run)
    told = []

    def judged(completions, completion_ids):
        told.append((tuple(completions), tuple(map(len, completion_ids))))
        return [0.0, 1.0, 0.5, 0.2] * (len(completions) // 4)

    online_trainer(
        tmp_path,
        objective=GRPO(loss_type=loss_type, sampler_correction="none"),
        rewards=[judged],
        # In a round of one step ratios are 1, whatever the log-probabilities above.
        rollout={"old_logprobs": "trainer"},
        max_steps=1,
        held_out=None,
    ).fit()
    assert told == [(("", "", "abcdef", "uvwxyz") * 4, (0, 1, 6, 6) * 4)]
    (step,) = lines(tmp_path)
    written = completions(tmp_path)
    assert [one["completion"] for one in written[:4]] == ["", "", "abcdef", "uvwxyz"]
    assert [one["finish"] for one in written[:4]] == ["stop", "stop", "length", "length"]
    assert step["completions/clipped_ratio"] == 0.5
    assert step["completions/min_length"] == 0
    assert step["completions/mean_terminated_length"] == 0.5
    assert step["supervised_tokens"] == 4 * 13
    assert step["grad_norm"] > 0
    none, one, first, second = (each["advantage"] for each in written[:4])
    assert none < 0 < one
    tokens = one + 6 * first + 6 * second
    expected = {
        "grpo": -(one + first + second) / 4,
        "dr_grpo": -tokens / (4 * 6),
        "dapo": -tokens / 13,
        "bnpo": -tokens / 13,
    }
    if loss_type in expected:
        assert step["loss"] == pytest.approx(expected[loss_type], rel=1e-4, abs=1e-6)
    else:
        assert math.isfinite(step["loss"])


def test_overlong_completions_lose(tmp_path):
    source, _ = source_of(tmp_path, rollout={"overlong_buffer": 4, "overlong_penalty": 2.0})
    source.take(Position(), 1)
    for one in completions(tmp_path):
        lost = -max(one["tokens"] - 2, 0) / 4
        assert one["rewards"]["overlong"] == lost
        assert one["reward"] == pytest.approx(one["rewards"]["vowels"] + 2 * lost)


def test_dynamic_sampling_goes_on_where_rewards_are_equal(tmp_path):
    def of_even_numbers(prompts, completions):
        even = [int(prompt.split()[1]) % 2 == 0 for prompt in prompts]
        return [float(place) if e else 1.0 for place, e in enumerate(even)]

    source, _ = source_of(
        tmp_path,
        rewards=[of_even_numbers],
        rollout={"dynamic_sampling": True, "max_resampled": 8},
    )
    batches, _ = source.take(Position(), 1)
    learned = [one for one in completions(tmp_path) if not one.get("left_out")]
    assert len(learned) == 16 == sum(batch.num_examples for batch in batches)
    assert all(int(one["prompt"].split()[1]) % 2 == 0 for one in learned)
    left_out = [one for one in completions(tmp_path) if one.get("left_out")]
    assert left_out
    assert all(int(one["prompt"].split()[1]) % 2 for one in left_out)
    share = source.metrics(Position(0, 1))["frac_reward_zero_std"]
    assert share == pytest.approx(len(left_out) / (16 + len(left_out)))


def test_the_trainers_log_probabilities_correct_the_samplers(tmp_path):
    source, model = source_of(tmp_path, rollout={"old_logprobs": "trainer", "passes": 2})
    (batch,), _ = source.take(Position(), 1)
    with torch.no_grad():
        scores = target_scores(model, batch, GRPO())
    torch.testing.assert_close(scores.logprobs, batch.columns["old_logprobs"])
    torch.testing.assert_close(
        batch.columns["sampler_logprobs"], batch.columns["old_logprobs"], rtol=1e-5, atol=1e-5
    )
    once, _ = source_of(tmp_path / "once", rollout={"old_logprobs": "trainer"})
    (batch,), _ = once.take(Position(), 1)
    assert "old_logprobs" not in batch.columns
    assert "sampler_logprobs" in batch.columns


def timeless(folder):
    """The lines of metrics.jsonl without times and memory."""
    left_out = ("tokens_per_second", "peak_memory_bytes", "rollout_seconds")
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines(folder)]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path, stop_at):
    """In the middle of a round, and at its end."""

    def fit(name, callbacks=(), resume=False):
        model = writer()
        trainer = online_trainer(
            tmp_path / name,
            model=model,
            callbacks=callbacks,
            max_steps=9,
            rollout={"minibatches": 2, "passes": 2, "dynamic_sampling": True},
            final_weights="last",
            eval_every=3,
        )
        return trainer.fit(resume=resume), model

    _, expected = fit("straight")
    interrupted, _ = fit("broken", [SignalAtStep(stop_at)])
    assert (interrupted.stopped, interrupted.steps) == ("interrupted", stop_at)
    _, model = fit("broken", resume=True)
    assert_same_bits(trainable(model), trainable(expected))
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "straight")
    assert completions(tmp_path / "broken") == completions(tmp_path / "straight")


@pytest.mark.slow
def test_killed_in_a_rollout_and_resumed_is_bitwise_the_same(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    killed = processes.Process(target=killed_in_a_rollout, args=(tmp_path / "killed", 2))
    killed.start()
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL

    def fit(name, resume=False):
        model = writer()
        settings = {"rollout": {"passes": 2}, "save_every": 1, "held_out": None}
        result = online_trainer(tmp_path / name, model=model, **settings).fit(resume=resume)
        assert result.steps == 4
        return trainable(model)

    assert len(lines(tmp_path / "killed")) == 2
    assert_same_bits(fit("killed", resume=True), fit("straight"))
    assert completions(tmp_path / "killed") == completions(tmp_path / "straight")


def raises(count):
    raise RuntimeError("the judge is away")


FAULTS = {
    "raises": (raises, "raises RuntimeError: the judge is away"),
    "nan": (lambda count: [math.nan] * count, "returns nan for the completion"),
    "too few": (lambda count: [0.5], "returns 1 numbers for 16 completions"),
    "no number": (lambda count: ["good"] * count, "returns 'good' for the completion"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_reward_that_fails_loses_nothing(tmp_path, name):
    """A run that a reward ends in its third round goes on to what it is without the fault."""
    answer, said = FAULTS[name]
    rounds = []

    def judge(completions):
        if len(completions) == 16:  # of a round, not of the held-out prompts
            rounds.append(len(completions))
            if rounds == [16] * 3:
                return answer(16)
        return vowels(completions)

    def fit(name, resume=False):
        model = writer()
        trainer = online_trainer(
            tmp_path / name, model=model, rewards=[judge], final_weights="last"
        )
        trainer.fit(resume=resume)
        return trainable(model)

    with pytest.raises(UserError, match=f"reward judge: {said}") as caught:
        fit("broken")
    assert "\n" not in str(caught.value)
    assert len(lines(tmp_path / "broken")) == 3, "the first evaluation and two steps"
    resumed = fit("broken", resume=True)
    assert len(rounds) == 5, "only the round that failed was written again"
    assert_same_bits(resumed, fit("straight"))
    assert completions(tmp_path / "broken") == completions(tmp_path / "straight")


@pytest.mark.parametrize("failing", ["a round", "an evaluation"])
def test_a_reward_that_fails_after_drawing_random_numbers_loses_none(tmp_path, failing):
    """The call that failed is made again with the numbers that it had."""
    size = {"a round": 16, "an evaluation": 2}[failing]

    def fit(name, fails=False, resume=False):
        calls = []

        def judge(completions):
            calls.append(len(completions))
            noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            if fails and calls.count(size) == 2:
                raise RuntimeError
            return [noise + reward for reward in vowels(completions)]

        trainer = online_trainer(tmp_path / name, rewards=[judge], eval_every=2)
        return trainer.fit(resume=resume)

    with pytest.raises(UserError, match="raises RuntimeError"):
        fit("broken", fails=True)
    fit("broken", resume=True)
    fit("straight")
    assert completions(tmp_path / "broken") == completions(tmp_path / "straight")


def test_what_dynamic_sampling_leaves_out_is_written_down_however_often_it_is_written(tmp_path):
    """Of one prompt, which is taken again and again, completions of the same tokens."""
    source, _ = source_of(
        tmp_path,
        train=PROMPTS[:1],
        rewards=[lambda completions: [1.0] * len(completions)],
        rollout={"prompts": 2, "dynamic_sampling": True, "max_resampled": 2, "top_k": 1},
    )
    source.take(Position(), 1)
    assert len(completions(tmp_path)) == 3 * 2 * 4


def test_masked_completions_count_alike_in_every_micro_batch(tmp_path):
    """Of a loss per sequence, also where a micro-batch has none but masked ones."""
    steps = {}
    for tokens in (4096, 24):
        folder = tmp_path / str(tokens)
        online_trainer(
            folder,
            objective=GRPO(loss_type="grpo"),
            rollout={"mask_truncated": True, "max_new_tokens": 2},
            rewards=[lambda completions: [float(i % 3) for i in range(len(completions))]],
            tokens_per_batch=tokens,
            max_steps=1,
            share_prefixes=False,
            held_out=None,
        ).fit()
        (steps[tokens],) = lines(folder)
        masked = [one["finish"] == "length" for one in completions(folder)]
        assert True in masked and False in masked
    for name in ("loss", "grad_norm", "entropy"):
        assert steps[24][name] == pytest.approx(steps[4096][name], rel=1e-4), name


def test_a_column_that_one_record_has_is_none_of_the_others(tmp_path):
    """Of rounds and held-out prompts without it too."""
    seen = []

    def judge(completions, hint):
        seen.extend(hint)
        return vowels(completions)

    train = [{"prompt": "a", "hint": "b"}, *({"prompt": f"number {i} is"} for i in range(20))]
    online_trainer(tmp_path, train=train, rewards=[judge], rollout={"prompts": 2}).fit()
    assert None in seen and set(seen) <= {None, "b"}


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_round_of_which_all_is_masked_changes_nothing(tmp_path, name):
    model = writer(value_head=name == "ppo")
    before = trainable(model)
    online_trainer(
        tmp_path,
        model=model,
        objective=GRPO(loss_type="grpo") if name == "grpo" else PPO(),
        rollout={"mask_truncated": True, "stop": (), "max_new_tokens": 1, "top_k": 1},
        max_steps=1,
        held_out=None,
    ).fit()
    assert {one["finish"] for one in completions(tmp_path)} == {"length"}
    assert_same_bits(trainable(model), before)


def test_a_run_is_resumed_with_the_same_rewards(tmp_path):
    online_trainer(tmp_path, max_steps=1).fit()
    with pytest.raises(UserError, match=r"made with rollout.generations=4, now .*=2"):
        online_trainer(tmp_path, max_steps=2, rollout={"generations": 2}).fit(resume=True)
    other = [{"reward": "json_valid", "weight": 0.5}]
    with pytest.raises(UserError, match=r"made with rewards=\['vowels × 1'\], now rewards"):
        online_trainer(tmp_path, max_steps=2, rewards=other).fit(resume=True)


def test_a_group_without_rewards_teaches_nothing(tmp_path):
    source, _ = source_of(tmp_path, rewards=[lambda completions: [None] * len(completions)])
    (batch,), _ = source.take(Position(), 1)
    assert batch.columns["advantages"].count_nonzero() == 0
    assert "reward" not in source.metrics(Position(0, 1))
    said = "no reward says anything of the completions"
    with pytest.raises(UserError, match=said):
        online_trainer(
            tmp_path / "run", rewards=[lambda completions: [None] * len(completions)]
        ).fit()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"objective": SFT()}, "objective sft does not learn from rewards; give GRPO or PPO"),
        ({"gradient_accumulation_steps": 2}, "set rollout.minibatches"),
        ({"rollout": {"generations": 1}}, "set rollout.generations to 2 or more"),
        ({"rollout": {"max_new_tokens": 510}}, "are more than the 512 that the model was made for"),
        (
            {"rewards": [Reward("judge", vowels, positions=15)]},
            "are more than the 15 that the model of the reward judge was made for; give a smaller",
        ),
        ({"train": [{"prompt": "", "answer": "a"}]}, "the prompt is empty; give some text"),
        ({"train": [{"text": "a text"}]}, "is read as 'text', expected 'prompt' and no answer"),
        ({"train": [Record("prompt", prompt="")]}, "the prompt is empty; give some text"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        online_trainer(tmp_path, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"engine": "vllm", "temperature": 0.7, "top_p": 0.9},
            "engine vllm tells log-probabilities before the temperature or after top_k, top_p and",
        ),
        ({"minibatches": 9}, "minibatches 9 must be at most prompts 8"),
        ({"overlong_buffer": 65}, "overlong_buffer 65 must be at most max_new_tokens 64"),
        ({"dynamic_sampling": True, "generations": 1}, "dynamic_sampling compares completions"),
    ],
)
def test_settings_that_do_not_fit_each_other(settings, said):
    with pytest.raises(ValueError, match=said):
        RolloutConfig(**settings)


def test_one_adapter_is_trained(tmp_path):
    model = writer(accelerate=False)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="an online run trains one adapter, and default, other"):
        online_trainer(tmp_path, model=model)


def test_ppo_measures_before_it_learns(tmp_path):
    """Values, returns and the reference of each token, by transformers' own forward."""
    model = writer(accelerate=False, value_head=True)
    objective = PPO(kl_weight=0.3, discount=0.9, trace=0.8, whiten=False)
    source, _ = source_of(tmp_path, model=model, objective=objective)
    source.take(Position(), 1)
    moved = []
    for one in source._round.answers:
        asked = TOKENIZER(PROMPTS[one.prompt]["prompt"])["input_ids"]
        ids = torch.tensor([asked + list(one.token_ids)])
        places = slice(len(asked) - 1, -1)

        def logprobs(ids=ids, places=places, asked=asked):
            every = model(ids).logits[0, :-1].log_softmax(-1)
            return every.gather(1, ids[0, 1:, None])[places.start :, 0]

        with torch.no_grad():
            hidden = model.get_base_model().model(ids).last_hidden_state[0, places]
            values = model.get_base_model().value_head(hidden)[:, 0]
            own = logprobs()
            with model.disable_adapter():
                kl = own - logprobs()
        gained = -0.3 * kl
        gained[-1] += one.reward
        advantages, returns = generalised_advantages(gained, values, discount=0.9, trace=0.8)
        for name, expected in {
            "old_logprobs": own,
            "old_values": values,
            "advantages": advantages,
            "returns": returns,
        }.items():
            found = torch.tensor(one.columns[name])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        moved.append(kl.sum().item())
    assert source.metrics(Position(0, 1))["kl"] == pytest.approx(sum(moved) / 16, rel=1e-3)
    assert min(map(abs, moved)) > 0
    free, _ = source_of(tmp_path / "free", model=model, objective=PPO(kl_weight=0))
    free.take(Position(), 1)
    assert "kl" not in free.metrics(Position(0, 1))


def test_ppo_raises_the_reward_and_learns_values(tmp_path):
    model = writer(accelerate=False)
    add_value_head(model)
    lora_engine.accelerate(model)
    online_trainer(
        tmp_path,
        model=model,
        objective=PPO(kl_weight=0.0, value_weight=1.0),
        max_steps=8,
        learning_rate=0.03,
        rollout={"prompts": 8, "generations": 4},
        held_out=None,
        preflight=True,
    ).fit()
    steps = lines(tmp_path)
    assert steps[0]["reward"] < 0.2
    assert steps[-1]["reward"] > 0.8
    head = model.get_base_model().value_head
    assert head.weight.abs().max() > 0
    saved = load_file(tmp_path / "adapter" / VALUE_HEAD_FILE)
    assert torch.equal(saved["v_head.summary.weight"], head.weight)
    assert torch.equal(saved["v_head.summary.bias"], head.bias)


def test_the_value_head_of_a_whole_model_is_no_part_of_its_weights(tmp_path):
    model = tiny_llama(vocab_size=len(TOKENIZER))
    add_value_head(model)
    online_trainer(tmp_path, model=model, objective=PPO(kl_weight=0.0), max_steps=1).fit()
    loaded, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "adapter", output_loading_info=True
    )
    assert not told["unexpected_keys"] and not told["missing_keys"]
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    saved = load_file(tmp_path / "adapter" / VALUE_HEAD_FILE)
    assert torch.equal(saved["v_head.summary.weight"], model.value_head.weight)


def test_a_dataset_with_answers_is_refused(tmp_path):
    data = prepare([{"prompt": "a", "completion": "b"}], TOKENIZER)
    config = TrainConfig(output_dir=tmp_path)
    with pytest.raises(UserError, match="train_data is tokenised for learning from answers"):
        Trainer(writer(), TOKENIZER, data, None, config, objective=GRPO(), online=Online([vowels]))


def test_none_of_a_tied_group_moves_the_loss(tmp_path):
    source, model = source_of(tmp_path, rewards=[lambda completions: [1.0] * len(completions)])
    (batch,), _ = source.take(Position(), 1)
    scores = target_scores(model, batch, GRPO())
    loss = GRPO()(scores, batch).total["policy"]
    assert loss.item() == 0
    assert source.metrics(Position(0, 1))["frac_reward_zero_std"] == 1
