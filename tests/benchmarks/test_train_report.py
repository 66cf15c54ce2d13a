import pytest

from benchmarks.train import train_report
from benchmarks.train.train_flops import ModelShape, step_flops

SHAPE = ModelShape(1, 4, 8, 2, 1, 2, 10)


def result(contender, seconds, peak):
    steps = [{"seconds": s, "cpu_seconds": 2 * s, "loss": 3.0} for s in (99.0, *seconds)]
    return {
        "contender": contender,
        "steps": steps,
        "loaded_bytes": 10,
        "peak_bytes": peak,
        "peak_training_bytes": peak,
    }


@pytest.fixture
def measured():
    """Two rounds of one warm-up step and two timed ones, of 4 and 6 tokens."""
    return {
        "command": "python train_step.py",
        "date": "2030-01-01",
        "hardware": {},
        "software": {},
        "load_average": 0.0,
        "workload": {
            "model": "tiny",
            "shape": vars(SHAPE),
            "rank": 2,
            "lengths": [[50], [4], [6]],
            "pieces": [[[0, 50]], [[0, 4]], [[0, 6]]],
            "targets": [40, 2, 3],
            "warmup": 1,
        },
        "contenders": {"ours": "us", "trl-padded": "them"},
        "dtypes": {
            "float32": {
                "matmuls": [{"flops_per_second": 1000.0}, {"flops_per_second": 3000.0}],
                "contenders": {
                    "ours": [result("ours", (1, 2), 20), result("ours", (2, 4), 30)],
                    "trl-padded": [
                        result("trl-padded", (4, 4), 90),
                        result("trl-padded", (8, 40), 100),
                    ],
                },
            }
        },
    }


def test_figures(measured):
    summary = train_report.summarise(measured)["float32"]
    ours, theirs = summary["ours"], summary["trl-padded"]
    assert ours["seconds_per_step"] == 2
    assert ours["tokens_per_second"] == {"median": 2.5, "lowest": 1.5, "highest": 4}
    assert ours["cores_used"] == 2
    assert ours["losses"] == [3.0, 3.0, 3.0]
    # Ratios of the same step of the same round: 4/1, 4/2, 8/2, 40/4.
    assert theirs["ours_times_faster"] == {"median": 4, "lowest": 2, "highest": 10}
    assert theirs["ours_memory_share"] == 0.3
    assert "ours_times_faster" not in ours


def test_share_of_the_matmul_rate(measured):
    flops = [step_flops(SHAPE, 2, [(0, 4)], 2), step_flops(SHAPE, 2, [(0, 6)], 3)]
    rates = sorted([flops[0] / 1, flops[1] / 2, flops[0] / 2, flops[1] / 4])
    share = train_report.summarise(measured)["float32"]["ours"]["matmul_share"]
    assert share == pytest.approx((rates[1] + rates[2]) / 2 / 2000)


def test_report_names_contenders_and_figures(measured):
    text = train_report.render({**measured, "summary": train_report.summarise(measured)})
    assert "- trl-padded: them" in text
    assert "10.00" in text.split("share of its memory")[1]
