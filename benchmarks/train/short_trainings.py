"""Short trainings of tiny random models, one of each kind; same_bits.py runs them at two revisions.

    python -m benchmarks.train.short_trainings --out FOLDER [--device cuda] [CASE ...]

Writes FOLDER/CASE.safetensors with every step's loss and gradient norm, the held-out losses, and
the final weights; FOLDER/CASE.error instead where a training failed. Only names that lora_engine's
users have are used here, so that one file serves many revisions.
"""

import argparse
import importlib.util
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

import lora_engine
from lora_engine.data import Example, TokenizedDataset

VOCABULARY = 61
PREFIX = 24  # tokens that the examples of a dataset with prefixes begin with in common
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Training:
    """One short training.

    model: transformers' model_type. config: its sizes that differ from `make_model`'s.
    lora: peft.LoraConfig's arguments, for each adapter; none: all weights are trained.
    train: TrainConfig's fields that differ from `SETTINGS`.
    prefixes: the examples begin with PREFIX tokens in common.
    interrupted: stopped by a signal after the second step, and resumed.
    """

    model: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    lora: tuple[dict[str, Any], ...] = ({},)
    train: dict[str, Any] = field(default_factory=dict)
    accelerated: bool = True
    checkpointing: bool = False
    prefixes: bool = False
    interrupted: bool = False


SETTINGS: dict[str, Any] = {
    "max_steps": 4,
    "tokens_per_batch": 128,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "weight_decay": 0.01,
    "final_weights": "last",
}
ODD_RANKS = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}

TRAININGS = {
    "full": Training(lora=()),
    "full, tied head": Training(lora=(), config={"tie_word_embeddings": True}),
    "lora": Training(),
    "lora, not accelerated": Training(accelerated=False),
    "rslora": Training(lora=({"use_rslora": True, "r": 7},)),
    "bias": Training(lora=({"bias": "all"},), config={"attention_bias": True, "mlp_bias": True}),
    "lora_bias": Training(lora=({"lora_bias": True},)),
    "modules_to_save": Training(
        lora=({"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},)
    ),
    "embedding and head": Training(
        lora=({"target_modules": ["embed_tokens", "lm_head", "v_proj"]},)
    ),
    "dora": Training(lora=({"use_dora": True},)),
    "dropout": Training(lora=({"lora_dropout": 0.3},)),
    "several adapters": Training(lora=({}, ODD_RANKS)),
    "packed": Training(prefixes=True, train={"share_prefixes": False}),
    "shared prefixes": Training(prefixes=True),
    "accumulation, clipping": Training(
        train={"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "loraplus_lr_ratio": 4.0}
    ),
    "8-bit moments": Training(train={"optimizer": "adamw_8bit"}),
    "checkpointing": Training(checkpointing=True),
    "resumed": Training(lora=({"lora_dropout": 0.1},), interrupted=True),
    "qwen3": Training(model="qwen3", config={"head_dim": 16}),
    "gemma": Training(model="gemma", config={"head_dim": 8}),
    "stablelm": Training(model="stablelm"),
}
CASES = [f"{name}, {dtype}" for name in TRAININGS for dtype in DTYPES]


def make_model(training: Training, dtype: torch.dtype, device: str) -> Any:
    """The training's model with its adapters, their B random so that no gradient is zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.AutoConfig.for_model(training.model, **{**sizes, **training.config})
    model: Any = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    names = adapter_names(training)
    for name, options in zip(names, training.lora, strict=True):
        lora = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
        )
        if name == names[0]:
            model = peft.get_peft_model(model, lora, adapter_name=name)
        else:
            model.add_adapter(name, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.any():
                parameter.normal_(std=0.1)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = model.to(device).train()
    if training.accelerated:
        lora_engine.accelerate(model)
    return model


def adapter_names(training: Training) -> list[str]:
    """The names of a training's adapters."""
    return ["default", "other"][: len(training.lora)]


def make_dataset(training: Training, count: int, seed: int) -> TokenizedDataset:
    """`count` examples of ragged lengths; the later part of each is supervised."""
    draw = random.Random(seed)
    names = adapter_names(training) if len(training.lora) > 1 else [""]
    common = [draw.randrange(VOCABULARY) for _ in range(PREFIX if training.prefixes else 0)]
    examples = []
    for index in range(count):
        own = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(3, 30))]
        prompt = len(common) + draw.randrange(1, len(own))
        ids = common + own
        supervised = [position >= prompt for position in range(len(ids))]
        examples.append(Example(ids, supervised, f"{index + 1}", adapter=names[index % len(names)]))
    return TokenizedDataset(examples)


class Recorder:
    """What a training said on its way; a signal after step `stop_at`."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.heldout: list[float] = []
        self.stop_at = stop_at

    def on_step(self, metrics: Any) -> None:
        self.losses.append(metrics.loss)
        self.grad_norms.append(metrics.grad_norm)
        if metrics.step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)

    def on_eval(self, step: int, result: Any) -> None:
        self.heldout.append(result.loss)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything recorded, float64, by name."""
        return {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in (
                ("loss", self.losses),
                ("grad_norm", self.grad_norms),
                ("heldout_loss", self.heldout),
            )
        }


def train(training: Training, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Trains; returns the recorded numbers and, as "weight NAME", every parameter."""
    recorder = Recorder(stop_at=2 if training.interrupted else None)
    data = [make_dataset(training, *size_and_seed) for size_and_seed in ((40, 1), (8, 2))]
    with tempfile.TemporaryDirectory(prefix="short-training-") as folder:
        config = lora_engine.TrainConfig(output_dir=folder, **{**SETTINGS, **training.train})
        for resume in (False, True) if training.interrupted else (False,):
            model = make_model(training, dtype, device)
            trainer = lora_engine.Trainer(model, None, *data, config, callbacks=[recorder])
            trainer.fit(resume=resume)
    weights = {f"weight {n}": p.detach().cpu().clone() for n, p in model.named_parameters()}
    return {**recorder.tensors(), **weights}


def is_within(folder: Path) -> bool:
    """Whether lora_engine and all of its parts come from `folder`.

    The Triton kernels are mapped into the package, as `kernels` in its first revisions; an editable
    installation answers for the name that the revision has not.
    """

    def comes_from_folder(name: str) -> bool:
        part = importlib.util.find_spec(f"lora_engine.{name}")
        return bool(part and part.origin and Path(part.origin).is_relative_to(folder))

    triton = comes_from_folder("backends.triton") or comes_from_folder("kernels")
    return triton and comes_from_folder("_C") and comes_from_folder("ops")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {CASES}; default: all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--expect", type=Path, help="the folder lora_engine has to come from")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.expect is not None and not is_within(args.expect):
        sys.exit(f"lora_engine comes from {lora_engine.__file__}, not from {args.expect}")
    for case in args.cases or CASES:
        name, dtype = case.rsplit(", ", 1)
        try:
            tensors = train(TRAININGS[name], DTYPES[dtype], args.device)
        except Exception:
            (args.out / f"{case}.error").write_text(traceback.format_exc())
        else:
            save_file(tensors, args.out / f"{case}.safetensors")


if __name__ == "__main__":
    main()
