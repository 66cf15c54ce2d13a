"""TRL's GRPOTrainer, given the completions that a run of ours wrote, takes the same first step."""

import pytest
from online_runs import PROMPTS, TOKENIZER, online_trainer, vowels, writer
from training_helpers import lines

from lora_engine.objectives.grpo import GRPO

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


class Recorder:
    """What TRL logs of its steps."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Recording(TrainerCallback):
            logged = None

            def on_log(self, *_, logs, **__):
                self.logged = self.logged or dict(logs)

        return Recording()


def their_step(folder, answers, loss_type):
    """TRL's metrics of the step on these completions."""
    waiting = {}
    for answer in answers:
        waiting.setdefault(PROMPTS[answer.prompt]["prompt"], []).append(answer)
    order = list(waiting)

    def given(prompts, trainer):
        own = {prompt: list(group) for prompt, group in waiting.items()}
        taken = [own[prompt].pop(0) for prompt in prompts]
        return {
            "prompt_ids": [TOKENIZER(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [list(one.token_ids) for one in taken],
            "logprobs": [list(one.logprobs) for one in taken],
        }

    def reward(completions, **columns):
        return vowels(completions)

    recorder = Recorder()
    trl.GRPOTrainer(
        model=writer(accelerate=False),
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(answers),
            num_generations=4,
            max_completion_length=6,
            max_steps=1,
            loss_type=loss_type,
            epsilon=0.2,
            epsilon_high=0.28,
            shuffle_dataset=False,
            max_grad_norm=1e9,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in order]),
        processing_class=TOKENIZER,
        rollout_func=given,
        callbacks=[recorder],
    ).train()
    return recorder.logged


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_same_step(tmp_path, loss_type):
    trainer = online_trainer(
        tmp_path / "ours",
        model=writer(accelerate=False),
        objective=GRPO(loss_type=loss_type),
        max_steps=1,
        max_grad_norm=None,
        held_out=None,
    )
    trainer.fit()
    (ours,) = lines(tmp_path / "ours")
    theirs = their_step(tmp_path / "theirs", trainer._train_source._round.answers, loss_type)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6)
    same = {
        *("reward", "reward_std", "frac_reward_zero_std", "entropy"),
        *("completions/mean_length", "completions/min_length", "completions/max_length"),
        *("completions/clipped_ratio", "completions/mean_terminated_length"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    }
    assert same <= ours.keys() & theirs.keys()
    for name in same:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
