from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_engine.errors import UserError
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.schedule import Schedule

KINDS = ("cosine", "linear", "constant")


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 200))
    return Schedule(
        peak=draw(st.floats(1e-6, 1.0)),
        total_steps=total,
        warmup_steps=draw(st.integers(0, total - 1)),
        kind=draw(st.sampled_from(KINDS)),
        min_ratio=draw(st.floats(0.0, 1.0)),
    )


@given(schedules())
def test_rises_to_the_peak_then_never_rises_again(schedule):
    rates = [schedule(step) for step in range(1, schedule.total_steps + 1)]
    top = schedule.warmup_steps
    assert rates[top] == pytest.approx(schedule.peak, rel=1e-12)
    assert all(0 < a < b for a, b in pairwise(rates[: top + 1]))
    slack = 1e-12 * schedule.peak
    assert all(a >= b - slack for a, b in pairwise(rates[top:]))
    assert rates[-1] >= schedule.peak * schedule.min_ratio - slack
    assert rates[-1] > 0


def test_linear_by_hand():
    schedule = Schedule(peak=1.0, total_steps=6, warmup_steps=2, kind="linear")
    rates = [schedule(step) for step in range(1, 7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])


def test_cosine_by_hand():
    schedule = Schedule(peak=2.0, total_steps=4, kind="cosine", min_ratio=0.5)
    half_way = 2.0 * (0.5 + 0.5 * 0.5)
    assert schedule(1) == 2.0
    assert schedule(3) == pytest.approx(half_way)


def test_constant_after_warmup():
    schedule = Schedule(peak=1.0, total_steps=5, warmup_steps=1, kind="constant", min_ratio=0.1)
    assert [schedule(step) for step in range(1, 6)] == [0.5, 1, 1, 1, 1]


def test_from_config_takes_the_ratio_of_all_steps():
    assert Schedule.from_config(TrainConfig(warmup_ratio=0.1), 50).warmup_steps == 5
    assert Schedule.from_config(TrainConfig(warmup_steps=7), 50).warmup_steps == 7
    assert Schedule.from_config(TrainConfig(), 50).warmup_steps == 0


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(UserError, match="warm-up of 9 steps must be shorter than the run of 9"):
        Schedule.from_config(TrainConfig(warmup_steps=9), 9)
