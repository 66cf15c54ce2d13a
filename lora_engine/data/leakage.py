"""What held-out data give away of training data, and examples that repeat others."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lora_engine.data.batch import MISMATCHED
from lora_engine.data.pairs import prompt_length
from lora_engine.data.render import Example


@dataclass(frozen=True)
class Duplicate:
    """A record whose tokens, mask and adapter are those of an earlier one."""

    origin: str
    first: str


@dataclass(frozen=True)
class Leakage:
    """What of the evaluation data is also in the training data, as the origins (eval, train).

    What trains another adapter gives nothing away.

    examples: the same tokens.
    prompts: the same tokens up to the answer, with another answer.
    """

    examples: tuple[tuple[str, str], ...]
    prompts: tuple[tuple[str, str], ...]


def find_leakage(train: Iterable[Example], evaluation: Iterable[Example]) -> Leakage:
    """Evaluation examples that the training data gives away."""
    whole: dict[bytes, str] = {}
    prompts: dict[bytes, str] = {}
    for example in train:
        whole.setdefault(_digest(example.adapter, example.input_ids), example.origin)
        prompts.setdefault(_digest(example.adapter, _prompt(example)), example.origin)
    same_example, same_prompt = [], []
    for example in evaluation:
        prompt = _prompt(example)
        if origin := whole.get(_digest(example.adapter, example.input_ids)):
            same_example.append((example.origin, origin))
        elif prompt and (origin := prompts.get(_digest(example.adapter, prompt))):
            same_prompt.append((example.origin, origin))
    return Leakage(tuple(same_example), tuple(same_prompt))


def find_duplicates(examples: Iterable[Example]) -> Iterator[Duplicate]:
    """Examples whose tokens, mask and adapter are those of an earlier one, of another record."""
    first: dict[bytes, str] = {}
    for example in examples:
        taught = hashlib.sha256(example.adapter.encode("utf-8", "surrogatepass"))
        for sequence in example.sequences:
            if sequence.role != MISMATCHED:
                taught.update(array("q", sequence.input_ids).tobytes() + sequence.role.encode())
                taught.update(bytes(sequence.supervised))
        origin = first.setdefault(taught.digest()[:16], example.origin)
        if origin != example.origin:
            yield Duplicate(example.origin, origin)


def _prompt(example: Example) -> list[int]:
    """Tokens before the first supervised one; empty for plain text, all of a prompt alone."""
    return example.input_ids[: prompt_length(example)]


def _digest(adapter: str, tokens: list[int]) -> bytes:
    """16 bytes that stand for an adapter and tokens."""
    head = adapter.encode("utf-8", "surrogatepass") + b"\0"
    return hashlib.sha256(head + array("q", tokens).tobytes()).digest()[:16]
