"""Whole steps beside others: settings, who is left out, and what the figures come to."""

import math
import os
from dataclasses import replace

import pytest

from benchmarks.common import jobs, processes
from benchmarks.common.job_rows import rows_of
from benchmarks.common.jobs import COMMON, Job
from benchmarks.common.worker import __main__ as worker
from lora_engine.errors import UserError

JOB = Job(
    name="fake",
    what="Nothing.",
    options={**COMMON, "dtype": "float32", "steps": 2, "lengths": [1, 2], "kind": "soft"},
    contenders={"ours": "us", "other": "them", "slow": "others"},
    default=("ours", "other"),
    prepare=lambda folder, options: {
        "unit": "tokens/s",
        "amounts": {"": [50, 4, 6]},
        "flops": {"": [0, 100, 300]},
        "expected": {"": 3.0},
        "text": "",
    },
    run=lambda *_: None,
    rate=lambda *_: None,
    choices={"kind": ("quiet", "soft")},
    least={"lengths": 2},
)


def result(*seconds, peak=20, loss=3.0):
    """A warm-up step and these."""
    steps = [{"seconds": s, "cpu_seconds": 2 * s, "loss": loss} for s in (99.0, *seconds)]
    bytes_ = {"loaded_bytes": 10, "peak_bytes": peak, "peak_training_bytes": peak}
    return {"steps": steps, "calls": 7, **bytes_}


def measured(monkeypatch, tmp_path, answers, *, job=JOB, names=("ours", "other"), **more):
    """What comes of a job whose processes answer so, by name and round."""
    calls = []

    def answer(job, name, point, folder, environment, deadline):
        calls.append(name)
        if name == jobs.CEILING:
            return {"flops_per_second": 50.0}
        found = answers[name][calls.count(name) - 1]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(processes, "run", answer)
    monkeypatch.setattr(processes, "environment_of_peers", lambda: ({}, ""))
    options, _ = jobs.options_of(job, {})
    found = jobs.measure_job(job, options, names, tmp_path, lambda line: None, **more)
    return found, calls


def test_contenders_take_turns_and_ratios_are_of_the_same_steps(monkeypatch, tmp_path):
    answers = {
        "ours": [result(1, 2, peak=20), result(2, 4, peak=30)],
        "other": [result(4, 4, peak=90), result(8, 40, peak=100)],
    }
    found, calls = measured(monkeypatch, tmp_path, answers)
    assert calls == [jobs.CEILING, "ours", "other"] * 2
    ours, other = rows_of(found)
    assert ours["seconds"]["median"] == 2 and ours["cpu_seconds"]["median"] == 4
    assert ours["rates"] == {"median": 2.5, "lowest": 1.5, "highest": 4}
    assert ours["rate"] == 2.5 and ours["unit"] == "tokens/s" and ours["calls"] == 7
    assert ours["share_of_ceiling"] == pytest.approx((75 + 100) / 2 / 50)
    # 4/1, 4/2, 8/2, 40/4
    assert other["compared"]["times_as_long"] == {"median": 4, "lowest": 2, "highest": 10}
    assert other["compared"]["times_the_cpu"]["median"] == 4
    assert other["compared"]["our_share_of_memory"] == 0.3
    assert "compared" not in ours
    assert not found.failures and not found.notes


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (result(1, 2, loss=3.1), "the loss of its first step is 3.1000, expected 3.0000"),
        (result(1, 2, loss=math.nan), "the loss of its first step is nan"),
        (result(1), "made 2 steps"),
        (processes.FailedError("RuntimeError: no memory"), "RuntimeError: no memory"),
    ],
    ids=["wrong", "nan", "short", "failed"],
)
def test_who_is_wrong_is_left_out_and_told(monkeypatch, tmp_path, bad, why):
    good = [result(1, 2), result(1, 2)]
    found, calls = measured(monkeypatch, tmp_path, {"ours": good, "other": [bad]})
    assert calls.count("other") == 1 and calls.count("ours") == 2
    assert found.notes == [f"fake: other left out: {why}"] and not found.failures
    assert [row["implementation"] for row in rows_of(found)] == ["ours"]
    found, _ = measured(monkeypatch, tmp_path, {"ours": [bad], "other": good})
    assert found.failures == [f"fake: ours left out: {why}"] and not found.notes


