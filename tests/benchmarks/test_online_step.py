"""GRPO beside TRL: every contender writes as much, and figures are computed right."""

import pytest

from benchmarks.common import output
from benchmarks.train import online_step


@pytest.mark.slow
def test_every_contender_writes_as_much(chat_model, tmp_path):
    pytest.importorskip("trl")
    given = ["--model", str(chat_model), "--prompts", "2", "--generations", "2", "--tokens", "4"]
    args = online_step.parse_arguments([*given, "--steps", "1"])
    online_step.prepare(tmp_path, args)
    for name, run in (("ours", online_step.run_ours), ("trl", online_step.run_trl)):
        result = run(tmp_path, args, name)
        assert result.contender == name and len(result.steps) == 2
        assert 0 < result.loaded_bytes <= result.peak_bytes


def test_figures():
    def rounds(*seconds, peak):
        steps = [{"seconds": s, "cpu_seconds": 2 * s, "loss": 0.5} for s in (99.0, *seconds)]
        return [{"steps": steps, "peak_bytes": peak}]

    raw = {
        "warmup": 1,
        "prompts": 2,
        "generations": 4,
        "tokens": 10,
        "dtype": "float32",
        "writing": [1.0, 1.0, 3.0],
        "rounds": {"ours": rounds(2.0, 2.0, 4.0, peak=10), "trl": rounds(8.0, 9.0, 8.0, peak=40)},
    }
    found = online_step.summarise(raw)
    assert found["ours"]["tokens_per_second"] == 40
    assert found["ours"]["writing_share"] == 0.5
    assert found["trl"]["ours_times_faster"] == found["trl"]["ours_times_less_cpu"] == 4
    assert found["trl"]["ours_memory_share"] == 0.25
    text = online_step.render({**output.context(), **raw}, found)
    assert "4.00 times" in text and "Of a step of ours 50% is writing" in text


def test_no_such_contender(capsys):
    with pytest.raises(SystemExit):
        online_step.parse_arguments(["--contenders", "ours,other"])
    assert "no contender other" in capsys.readouterr().err
