"""The trainers of TRL and transformers, set up as their users do."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.drop_in.trainer_cases import Case
from lora_engine.testing import byte_tokenizer

PROMPTS = ["Say a", "Count to three", "And now?", "What colour is the sea today", "Why", "Go on:"]
GOOD = [" word.", " one two three", " nothing", " blue, as ever, and green", " so", " then"]
BAD = [" no", " four", " I will not tell you that at all", " red", " because of that", " stop it"]
PAIRS = {"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD}


def offline(name: str, rows: dict[str, Any], model: Any, folder: Path, **settings: Any) -> Any:
    """TRL's trainer of this name on rows of text."""
    import datasets
    import trl
    from trl.experimental import cpo, orpo

    place = {"CPO": cpo, "ORPO": orpo}.get(name, trl)
    return getattr(place, f"{name}Trainer")(
        model,
        args=getattr(place, f"{name}Config")(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=byte_tokenizer(),
    )


def online(name: str, model: Any, folder: Path, **settings: Any) -> Any:
    """TRL's trainer of this name, which samples completions with the model."""
    import datasets
    import trl

    sampling = {"num_generations": 4, "max_completion_length": 12}
    return getattr(trl, f"{name}Trainer")(
        model,
        share_of_vowels,
        args=getattr(trl, f"{name}Config")(str(folder), **sampling, **settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=byte_tokenizer(),
    )


def share_of_vowels(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs between any two completions, nearly."""
    return [sum(c in "aeiou" for c in text) + 0.01 * len(text) for text in completions]


# Means over every position of a batch, padding among them, whose logits are not computed.
_MEAN_LOGITS = ("logits/chosen", "logits/rejected")
# The reference is a copy of the adapters: at first all rewards are zero, but for rounding.
_TIES = ("rewards/accuracies of step 1",)
TRL = {
    "SFT": Case(partial(offline, "SFT", {"prompt": PROMPTS, "completion": GOOD})),
    "DPO": Case(partial(offline, "DPO", PAIRS), but=_TIES),
    "KTO": Case(
        partial(
            offline,
            "KTO",
            {"prompt": PROMPTS * 2, "completion": GOOD + BAD, "label": [True] * 6 + [False] * 6},
        )
    ),
    "ORPO": Case(partial(offline, "ORPO", PAIRS), but=_MEAN_LOGITS),
    "CPO": Case(partial(offline, "CPO", PAIRS), but=_MEAN_LOGITS),
    "Reward": Case(partial(offline, "Reward", PAIRS), kind="ForSequenceClassification"),
    "GRPO": Case(partial(online, "GRPO")),
    "RLOO": Case(partial(online, "RLOO")),
}


def hugging_face(
    model: Any,
    folder: Path,
    *,
    trainer_class: str = "Trainer",
    compute_loss_func: Any = None,
    compute_metrics: Any = None,
    **settings: Any,
) -> Any:
    """transformers' Trainer on padded rows of token ids, whose prompts are no labels."""
    import datasets
    import transformers

    tokenizer = byte_tokenizer()
    prompts, answers = (tokenizer(list(texts)).input_ids for texts in (PROMPTS, GOOD))
    rows = datasets.Dataset.from_list(
        [
            {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )
    classes = {"Trainer": transformers.Trainer, "reads logits": reads_logits()}
    return classes[trainer_class](
        model=model,
        args=transformers.TrainingArguments(str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=compute_loss_func,
        compute_metrics=compute_metrics,
    )


def reads_logits() -> type:
    """A Trainer whose loss is taken of the logits of a call with labels."""
    import transformers

    class ReadsLogits(transformers.Trainer):
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | None = None,
        ) -> Any:
            outputs = model(**inputs)
            loss = focal_loss(outputs, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    return ReadsLogits


def focal_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy that counts uncertain tokens more."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    kept = losses[targets.flatten() != -100]
    focal = (1 - torch.exp(-kept)) ** 2 * kept
    return focal.mean() if num_items_in_batch is None else focal.sum() / num_items_in_batch


def accuracy(evaluated: Any) -> dict[str, float]:
    """Of the logits, the share of labels that are the likeliest token, and their mean logit."""
    logits, labels = evaluated.predictions[:, :-1], evaluated.label_ids[:, 1:]
    kept = labels != -100
    of_labels = logits[kept][range(kept.sum()), labels[kept]]
    right = logits[kept].argmax(-1) == labels[kept]
    return {"accuracy": float(right.mean()), "logit": float(of_labels.mean())}


HUGGING_FACE = {
    "default": Case(hugging_face),
    "gradient accumulation": Case(partial(hugging_face, gradient_accumulation_steps=2)),
    "gradient checkpointing": Case(partial(hugging_face, gradient_checkpointing=True)),
    "label smoothing": Case(partial(hugging_face, label_smoothing_factor=0.1)),
    "compute_loss_func": Case(partial(hugging_face, compute_loss_func=focal_loss)),
    "compute_loss reads logits": Case(partial(hugging_face, trainer_class="reads logits")),
    "compute_metrics": Case(
        partial(hugging_face, compute_metrics=accuracy, eval_strategy="steps", eval_steps=2)
    ),
    "all weights": Case(hugging_face, lora=False),
}
