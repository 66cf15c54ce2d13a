"""TRL's own loss functions on the same log-probabilities: losses, gradients and metrics are equal.

What TRL's trainer would have made of a model is handed to its loss in its place.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from objective_cases import EVERY, GRPO_TYPES, Numbers, batch_for, examples_for
from torch.nn.utils.rnn import pad_sequence

from lora_engine.data.batch import collate
from lora_engine.objectives.answers import mean_of, weight_of
from lora_engine.objectives.base import TargetScores
from lora_engine.objectives.cpo import CPO
from lora_engine.objectives.dpo import DPO
from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.kto import KTO
from lora_engine.objectives.orpo import ORPO
from lora_engine.objectives.reward import Reward
from lora_engine.objectives.simpo import SimPO

trl = pytest.importorskip("trl")


class Accelerator:
    """One process on the CPU."""

    device = torch.device("cpu")
    num_processes = 1

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def trainer(**settings):
    """What a trainer's loss reads of the trainer."""
    usual = {
        "accelerator": Accelerator(),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "precompute_ref_logps": True,
        "label_smoothing": 0.0,
        "beta": 0.1,
    }
    return SimpleNamespace(**{**usual, **settings})


def padded(values, counts):
    """[E, L] of values [U], 0 behind each example's."""
    return pad_sequence(values.split(counts), batch_first=True)


def mask_of(counts):
    return padded(torch.ones(sum(counts)), counts)


def two_sides(x):
    """TRL has all chosen rows before all rejected ones."""
    return torch.cat([x[::2], x[1::2]])


def float32(batch, objective):
    numbers = Numbers(batch, objective)
    numbers.leaves = {k: v.detach().float().requires_grad_() for k, v in numbers.leaves.items()}
    numbers.rest = {name: x.float() for name, x in numbers.rest.items()}
    return numbers


def assert_equal(objective, batch, numbers, theirs, their_metrics=None, leaf="logprobs"):
    """theirs: a function of the leaf. Loss, gradient and metrics to 1e-5, relative."""
    own = objective(numbers.scores(), batch)
    loss = mean_of(objective, own, weight_of(objective, batch))
    (gradient,) = torch.autograd.grad(loss, numbers.leaves[leaf])
    expected = theirs(numbers.leaves[leaf])
    (their_gradient,) = torch.autograd.grad(expected, numbers.leaves[leaf])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 0
    for name, value in (their_metrics or dict)().items():
        if name in own.metrics:
            mean = own.metrics[name]
            assert mean.total.item() / mean.count == pytest.approx(value, rel=1e-4, abs=1e-6), name
    return own.metrics.keys()


def model_inputs(counts, prompt=3):
    """input_ids and completion_mask of a batch, of which loss functions read the shapes."""
    mask = torch.cat([torch.zeros(len(counts), prompt), mask_of(counts)], 1)
    return {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
    }


def outputs_of(logprobs, prompt=3):
    """What TRL's fused head returns, of log-probabilities [E, L] behind a prompt."""
    whole = torch.cat([logprobs.new_zeros(len(logprobs), prompt - 1), logprobs], 1)
    others = {name: torch.zeros_like(whole) for name in ("entropy", "mean_logits")}
    return SimpleNamespace(log_probs=whole, is_top1=whole > 0, **others)


@pytest.mark.parametrize(
    "objective",
    [
        DPO(),
        DPO(beta=0.7),
        DPO("sigmoid_norm", beta=2.0),
        DPO("hinge", beta=0.5),
        DPO("ipo", beta=0.5),
        DPO("robust", label_smoothing=0.1),
    ],
    ids=str,
)
def test_dpo(objective):
    batch = batch_for("dpo sigmoid", 5)
    counts, numbers = batch.target_counts, float32(batch, objective)
    reference = two_sides(padded(numbers.rest["reference"], counts)).sum(1)
    inputs = {k: two_sides(v) for k, v in model_inputs(counts).items()}
    inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), reference.chunk(2), strict=True))
    fake = trainer(
        beta=objective.beta,
        loss_types=[objective.loss_type],
        loss_weights=[1.0],
        label_smoothing=objective.label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )

    def theirs(logprobs):
        rows = two_sides(padded(logprobs, counts))
        return trl.DPOTrainer._compute_loss(fake, lambda **_: outputs_of(rows), inputs, False)

    def metrics():
        return {name: values[-1] for name, values in fake._metrics["train"].items()}

    names = assert_equal(objective, batch, numbers, theirs, metrics)
    assert names <= metrics().keys()


