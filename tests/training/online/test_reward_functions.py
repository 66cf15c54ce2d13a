"""Rewards: what they are called with, what is refused of their answers, and how they are named."""

import asyncio
import math
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from lora_engine.errors import UserError
from lora_engine.training.online.named import rewards_of
from lora_engine.training.online.rewards import Reward, Written, rewarded

WRITTEN = Written(
    prompts=["1+1=", "2+2="],
    completions=["2", "five"],
    prompt_ids=[[1], [2, 3]],
    completion_ids=[[7], [8, 9]],
    columns={"answer": ["2", "4"]},
    origins=["data.jsonl:1", "data.jsonl:2"],
)


def of(function, **settings):
    return Reward("mine", function, **settings)(WRITTEN).tolist()


def test_a_function_gets_the_arguments_that_it_names():
    seen = {}

    def judge(prompts, completions, completion_ids, answer, missing="default"):
        seen.update(locals())
        return [1, 2.5]

    assert of(judge) == [1.0, 2.5]
    assert seen["prompts"] == ["1+1=", "2+2="]
    assert seen["completions"] == ["2", "five"]
    assert seen["completion_ids"] == [[7], [8, 9]]
    assert seen["answer"] == ["2", "4"]
    assert seen["missing"] == "default"
    assert of(lambda **every: [len(every), 0]) == [5.0, 0.0]


def test_none_is_no_reward_and_arrays_are_taken():
    answers = of(lambda completions: [None, 1])
    assert math.isnan(answers[0])
    assert answers[1] == 1.0
    assert of(lambda completions: np.array([0.5, 1.0], dtype=np.float32)) == [0.5, 1.0]
    assert of(lambda completions: torch.tensor([0.5, 1.0])) == [0.5, 1.0]
    assert of(lambda completions: [torch.tensor(0.5), np.bool_(True)]) == [0.5, 1.0]


def test_a_coroutine_is_awaited():
    async def judge(completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    assert of(judge) == [1.0, 4.0]
    assert of(judge, timeout=5.0) == [1.0, 4.0]


def test_coroutines_share_a_loop_and_run_beside_another(tmp_path):
    """A client of somebody's that was made in the first call serves the next; notebooks have a
    loop of their own, in which a run is started."""
    loops = []

    async def judge(completions):
        loops.append(asyncio.get_running_loop())
        return [1, 2]

    async def notebook():
        return of(judge), of(judge, timeout=5.0)

    assert asyncio.run(notebook()) == ([1.0, 2.0], [1.0, 2.0])
    of(judge)
    assert len(set(map(id, loops))) == 1


def test_a_coroutine_that_takes_too_long_is_cancelled():
    ended = []

    async def judge(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def quick(completions):
        return [1, 2]

    async def blocks(completions):
        time.sleep(2)

    for slow in (judge, blocks):
        with pytest.raises(UserError, match=r"took more than 0.05 s"):
            of(slow, timeout=0.05)
        assert of(quick, timeout=5.0) == [1.0, 2.0]
    assert ended == ["cancelled"]


def test_a_time_limit_may_be_longer_than_the_system_counts():
    assert of(lambda completions: [1, 2], timeout=1e300) == [1.0, 2.0]


def test_what_a_function_changes_is_its_own():
    records = {"facts": [{"answer": 1}, {"answer": 2}]}
    written = replace(WRITTEN, prompts=[({"role": "user", "content": "hi"},)] * 2, columns=records)

    def changes(prompts, completions, facts):
        prompts[0][0]["content"] = "changed"
        facts[0].clear()
        facts.pop()
        completions.clear()
        return [1, 2]

    Reward("mine", changes)(written)
    assert written.prompts[0][0] == {"role": "user", "content": "hi"}
    assert written.columns == {"facts": [{"answer": 1}, {"answer": 2}]}
    assert written.completions == ["2", "five"]


def test_further_positions_are_left_out():
    assert of(lambda completions, *more: [len(more), len(completions)]) == [0.0, 2.0]


def raising(error):
    def function(completions):
        raise error

    return function


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


async def cancelled(completions):
    raise asyncio.CancelledError


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raising(SystemExit(3)), r"raises SystemExit: 3 \("),
        (raising(AssertionError()), r"raises AssertionError \("),
        (raising(ValueError("one\ntwo")), r"raises ValueError: one \("),
        (raising(Unprintable()), r"raises Unprintable \("),
        (cancelled, r"raises CancelledError \("),
    ],
)
def test_whatever_is_raised_is_one_line(function, said, timeout):
    with pytest.raises(UserError, match=said) as caught:
        of(function, timeout=timeout)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("for the completion '2' of data.jsonl:1")


def needs_digits(completions):
    return [float(text) for text in completions]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (needs_digits, r"reward mine: raises ValueError: could not convert .*'five' "
                       r"\(test_reward_functions.py:\d+\) for the completion 'five' of "
                       r"data.jsonl:2$"),
        (lambda completions: [1.0], "returns 1 numbers for 2 completions"),
        (lambda completions: [1.0, math.nan], "returns nan for the completion 'five' of data"),
        (lambda completions: [1.0, 1e30], "returns 1e.30 for .*; give a number of at most 1e.15"),
        (lambda completions: [10**400, 1], "returns 1000+ for the completion '2' of data.jsonl:1"),
        (lambda completions: [10**5000, 1], "returns one int for the completion '2'"),
        (lambda completions: [Fraction(-(10**400), 3), 1], r"returns Fraction\(-1000+ for"),
        (lambda completions: np.ones((2, 1)), r"returns \[1.0\] for the completion '2'"),
        (lambda completions: ["a", 1], "returns 'a' for the completion '2' of data.jsonl:1"),
        (lambda completions: None, "returns NoneType, expected a list of 2 numbers"),
        (lambda solution: [0, 0], r"takes 'solution', which the records .*\(their columns: answer"),
    ],
)  # fmt: skip
def test_what_a_reward_does_wrong_is_one_line(function, said):
    with pytest.raises(UserError, match=said) as caught:
        of(function)
    assert "\n" not in str(caught.value)


