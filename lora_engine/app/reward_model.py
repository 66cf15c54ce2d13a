"""Reward models: the run of `objective: reward` as a judge of completions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_engine.app.rewards import folder_of
from lora_engine.app.trained import find_trained
from lora_engine.data.batch import collate
from lora_engine.data.render import Example
from lora_engine.data.template import Tokenizer
from lora_engine.data.vocabulary import check_same_vocabulary
from lora_engine.errors import UserError
from lora_engine.evaluation.batch_loss import target_scores
from lora_engine.evaluation.modes import inference
from lora_engine.export.loading import load_adapter
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.models.attach.head import positions_of
from lora_engine.models.load.origin import base_of, how_they_differ, read_base, sha256_of
from lora_engine.models.load.scalar import with_scalar_head
from lora_engine.objectives.reward import Reward as RewardObjective
from lora_engine.training.online.named import Named

_TOKENS_PER_BATCH = 4096


class RewardModel:
    """A scalar head's value at the last token of a prompt and its completion.

    model: a sequence classifier with one label, of the policy's vocabulary. settings: what tells
    its weights from others, for `Reward.settings`. positions: the tokens that it was made for.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Mapping[str, object] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or {}
        self.positions = positions_of(model)

    def __call__(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[float]:
        device = next(self.model.parameters()).device
        whole = [[*asked, *said] for asked, said in zip(prompt_ids, completion_ids, strict=True)]
        values: list[float] = []
        with inference(self.model):
            for first, last in _spans([len(ids) for ids in whole], _TOKENS_PER_BATCH):
                examples = [Example(ids, [False] * len(ids)) for ids in whole[first:last]]
                batch = collate(examples).to(device)
                scores = target_scores(self.model, batch, RewardObjective())
                assert scores.values is not None, "it reads the values of examples"
                values += scores.values.tolist()
        return values


def made_rewards(
    named: Sequence[Any], tokenizer: Tokenizer, device: str | torch.device
) -> list[Named]:
    """The rewards that a configuration names, reward models loaded. tokenizer: of the policy."""
    return [one if folder_of(one) is None else _loaded(one, tokenizer, device) for one in named]


def _loaded(one: Any, tokenizer: Tokenizer, device: str | torch.device) -> Any:
    """A reward model, in float32, whose adapter and head are those of a run of `reward`.

    Raises UserError for a folder that is not whole, another base than it was trained on, and
    another vocabulary.
    """
    settings = dict(one) if isinstance(one, Mapping) else {"reward": one}
    folder = str(settings["reward"])
    trained = find_trained(folder, settings.pop("base", None))
    if not trained.adapters:
        raise UserError(
            f"rewards: {folder} is a whole model; give the run of a reward model, whose head is "
            "in its adapter's folder"
        )
    (read, *more) = trained.choose([])[1]
    adapter = read[0].folder
    if more or read[0].settings.get("task_type") != "SEQ_CLS":
        raise UserError(
            f"rewards: {folder} is not the adapter of a reward model; train one with objective: "
            "reward"
        )
    if "score.weight" not in read[0].whole:
        raise UserError(f"rewards: {folder} has no scalar head; get the complete adapter")
    model, theirs = trained.load_base(dtype="float32", device=device)
    trained_on = read_base(adapter)
    if trained_on is not None and (difference := how_they_differ(trained_on, base_of(model))):
        raise UserError(f"rewards: {folder} is {difference}; give that model as its base")
    check_same_vocabulary(theirs, tokenizer, f"rewards: {folder}")
    model = load_adapter(with_scalar_head(model), adapter).eval().requires_grad_(False)
    accelerate(model)
    weights = {"weights": sha256_of(adapter / "adapter_model.safetensors")}
    judge = RewardModel(model, settings=weights)
    return {"name": Path(folder).name, **settings, "reward": judge}


def _spans(lengths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Runs of sequences of at most `most` tokens together, or of one that has more."""
    spans, first, taken = [], 0, 0
    for place, length in enumerate(lengths):
        if place > first and taken + length > most:
            spans.append((first, place))
            first, taken = place, 0
        taken += length
    return [*spans, (first, len(lengths))]