def test_a_round_that_would_not_end_in_time_is_not_begun(monkeypatch, tmp_path):
    clock = iter([0.0, 60.0, 60.0])  # a round takes a minute
    monkeypatch.setattr(jobs.time, "monotonic", lambda: next(clock))
    answers = {"ours": [result(1, 2)], "other": [result(1, 2)]}
    found, calls = measured(monkeypatch, tmp_path, answers, deadline=119.0)
    assert calls == [jobs.CEILING, "ours", "other"]
    assert found.notes == ["1 of 2 rounds: the time was over"]


def test_who_is_out_of_time_keeps_its_earlier_rounds(monkeypatch, tmp_path):
    late = processes.OutOfTimeError("stopped, the time was over")
    answers = {
        "ours": [result(1, 2, peak=20), result(1, 1, peak=40)],
        "other": [result(4, 4, peak=40), late],
    }
    found, _ = measured(monkeypatch, tmp_path, answers)
    assert found.notes == ["fake: other stopped, the time was over"] and not found.failures
    ours, other = rows_of(found)
    assert ours["seconds"]["samples"] == 4 and other["seconds"]["samples"] == 2
    assert other["compared"]["times_as_long"] == {"median": 3, "lowest": 2, "highest": 4}
    assert other["compared"]["our_share_of_memory"] == 0.5, "of the round that both made"
    found, _ = measured(monkeypatch, tmp_path, {"ours": [late], "other": [late]})
    assert len(found.notes) == 2 and not found.failures and not rows_of(found)


def of_two_points(folder, options):
    return {"unit": "tokens/s", "amounts": {"1": [1, 1, 1], "2": [2, 2, 2]}, "text": ""}


def test_who_fails_at_one_point_is_measured_at_the_others(monkeypatch, tmp_path):
    job = replace(JOB, points="lengths", prepare=of_two_points, rate=None)
    gone = processes.FailedError("no memory")
    answers = {"ours": [result(1, 2)] * 4, "other": [result(1, 2), gone, result(1, 4)]}
    found, calls = measured(monkeypatch, tmp_path, answers, job=job)
    assert calls == ["ours", "other"] * 2 + ["ours", "other", "ours"]
    assert found.notes == ["fake 2: other left out: no memory"]
    rows = [(x["implementation"], x["x"], x["seconds"]["samples"]) for x in rows_of(found)]
    assert rows == [("ours", 1, 4), ("ours", 2, 4), ("other", 1, 4)]


@pytest.mark.parametrize(
    ("second", "wrong"), [(4.0, True), (3.6, True), (3.4, False), (2.9, False), (2.4, True)]
)
def test_who_does_not_learn_is_left_out(monkeypatch, tmp_path, second, wrong):
    """Of a second step whose loss is 4 without the first step and 3 after it."""

    def prepare(folder, options):
        return {**JOB.prepare(folder, options), "second": {"": (4.0, 3.0)}}

    found = result(1, 2)
    found["steps"][1]["loss"] = second
    answers = {"ours": [found] * 2, "other": [found] * 2}
    job = replace(JOB, prepare=prepare)
    came, _ = measured(monkeypatch, tmp_path, answers, job=job)
    said = f"the loss of its second step is {second:.4f}, expected 3.0000 after the first"
    assert [said in x for x in came.failures + came.notes] == [True, True] * wrong
    assert len(rows_of(came)) == (0 if wrong else 2)


