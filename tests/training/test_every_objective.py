"""Every objective on a model: what is no part of the loss changes neither it nor its gradient."""

from dataclasses import replace

import peft
import pytest
import torch
from objective_cases import EVERY, JUDGED, PAIRED, examples_for
from training_helpers import (
    SignalAtStep,
    assert_same_bits,
    lines,
    tiny_llama,
    tiny_lora,
    trainable,
)
from transformers import AutoModelForSequenceClassification

import lora_engine
from lora_engine import TrainConfig, Trainer, UserError
from lora_engine.data.batch import collate, without_shared_prefixes
from lora_engine.data.dataset import TokenizedDataset
from lora_engine.evaluation import batch_loss
from lora_engine.evaluation.batch_loss import target_scores, with_statistics
from lora_engine.evaluation.heldout import evaluate
from lora_engine.models.attach.head import transformers_model
from lora_engine.objectives.base import Loss, Reads, Teacher, settings_of
from lora_engine.objectives.distill import Distill
from lora_engine.objectives.dpo import DPO
from lora_engine.objectives.kto import KTO
from lora_engine.objectives.sft import SFT
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep

# One of each; the others differ in a formula that is tested on numbers.
NAMES = [
    *("domain", "distill", "dpo sigmoid", "orpo", "simpo", "cpo ipo", "reward", "kto"),
    *("grpo dapo", "grpo gspo", "ppo"),
]


def model_for(name, *, accelerate=True, seed=0):
    """With adapters that are not fresh, and the head that the objective reads."""
    if name == "reward":
        config = tiny_llama().config
        config.num_labels, config.pad_token_id = 1, 0
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        kind = peft.TaskType.SEQ_CLS
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type=kind)
        torch.manual_seed(seed + 1)
        model = peft.get_peft_model(model, replace(lora, init_lora_weights=False))
    else:
        model = tiny_lora(init_lora_weights=False)
        if name == "ppo":
            inner = model.get_base_model()
            torch.manual_seed(seed)
            inner.value_head = torch.nn.Linear(32, 1)
    for parameter_name, parameter in model.named_parameters():
        if "value_head" in parameter_name:
            parameter.requires_grad_()
    if accelerate:
        lora_engine.accelerate(model)  # a scalar head runs as transformers has it
    return model


def gradient_of(name, parts, *, accelerate=True, share_prefixes=False):
    """(loss, gradients, norm) of one step over the parts as micro-batches."""
    model = model_for(name, accelerate=accelerate).train()
    step = TrainStep(
        model, EVERY[name], FlatAdamW(FlatParameters(model.named_parameters()), TrainConfig())
    )
    batches = [collate(part, share_prefixes=share_prefixes) for part in parts]
    if share_prefixes and examples_for(name, 1)[0].role in ("chosen", "rejected"):
        assert all(batch.parents is not None for batch in batches)
    result = step(1, batches, 0.0, lambda: None)
    flat = step.optimizer.flat
    gradients = {entry.name: entry.view(flat.grad).clone() for entry in flat.entries}
    assert result.grad_norm > 0
    return result, gradients


@pytest.fixture(scope="module")
def whole():
    """One micro-batch of all, by objective."""
    return {name: gradient_of(name, [examples_for(name, 6, 7)]) for name in NAMES}


def padded_hidden_states(model, batch, rows=None):
    """`packed_hidden_states` of a batch whose sequences are rows of one length, with padding on
    either side that a mask takes out."""
    lengths = batch.cu_seqlens.diff().tolist()
    width = max(lengths) + 3
    before = [place % 3 for place in range(len(lengths))]
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, (first, length) in enumerate(zip(before, lengths, strict=True)):
        mask[row, first : first + length] = True
    ids, positions = torch.full(mask.shape, 7), torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask], positions[mask] = batch.input_ids, batch.position_ids
    output = transformers_model(model).base_model(
        input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False
    )
    hidden = output.last_hidden_state[mask]
    return hidden if rows is None else hidden[rows]


