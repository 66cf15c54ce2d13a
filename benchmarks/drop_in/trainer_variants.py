"""Settings of trainers beside their defaults: packing, resuming, evaluation, noise and the like."""

import importlib
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.drop_in.trainer_cases import Case, make_model
from benchmarks.drop_in.trainer_setups import (
    BAD,
    GOOD,
    PAIRS,
    PROMPTS,
    TRL,
    accuracy,
    hugging_face,
    share_of_vowels,
)
from lora_engine.testing import CHAT_TEMPLATE, byte_tokenizer

Build = Callable[..., Any]
# The same template, which also says what the assistant's own words are.
_CHAT = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}<end>",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<end>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<end>{% endif %}",
)
_TEXTS = {"text": [a + b for a, b in zip(PROMPTS * 2, GOOD + BAD, strict=True)]}
_ANSWERS = {"prompt": PROMPTS, "completion": GOOD}
_ASKED = {"prompt": PROMPTS}
_SAMPLES: dict[str, Any] = {"rewards": True, "max_completion_length": 8}
# What Online DPO logs of all rows of a batch, padding among them, whose logits are not computed.
_SUMS_OVER_PADDING = tuple(
    f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward")
)
_EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
# The worst of five, so that what is loaded at the end is not what is there already.
_BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


def trl(name: str, rows: dict[str, Any], model: Any, folder: Path, **settings: Any) -> Any:
    """TRL's trainer of this name, which evaluates on the rows that it trains on."""
    import datasets
    import trl

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = _CHAT
    data = datasets.Dataset.from_dict(rows)
    return getattr(trl, f"{name}Trainer")(
        model,
        args=getattr(trl, f"{name}Config")(str(folder), **settings),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
    )


def conversations() -> dict[str, Any]:
    """Two questions and two answers a row."""
    rows = []
    for words in zip(PROMPTS, GOOD, PROMPTS[::-1], BAD, strict=True):
        roles = ("user", "assistant") * 2
        rows.append([{"role": r, "content": w} for r, w in zip(roles, words, strict=True)])
    return {"messages": rows}


def having(build: Build, **own: Any) -> Build:
    """`build` with these settings, whatever the others say."""

    def built(model: Any, folder: Path, **settings: Any) -> Any:
        return build(model, folder, **settings | own)

    return built


def resumed(build: Build) -> Build:
    """The trainer that goes on from the third step of another, with other weights in the model."""

    def built(model: Any, folder: Path, **settings: Any) -> Any:
        saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
        build(model, folder, **settings | saving).train()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3)
        trainer = build(model, folder, **settings)
        checkpoint = str(folder / "checkpoint-3")
        trainer.train = partial(trainer.train, resume_from_checkpoint=checkpoint)
        return trainer

    return built


def synchronised(name: str, **own: Any) -> Build:
    """TRL's trainer with a reference model that follows the one in training.

    The reference is loaded from where the model came from.
    """

    def built(model: Any, folder: Path, **settings: Any) -> Any:
        with tempfile.TemporaryDirectory(prefix="reference-") as saved:
            model.save_pretrained(saved)
            model.config._name_or_path = saved
            following = {"sync_ref_model": True, "ref_model_sync_steps": 2}
            return TRL[name].build(model, folder, **settings | following | own)

    return built


