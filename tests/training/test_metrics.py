import hashlib
import json
from dataclasses import replace

import pytest

from lora_engine.evaluation.heldout import HeldoutResult, ProbeResult
from lora_engine.training.metrics import (
    MetricsLog,
    StepMetrics,
    Written,
)

STEP = StepMetrics(1, 2.5, 1e-3, 0.7, 100, 40, 321.5, 1 << 30)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_have_exactly_these_fields(tmp_path):
    log = MetricsLog(tmp_path / "deep" / "metrics.jsonl")
    log.append_step(STEP)
    log.append_heldout(1, HeldoutResult(2.0, 0.5, 9, 5))
    log.append_heldout(2, HeldoutResult(2.0, None, 9, 5, {}, ProbeResult(3.0, 0.4, 7)))
    log.close()
    step, heldout, probed = lines(tmp_path / "deep" / "metrics.jsonl")
    assert set(step) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert heldout == {"step": 1, "heldout_loss": 2.0, "heldout_accuracy": 0.5}
    assert probed == {"step": 2, "heldout_loss": 2.0, "probe_loss": 3.0, "probe_accuracy": 0.4}


def test_is_on_disk_after_every_line(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.append_step(STEP)
    assert lines(tmp_path / "m")[0]["loss"] == 2.5
    log.close()


def test_opening_cuts_back_to_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.append_step(STEP)
    written = log.sync()
    for step in (2, 3):
        log.append_step(replace(STEP, step=step))
    log.close()
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    log = MetricsLog(tmp_path / "m", written)
    log.append_step(replace(STEP, step=2))
    log.close()
    assert [line["step"] for line in lines(tmp_path / "m")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"step": 1}\n{"st', 1),
        ('{"step": 1}\n{"st\n[1]\n9\n\xff\n{"step": 1}\n', 2),
        ('{}\n{"loss": 1}\n{"step": "1"}\n{"step": 1, "loss": [2]}\n{"step": NaN}\n', 0),
        ("[" * 100_000 + "\n", 0),
        ("", 0),
    ],
    ids=["shorter", "other lines", "other objects", "deep", "empty"],
)
def test_of_a_file_that_was_changed_what_can_be_read_is_kept(tmp_path, caplog, content, kept):
    path = tmp_path / "m"
    path.write_text(content, encoding="latin-1")
    log = MetricsLog(path, Written(1_000_000, "of something else"))
    log.append_step(replace(STEP, step=2))
    log.close()
    assert [line["step"] for line in lines(path)] == [1] * kept + [2]
    assert caplog.messages == [
        f"{path}: was changed after the checkpoint; {kept} of its lines can be read"
    ]


def test_what_is_written_can_be_checked_after_every_resumption(tmp_path, caplog):
    written = None
    for _ in range(3):
        log = MetricsLog(tmp_path / "m", written)
        log.append_step(STEP)
        written = log.sync()
        log.close()
        assert written.sha256 == hashlib.sha256((tmp_path / "m").read_bytes()).hexdigest()
    assert caplog.messages == []
    assert len(lines(tmp_path / "m")) == 3


def test_a_line_that_the_disk_takes_in_parts_is_whole(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "m")
    file = log._file

    class Slow:
        def write(self, content):
            return file.write(content[:10])

        def close(self):
            file.close()

    log._file = Slow()
    log.append_step(STEP)
    log.close()
    assert lines(tmp_path / "m")[0]["loss"] == 2.5


def test_what_cannot_be_written_names_the_file(tmp_path):
    log = MetricsLog(tmp_path / "m")
    log.close()
    refused = pytest.raises(OSError, match=r"No space left on device: '.*/m'")
    with open("/dev/full", "ab", buffering=0) as log._file, refused:
        log.append_step(STEP)


def test_what_is_not_json_is_refused(tmp_path):
    log = MetricsLog(tmp_path / "m")
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append_step(replace(STEP, loss=float("nan")))
    log.close()
