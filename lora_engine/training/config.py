"""What the training loop can be told: `TrainConfig`."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lora_engine.config_schema import describe_problems
from lora_engine.errors import UserError
from lora_engine.files import user_path
from lora_engine.memory.policy import policy_of
from lora_engine.text import parsed_bytes

Service: TypeAlias = Literal["tensorboard", "wandb", "mlflow", "trackio"]

# Changing these between a checkpoint and its resumption leaves every weight as it would have
# been; changing any other field makes it another run.
_FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "overwrite",
        "eval_every",
        "early_stopping_patience",
        "stop_on_forgetting",
        "best_by",
        "save_every",
        "keep_checkpoints",
        "final_weights",
        "max_length",  # its effect, the tokens, is compared by itself
        "max_steps",  # a run may be extended
        "preflight",
        "epochs",
        "log_to",
        "checkpointing",
        "memory",
        "layerwise_update",
        "offload_activations",
        "offload_optimizer",
        "sequence_parallel",
    }
)


def _as_path(value: object) -> object:
    return user_path(value) if isinstance(value, str | Path) else value


def _checked_policy(name: str) -> str:
    return policy_of(name).name


def _checked_memory(size: str) -> str:
    if size != "auto":
        try:
            parsed_bytes(size)
        except ValueError as error:
            raise ValueError(f"{error}, or auto") from error
    return size


# A path, ~ as the home folder.
UserPath = Annotated[Path, BeforeValidator(_as_path)]


class TrainConfig(BaseModel):
    """The training loop: how long, how fast, how often it measures and saves.

    Raises UserError, one line, for a value that a field does not take.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    output_dir: UserPath = Field(
        Path("runs/train"),
        description="Folder of the run: checkpoints/, adapter/ and metrics.jsonl.",
    )
    overwrite: bool = Field(
        False,
        description="Discard the run that output_dir already holds, if any, when not resuming; "
        "nothing but files of the run is deleted.",
    )

    log_to: tuple[Service, ...] = Field(
        (),
        description="Services that are told every step's and evaluation's numbers, through their "
        "own packages: `tensorboard` (files in output_dir), `wandb`, `mlflow`, `trackio`.",
    )

    max_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Number of optimiser steps; give this or epochs. More of either extends a "
        "run that is resumed.",
    )
    epochs: int | None = Field(
        None,
        ge=1,
        le=10**4,
        description="Number of passes over the training data; one if max_steps is not given.",
    )
    tokens_per_batch: int = Field(
        4096, ge=2, le=10**7, description="Tokens packed into one micro-batch, without padding."
    )
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        le=10**6,
        description="Micro-batches per optimiser step; their gradient is that of one large batch.",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        le=10**7,
        description="Longest example in tokens, for data that the Trainer tokenises itself.",
    )

    preflight: bool = Field(
        True,
        description="Try a step on the first batch before the run, and stop where nothing would be "
        "learned; the weights are then put back.",
    )

    share_prefixes: bool = Field(
        True,
        description="Compute what examples of a batch begin with in common once, for the same "
        "gradients, where the model's attention is lora_engine's and nothing is dropped out.",
    )

    checkpointing: Annotated[str, AfterValidator(_checked_policy)] | None = Field(
        None,
        description="What layers keep for the backward pass, which computes the rest again, to "
        "bitwise the same weights: `none` keeps everything, `every_2` (or another number) of each "
        "second layer its input alone, `selective` the input and attention's output, `half` the "
        "inputs of a layer's halves, `tiled_4096` as well, with the MLP run on so many tokens at "
        "once (to rounding), `layer` the input (docs/memory.md). `null` leaves the model's "
        "layers as they are.",
    )

    offload_activations: Literal["disk", "host"] | None = Field(
        None,
        description="Where what `checkpointing` keeps waits for the backward pass: `disk` is a "
        "file without a name in output_dir, `host` the computer's memory, for a GPU "
        "(docs/memory.md); `null`: the model's device.",
    )

    offload_optimizer: Literal["host"] | None = Field(
        None,
        description="Where the optimiser's state is: `host` is the computer's memory, for a GPU, "
        "which sees it in pieces at every step; `null`: the model's device.",
    )

    memory: Annotated[str, AfterValidator(_checked_memory)] | None = Field(
        None,
        description="Memory of the device that the run may use, `24GB` say, or `auto` for all of "
        "it: checkpointing, and smaller micro-batches where that is not enough, are chosen to fit, "
        "and the longest batch is tried before the first step (docs/memory.md).",
    )

    sequence_parallel: bool = Field(
        False,
        description="Of several processes, each runs a part of the tokens of every micro-batch, "
        "and within attention a part of the heads, for sequences that one process has no memory "
        "for (docs/distributed.md). Supervised fine-tuning, without dropout.",
    )

    learning_rate: float = Field(2e-4, gt=0, le=100, description="Peak learning rate.")
    loraplus_lr_ratio: float = Field(
        1.0,
        gt=0,
        le=10**4,
        description="Learning rate of LoRA's B over that of A (LoRA+, arXiv:2402.12354: 16, say).",
    )
    adapter_learning_rates: dict[str, Annotated[float, Field(gt=0, le=10**4)]] = Field(
        default_factory=dict,
        description="What multiplies the learning rate of an adapter, by its name.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up."
    )
    warmup_steps: int | None = Field(
        None, ge=0, le=10**9, description="Steps of linear warm-up; give this or warmup_ratio."
    )
    warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Warm-up as a share of all steps; none if neither is given."
    )
    min_lr_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the peak learning rate that cosine and linear end at.",
    )

    trainable: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="Without adapters, regular expressions: parameters in whose names one is found "
        "are trained, the others are frozen; `null` trains those that the model has unfrozen.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "lion", "adafactor"] = Field(
        "adamw",
        description="`adamw` has moments in float32, 8 bytes a trained value, `adamw_8bit` in 8 "
        "bits, 2 bytes; `lion` has one moment, 4 bytes, and wants a third to a tenth of AdamW's "
        "learning rate; `adafactor` a row and a column of a matrix (docs/memory.md).",
    )
    rounding: Literal["stochastic"] | None = Field(
        None,
        description="How bfloat16 weights that are trained take an update: `null` keeps float32 "
        "masters of them, 4 bytes a value; `stochastic` has none, and rounds each weight up or "
        "down at random.",
    )
    layerwise_update: bool = Field(
        False,
        description="Update each weight within the backward pass, when its gradient is there, so "
        "that gradients are never all in memory. For one micro-batch a step, without max_grad_norm "
        "(docs/memory.md).",
    )
    weight_decay: float = Field(
        0.0, ge=0, le=100, description="Decoupled weight decay, on all trained weights."
    )
    beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="AdamW's decay rate of the gradient's mean; Lion's of its step.",
    )
    beta2: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="AdamW's decay rate of the squared gradient's mean; Lion's of its moment, 0.99 "
        "unless given.",
    )
    eps: float = Field(1e-8, gt=0, lt=1, description="AdamW's term in the denominator.")
    kl_to_base: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="Against forgetting: adds this times the mean over supervised tokens of the KL "
        "divergence from the model without its adapter to the one with it.",
    )
    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        le=10**9,
        description="Gradients with a larger global norm are scaled down to it; null never does.",
    )

    eval_every: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Steps between evaluations on held-out data; null evaluates first and last.",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Stop after this many evaluations in a row without a better held-out result.",
    )
    stop_on_forgetting: float | None = Field(
        None,
        gt=0,
        le=10**6,
        description="Stop at an evaluation where the probe's loss has risen by more than this "
        "share of what it was before training: 0.1 for 10 %. Weights that forgot more are never "
        "the best.",
    )
    best_by: str = Field(
        "loss",
        description="What the best weights are told by: the held-out `loss`, `accuracy`, or one of "
        "the objective's metrics, such as `rewards/accuracies`. Of equally good ones the latest "
        "are the best.",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Steps between checkpoints; null saves first, last and at the best.",
    )
    keep_checkpoints: int = Field(
        2, ge=1, le=10**6, description="Newest checkpoints to keep; the best one is kept besides."
    )
    final_weights: Literal["best", "last"] = Field(
        "best",
        description="Which weights the run ends with: the best by `best_by`, or the last step's.",
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the order of the data and of dropout."
    )

    @model_validator(mode="before")
    @classmethod
    def _betas_of_lion(cls, given: object) -> object:
        if isinstance(given, dict) and given.get("optimizer") == "lion":
            return {"beta2": 0.99, **given}
        return given

    @model_validator(mode="wrap")
    @classmethod
    def _checked(
        cls, values: object, handler: ModelWrapValidatorHandler["TrainConfig"], info: ValidationInfo
    ) -> "TrainConfig":
        """Context is given by a reader of files, who says more: where the value stands."""
        try:
            config = handler(values)
            config._check_pairs()
        except ValueError as error:
            if info.context is not None:
                raise
            message, more = str(error), 0
            if isinstance(error, ValidationError):
                message, more = describe_problems(TrainConfig, error.errors())[1:]
            suffix = f" ({more} more after this one)" if more else ""
            raise UserError(f"TrainConfig: {message}{suffix}") from error
        return config

    def _check_pairs(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give either max_steps or epochs, not both")
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give either warmup_steps or warmup_ratio, not both")
        if (
            self.max_steps is not None
            and self.warmup_steps is not None
            and self.warmup_steps >= self.max_steps
        ):
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be less than max_steps {self.max_steps}"
            )
        if self.early_stopping_patience is not None and self.eval_every is None:
            raise ValueError("early_stopping_patience needs eval_every; give both")
        if self.stop_on_forgetting is not None and self.eval_every is None:
            raise ValueError("stop_on_forgetting needs eval_every; give both")
        if self.offload_activations and self.checkpointing in (None, "none"):
            raise ValueError(
                "offload_activations is for what checkpointed layers keep; set checkpointing to "
                "layer, half, selective or every_2"
            )
        if self.offload_optimizer and self.optimizer == "adafactor":
            raise ValueError(
                "offload_optimizer: the states of adafactor are a row and a column of each matrix; "
                "leave it out"
            )
        if self.layerwise_update and self.gradient_accumulation_steps > 1:
            raise ValueError(
                "layerwise_update has no gradients to accumulate; set gradient_accumulation_steps "
                "to 1"
            )
        if self.layerwise_update and self.max_grad_norm is not None:
            raise ValueError(
                "layerwise_update cannot clip by a norm that is known after the updates; set "
                "max_grad_norm to null"
            )

    def trajectory(self) -> dict[str, object]:
        """The fields that decide the weights, as JSON values; a resumed run must share them."""
        return self.model_dump(mode="json", exclude=set(_FREE_ON_RESUME))
