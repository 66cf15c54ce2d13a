"""What the model writes for held-out prompts, beside what it should have written."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from lora_engine.evaluation.modes import inference, with_adapter
from lora_engine.generation.engine import Generator, Request
from lora_engine.generation.sampling import Sampling
from lora_engine.models.attach.cached_layers import why_not_cached
from lora_engine.models.families.modules import CausalLm, PeftCausalLm

BATCH_SIZE = 8  # of transformers' generate
CACHE_TOKENS = 65536  # whose keys and values are kept, or more where two prompts have more
PROMPT_TOKENS_OF_PLAIN_TEXT = 0.5


class ExampleLike(Protocol):
    """A tokenized example: `supervised[i]` says whether token i is learned from."""

    @property
    def input_ids(self) -> Sequence[int]: ...

    @property
    def supervised(self) -> Sequence[bool]: ...

    @property
    def origin(self) -> str: ...

    @property
    def truncated(self) -> bool: ...

    @property
    def adapter(self) -> str: ...


class TextTokenizer(Protocol):
    """What writing texts takes of a tokenizer of transformers."""

    pad_token_id: int | None
    eos_token_id: int | None

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """The tokens before a held-out answer, and that answer.

    origin: where the record stands. adapter: the adapter that it names ("": none).
    """

    input_ids: tuple[int, ...]
    origin: str
    text: str
    reference: str
    adapter: str = ""


def choose_prompts(
    examples: Sequence[ExampleLike], tokenizer: TextTokenizer, count: int
) -> list[Prompt]:
    """`count` distinct prompts spread evenly over `examples`, whole ones before truncated ones.

    Fewer if there are fewer.
    """
    chosen: dict[tuple[int, ...], Prompt] = {}
    order = sorted(_spread(len(examples), count), key=lambda i: examples[i].truncated)
    for index in order:
        if len(chosen) == count:
            break
        prompt = split_example(examples[index], tokenizer)
        if prompt is not None:
            chosen.setdefault(prompt.input_ids, prompt)
    return list(chosen.values())


def split_example(example: ExampleLike, tokenizer: TextTokenizer) -> Prompt | None:
    """The example's last supervised run as reference, all before it as prompt.

    An example that is supervised from its start (plain text) is cut in the middle. None if
    nothing is left on one of the two sides.
    """
    ids, supervised = list(example.input_ids), list(example.supervised)
    if True not in supervised:
        return None
    end = len(ids) - supervised[::-1].index(True)
    start = end
    while start > 0 and supervised[start - 1]:
        start -= 1
    if start <= 1:  # nothing, or only a begin-of-text token, stands before it
        start = int(end * PROMPT_TOKENS_OF_PLAIN_TEXT)
    prompt_ids, answer_ids = ids[:start], ids[start:end]
    reference = tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
    if not prompt_ids or not reference:
        return None
    text = tokenizer.decode(prompt_ids, skip_special_tokens=True).strip()
    return Prompt(
        input_ids=tuple(prompt_ids),
        origin=example.origin,
        text=text,
        reference=reference,
        adapter=example.adapter,
    )


def differing_parts(prompts: Sequence[str]) -> list[str]:
    """The prompts without the whole lines (or words) that all of them begin and end with."""
    if len(set(prompts)) < 2:
        return list(prompts)
    start = _boundary(os.path.commonprefix(prompts))  # noqa: RUF071 (characters are meant)
    rest = [prompt[start:] for prompt in prompts]
    end = _boundary(os.path.commonprefix([text[::-1] for text in rest]))  # noqa: RUF071
    return [text[: len(text) - end].strip("\n") for text in rest]


def _boundary(shared: str) -> int:
    """Length of `shared` up to its last line break, or else its last space, included."""
    return (shared.rfind("\n") if "\n" in shared else shared.rfind(" ")) + 1


def generate(
    model: CausalLm, tokenizer: TextTokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> list[str]:
    """The model's greedy continuation of every prompt, as text without special tokens.

    model: a transformers (or PEFT) causal language model, by our own layers where it is accelerated
    and these take it, else by its own `generate`; each module's training mode is as before
    afterwards, and no random number is drawn. A prompt that names an adapter is continued by that
    one alone.
    """
    texts = [""] * len(prompts)
    with inference(model):
        if prompts and why_not_cached(model) is None:
            for name in dict.fromkeys(prompt.adapter for prompt in prompts):
                places = [i for i, prompt in enumerate(prompts) if prompt.adapter == name]
                with with_adapter(cast(PeftCausalLm, model), name) if name else nullcontext():
                    own = [prompts[i] for i in places]
                    found = _generate_side_by_side(model, tokenizer, own, max_new_tokens)
                for i, text in zip(places, found, strict=True):
                    texts[i] = text
            return texts
        for first in range(0, len(prompts), BATCH_SIZE):
            part = slice(first, first + BATCH_SIZE)
            texts[part] = _generate_batch(model, tokenizer, prompts[part], max_new_tokens)
    return texts


def _generate_side_by_side(
    model: CausalLm, tokenizer: TextTokenizer, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    stop = stop_tokens(model, tokenizer)
    longest = max(len(prompt.input_ids) for prompt in prompts) + max_new_tokens
    generator = Generator(
        model, tokenizer, stop_tokens=stop, cache_tokens=max(CACHE_TOKENS, 2 * longest)
    )
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    made = generator.run([Request(prompt.input_ids, sampling) for prompt in prompts])
    return [completion.text.strip() for (completion,) in made]


def _generate_batch(
    model: CausalLm, tokenizer: TextTokenizer, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[str]:
    from transformers import GenerationConfig

    batch = [list(prompt.input_ids) for prompt in prompts]
    adapters = [prompt.adapter for prompt in prompts]
    routed = {"adapter_names": adapters} if all(adapters) else {}

    stop = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stop[0] if stop else 0
    longest = max(map(len, batch))
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=stop or None,
        ),
        **routed,
    )
    answers = [_until_stop(row, stop) for row in output[:, longest:].tolist()]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def stop_tokens(model: CausalLm, tokenizer: TextTokenizer) -> list[int]:
    """End-of-text tokens of the tokenizer and of the model's own generation settings."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    candidates = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(t for t in (tokenizer.eos_token_id, *candidates) if t is not None))


def _until_stop(ids: list[int], stop: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]


def _spread(length: int, count: int) -> list[int]:
    """All indices below `length`, `count` evenly spaced ones first."""
    first = [i * length // count for i in range(min(count, length))] if count else []
    chosen = set(first)
    return first + [i for i in range(length) if i not in chosen]
