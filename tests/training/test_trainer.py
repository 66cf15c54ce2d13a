import json

import peft
import pytest
import torch
import transformers
from training_helpers import (
    EVAL,
    TRAIN,
    accelerated,
    assert_same_bits,
    lines,
    make_examples,
    make_trainer,
    one_batch,
    saved_steps,
    tiny_llama,
    tiny_lora,
    trainable,
)

from lora_engine import TrainConfig, Trainer
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.render import Example
from lora_engine.errors import UserError
from lora_engine.evaluation.heldout import HeldoutResult, evaluate
from lora_engine.models.attach.accelerate import restore
from lora_engine.objectives.sft import SFT
from lora_engine.training.metrics import StepMetrics


def heldout_loss(model):
    return evaluate(model, [one_batch(EVAL.examples)], SFT()).loss


class Recorder:
    def __init__(self):
        self.calls = []

    def on_start(self, trainer):
        self.calls.append(("start", trainer))

    def on_step(self, metrics):
        self.calls.append(("step", metrics))

    def on_eval(self, step, result):
        self.calls.append(("eval", step, result))

    def on_end(self, result):
        self.calls.append(("end", result))


def test_learns_and_reports(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, callbacks=[recorder], max_steps=40, learning_rate=2e-2, eval_every=20
    )
    result = trainer.fit()
    assert result.heldout_loss_after < 0.8 * result.heldout_loss_before
    assert result.heldout_accuracy_after > result.heldout_accuracy_before
    assert (result.steps, result.stopped) == (40, "finished")
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 41))
    assert result.train_tokens == sum(line["tokens"] for line in steps)
    assert result.tokens_per_second == result.train_tokens / result.train_seconds
    assert [line["learning_rate"] for line in steps] == [trainer.schedule(i) for i in range(1, 41)]
    assert [line["step"] for line in lines(tmp_path) if "heldout_loss" in line] == [0, 20, 40]
    summary = json.loads(json.dumps(result.summary()))
    assert summary["heldout_loss_after"] == result.heldout_loss_after
    events = [call[0] for call in recorder.calls]
    assert events == ["start", "eval", *["step"] * 20, "eval", *["step"] * 20, "eval", "end"]
    assert recorder.calls[0][1] is trainer
    assert isinstance(recorder.calls[2][1], StepMetrics)
    assert isinstance(recorder.calls[1][2], HeldoutResult)
    assert recorder.calls[-1][1] is result


def test_records_need_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="train_data is not tokenised yet: give the trainer a tok"):
        make_trainer(tmp_path, train=[{"text": "a"}])


def test_an_epoch_sees_every_example_once(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=None, epochs=2, gradient_accumulation_steps=3)
    result = trainer.fit()
    assert result.train_tokens == 2 * TRAIN.num_tokens
    assert result.steps == trainer.total_steps


def test_adapter_loads_in_peft_with_the_same_logits(tmp_path):
    model = tiny_lora()
    make_trainer(tmp_path, model).fit()
    ids = torch.tensor([EVAL[0].input_ids])
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        assert not torch.equal(tiny_llama()(input_ids=ids).logits, expected)


def test_accelerated_model_trains_alike(tmp_path):
    plain, ours = tiny_lora(), accelerated(tiny_lora())
    expected = make_trainer(tmp_path / "plain", plain, learning_rate=2e-2).fit()
    actual = make_trainer(tmp_path / "ours", ours, learning_rate=2e-2).fit()
    losses, expected_losses = (
        [x["loss"] for x in lines(tmp_path / name) if "loss" in x] for name in ("ours", "plain")
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert actual.heldout_loss_after == pytest.approx(expected.heldout_loss_after, rel=1e-5)
    restore(ours)
    loaded = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path / "ours" / "adapter", is_trainable=True
    )
    assert_same_bits(trainable(loaded), trainable(ours))


def test_full_model_is_saved_whole(tmp_path):
    model = tiny_llama()
    make_trainer(tmp_path, model).fit()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same_bits(loaded.state_dict(), model.state_dict())
    assert heldout_loss(model) < heldout_loss(tiny_llama())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_parameters_own_their_storage_afterwards(tmp_path):
    model = tiny_lora()
    make_trainer(tmp_path, model).fit()
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
        assert parameter.grad is None


def test_training_mode_is_restored(tmp_path):
    model = tiny_lora()
    model.eval()
    model.get_base_model().lm_head.train()
    modes = {name: module.training for name, module in model.named_modules()}
    seen = []

    class Look:
        def on_step(self, metrics):
            seen.append(model.training)

    make_trainer(tmp_path, model, callbacks=[Look()], max_steps=2).fit()
    assert seen == [True, True]
    assert {name: module.training for name, module in model.named_modules()} == modes


def diverging(folder, max_steps=9, **config):
    """Learns at first; then the large constant rate makes it worse again, step 6 being the best.

    Much later the losses are chaotic: rounding decides them.
    """
    return make_trainer(
        folder,
        max_steps=max_steps,
        learning_rate=0.1,
        schedule="constant",
        max_grad_norm=None,
        eval_every=1,
        **config,
    )


