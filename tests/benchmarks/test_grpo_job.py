"""GRPO beside TRL: every contender writes as much."""

import pytest

from benchmarks.common import jobs
from benchmarks.train import grpo_job


@pytest.mark.slow
def test_every_contender_writes_as_much(chat_model, tmp_path):
    pytest.importorskip("trl")
    words = {"model": str(chat_model), "prompts": "2", "generations": "2", "tokens": "4"}
    options, names = jobs.options_of(grpo_job.JOB, {**words, "steps": "1"})
    facts = grpo_job.prepare(tmp_path, options)
    assert facts["amounts"] == {"": [16, 16]}
    assert names == ("ours", "trl")
    for name in names:
        result = grpo_job.run(tmp_path, options, name)
        assert result.contender == name and len(result.steps) == 2
        assert 0 < result.loaded_bytes <= result.peak_bytes
