"""DPO beside TRL: the same losses step after step, the first of them as expected."""

import json

import pytest

from benchmarks.common import jobs
from benchmarks.train import dpo_job
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
    words = {"model": str(chat_model), "dtype": "float32", "pairs": "3", "steps": "2"}
    options, _ = jobs.options_of(dpo_job.JOB, words)
    return options, dpo_job.prepare(tmp_path, options)


def test_every_contender_does_the_same_job(arguments, tmp_path):
    """Also after steps: gradients, clipping and AdamW are the same."""
    pytest.importorskip("trl")
    options, facts = arguments
    rows = json.loads((tmp_path / "pairs.json").read_text())
    assert len(rows) == 9 and rows[0].keys() == {"prompt", "chosen", "rejected"}
    losses = {}
    for name in ("ours", "ours-unshared", "trl"):
        result = dpo_job.run(tmp_path, options, name)
        losses[name] = [step.loss for step in result.steps]
        assert result.contender == name and 0 < result.loaded_bytes <= result.peak_bytes
        assert result.calls > 100
    assert abs(losses["trl"][0] - 0.6931) > 1e-3  # the adapter is not fresh
    assert losses["trl"][0] == pytest.approx(facts["expected"][""], rel=1e-5)
    assert losses["trl"][1] == pytest.approx(facts["second"][""][1], rel=1e-5)
    assert losses["ours"] == pytest.approx(losses["trl"], rel=1e-5)
    assert losses["ours-unshared"] == pytest.approx(losses["trl"], rel=1e-5)
