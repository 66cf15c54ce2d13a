"""Every objective by its formula, its gradient, and what may not change it."""

import math
from dataclasses import replace

import pytest
import torch
from objective_cases import (
    EVERY,
    GRPO_TYPES,
    JUDGED,
    PAIRED,
    SAMPLED,
    SETTINGS,
    Numbers,
    batch_for,
    examples_for,
)
from torch.autograd import gradcheck

from lora_engine.data.batch import collate
from lora_engine.objectives.answers import loss_of, mean_of, weight_of
from lora_engine.objectives.base import Mean, TargetScores
from lora_engine.objectives.cpo import CPO
from lora_engine.objectives.dpo import DPO
from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.kto import KTO
from lora_engine.objectives.orpo import ORPO, log1mexp
from lora_engine.objectives.reward import Reward
from lora_engine.objectives.simpo import SimPO


def mean_loss(objective, scores, batch):
    loss = loss_of(objective, scores, batch)
    return mean_of(objective, loss, weight_of(objective, batch))


def metric(loss, name) -> float:
    mean: Mean = loss.metrics[name]
    return float(mean.total) / mean.count


@pytest.mark.parametrize("name", list(EVERY))
def test_the_gradient_is_that_of_the_loss(name):
    objective, batch = EVERY[name], batch_for(name)
    if name == "grpo cispo":  # whose gradient is not that of its value, by design
        objective = replace(objective, epsilon_high=0.1)
    numbers = Numbers(batch, objective)
    assert gradcheck(
        lambda *leaves: mean_loss(objective, numbers.scores(*leaves), batch),
        tuple(numbers.leaves.values()),
        eps=1e-7,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", [name for name in EVERY if name != "grpo bnpo"])
def test_the_order_of_records_does_not_matter(name):
    """Of pairs, of groups; a micro-batch's own mean (bnpo) included where it is one."""
    objective = EVERY[name]
    examples = examples_for(name, 5)
    order = [3, 0, 4, 2, 1] if len(examples) == 5 else [6, 7, 0, 1, 8, 9, 4, 5, 2, 3]
    statistics = {"kl": torch.tensor(0.03)} if name in JUDGED else {}
    batch, shuffled = (
        replace(collate(part), statistics=statistics)
        for part in (examples, [examples[i] for i in order])
    )
    numbers = Numbers(batch, objective)
    moved = Numbers(shuffled, objective)
    sizes = [s.num_targets for e in examples for s in e.sequences if s.role != "mismatched"]
    per = len(sizes) // len(examples)
    for values in (moved.leaves, moved.rest):
        own = numbers.leaves if values is moved.leaves else numbers.rest
        for part, tensor in own.items():
            if len(tensor) == sum(sizes):
                parts = list(tensor.detach().split(sizes))
            elif len(tensor) == len(sizes):
                parts = list(tensor.detach().split(1))
            else:
                values[part] = tensor
                continue
            groups = [parts[i * per : (i + 1) * per] for i in order]
            values[part] = torch.cat([x for group in groups for x in group])
    expected = mean_loss(objective, numbers.scores(), batch)
    assert mean_loss(objective, moved.scores(), shuffled).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("name", [name for name in EVERY if name != "grpo bnpo"])
def test_parts_of_a_step_add_up(name):
    """Whatever the weight of each: one sum over the weights of all."""
    objective, examples = EVERY[name], examples_for(name, 6)
    statistics = {"kl": torch.tensor(0.03)} if name in JUDGED else {}
    whole = replace(collate(examples), statistics=statistics)
    numbers = Numbers(whole, objective)
    weights = weight_of(objective, whole)
    total, begin, first = 0.0, 0, 0
    for part in (examples[:1], examples[1:4], examples[4:]):
        batch = replace(collate(part), statistics=statistics)
        scores = numbers.scores()
        end, last = begin + batch.num_targets, first + batch.num_examples

        def cut(x, batch=batch, span=(begin, end), rows=(first, last)):
            if x is None or x.dim() == 0:
                return None if x is None else x * batch.num_targets / whole.num_targets
            return x[slice(*(span if len(x) == whole.num_targets else rows))]

        own = {part: cut(x) for part, x in vars(scores).items()}
        own["total"] = own["logprobs"].sum()
        total += mean_of(objective, objective(TargetScores(**own), batch), weights).item()
        begin, first = end, last
    assert total == pytest.approx(mean_loss(objective, numbers.scores(), whole).item())


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_dpo_begins_at_ln_2(kind):
    objective, batch = DPO(kind), batch_for("dpo sigmoid")
    numbers = Numbers(batch, objective)
    numbers.rest["reference"] = numbers.leaves["logprobs"].detach()
    loss = objective(numbers.scores(), batch)
    assert loss.total.item() / 4 == pytest.approx(math.log(2), abs=1e-12)
    assert metric(loss, "rewards/margins") == metric(loss, "rewards/accuracies") == 0


def one_pair(chosen, rejected, reference=(0.0, 0.0)):
    """A pair of answers of 2 tokens and 1, with these sums of log-probabilities."""
    batch = collate(_pair_of_lengths(2, 1))
    halves = [chosen / 2, chosen / 2, rejected]
    logprobs = torch.tensor(halves, dtype=torch.float64)
    theirs = torch.tensor([reference[0] / 2] * 2 + [reference[1]], dtype=torch.float64)
    return TargetScores(logprobs, logprobs.sum(), logprobs > 0, reference=theirs), batch


def _pair_of_lengths(chosen, rejected):
    (example,) = examples_for("orpo", 1, prompt=3)

    def of(length, part):
        return replace(
            part,
            input_ids=[1, 2, 3, *range(4, 4 + length)],
            supervised=[False] * 3 + [True] * length,
        )

    return [replace(of(chosen, example), others=(of(rejected, example.others[0]),))]


def test_dpo_by_hand():
    scores, batch = one_pair(-2.0, -3.0, reference=(-2.5, -2.5))  # h = 0.5 - (-0.5) = 1
    sigmoid = math.log1p(math.exp(-0.5))
    wrong = math.log1p(math.exp(0.5))
    expected = {
        DPO(beta=0.5): sigmoid,
        DPO(beta=0.5, label_smoothing=0.1): 0.9 * sigmoid + 0.1 * wrong,
        DPO("robust", beta=0.5, label_smoothing=0.1): (0.9 * sigmoid - 0.1 * wrong) / 0.8,
        DPO("hinge", beta=0.5): 0.5,
        DPO("ipo", beta=0.5): (0.25 + 0.5 - 1) ** 2,
        DPO("sigmoid_norm", beta=0.5): math.log1p(math.exp(-0.375)),
    }
    for objective, value in expected.items():
        assert objective(scores, batch).total.item() == pytest.approx(value), objective
    loss = DPO(beta=0.5)(scores, batch)
    assert metric(loss, "rewards/chosen") == 0.25 and metric(loss, "rewards/rejected") == -0.25
    assert metric(loss, "rewards/margins") == 0.5 and metric(loss, "rewards/accuracies") == 1
    assert metric(loss, "logps/chosen") == -2 and metric(loss, "logps/rejected") == -3


def test_objectives_without_a_reference_by_hand():
    scores, batch = one_pair(-2.0, -3.0)
    odds = (-1 + 3) - (math.log(1 - math.exp(-1)) - math.log(1 - math.exp(-3)))
    orpo = ORPO(beta=0.2)(scores, batch)
    assert orpo.total["nll"].item() == 2.0
    assert orpo.total["odds"].item() == pytest.approx(0.2 * math.log1p(math.exp(-odds)))
    assert weight_of(ORPO(), batch) == {"nll": 2, "odds": 1}
    assert SimPO(beta=2.0, gamma=1.0)(scores, batch).total.item() == pytest.approx(
        math.log1p(math.exp(-(2 * 2 - 1)))
    )
    cpo = CPO(beta=0.5, nll_weight=0.5)(scores, batch)
    assert cpo.total["preference"].item() == pytest.approx(math.log1p(math.exp(-0.5)))
    assert cpo.total["nll"].item() == 1.0


def test_kto_by_hand():
    batch = batch_for("kto", 2)
    numbers = Numbers(batch, KTO())
    scores = numbers.scores()
    good, bad = (
        (own - other).sum().item()
        for own, other in zip(
            scores.logprobs.split(batch.target_counts),
            scores.reference.split(batch.target_counts),
            strict=True,
        )
    )

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    loss = KTO(beta=0.5, undesirable_weight=2.0)(scores, batch)
    expected = 1 - sigmoid(0.5 * (good - 0.03)) + 2 * (1 - sigmoid(0.5 * (0.03 - bad)))
    assert loss.total.item() == pytest.approx(expected)
    assert metric(loss, "kl") == pytest.approx(0.03)
    assert metric(loss, "rewards/chosen") == pytest.approx(0.5 * good)
    zero = KTO("apo_zero", beta=0.5)(scores, batch)
    assert zero.total.item() == pytest.approx(1 - sigmoid(0.5 * good) + sigmoid(0.5 * bad))


def test_a_reward_model_wins_by_the_margin_of_the_record():
    examples = [
        replace(e, columns={"margin": m})
        for e, m in zip(examples_for("reward", 2), (1, 2), strict=True)
    ]
    batch = collate(examples)
    values = torch.tensor([3.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    scores = TargetScores(values[:0], values[:0].sum(), values[:0].bool(), values=values)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(2))
    assert Reward(margin=7.0)(scores, batch).total.item() == pytest.approx(expected)
    plain = collate([replace(e, columns={}) for e in examples])
    expected = math.log1p(math.exp(-1.5)) + math.log1p(math.exp(0.5))
    loss = Reward(margin=0.5)(scores, plain)
    assert loss.total.item() == pytest.approx(expected)
    assert metric(loss, "rewards/accuracies") == 0.5 and metric(loss, "rewards/margins") == 1


def test_log1mexp_keeps_its_digits():
    x = torch.tensor([-1e-12, -1e-3, -0.7, -5, -50], dtype=torch.float64, requires_grad=True)
    expected = [math.log(-math.expm1(v)) if v > -40 else -math.exp(v) for v in x.tolist()]
    actual = log1mexp(x)
    assert actual.tolist() == pytest.approx(expected, rel=1e-12)
    actual.sum().backward()
    assert x.grad.tolist() == pytest.approx(
        [1 / math.expm1(v) * -math.exp(v) * -1 for v in x.tolist()]
    )


@pytest.mark.parametrize("kind", GRPO_TYPES)
def test_on_policy_the_gradient_is_reinforces(kind):
    """The ratio is 1, the KL 0, nothing is clipped, and normalised advantages make the loss 0."""
    examples = [
        replace(e, columns={"advantages": 0.7 if i % 2 else -0.7})
        for i, e in enumerate(examples_for("grpo grpo"))
    ]
    batch = collate(examples)
    objective = GRPO(kind, kl_weight=0.1, **{**SETTINGS.get(kind, {}), "sapo_negative": 1.0})
    numbers = Numbers(batch, objective)
    numbers.rest["reference"] = numbers.leaves["logprobs"].detach()
    loss = objective(numbers.scores(), batch)
    assert metric(loss, "kl") == 0
    for name in loss.metrics:
        if "clip" in name:
            assert metric(loss, name) == 0, name
    if kind in ("grpo", "gspo", "rloo"):  # a mean over sequences; the others weigh by tokens
        assert loss.total["policy"].item() == pytest.approx(0, abs=1e-12)
    mean_of(objective, loss, weight_of(objective, batch)).backward()
    counts = torch.tensor(batch.target_counts, dtype=torch.float64)
    each = counts.repeat_interleave(counts.long())
    tokens, sequences = counts.sum(), len(counts)
    divisor = {
        "bnpo": tokens,
        "dapo": tokens,
        "cispo": tokens,
        "dr_grpo": torch.tensor(sequences * 9.0),
        "rloo": torch.tensor(float(sequences)),
        "reinforce": torch.tensor(float(sequences)),
    }.get(kind, sequences * each)
    advantages = torch.tensor(
        [0.7 if i % 2 else -0.7 for i in range(sequences)], dtype=torch.float64
    )
    expected = -advantages.repeat_interleave(counts.long()) / divisor
    torch.testing.assert_close(numbers.leaves["logprobs"].grad, expected.expand(len(each)))


def test_clipping_by_hand():
    """r A is kept where the clip would make it better than it is."""
    (example,) = examples_for("grpo grpo", 1)[:1]
    example = replace(
        example, input_ids=example.input_ids[:9] + [1] * 4, supervised=[False] * 9 + [True] * 4
    )
    ratios = [1.5, 1.5, 0.5, 0.5]
    columns = {"advantages": [1.0, -1.0, 1.0, -1.0], "old_logprobs": [0.0] * 4}
    batch = collate([replace(example, columns=columns)])
    logprobs = torch.tensor(ratios, dtype=torch.float64).log()
    scores = TargetScores(logprobs, logprobs.sum(), logprobs > 9, entropy=logprobs)

    def policy(**settings):
        objective = GRPO(epsilon_low=0.2, epsilon_high=0.3, **settings)
        return objective(scores, batch)

    loss = policy()
    assert loss.total["policy"].item() == pytest.approx(-(1.3 - 1.5 + 0.5 - 0.8))
    assert metric(loss, "clip_ratio/high_mean") == metric(loss, "clip_ratio/low_mean") == 0.25
    assert metric(loss, "clip_ratio/region_mean") == 0.5
    two_sided = policy(delta=1.4).total["policy"].item()
    assert two_sided == pytest.approx(-(1.3 - 1.4 + 0.5 - 0.8))


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("none", [1, 1]),
        ("token_truncate", [2.0, 0.5]),
        ("token_mask", [0, 0.5]),
        ("sequence_truncate", [1.5, 1.5]),
        ("sequence_mask", [1.5, 1.5]),
    ],
)
def test_a_sampler_that_is_not_the_trainer(correction, expected):
    (example,) = examples_for("grpo grpo", 1)[:1]
    example = replace(
        example, input_ids=example.input_ids[:9] + [1] * 2, supervised=[False] * 9 + [True] * 2
    )
    old = [math.log(0.3), math.log(0.2)]
    sampler = [math.log(0.1), math.log(0.4)]  # ratios 3 and 0.5, of the sequence 1.5
    columns = {"advantages": 1.0, "old_logprobs": old, "sampler_logprobs": sampler}
    batch = collate([replace(example, columns=columns)])
    logprobs = torch.tensor(old, dtype=torch.float32).double().requires_grad_()
    scores = TargetScores(logprobs, logprobs.sum(), logprobs > 9, entropy=logprobs.detach())
    loss = GRPO(sampler_correction=correction, sampler_cap=2.0)(scores, batch)
    loss.total["policy"].backward()
    assert (-logprobs.grad).tolist() == pytest.approx(expected, rel=1e-6)
    if correction != "none":
        ratio = metric(loss, "sampling/importance_sampling_ratio")
        assert ratio == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_a_completion_without_targets_counts_as_a_sequence_alone():
    """Masked because it was cut off, say."""
    examples = examples_for("grpo grpo", 2)
    blank = replace(examples[0], supervised=[False] * len(examples[0]))
    blank = replace(
        blank, columns={name: [] if name != "advantages" else 1.0 for name in blank.columns}
    )
    batch = collate([*examples[1:], blank])
    assert weight_of(GRPO("grpo"), batch)["policy"] == 4
    assert weight_of(GRPO("dapo"), batch)["policy"] == batch.num_targets
    numbers = Numbers(batch, GRPO("grpo"))
    assert math.isfinite(mean_loss(GRPO("grpo"), numbers.scores(), batch))
    for kind, policy in {"grpo": 1, "dr_grpo": 256, "dapo": 0, "bnpo": 0}.items():
        assert weight_of(GRPO(kind), collate([blank])) == {"policy": policy, "entropy": 0}


WRONG = {
    "a beta of 0": (lambda: DPO(beta=0), "beta: expected a number > 0, got 0"),
    "no loss type": (lambda: DPO("sigmod"), "loss_type: expected sigmoid or .* got 'sigmod'"),
    "half wrong": (lambda: DPO(label_smoothing=0.5), r"label_smoothing: expected 0 to below 0\.5"),
    "smoothed hinge": (lambda: DPO("hinge", label_smoothing=0.1), "expected 0 with hinge"),
    "a weight below 0": (
        lambda: KTO(desirable_weight=-1),
        "desirable_weight: expected a number ≥ 0",
    ),
    "no temperature": (lambda: GRPO(temperature=math.nan), "temperature: expected a number > 0"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_settings_that_make_no_sense_are_refused(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_names_are_distinct():
    kinds = {type(objective) for objective in EVERY.values()}
    assert len({kind.name for kind in kinds}) == len(kinds)
    assert {name.partition(" ")[0] for name in (*PAIRED, *SAMPLED)} == {
        *("dpo", "orpo", "simpo", "cpo", "reward", "grpo", "ppo"),
    }
