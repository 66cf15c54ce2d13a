"""Every objective with small examples of its kind, and numbers that stand for a model's."""

import random
from dataclasses import replace

import torch

from lora_engine.data.batch import PackedBatch, collate
from lora_engine.data.pairs import with_mismatched
from lora_engine.data.render import Example
from lora_engine.objectives.base import TargetScores
from lora_engine.objectives.cpo import CPO
from lora_engine.objectives.distill import Distill
from lora_engine.objectives.domain import Domain
from lora_engine.objectives.dpo import DPO
from lora_engine.objectives.grpo import GRPO
from lora_engine.objectives.kto import KTO
from lora_engine.objectives.orpo import ORPO
from lora_engine.objectives.ppo import PPO
from lora_engine.objectives.reward import Reward
from lora_engine.objectives.sft import SFT
from lora_engine.objectives.simpo import SimPO

VOCAB = 61
GRPO_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce")
SETTINGS = {"cispo": {"epsilon_high": 1.1}, "dr_grpo": {"max_completion_length": 9}}

PAIRED = {
    **{f"dpo {kind}": DPO(kind) for kind in ("sigmoid", "sigmoid_norm", "hinge", "ipo")},
    "dpo smoothed": DPO(label_smoothing=0.1),
    "dpo robust": DPO("robust", label_smoothing=0.2),
    "orpo": ORPO(),
    "simpo": SimPO(),
    **{f"cpo {kind}": CPO(kind) for kind in ("sigmoid", "hinge", "ipo")},
    "reward": Reward(centre=0.05),
}
JUDGED = {"kto": KTO(undesirable_weight=0.7), "kto apo_zero": KTO("apo_zero")}
SAMPLED = {
    **{
        f"grpo {kind}": GRPO(kind, kl_weight=0.05, entropy_weight=0.02, **SETTINGS.get(kind, {}))
        for kind in GRPO_TYPES
    },
    "ppo": PPO(entropy_weight=0.01),
}
PLAIN = {"sft": SFT(), "domain": Domain(0.1), "distill": Distill(cross_entropy=0.3)}
EVERY = {**PLAIN, **PAIRED, **JUDGED, **SAMPLED}


def examples_for(name: str, count: int = 4, seed: int = 0, *, prompt: int = 9) -> list[Example]:
    """Records of what the objective learns from; prompts of `prompt` tokens, answers of 1 to 6."""
    draw = random.Random(seed)

    def answer(asked: list[int], role: str = "") -> Example:
        ids = [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 7))]
        supervised = [False] * len(asked) + [True] * len(ids)
        return Example([*asked, *ids], supervised, role=role)

    made = []
    for number in range(count):
        asked = [draw.randrange(VOCAB) for _ in range(prompt)]
        origin = f"data.jsonl:{number + 1}"
        if name in PAIRED:
            chosen, rejected = answer(asked, "chosen"), answer(asked, "rejected")
            other = replace(rejected, origin=origin)
            made.append(replace(chosen, origin=origin, others=(other,)))
        elif name in JUDGED:
            role = "undesirable" if number % 2 else "desirable"
            made.append(replace(answer(asked, role), origin=origin))
        elif name in SAMPLED:
            for _ in range(2):  # a group
                sampled = answer(asked)
                columns = {"advantages": draw.uniform(-1, 1)}
                for column in ("old_logprobs", "sampler_logprobs", "old_values", "returns"):
                    base = -4.1 if "log" in column else 0.3
                    numbers = [base + draw.uniform(-0.4, 0.4) for _ in range(sampled.num_targets)]
                    columns[column] = numbers
                made.append(replace(sampled, origin=origin, columns=columns))
        else:
            made.append(replace(answer(asked), origin=origin))
    return with_mismatched(made)


def batch_for(name: str, count: int = 4, seed: int = 0, **options: object) -> PackedBatch:
    """Those examples, with the statistic that KTO takes over all batches of a step."""
    batch = collate(examples_for(name, count, seed), **options)
    return replace(batch, statistics={"kl": torch.tensor(0.03)}) if name in JUDGED else batch


class Numbers:
    """What a model might say of a batch's targets, as leaves in float64."""

    def __init__(self, batch: PackedBatch, objective: object, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(count: int, low: float, high: float) -> torch.Tensor:
            made = torch.rand(count, generator=generator, dtype=torch.float64)
            return (low + (high - low) * made).requires_grad_()

        reads, count = objective.reads, batch.num_targets
        self.leaves = {"logprobs": draw(count, -4.5, -3.7)}
        self.rest = {"reference": draw(count, -4.5, -3.7).detach()}
        if reads.entropy:
            self.leaves["entropy"] = draw(count, 1, 3)
        if reads.values:
            size = batch.num_examples if reads.values == "examples" else count
            self.leaves["values"] = draw(size, -1, 1)
        if reads.divergence:
            self.leaves["divergence"] = draw(1, 1, 2)
        if reads.values == "examples":
            del self.leaves["logprobs"]
        if not reads.reference:
            self.rest = {}

    def scores(self, *leaves: torch.Tensor) -> TargetScores:
        """Of `leaves` in place of the numbers' own, in their order."""
        given = dict(zip(self.leaves, leaves or self.leaves.values(), strict=True))
        logprobs = given.pop("logprobs", torch.zeros(0, dtype=torch.float64))
        if "divergence" in given:
            given["divergence"] = given["divergence"].sum()
        correct = torch.zeros(len(logprobs), dtype=torch.bool)
        return TargetScores(logprobs, logprobs.sum(), correct, **given, **self.rest)
