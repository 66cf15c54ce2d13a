"""DPO beside TRL: the same losses step after step, and figures that are computed right."""

import json

import pytest

from benchmarks.train import preference_step
from lora_engine.data import preferred_docstrings
from lora_engine.data.records import Record


def record(number):
    def said(role, text):
        return ({"role": role, "content": text},)

    return Record(
        "preference",
        prompt=said("user", f"def double_{number}(x): return x * {number}"),
        chosen=said("assistant", f"By {number}"),
        rejected=said("assistant", f"It is {number} x"),
    )


@pytest.fixture
def arguments(chat_model, tmp_path, monkeypatch):
    """Of a few pairs on a tiny model, prepared in the folder."""
    monkeypatch.setattr(
        preferred_docstrings, "docstring_pairs", lambda: [record(i) for i in range(40)]
    )
    given = ["--model", str(chat_model), "--dtype", "float32", "--pairs", "3", "--steps", "2"]
    args = preference_step.parse_arguments(given)
    preference_step.prepare(tmp_path, args)
    return args


def test_every_contender_does_the_same_job(arguments, tmp_path):
    """Also after steps: gradients, clipping and AdamW are the same."""
    pytest.importorskip("trl")
    rows = json.loads((tmp_path / "pairs.json").read_text())
    assert len(rows) == 9 and rows[0].keys() == {"prompt", "chosen", "rejected"}
    losses = {}
    for name in ("ours", "ours-unshared", "trl"):
        run = preference_step.run_trl if name == "trl" else preference_step.run_ours
        result = run(tmp_path, arguments, name)
        losses[name] = [step.loss for step in result.steps]
        assert result.contender == name and 0 < result.loaded_bytes <= result.peak_bytes
    assert abs(losses["trl"][0] - 0.6931) > 1e-3  # the adapter is not fresh
    assert losses["ours"] == pytest.approx(losses["trl"], rel=1e-5)
    assert losses["ours-unshared"] == pytest.approx(losses["trl"], rel=1e-5)


def rounds(*seconds, peak):
    """A warm-up step and these."""
    steps = [{"seconds": s, "cpu_seconds": 2 + s, "loss": 0.5} for s in (99.0, *seconds)]
    return [{"steps": steps, "peak_bytes": peak}]


def test_figures():
    raw = {
        "warmup": 1,
        "tokens": [50, 40, 60],
        "rounds": {"ours": rounds(1.0, 3.0, peak=10), "trl": rounds(4.0, 6.0, peak=40)},
    }
    found = preference_step.summarise(raw)
    assert found["ours"]["tokens_per_second"] == 30  # 40 and 20
    assert found["trl"]["tokens_per_second"] == 10
    assert found["trl"]["ours_times_faster"] == 3  # 4 and 2
    assert found["trl"]["ours_times_less_cpu"] == pytest.approx((6 / 3 + 8 / 5) / 2)
    assert found["trl"]["cpu_seconds"] == 7
    assert found["trl"]["ours_memory_share"] == 0.25
    assert "ours_times_faster" not in found["ours"]


def test_an_unknown_contender_is_refused(capsys):
    with pytest.raises(SystemExit):
        preference_step.parse_arguments(["--contenders", "ours,other"])
    assert "no contender other; there is ours," in capsys.readouterr().err