def test_every_point_is_measured_by_everyone_before_the_next(monkeypatch, tmp_path):
    job = replace(JOB, points="lengths", prepare=of_two_points, rate=None)
    job = replace(job, options={**job.options, "rounds": 1})
    answers = {"ours": [result(1, 2), result(2, 2)], "other": [result(1, 2), result(4, 4)]}
    found, calls = measured(monkeypatch, tmp_path, answers, job=job)
    assert calls == ["ours", "other", "ours", "other"]
    rows = rows_of(found)
    assert [(row["implementation"], row["x"], row["size"]) for row in rows] == [
        ("ours", 1, "smollm2 1"),
        ("ours", 2, "smollm2 2"),
        ("other", 1, "smollm2 1"),
        ("other", 2, "smollm2 2"),
    ]
    assert rows[3]["compared"]["times_as_long"]["median"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"roundz": "3"}, "roundz=3: fake has no setting 'roundz'; did you mean rounds?"),
        ({"rounds": "many"}, "rounds=many: expected a whole number"),
        ({"rounds": "0"}, "rounds=0: expected at least 1"),
        ({"rounds": "1,2"}, "rounds=1,2: expected one number"),
        ({"dtype": "float16"}, "dtype=float16: expected one of bfloat16, float32"),
        ({"device": "tpu"}, "device=tpu: expected one of cpu, cuda"),
        ({"contenders": "ours,trl"}, "contenders=ours,trl: no contender 'trl'; there is ours"),
        ({"contenders": "ours,ours"}, "contenders=ours,ours: ours is named twice"),
        ({"lengths": "8,16,8"}, "lengths=8,16,8: 8 is named twice"),
        ({"seed": "-1"}, "seed=-1: expected at least 0"),
        ({"lengths": "1,8"}, "lengths=1,8: expected at least 2"),
        ({"kind": "loud"}, "kind=loud: expected one of quiet, soft"),
    ],
    ids=lambda x: next(iter(x.items()))[1] if isinstance(x, dict) else "",
)
def test_a_wrong_setting_is_one_line(words, message):
    with pytest.raises(UserError) as caught:
        jobs.options_of(JOB, words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_settings_are_taken():
    words = {"lengths": "8,16", "seed": "0", "model": "here", "contenders": "slow"}
    options, names = jobs.options_of(JOB, words)
    assert (options["lengths"], options["seed"], options["model"]) == ([8, 16], 0, "here")
    assert names == ("slow",)


def test_every_job_is_whole():
    for name in jobs.MODULES:
        job = jobs.job_of(name)
        assert job.name == name
        assert set(COMMON) <= set(job.options)
        assert set(job.default) <= set(job.contenders) and job.default[0] == "ours"
        assert set(job.packages) <= set(job.contenders)
        assert not job.points or isinstance(job.options[job.points], list)


def test_a_worker_writes_what_its_contender_measured(monkeypatch, tmp_path, chat_model):
    words = {"model": str(chat_model), "dtype": "float32", "steps": "1", "lengths": "16"}
    job = jobs.job_of("length")
    options, _ = jobs.options_of(job, words)

    def run_here(job, name, point, folder, environment, deadline):
        assert worker.main([job, name, str(folder), point]) == 0
        return jobs.json.loads((folder / "result.json").read_text())

    monkeypatch.setattr(processes, "run", run_here)
    monkeypatch.setattr(processes, "environment_of_peers", lambda: ({}, ""))
    names = ("ours", "peft", "peft-checkpointed")
    found = jobs.measure_job(job, options, names, tmp_path, lambda line: None)
    assert not found.failures and not found.notes, "all have the loss that float32 has"
    assert [row["x"] for row in rows_of(found)] == [16, 16, 16]


def test_ours_keeps_its_environment(monkeypatch, tmp_path):
    given = {}

    def answer(job, name, point, folder, environment, deadline):
        given[name] = environment
        return {"flops_per_second": 50.0} if name == jobs.CEILING else result(1, 2)

    monkeypatch.setattr(processes, "run", answer)
    monkeypatch.setattr(processes, "environment_of_peers", lambda: ({"of": "peers"}, "how"))
    found = jobs.measure_job(
        JOB, jobs.options_of(JOB, {})[0], ["ours", "other"], tmp_path, lambda line: None
    )
    assert given["ours"] is os.environ and given["other"] == given[jobs.CEILING] == {"of": "peers"}
    assert found.notes == ["how"]
