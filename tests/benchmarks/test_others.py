"""What other programs take of the cores is theirs, and what this process takes is not."""

import os

import pytest

from benchmarks.common import others

SECOND = {"user": 1.0, "nice": 0.0, "system": 0.0, "irq": 0.0, "softirq": 0.0, "steal": 0.0}


class Core:
    def __init__(self, **seconds):
        self.__dict__.update(SECOND | seconds)


@pytest.fixture
def machine(monkeypatch):
    """Two of three cores are ours; cores' times, own times and the clock are what is put here."""
    now = {"clock": 0.0, "cores": [Core(), Core(), Core()], "own": (0.0, 0.0, 0.0, 0.0, 0.0)}
    monkeypatch.setattr(others.psutil, "cpu_times", lambda percpu: now["cores"])
    monkeypatch.setattr(others.os, "times", lambda: now["own"])
    monkeypatch.setattr(others.os, "sched_getaffinity", lambda pid: {0, 2}, raising=False)
    monkeypatch.setattr(others.time, "monotonic", lambda: now["clock"])
    return now


def test_others_have_what_is_not_ours(machine):
    watch = others.OtherPrograms()
    machine["clock"] = 10.0
    machine["cores"] = [Core(user=9.0, steal=1.0), Core(user=99.0), Core(system=4.0, idle=50.0)]
    machine["own"] = (3.0, 1.0, 2.0, 1.0, 77.0)  # user, system, of children, the clock
    assert watch.cores() == pytest.approx((8 + 1 + 4 - 7) / 10)


def test_rounding_takes_nothing_away(machine):
    watch = others.OtherPrograms()
    machine["clock"] = 1.0
    machine["own"] = (0.5, 0.0, 0.0, 0.0, 1.0)
    assert watch.cores() == 0


def test_the_systems_own_figures():
    watch = others.OtherPrograms()
    assert 0 <= watch.cores() < 1e3 and len(os.times()) == 5