def test_what_takes_too_long_is_left_behind():
    began = time.perf_counter()
    with pytest.raises(UserError, match=r"more than 0.05 s for 2 .* '2' of data.jsonl:1"):
        of(lambda completions: time.sleep(1), timeout=0.05)
    assert time.perf_counter() - began < 0.9


def test_rewards_add_up_by_weight_over_those_that_say_something():
    one = Reward("one", lambda completions: [1.0, None], weight=2.0)
    two = Reward("two", lambda completions: [None, None], weight=5.0)
    three = Reward("three", lambda completions: [0.5, None], weight=-1.0)
    found = rewarded([one, two, three], WRITTEN)
    assert found.total[0] == 1.5
    assert math.isnan(found.total[1])
    assert found.parts["one"][0] == 1.0


def test_a_sum_that_is_too_large_is_refused():
    large = Reward("large", lambda completions: [0, 1e10], weight=1e300)
    said = "rewards: add up to inf for the completion 'five' of data.jsonl:2; give weights"
    with pytest.raises(UserError, match=said):
        rewarded([large], WRITTEN)


@pytest.mark.parametrize(
    ("named", "texts", "expected"),
    [
        ("exact_match", ["2", " 4\n"], [1, 1]),
        ({"reward": "exact_match", "column": "answer"}, ["2", "5"], [1, 0]),
        ({"reward": "regex", "pattern": r"\d"}, ["a1", "b"], [1, 0]),
        ({"reward": "format", "pattern": "<a>.*</a>"}, ["<a>\n</a>", "<a></a>!"], [1, 0]),
        ({"reward": "length", "target": 2}, ["", ""], [-0.5, 0]),
        ({"reward": "length", "target": 2, "spread": 1}, ["", ""], [0, 0]),
        ("json_valid", ['{"a": [1]}', "{a}"], [1, 0]),
    ],
)
def test_rewards_of_the_package(named, texts, expected):
    (reward,) = rewards_of([named])
    written = Written(["", ""], texts, [[1], [1]], [[7], [8, 9]], {"answer": [2, "4"]}, ["", ""])
    assert reward(written).tolist() == expected


def test_a_function_is_found_by_module_and_by_file(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(completions):\n    return [0.0, 1.0]\n")
    monkeypatch.chdir(tmp_path)
    by_module, by_file = rewards_of(
        [
            {"reward": "my_rewards:short", "weight": "2e0"},
            {"reward": "my_rewards.py:short", "name": "again", "timeout": 3},
        ]
    )
    assert (by_module.name, by_module.weight, by_module.timeout) == ("short", 2.0, None)
    assert (by_file.name, by_file.timeout) == ("again", 3.0)
    assert by_module(WRITTEN).tolist() == by_file(WRITTEN).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ([], "rewards: expected a list of one reward or more"),
        ("exact_match", "rewards: expected a list"),
        (["exact_mach"], r"rewards\[0\]: no reward 'exact_mach'; did you mean exact_match\?"),
        ([{"weight": 1}], r"rewards\[0\]: no reward None; there is exact_match, regex"),
        ([3], r"rewards\[0\]: expected a function or its name, got 3"),
        (["no_such_module:f"], r"rewards\[0\]: no_such_module:f: the module cannot be imported"),
        (["math:sqr"], r"rewards\[0\]: math:sqr: the module has no function 'sqr'; .*sqrt"),
        ([{"reward": "math:sqrt", "colum": 1}], "unknown key 'colum'; a function of yours takes"),
        ([{"reward": "regex", "patern": "a"}], "unknown key 'patern'; did you mean pattern"),
        (["regex"], r"rewards\[0\]: regex needs pattern; give it"),
        ([{"reward": "regex", "pattern": "("}], r"regex: .*unterminated.*; mend its settings"),
        ([{"reward": "json_valid", "weight": True}], "weight: expected a number, got True"),
        ([{"reward": "json_valid", "weight": 10**400}], "weight: expected a number, got 1000"),
        ([{"reward": "json_valid", "name": "a\nb"}], "name: expected a line of text"),
        ([{"reward": "json_valid", "name": "overlong"}], "'overlong' is what rollout.overlong_buf"),
        ([max], r"rewards\[0\]: reward max: Python does not know what it takes; give a function"),
        ([{"reward": "json_valid", "timeout": 0}], "timeout: expected a number above 0, got 0"),
        (["json_valid", "json_valid"], "rewards: 'json_valid' is there twice; give one"),
    ],
)
def test_a_name_that_is_wrong_is_one_line(named, said):
    with pytest.raises(UserError, match=said) as caught:
        rewards_of(named)
    assert "\n" not in str(caught.value)


def test_a_column_may_not_stand_for_what_is_written():
    written = replace(WRITTEN, columns={"completions": ["a", "b"]})
    with pytest.raises(UserError, match="have a column 'completions', as reward functions"):
        Reward("mine", lambda **every: [0, 0])(written)


def test_a_column_that_is_not_there_is_named():
    (reward,) = rewards_of([{"reward": "exact_match", "column": "solution"}])
    with pytest.raises(UserError, match="records have answer, and no 'solution'; give"):
        reward(WRITTEN)
