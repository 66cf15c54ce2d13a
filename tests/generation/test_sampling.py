"""The next token: what may be drawn, how often, and the log-probability that is reported."""

from collections import Counter

import pytest
import torch

from lora_engine.errors import UserError
from lora_engine.generation.sampling import RandomNumbers, Sampling, choose

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf, 3.0])


def drawn(settings: Sampling, count: int = 400, history: tuple[int, ...] = ()) -> Counter[int]:
    numbers = [RandomNumbers(settings.seed, n) for n in range(count)]
    chosen = choose(
        LOGITS.expand(count, -1), [settings] * count, numbers, [history] * count, [()] * count
    )
    return Counter(chosen.tokens.tolist())


def test_temperature_zero_is_the_most_likely_token() -> None:
    assert drawn(Sampling(temperature=0), 3) == {5: 3}


def test_tokens_come_as_often_as_the_softmax_says() -> None:
    count = 4000
    for temperature in (0.5, 1.0, 2.0):
        found = drawn(Sampling(temperature=temperature, seed=1), count)
        probs = (LOGITS / temperature).softmax(0)
        for token, p in enumerate(probs.tolist()):
            spread = 5 * (count * p * (1 - p)) ** 0.5
            assert abs(found[token] - count * p) <= spread
        assert found[4] == 0


KEPT = {
    "top_k": (Sampling(top_k=2), {5, 0}),
    "top_k over all": (Sampling(top_k=99), {5, 0, 1, 2, 3}),
    "top_p under the first": (Sampling(top_p=0.1), {5}),
    "top_p of two": (Sampling(top_p=0.8), {5, 0}),
    "top_p one": (Sampling(top_p=1.0, min_p=1e-9), {5, 0, 1, 2, 3}),
    "min_p": (Sampling(min_p=0.1), {5, 0, 1}),
    "min_p one": (Sampling(min_p=1.0), {5}),
    "top_k and top_p": (Sampling(top_k=1, top_p=0.99), {5}),
}


@pytest.mark.parametrize("name", KEPT)
def test_only_what_is_kept_is_drawn(name: str) -> None:
    settings, kept = KEPT[name]
    assert set(drawn(settings, 600)) == kept


def test_more_than_the_tokens_that_are_sorted_first_can_be_kept() -> None:
    logits = torch.zeros(1, 5000)
    settings = Sampling(top_p=0.9)
    found = [
        int(choose(logits, [settings], [RandomNumbers(0, n)], [()], [()]).tokens[0])
        for n in range(300)
    ]
    assert len(set(found)) > 256


def test_seen_tokens_are_penalised() -> None:
    chosen = choose(
        torch.tensor([[3.0, 2.9], [-3.0, -3.1]]),
        [Sampling(temperature=0, repetition_penalty=1.2)] * 2,
        [RandomNumbers(0, 0)] * 2,
        [(0, 0), ()],
        [(), (0,)],
    )
    assert chosen.tokens.tolist() == [1, 1]


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.5), (1.0, -0.25)], ids=str)
def test_tokens_of_the_text_lose_by_presence_and_frequency(
    presence: float, frequency: float
) -> None:
    """Those of the prompt do not."""
    settings = Sampling(temperature=0, presence_penalty=presence, frequency_penalty=frequency)
    chosen = choose(LOGITS[None], [settings], [RandomNumbers(0, 0)], [(0, 1)], [(5, 2, 5)])
    expected = LOGITS.clone()
    expected[5] -= presence + 2 * frequency
    expected[2] -= presence + frequency
    assert chosen.logprobs[0].item() == pytest.approx(expected.log_softmax(0).max().item())
    unwritten = choose(LOGITS[None], [settings], [RandomNumbers(0, 0)], [(5, 5)], [()])
    assert unwritten.logprobs[0].item() == pytest.approx(LOGITS.log_softmax(0)[5].item())


def test_the_logprob_is_of_the_distribution_at_the_temperature() -> None:
    settings = Sampling(temperature=0.5, top_k=1)
    chosen = choose(LOGITS[None], [settings], [RandomNumbers(0, 0)], [()], [()])
    assert chosen.logprobs[0].item() == pytest.approx((LOGITS / 0.5).log_softmax(0)[5].item())
    greedy = choose(LOGITS[None], [Sampling(temperature=0)], [RandomNumbers(0, 0)], [()], [()])
    assert greedy.logprobs[0].item() == pytest.approx(LOGITS.log_softmax(0)[5].item())


def test_a_number_s_stream_depends_on_seed_and_number() -> None:
    def first(seed: int, number: int) -> list[float]:
        numbers = RandomNumbers(seed, number)
        return [numbers.next() for _ in range(3)]

    assert first(1, 2) == first(1, 2)
    seeds = (0, 1, 2, 2**63, 2**63 + 1, 2**64 - 1)
    assert len({tuple(first(s, n)) for s in seeds for n in range(3)}) == 18


def test_the_likeliest_are_told_with_their_logprobs() -> None:
    settings = [Sampling(temperature=2, top_k=1, top_logprobs=2), Sampling(top_logprobs=9)]
    numbers = [RandomNumbers(0, 0), RandomNumbers(0, 1)]
    two, all_six = choose(LOGITS.expand(2, -1), settings, numbers, [()] * 2, [()] * 2).likeliest
    logprobs = (LOGITS / 2).log_softmax(0).tolist()
    assert [token for token, _ in two] == [5, 0]
    assert [logprob for _, logprob in two] == pytest.approx([logprobs[5], logprobs[0]])
    assert [token for token, _ in all_six] == [5, 0, 1, 2, 3, 4]
    assert choose(LOGITS[None], [Sampling()], numbers[:1], [()], [()]).likeliest == [()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(bad: float) -> None:
    logits = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(UserError, match="NaN"):
        choose(logits, [Sampling()], [RandomNumbers(0, 0)], [()], [()])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"seed": -1},
        {"top_logprobs": 21},
        {"stop": ("",)},
    ],
    ids=str,
)
def test_settings_outside_their_range_are_refused(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
