"""Writing beside transformers' generate: all write likely tokens, and who does not is told."""

import pytest
import torch

from benchmarks.common import jobs
from benchmarks.train import train_workload, write_job


@pytest.fixture(scope="module")
def prepared(chat_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    words = {"model": str(chat_model), "dtype": "float32", "steps": "1", "tokens": "3"}
    options, _ = jobs.options_of(write_job.JOB, {**words, "prompts": "2"})
    return options, write_job.prepare(folder, options), folder


@pytest.mark.parametrize("name", ["ours", "transformers", "transformers-merged"])
def test_what_is_written_is_likely(prepared, name):
    options, facts, folder = prepared
    assert facts["amounts"] == {"": [6, 6]}
    result = write_job.run(folder, options, name)
    assert len(result.steps) == 2 and result.contender == name
    assert result.steps[0].loss == facts["expected"][""] == 1.0


def test_unlikely_tokens_are_found(prepared, monkeypatch):
    _, _, folder = prepared
    workload = train_workload.load(folder)
    prompts = write_job.prompts(folder)[0]
    assert all(0 < len(ids) <= len(e) for ids, e in zip(prompts, workload.batches[0], strict=True))
    plain, _ = train_workload.load_with_adapters(workload, torch.float32)
    write = write_job.generate_writer(plain, 0, 3, static=False)
    written = [list(ids) for ids in write(prompts)]
    monkeypatch.setattr(write_job, "NEAR", 0.0)
    assert write_job.likely_share(workload, prompts, written) == 1.0
    written[0][2] = (written[0][2] + 1) % 200
    assert write_job.likely_share(workload, prompts, written) == pytest.approx(5 / 6)