def other(
    place: str,
    name: str,
    rows: dict[str, Any],
    model: Any,
    folder: Path,
    *,
    teaches: bool = False,
    rewards: bool = False,
    **settings: Any,
) -> Any:
    """The trainer `name` of the module `place`, which may want a teacher or a reward."""
    import datasets

    given: dict[str, Any] = {"reward_funcs": share_of_vowels} if rewards else {}
    if teaches:
        given["teacher_model"] = make_model("Llama", "ForCausalLM").eval()
    module = importlib.import_module(place)
    return getattr(module, f"{name}Trainer")(
        model=model,
        args=getattr(module, f"{name}Config")(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=byte_tokenizer(),
        **given,
    )


def experimental(place: str, name: str, rows: dict[str, Any], **own: Any) -> Build:
    """`other` of the module `place` of trl.experimental."""
    return having(partial(other, f"trl.experimental.{place}", name, rows), **own)


SFT = partial(trl, "SFT", _ANSWERS)
VARIANTS = {
    "SFT, packing": Case(having(partial(trl, "SFT", _TEXTS), packing=True, max_length=48)),
    "SFT, packing wrapped": Case(
        having(partial(trl, "SFT", _TEXTS), packing=True, packing_strategy="wrapped", max_length=48)
    ),
    "SFT, padding_free": Case(having(SFT, padding_free=True, max_length=None)),
    "SFT, assistant_only_loss": Case(
        having(partial(trl, "SFT", conversations()), assistant_only_loss=True)
    ),
    "SFT, gradient accumulation, odd last batch": Case(having(SFT, gradient_accumulation_steps=2)),
    "SFT, neftune": Case(having(SFT, neftune_noise_alpha=5)),
    "SFT, evaluation": Case(having(SFT, **_EVALUATION)),
    "SFT, resumed": Case(resumed(SFT)),
    "SFT, best model at the end": Case(having(SFT, **_BEST)),
    "DPO, evaluation": Case(having(partial(trl, "DPO", PAIRS), **_EVALUATION), but=TRL["DPO"].but),
    "DPO, padding_free": Case(
        having(partial(trl, "DPO", PAIRS), padding_free=True), but=TRL["DPO"].but
    ),
    "DPO, sync_ref_model": Case(synchronised("DPO"), lora=False, but=TRL["DPO"].but),
    "GRPO, sync_ref_model": Case(synchronised("GRPO", beta=0.1), lora=False),
    "GRPO, beta": Case(having(TRL["GRPO"].build, beta=0.1)),
    "Trainer, gradient accumulation, odd last batch": Case(
        having(hugging_face, gradient_accumulation_steps=3)
    ),
    "Trainer, neftune": Case(having(hugging_face, neftune_noise_alpha=5)),
    "Trainer, resumed": Case(resumed(hugging_face)),
    "Trainer, all weights, resumed": Case(resumed(hugging_face), lora=False),
    "Trainer, best model at the end": Case(having(hugging_face, **_BEST)),
    "Trainer, compute_metrics in parts": Case(
        having(hugging_face, compute_metrics=accuracy, eval_accumulation_steps=1, **_EVALUATION)
    ),
    "SFT, dft": Case(having(SFT, loss_type="dft")),
    "SFT, padding_free, dft": Case(
        having(SFT, padding_free=True, max_length=None, loss_type="dft")
    ),
    "SFT, bfd_split": Case(
        having(
            partial(trl, "SFT", _TEXTS), packing=True, packing_strategy="bfd_split", max_length=24
        )
    ),
    "DPO, three losses at once": Case(
        having(
            partial(trl, "DPO", PAIRS),
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
        ),
        but=TRL["DPO"].but,
    ),
    "DPO, reference computed before": Case(
        having(partial(trl, "DPO", PAIRS), precompute_ref_log_probs=True, padding_free=True),
        but=TRL["DPO"].but,
    ),
    "GRPO, GSPO": Case(
        having(TRL["GRPO"].build, importance_sampling_level="sequence", loss_type="grpo")
    ),
    "GRPO, the uncertain half": Case(having(TRL["GRPO"].build, top_entropy_quantile=0.5)),
    "GKD": Case(
        experimental("gkd", "GKD", conversations(), teaches=True, max_new_tokens=8, lmbda=0.5)
    ),
    "TPO": Case(experimental("tpo", "TPO", {**PAIRS, "reference": GOOD[::-1]})),
    "GMPO": Case(experimental("gmpo", "GMPO", _ASKED, **_SAMPLES, num_generations=4)),
    "A2PO": Case(experimental("a2po", "A2PO", _ASKED, **_SAMPLES)),
    "Online DPO": Case(
        experimental(
            "online_dpo",
            "OnlineDPO",
            _ASKED,
            rewards=True,
            max_new_tokens=8,
            max_length=64,
        ),
        but=_SUMS_OVER_PADDING,
    ),
    "SDPO": Case(
        experimental(
            "sdpo",
            "SDPO",
            {**_ASKED, "privileged_context": GOOD},
            **_SAMPLES,
            num_generations=4,
        )
    ),
    "Distillation": Case(
        having(partial(other, "trl", "Distillation", _ASKED), teaches=True, max_completion_length=8)
    ),
}