def test_best_weights_remain(tmp_path):
    trainer = diverging(tmp_path, keep_checkpoints=1)
    result = trainer.fit()
    measured = {x["step"]: x["heldout_loss"] for x in lines(tmp_path) if "heldout_loss" in x}
    assert result.best_step == min(measured, key=measured.get)
    assert 0 < result.best_step < 9, "the test needs a run that gets worse again"
    assert result.heldout_loss_after == measured[result.best_step]
    assert heldout_loss(trainer.model) == pytest.approx(result.heldout_loss_after, rel=1e-5)
    assert saved_steps(tmp_path) == [result.best_step, 9]


def test_last_weights_remain(tmp_path):
    trainer = diverging(tmp_path, final_weights="last")
    result = trainer.fit()
    measured = {x["step"]: x["heldout_loss"] for x in lines(tmp_path) if "heldout_loss" in x}
    assert result.heldout_loss_after == measured[9] > measured[result.best_step]
    assert heldout_loss(trainer.model) == pytest.approx(measured[9], rel=1e-5)


def test_early_stopping(tmp_path):
    result = diverging(tmp_path, early_stopping_patience=2).fit()
    assert result.stopped == "early_stopping"
    assert result.steps == result.best_step + 2 < 9
    again = diverging(tmp_path, early_stopping_patience=2).fit(resume=True)
    assert (again.stopped, again.steps) == ("early_stopping", result.steps)


def test_extending_a_run_that_stopped_early(tmp_path, caplog):
    stopped = diverging(tmp_path, early_stopping_patience=2).fit()
    again = diverging(tmp_path, max_steps=12, early_stopping_patience=2).fit(resume=True)
    assert again.steps == stopped.steps
    assert "does so again: raise early_stopping_patience above 2 to go on" in caplog.text
    caplog.clear()
    longer = diverging(tmp_path, max_steps=12, early_stopping_patience=3).fit(resume=True)
    assert longer.steps == stopped.steps + 1
    assert "early" not in caplog.text


def test_without_held_out_data(tmp_path):
    result = make_trainer(tmp_path, held_out=None).fit()
    assert result.heldout_loss_before is None
    assert result.heldout_loss_after is None
    assert result.best_step is None
    assert saved_steps(tmp_path) == [0, 6]


def test_keeps_the_newest_checkpoints(tmp_path):
    make_trainer(tmp_path, held_out=None, save_every=1, keep_checkpoints=3).fit()
    assert saved_steps(tmp_path) == [4, 5, 6]


def test_data_without_examples(tmp_path):
    with pytest.raises(UserError, match="train_data has no examples"):
        make_trainer(tmp_path, train=TokenizedDataset([]))


def test_max_length_is_for_data_that_are_not_tokenised_yet(tmp_path):
    with pytest.raises(UserError, match="max_length has no effect on train_data"):
        make_trainer(tmp_path, max_length=8)


def test_model_without_trainable_parameters(tmp_path):
    trainer = make_trainer(tmp_path / "run", tiny_llama().requires_grad_(False))
    with pytest.raises(UserError, match="no trainable parameters"):
        trainer.fit()
    assert not (tmp_path / "run").exists()


def test_micro_batches_without_targets_do_not_break_training(tmp_path):
    idle = [Example([1, 2, 3], [False] * 3, f"idle:{i}") for i in range(4)]
    data = TokenizedDataset([*make_examples(4), *idle])
    result = make_trainer(tmp_path, train=data, tokens_per_batch=3, max_steps=8).fit()
    assert result.steps == 8
    assert 0 in [x["supervised_tokens"] for x in lines(tmp_path) if "loss" in x]


def test_seed_decides_order_and_dropout(tmp_path):
    def losses(name, seed):
        make_trainer(tmp_path / name, tiny_lora(dropout=0.3), seed=seed).fit()
        return [x["loss"] for x in lines(tmp_path / name) if "loss" in x]

    assert losses("a", 1) == losses("b", 1)
    assert losses("c", 2) != losses("d", 1)


def test_adapter_can_be_saved_while_training(tmp_path):
    model = tiny_lora()

    class Save:
        def on_eval(self, step, result):
            model.save_pretrained(tmp_path / f"at-{step}")
            self.weights = trainable(model)

    make_trainer(tmp_path / "run", model, callbacks=[save := Save()]).fit()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "at-6", is_trainable=True)
    assert_same_bits(trainable(loaded), save.weights)


def test_arguments_in_each_others_place_are_refused_in_one_line(tmp_path):
    config, model = TrainConfig(output_dir=tmp_path, max_steps=1), tiny_lora()
    order = "the order is model, tokenizer, train_data, eval_data, config$"
    with pytest.raises(UserError, match=f"^Trainer: model is NoneType, expected a model .*{order}"):
        Trainer(None, model, TRAIN, None, config)
    with pytest.raises(UserError, match=f"^Trainer: tokenizer is PeftModel.*{order}"):
        Trainer(model, model, TRAIN, None, config)
    with pytest.raises(UserError, match=rf"^Trainer: config is dict, .*\.TrainConfig; {order}"):
        Trainer(model, None, TRAIN, None, {"max_steps": 1})