@pytest.mark.parametrize("objective", [KTO(undesirable_weight=0.6), KTO("apo_zero")], ids=str)
def test_kto(objective):
    batch = batch_for("kto", 5)
    counts, numbers = batch.target_counts, float32(batch, objective)
    inputs = model_inputs(counts)
    inputs["ref_logps"] = padded(numbers.rest["reference"], counts).sum(1)
    inputs["label"] = torch.tensor([role == "desirable" for role in batch.roles])
    inputs["ref_KL_logps"] = torch.zeros(5)
    fake = trainer(
        beta=objective.beta,
        loss_type={"apo_zero": "apo_zero_unpaired"}.get(objective.loss_type, "kto"),
        calculate_KL=objective.loss_type == "kto",
        desirable_weight=objective.desirable_weight,
        undesirable_weight=objective.undesirable_weight,
        _compute_kl_logps=lambda model, batch: torch.full((5,), 0.03),
    )

    def theirs(logprobs):
        rows = padded(logprobs, counts)
        return trl.KTOTrainer._compute_loss(fake, lambda **_: outputs_of(rows), inputs, False)

    def metrics():
        return {name: values[-1] for name, values in fake._metrics["train"].items()}

    names = assert_equal(objective, batch, numbers, theirs, metrics)
    assert names <= metrics().keys()


def logits_case(count=4, vocabulary=7):
    """Pairs behind a prompt of one token, and logits of every position."""
    examples = examples_for("orpo", count, prompt=1)
    batch = collate(examples)
    sequences = [s for e in examples for s in e.sequences]
    ids = pad_sequence(
        [torch.tensor(s.input_ids) % vocabulary for s in sequences], batch_first=True
    )
    lengths = [len(s) for s in sequences]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*ids.shape, vocabulary, generator=generator).requires_grad_()
    return batch, ids, lengths, logits


def logprobs_of(logits, ids, lengths):
    each = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([row[: length - 1] for row, length in zip(each, lengths, strict=True)])


