"""Samples: which prompts, and that generation is plain greedy decoding that leaves no trace."""

from dataclasses import dataclass

import peft
import pytest
import torch

from lora_engine.evaluation.modes import with_adapter
from lora_engine.evaluation.samples import (
    Prompt,
    choose_prompts,
    differing_parts,
    generate,
    split_example,
)
from lora_engine.generation.engine import Generator
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.testing import tiny_llama, with_lora


class LetterTokenizer:
    """Token i is the letter chr(96 + i); 0 pads and 1 ends the text."""

    pad_token_id = 0
    eos_token_id = 1

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(96 + i) for i in ids if i > 1)


@dataclass
class Row:
    input_ids: list[int]
    supervised: list[bool]
    origin: str = ""
    truncated: bool = False
    adapter: str = ""


def row(prompt, answer, **kwargs):
    return Row([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), **kwargs)


@pytest.fixture(params=["transformers", "ours"])
def model(request):
    """A model that writes by transformers' generate, and one that writes by our layers."""
    model = with_lora(tiny_llama(vocab_size=40))
    model.generation_config.eos_token_id = None
    if request.param == "ours":
        accelerate(model)
        model.generate = model.base_model.model.generate = lambda **_: 1 / 0
    return model


def prompts_of(*all_ids):
    return [Prompt(tuple(ids), "", "", "") for ids in all_ids]


def greedy(model, ids, steps):
    """The tokens of a decoder that recomputes everything at each step."""
    ids = list(ids)
    model.eval()
    with torch.no_grad():
        for _ in range(steps):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids


def text_until_end(ids):
    kept = ids[: ids.index(1)] if 1 in ids else ids
    return LetterTokenizer().decode(kept, skip_special_tokens=True)


def test_batch_with_padding_is_greedy_decoding_of_each(model):
    all_ids = [[5, 6, 7], [9], [3, 4, 5, 6, 7, 8, 9, 10], *([i, i + 1] for i in range(10, 17))]
    expected = [text_until_end(greedy(model, ids, 6)[len(ids) :]) for ids in all_ids]
    assert len(set(expected)) > 3
    texts = generate(model, LetterTokenizer(), prompts_of(*all_ids), max_new_tokens=6)
    assert texts == expected


def test_stops_at_the_models_own_end_token(model):
    answer = greedy(model, [5, 6, 7], 6)[3:]
    stop = answer[2]
    model.generation_config.eos_token_id = [stop]
    [text] = generate(model, LetterTokenizer(), prompts_of([5, 6, 7]), max_new_tokens=6)
    assert text == text_until_end(answer[: answer.index(stop)])


@pytest.mark.parametrize("ours", [False, True], ids=["transformers", "ours"])
def test_a_prompt_is_continued_by_the_adapter_it_names(ours):
    model = with_lora(tiny_llama(vocab_size=40)).eval()
    model.generation_config.eos_token_id = None
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    expected = {}
    for name in ("default", "other"):
        with with_adapter(model, name):
            expected[name] = text_until_end(greedy(model, [5, 6, 7], 6)[3:])
    assert expected["default"] != expected["other"]
    if ours:
        accelerate(model)
    names = ["default", "other", "default"]
    prompts = [Prompt((5, 6, 7), "", "", "", name) for name in names]
    texts = generate(model, LetterTokenizer(), prompts, max_new_tokens=6)
    assert texts == [expected[name] for name in names]
    assert model.active_adapters == ["default"]


def test_generation_leaves_no_trace(model):
    model.train()
    frozen_part = model.base_model.model.model.layers[0].mlp
    frozen_part.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    config = model.generation_config.to_dict()
    generate(model, LetterTokenizer(), prompts_of([5, 6], [7]), max_new_tokens=3)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert parameter.grad is None


def test_no_prompts_no_work():
    assert generate(torch.nn.Linear(1, 1), None, [], max_new_tokens=3) == []


def test_mode_comes_back_after_an_error(model, monkeypatch):
    model.train()
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    monkeypatch.setattr(Generator, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, LetterTokenizer(), prompts_of([5]), max_new_tokens=3)
    assert model.training


def test_prompt_ends_where_the_last_answer_begins():
    example = Row([2, 3, 4, 5, 6, 7, 1, 9], [False, True, False, False, True, True, True, False])
    prompt = split_example(example, LetterTokenizer())
    assert prompt == Prompt((2, 3, 4, 5), "", "bcde", "fg")


def test_plain_text_is_cut_in_the_middle():
    example = Row([2, 3, 4, 5, 6, 7], [False, True, True, True, True, True])
    prompt = split_example(example, LetterTokenizer())
    assert prompt == Prompt((2, 3, 4), "", "bcd", "efg")


@pytest.mark.parametrize(
    "example",
    [row([2, 3], []), row([2, 3], [1]), Row([2], [True])],
    ids=["nothing supervised", "only an end token", "one token"],
)
def test_example_without_two_sides(example):
    assert split_example(example, LetterTokenizer()) is None


def test_prompts_are_distinct_spread_out_and_whole():
    rows = [row([2, 2 + i // 2], [5], origin=str(i), truncated=i == 0) for i in range(12)]
    chosen = choose_prompts(rows, LetterTokenizer(), 3)
    assert [prompt.origin for prompt in chosen] == ["4", "8", "1"]
    everything = choose_prompts(rows, LetterTokenizer(), 100)
    assert len(everything) == len({p.input_ids for p in everything}) == 6
    assert choose_prompts(rows, LetterTokenizer(), 0) == []


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        (["Do it:\ndef f\nend", "Do it:\ndef g\nend"], ["def f", "def g"]),
        (["say one now", "say two now"], ["one", "two"]),
        (["abc", "abd"], ["abc", "abd"]),
        (["same", "same"], ["same", "same"]),
        (["alone"], ["alone"]),
        ([], []),
        (["a\nb\nc", "a\nc"], ["b\nc", "c"]),
    ],
)
def test_differing_parts(prompts, parts):
    assert differing_parts(prompts) == parts
