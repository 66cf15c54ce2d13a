"""How an online run writes and uses completions: `RolloutConfig`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RolloutConfig(BaseModel):
    """What the model writes in a round of an online objective, and how it learns from it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompts: int = Field(8, ge=1, le=10**6, description="Prompts of a round.")
    generations: int = Field(
        8, ge=1, le=10**4, description="Completions of each prompt, which are compared."
    )
    minibatches: int = Field(
        1,
        ge=1,
        le=10**6,
        description="Optimiser steps that a round's prompts are shared out to.",
    )
    passes: int = Field(
        1, ge=1, le=1000, description="How often a round is learned from before the next."
    )
    max_new_tokens: int = Field(64, ge=1, le=10**6, description="Longest completion in tokens.")
    temperature: float = Field(
        1.0,
        ge=1e-6,
        le=100,
        description="What logits are divided by, when writing and when learning.",
    )
    top_k: int = Field(0, ge=0, le=10**9, description="Draw from the k likeliest; 0: from all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw from the likeliest that have this probability together."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Draw from those with this share of the likeliest's."
    )
    stop: tuple[str, ...] = Field(
        (), description="Texts that end a completion, beside the tokens that end a turn."
    )
    mask_truncated: bool = Field(
        False, description="Learn nothing from completions that were cut at max_new_tokens."
    )
    overlong_buffer: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Tokens before max_new_tokens over which a completion loses up to "
        "overlong_penalty of its reward (DAPO's soft punishment, arXiv:2503.14476).",
    )
    overlong_penalty: float = Field(
        1.0, ge=0, le=10**6, description="What the longest completions lose of their reward."
    )
    dynamic_sampling: bool = Field(
        False,
        description="Go on with further prompts in place of those whose completions all have the "
        "same reward (DAPO).",
    )
    max_resampled: int = Field(
        3,
        ge=1,
        le=1000,
        description="With dynamic_sampling, how often a round looks for further prompts.",
    )
    old_logprobs: Literal["sampler", "trainer"] = Field(
        "sampler",
        description="Whose log-probabilities the ratios compare with: those of sampling, or those "
        "of a pass of the model before the round's first step, beside which the sampler's correct "
        "the loss.",
    )
    eval_generations: int = Field(
        1, ge=1, le=10**4, description="Completions of each held-out prompt."
    )
    eval_temperature: float = Field(
        0.0, ge=0, le=100, description="Of these; 0 writes the likeliest token."
    )
    engine: Literal["lora_engine", "vllm"] = Field(
        "lora_engine", description="What writes: the trained model's own layers, or a vLLM server."
    )
    server: str | None = Field(
        None, description="The vLLM server's address; http://127.0.0.1:8000 if null."
    )
    server_folder: str | None = Field(
        None,
        description="Where the server finds the adapter, in the same place as here; a folder for "
        "temporary files if null.",
    )
    server_timeout: float = Field(
        1800.0, gt=0, le=10**6, description="Seconds that an answer of the server may take."
    )

    @model_validator(mode="after")
    def _numbers_fit(self) -> "RolloutConfig":
        if self.minibatches > self.prompts:
            raise ValueError(
                f"minibatches {self.minibatches} must be at most prompts {self.prompts}: the "
                "completions of a prompt stay together"
            )
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong_buffer {self.overlong_buffer} must be at most max_new_tokens "
                f"{self.max_new_tokens}"
            )
        draws_from_some = bool(self.top_k or self.min_p) or self.top_p < 1
        if self.engine == "vllm" and self.temperature != 1 and draws_from_some:
            raise ValueError(
                "engine vllm tells log-probabilities before the temperature or after top_k, top_p "
                "and min_p; leave temperature at 1, or these three out"
            )
        if self.dynamic_sampling and self.generations == 1:
            raise ValueError("dynamic_sampling compares completions of a prompt; give generations")
        return self

    def trajectory(self) -> dict[str, object]:
        """What decides the weights: all but where a server is."""
        where = {"server", "server_folder", "server_timeout"}
        return self.model_dump(mode="json", exclude=where)

    @property
    def steps(self) -> int:
        """Optimiser steps of a round."""
        return self.passes * self.minibatches