@pytest.mark.parametrize(
    "objective",
    [
        ORPO(beta=0.3),
        CPO(beta=0.3, nll_weight=0.5),
        CPO(label_smoothing=0.1),
        CPO("hinge"),
        CPO("ipo"),
        SimPO(),
        SimPO(label_smoothing=0.1),
    ],
    ids=str,
)
def test_objectives_of_logits(objective):
    """ORPO's cross-entropy is over the prompt too at TRL: one token here, which none predicts."""
    if isinstance(objective, ORPO):
        module = pytest.importorskip("trl.experimental.orpo")
        owner, settings = module.ORPOTrainer, {}
    else:
        owner = pytest.importorskip("trl.experimental.cpo").CPOTrainer
        simple = isinstance(objective, SimPO)
        settings = {
            "loss_type": "simpo" if simple else objective.loss_type,
            "cpo_alpha": 0.0 if simple else objective.nll_weight,
            "simpo_gamma": getattr(objective, "gamma", 0.0),
            "label_smoothing": objective.label_smoothing,
            "alpha": 0.0,
        }
    batch, ids, lengths, logits = logits_case()
    inside = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~inside, -100)
    labels[:, 0] = -100
    parts = {"input_ids": two_sides(ids), "labels": two_sides(labels)}
    parts |= {"attention_mask": two_sides(inside.long())}
    fake = trainer(
        beta=objective.beta,
        is_encoder_decoder=False,
        padding_value=0,
        pad_token_id=0,
        concatenated_inputs=lambda *_, **__: {f"concatenated_{k}": v for k, v in parts.items()},
        **settings,
    )
    for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(owner, name):
            setattr(fake, name, getattr(owner, name).__get__(fake))
    fake.get_batch_logps = owner.get_batch_logps
    chosen = {"chosen_labels": parts["labels"][: len(ids) // 2]}
    loss, metrics = owner.get_batch_loss_metrics(
        fake, lambda *_, **__: SimpleNamespace(logits=two_sides(logits)), chosen
    )
    (expected,) = torch.autograd.grad(loss, logits)

    logprobs = logprobs_of(logits, ids, lengths)
    scores = TargetScores(logprobs, logprobs.sum(), logprobs > 0)
    own = objective(scores, batch)
    ours = mean_of(objective, own, weight_of(objective, batch))
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(ours, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
    for name, mean in own.metrics.items():
        assert mean.total.item() / mean.count == pytest.approx(metrics[name], rel=1e-4), name


@pytest.mark.parametrize("margin", [None, (0.5, 1.0, 0.0, 2.0)])
def test_reward(margin):
    examples = examples_for("reward", 4)
    if margin:
        examples = [
            replace(e, columns={"margin": m}) for e, m in zip(examples, margin, strict=True)
        ]
    objective, batch = Reward(centre=0.1), collate(examples)
    numbers = float32(batch, objective)
    inputs = {"attention_mask": torch.ones(8, 2)}
    inputs |= {"margin": torch.tensor(margin)} if margin else {}
    fake = trainer(args=SimpleNamespace(center_rewards_coefficient=0.1))

    def theirs(values):
        model = lambda **_: SimpleNamespace(logits=two_sides(values)[:, None])  # noqa: E731
        return trl.RewardTrainer.compute_loss(fake, model, dict(inputs))

    def metrics():
        named = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
        return {named.get(k, k): v[-1] for k, v in fake._metrics["train"].items()}

    assert_equal(objective, batch, numbers, theirs, metrics, leaf="values")


GROUPS = {
    **{kind: {} for kind in ("grpo", "bnpo", "dapo", "gspo", "sapo")},
    "dr_grpo": {"max_completion_length": 9},
    "cispo": {"epsilon_high": 1.1},
    "grpo with a KL": {"kl_weight": 0.1},
    "dapo on both sides": {"delta": 1.3},
    "grpo of a sampler": {"sampler_correction": "token_truncate", "sampler_cap": 1.2},
    "dapo of a sampler": {"sampler_correction": "sequence_mask", "sampler_cap": 1.5},
    "dapo with entropy": {"entropy_weight": 0.05},
}


@pytest.mark.parametrize("case", list(GROUPS))
def test_grpo(case):
    kind, settings = case.split()[0], {"sampler_correction": "none", **GROUPS[case]}
    objective, batch = GRPO(kind, **settings), batch_for("grpo grpo")
    counts, numbers = batch.target_counts, float32(batch, objective)
    mask, columns = mask_of(counts), batch.columns
    old = padded(columns["old_logprobs"], counts)
    inputs = {
        "prompt_ids": torch.zeros(len(counts), 2),
        "prompt_mask": torch.ones(len(counts), 2),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": columns["advantages"],
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    corrected = objective.sampler_correction != "none"
    if corrected:
        log_ratios = (old - padded(columns["sampler_logprobs"], counts)) * mask
        if "sequence" in objective.sampler_correction:
            log_ratios = log_ratios.sum(1, keepdim=True)
        ratios, cap = log_ratios.exp(), objective.sampler_cap
        inputs["importance_sampling_ratio"] = (
            ratios.clamp(max=cap)
            if "truncate" in objective.sampler_correction
            else ratios * (ratios <= cap)
        )
    if objective.kl_weight:
        inputs["ref_per_token_logps"] = padded(numbers.rest["reference"], counts)
    entropy = padded(numbers.leaves["entropy"].detach(), counts)
    fake = trainer(
        beta=objective.kl_weight,
        loss_type="grpo" if kind == "gspo" else kind,
        importance_sampling_level="sequence" if kind == "gspo" else "token",
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        args=SimpleNamespace(
            delta=objective.delta,
            use_bias_correction_kl=False,
            sapo_temperature_pos=objective.sapo_positive,
            sapo_temperature_neg=objective.sapo_negative,
            steps_per_generation=1,
        ),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        max_completion_length=objective.max_completion_length,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=objective.entropy_weight != 0,
        use_adaptive_entropy=False,
        entropy_coef=objective.entropy_weight,
    )
    fake.accelerator.sync_gradients = False

    def theirs(logprobs):
        given = padded(logprobs, counts), entropy, None
        fake._get_per_token_logps_and_entropies = lambda *_, **__: given
        return trl.GRPOTrainer._compute_loss(fake, None, inputs)

    def metrics():
        return {name: values[-1] for name, values in fake._metrics["train"].items()}

    names = assert_equal(objective, batch, numbers, theirs, metrics)
    assert names - metrics().keys() <= {"sampling/importance_sampling_ratio"}


def test_rloo():
    objective, batch = EVERY["grpo rloo"], batch_for("grpo grpo")
    objective = replace(objective, kl_weight=0.0, entropy_weight=0.0, sampler_correction="none")
    counts, numbers = batch.target_counts, float32(batch, objective)
    mask = mask_of(counts)
    inputs = {
        "prompt_ids": torch.zeros(len(counts), 2),
        "prompt_mask": torch.ones(len(counts), 2),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": batch.columns["advantages"],
        "old_logps": padded(batch.columns["old_logprobs"], counts).sum(1),
    }
    entropy = padded(numbers.leaves["entropy"].detach(), counts)
    fake = trainer(
        epsilon_low=objective.epsilon_low,
        epsilon_high=objective.epsilon_high,
        args=SimpleNamespace(),
    )

    def theirs(logprobs):
        given = padded(logprobs, counts), entropy, None
        fake._get_per_token_logps_and_entropies = lambda *_, **__: given
        return trl.RLOOTrainer._compute_loss(fake, None, inputs)

    def metrics():
        return {name: values[-1] for name, values in fake._metrics["train"].items()}

    assert_equal(objective, batch, numbers, theirs, metrics)


def test_every_kind_of_grpo_is_compared():
    compared = {case.split()[0] for case in GROUPS} | {"rloo"}
    assert compared == set(GRPO_TYPES) - {"reinforce"}