WAYS = {
    "micro-batches": {},
    "shared prefixes": {"share_prefixes": True},
    "transformers' own forward": {"accelerate": False},
    "padding": {},
    "padding, transformers' own forward": {"accelerate": False},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", list(WAYS))
def test_loss_and_gradient_stay(name, way, whole, monkeypatch):
    examples = examples_for(name, 6, 7)
    parts = [examples]
    if way.startswith("padding"):
        monkeypatch.setattr(batch_loss, "packed_hidden_states", padded_hidden_states)
    if way == "micro-batches":
        parts = [examples[:1], examples[1:4], examples[4:]]
    result, gradients = gradient_of(name, parts, **WAYS[way])
    expected, their_gradients = whole[name]
    assert result.loss == pytest.approx(expected.loss, rel=1e-5, abs=1e-6)
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, their_gradients[parameter], rtol=1e-3, atol=1e-5 * expected.grad_norm
        )
    assert result.metrics.keys() == expected.metrics.keys()
    for metric, value in expected.metrics.items():
        assert result.metrics[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric


@pytest.mark.parametrize("name", ["dpo sigmoid", "kto", "reward"])
def test_evaluation_does_not_depend_on_the_packing(name):
    model, objective = model_for(name), EVERY[name]
    examples = examples_for(name, 6, 7)
    parts = [[examples], [examples[:2], examples[2:]]]
    one, two = (evaluate(model, [collate(p) for p in each], objective) for each in parts)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.metrics == pytest.approx(one.metrics, rel=1e-4, abs=1e-6)
    if name == "reward":
        assert one.accuracy == one.metrics["rewards/accuracies"]


def test_the_statistic_of_kto_is_of_the_whole_step():
    model, objective = model_for("kto"), KTO()
    batches = [collate(examples_for("kto", count, seed)) for count, seed in ((2, 7), (4, 8))]
    moved = []
    for batch in batches:
        other = batch.mismatched
        scores = target_scores(model, other, replace(objective, loss_type="apo_zero"))
        moved += [
            (own.sum() - reference.sum()).item()
            for own, reference in zip(
                scores.logprobs.split(other.target_counts),
                scores.reference.split(other.target_counts),
                strict=True,
            )
        ]
    expected = max(sum(moved) / 6, 0.0)
    assert expected > 0.1
    for batch in with_statistics(model, batches, objective):
        assert batch.statistics["kl"].item() == pytest.approx(expected, abs=1e-4)
    plain = collate(examples_for("sft", 2))
    with pytest.raises(UserError, match="kto compares answers with answers to other prompts"):
        list(with_statistics(model, [plain], objective))


def test_sequences_that_shared_a_prefix_are_put_on_their_own():
    examples = examples_for("dpo sigmoid", 3)
    plain, shared = (collate(examples, share_prefixes=share) for share in (False, True))
    assert shared.num_rows < plain.num_rows
    apart = without_shared_prefixes(shared)
    for name in ("input_ids", "position_ids", "cu_seqlens", "target_index", "last_index"):
        assert torch.equal(getattr(apart, name), getattr(plain, name)), name
    assert apart.parents is None and without_shared_prefixes(plain) is plain


def distilled(teacher, model, examples, **settings):
    objective = Distill(teacher, **settings)
    return evaluate(model, [collate(examples)], objective)


def test_teachers():
    """Another model, another adapter of the same, and the model without adapters."""
    examples = examples_for("distill", 4)
    model = model_for("distill", accelerate=False)
    torch.manual_seed(5)
    model.add_adapter(
        "other", peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    )
    base = tiny_llama()
    before, trained = trainable(model), list(model.active_adapters)
    expected = distilled(Teacher(base), model, examples, beta=0.3, temperature=2.0)
    assert expected.metrics["divergence"] > 0.01
    own = distilled("", model, examples, beta=0.3, temperature=2.0)
    assert own.loss == pytest.approx(expected.loss, rel=1e-5)
    other = distilled("other", model, examples, beta=0.3)
    assert abs(other.loss - expected.loss) > 1e-3
    assert trainable(model).keys() == before.keys() and list(model.active_adapters) == trained
    itself = distilled("default", model, examples)
    assert itself.loss == pytest.approx(0, abs=1e-5)
    with pytest.raises(
        UserError, match="teacher 'none' is no adapter of the model, which has default"
    ):
        distilled("none", model, examples)
    with pytest.raises(UserError, match="and it has none: add an adapter"):
        distilled("", tiny_llama(), examples)
    small = tiny_llama()
    small.resize_token_embeddings(60)
    with pytest.raises(UserError, match="the teacher has 60 tokens and the model 61"):
        distilled(Teacher(small), model, examples)


def test_the_settings_of_a_run_name_the_teacher():
    teacher = Teacher(tiny_llama(), "large")
    settings = settings_of(Distill(teacher, beta=0.5))
    assert settings["name"] == "distill" and settings["teacher"] == "large"
    assert settings_of(Distill(Teacher(tiny_llama())))["teacher"] == "LlamaForCausalLM"


def test_a_teacher_that_cannot_share_rows_has_its_own():
    examples = examples_for("distill", 4)
    twins = [replace(e, input_ids=examples[0].input_ids[:9] + e.input_ids[9:]) for e in examples]
    model = model_for("distill")
    shared, plain = (collate(twins, share_prefixes=share) for share in (True, False))
    assert shared.parents is not None
    losses = [
        evaluate(model, [b], Distill(Teacher(tiny_llama()), beta=1.0)).loss for b in (shared, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_scalar_head_that_is_not_there_is_named():
    with pytest.raises(UserError, match="LlamaForCausalLM has no scalar head"):
        evaluate(tiny_lora(), [collate(examples_for("reward", 2))], EVERY["reward"])


def test_terms_and_weights_have_the_same_names():
    from dataclasses import dataclass
    from typing import ClassVar

    @dataclass(frozen=True)
    class Odd:
        name: ClassVar[str] = "odd"
        unit: ClassVar[str] = ""
        reads: ClassVar[Reads] = Reads()

        def weight(self, batch):
            return {"a": 1, "b": 1}

        def __call__(self, scores, batch):
            return Loss({"a": -scores.total})

    model = tiny_lora()
    step = TrainStep(
        model, Odd(), FlatAdamW(FlatParameters(model.named_parameters()), TrainConfig())
    )
    with pytest.raises(UserError, match=r"objective odd: its loss has the terms \['a'\]"):
        step(1, [collate(examples_for("sft", 2))], 0.1, lambda: None)


def test_pairs_and_judged_examples_are_told_apart():
    assert {EVERY[name].reads.examples for name in PAIRED} == {"pairs"}
    assert {EVERY[name].reads.examples for name in JUDGED} == {"labelled"}
    assert DPO().weight(collate(examples_for("kto", 2))) == 0


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("kto", DPO(), r"dpo learns from records of 'chosen' and 'rejected', and 4 of 4 are not"),
        ("dpo sigmoid", KTO(), "kto learns from records of 'prompt', 'completion' and 'label'"),
        ("dpo sigmoid", SFT(), "sft learns from records of 'messages', .* give such records"),
    ],
)
def test_records_of_another_kind_are_refused(name, objective, message, tmp_path):
    data = TokenizedDataset(examples_for(name))
    config = TrainConfig(output_dir=tmp_path, max_steps=1)
    with pytest.raises(UserError, match=message):
        Trainer(tiny_lora(), None, data, None, config, objective=objective)


def test_labels_that_are_all_one_are_refused(tmp_path):
    data = TokenizedDataset([replace(e, role="desirable") for e in examples_for("kto")])
    config = TrainConfig(output_dir=tmp_path, max_steps=1)
    with pytest.raises(UserError, match="data: every label is true"):
        Trainer(tiny_lora(), None, data, None, config, objective=KTO())


@pytest.mark.parametrize("name", ["dpo sigmoid", "kto", "reward", "distill"])
def test_a_run_learns_and_resumes_with_the_same_bits(name, tmp_path):
    """Preflight, training, evaluation, checkpoint, resumption."""
    train, held_out = (TokenizedDataset(examples_for(name, n, s)) for n, s in ((12, 0), (4, 1)))

    def run(folder, model, resume=False, callbacks=()):
        config = TrainConfig(
            output_dir=tmp_path / folder, max_steps=5, tokens_per_batch=800, learning_rate=1e-2
        )
        trainer = Trainer(
            model, None, train, held_out, config, objective=EVERY[name], callbacks=callbacks
        )
        return trainer.fit(resume=resume)

    whole, broken, resumed = (model_for(name) for _ in range(3))
    result = run("whole", whole)
    assert result.steps == 5
    run("broken", broken, callbacks=[SignalAtStep(2)])
    run("broken", resumed, resume=True)
    assert_same_bits(trainable(resumed), trainable(whole))
    steps = [[x for x in lines(tmp_path / folder) if "loss" in x] for folder in ("whole", "broken")]
    assert steps[0][-1]["loss"] < steps[0][0]["loss"]
    own = EVERY[name].name
    metric = {"kto": "rewards/chosen", "distill": "divergence"}.get(own, "rewards/margins")
    assert [x[metric] for x in steps[0]] == [x[metric] for x in steps[1]]
    assert (tmp_path / "whole/adapter/adapter_model.safetensors").is_file()
