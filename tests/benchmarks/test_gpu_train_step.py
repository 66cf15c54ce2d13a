"""The training step on a GPU, on a model so small that a CPU does it as well."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import journal
from benchmarks.gpu import step_contenders, step_models, step_profile, step_report, train_step
from benchmarks.gpu.step_contenders import Contender, Job
from benchmarks.gpu.step_profile import Interval

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--warmup", "1", "--steps", "2", "--no-host"]


@pytest.mark.parametrize("job", train_step.DRY_JOBS)
def test_contenders_have_the_same_losses(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "steps.jsonl"
    method, batch = job.split(":")[1:]
    chosen = {
        "full": ["ours", "transformers", "transformers-autocast"],
        "qlora": ["ours", "peft"],
        "lora": ["ours", "peft", "peft-autocast", "ours-drop-in"],
    }[method]
    if "mixed" in batch:
        chosen = ["ours", "peft-padded", "peft-packed"]
    arguments = [*QUICK, "--jobs", job, "--contenders", ",".join(chosen), "--append", str(file)]
    assert train_step.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    rows = [x for x in journal.read(file) if x["event"] == "row"]
    assert {x["item"]["contender"] for x in rows} == set(chosen)
    for row in rows:
        assert len(row["losses"]) == 3 and row["losses"][-1] < row["losses"][0]
        assert row["flops"] > 0 and row["wall_seconds"] > 0
    (lossless, *others) = (x["losses"][0] for x in rows)
    assert others == pytest.approx([lossless] * len(others), rel=2e-3)
    page = (tmp_path / "out.md").read_text()
    assert all(f"| {name} " in page for name in chosen) and "Wrong" not in page
    # What a file says was begun is left out.
    assert train_step.main(arguments) == 0
    assert len([x for x in journal.read(file) if x["event"] == "row"]) == len(rows)


def test_nf4_is_bitsandbytes_and_the_next_contender_finds_the_dense_weights(
    tmp_path: Path,
) -> None:
    pytest.importorskip("bitsandbytes")
    file = tmp_path / "steps.jsonl"
    chosen = [
        "--jobs",
        "tiny:qlora:tiny",
        "--rounds",
        "2",
        "--contenders",
        "ours,bitsandbytes,peft",
    ]
    assert train_step.main([*QUICK, *chosen, "--append", str(file)]) == 0
    losses: dict[str, list[list[float]]] = {}
    for row in journal.read(file):
        if row["event"] == "row":
            losses.setdefault(row["item"]["contender"], []).append(row["losses"])
    for first, second in losses.values():
        assert first == pytest.approx(second, rel=1e-6)


@contextmanager
def out_of_memory(job: Job) -> Iterator[Any]:
    raise torch.OutOfMemoryError("too large")
    yield


@contextmanager
def broken(job: Job) -> Iterator[Any]:
    raise ValueError("no such\nkernel")
    yield


def test_a_contender_that_fails_or_does_not_fit_keeps_none_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft = step_contenders.LORA["peft"]
    table = {"big": Contender("", out_of_memory), "bad": Contender("", broken), "peft": peft}
    monkeypatch.setattr(step_contenders, "LORA", table)
    out = tmp_path / "out"
    assert train_step.main([*QUICK, "--jobs", "tiny:lora:tiny", "--out", str(out)]) == 1
    page = out.with_suffix(".md").read_text()
    assert "Not run: big (does not fit" in page
    assert "tiny lora tiny bad 1: ValueError: no such kernel" in page
    assert "| peft " in page


def test_a_profile_that_fails_leaves_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        return step_models.add_adapters(step_models.make_model("tiny", CPU))

    model, batch = make(), step_models.make_batch("tiny", 512, CPU)
    job = Job("lora", make, model, step_models.Snapshot(model), batch)

    def fails(*_: object) -> float:
        raise RuntimeError("no\ntracer")

    monkeypatch.setattr(train_step, "_host_seconds", fails)
    peft = step_contenders.LORA["peft"]
    found = train_step.measure_steps(peft, job, CPU, warmup=1, steps=1, host_batch=batch)
    assert found["wall_seconds"] > 0
    assert found["failed"] == {"host_seconds": "RuntimeError: no tracer"}
    entry = {**row("peft", [4.0]), **found}
    assert step_report.problems([entry]) == [
        "m lora b peft 1: no host_seconds: RuntimeError: no tracer"
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--contenders", "ours,pfet"), ("--jobs", "llama-1b:lora"), ("--jobs", "llama-1b:lora:rosw")],
)
def test_a_name_that_does_not_exist_is_refused(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_step.parse_arguments([option, value])
    assert value.split(",")[-1] in capsys.readouterr().err


def test_no_contender_begins_after_the_time(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    options = ["--jobs", "tiny:lora:tiny", "--minutes", "0", "--append", str(file)]
    assert train_step.main([*QUICK, *options]) == 0
    assert [x["event"] for x in journal.read(file)] == ["context"]


def row(contender: str, losses: list[float], norm: float = 1.0) -> dict[str, Any]:
    item = {"model": "m", "method": "lora", "batch": "b", "contender": contender, "round": 1}
    return {"event": "row", "item": item, "losses": losses, "norms": [norm]}


@pytest.mark.parametrize(
    ("of_ours", "problem"),
    [
        (row("ours", [4.0, 3.99]), None),
        (row("ours", [4.0, 3.8]), "m lora b ours: the loss of step 2 is 3.8000, expected 4.0000"),
        (row("ours", [float("nan"), 4.0]), "m lora b ours: the loss of step 1 is nan"),
        (row("ours", [4.0, 4.0], 1.2), "m lora b ours: the first gradient's norm is 1.2, exp"),
    ],
)
def test_losses_that_differ_are_told(of_ours: dict[str, Any], problem: str | None) -> None:
    found = step_report.problems([of_ours, row("peft-autocast", [4.0, 4.0])])
    assert found == [] if problem is None else found[0].startswith(problem)


def test_adapters_in_bfloat16_are_no_reference_for_a_later_step() -> None:
    """Their updates are rounded: PEFT's own losses differ by as much between the two dtypes."""
    ours, rounded = row("ours", [4.0, 3.9]), row("peft", [4.0, 3.7])
    assert step_report.problems([ours, rounded]) == []
    assert step_report.unchecked(step_report.rows([ours, rounded])["m", "lora", "b"]) == ["ours"]
    (found,) = step_report.problems([row("ours", [4.2, 3.9]), rounded])
    assert found.endswith("ours: the loss of step 1 is 4.2000, expected 4.0000")
    (found,) = step_report.problems([rounded, row("peft-checkpointed", [4.0, 3.9])])
    assert "peft-checkpointed: the loss of step 2" in found


def test_what_acceleration_left_is_told() -> None:
    report = "  2 × layers  glu → Triton kernel\n  1 × Llama  attention  left: a try differs"
    times = {"wall_seconds": 1.0, "gpu_seconds": [], "flops": 1, "tokens_per_second": 1.0}
    entry = {**row("ours", [4.0, 4.0]), **times, "report": {"accelerate": report}}
    page = "\n".join(step_report.parts([entry]))
    assert "Not accelerated in ours:\n\n- 1 × Llama  attention  left: a try differs" in page


def test_a_profile_counts_launches_and_time_without_any() -> None:
    found = [
        Interval("gemm", 1.0, 2.0),
        Interval("norm", 2.5, 2.6),  # after a gap of 0.5
        Interval("copy", 1.5, 2.2),  # beside the first
        Interval("gemm", 2.6, 4.0),
    ]
    summary = step_profile.summarise(found)
    assert summary["launches"] == 4 and summary["span"] == pytest.approx(3.0)
    assert summary["idle"] == pytest.approx(0.3) == summary["longest_gap"]
    (first, *_) = summary["kernels"]
    assert (first["name"], first["launches"]) == ("gemm", 2)
    assert first["seconds"] == pytest.approx(2.4)
    text = step_profile.render(summary)
    assert "4 launches in 3000.0 ms" in text and "| gemm " in text
    assert step_profile.summarise([])["launches"] == 0


def test_mixed_lengths_add_up_to_as_many_tokens_as_equal_ones() -> None:
    assert sum(step_models.BATCHES["mixed"]) == sum(step_models.BATCHES["rows"]) == 8192
    batch = step_models.make_batch("tiny-mixed", 512, CPU)
    assert batch.rows is None and batch.tokens == 36 and batch.targets == 32
    assert int((batch.packed["labels"] != -100).sum()) == 32
    assert batch.padded["input_ids"].shape == (4, 17)
    assert batch.padded["attention_mask"].sum() == 36


@pytest.mark.gpu
@pytest.mark.parametrize("contender", ["ours", "peft"])
def test_on_a_gpu_a_step_has_launches_and_memory(contender: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")

    def make() -> Any:
        return step_models.add_adapters(step_models.make_model("tiny", device))

    model, batch = make(), step_models.make_batch("tiny", 512, device)
    job = Job("lora", make, model, step_models.Snapshot(model), batch)
    found = train_step.measure_steps(
        step_contenders.LORA[contender], job, device, warmup=1, steps=2, host_batch=batch
    )
    assert found["profile"]["launches"] > 20
    assert 0 <= found["profile"]["idle"] < found["profile"]["span"]
    assert len(found["gpu_seconds"]) == 2 and min(found["gpu_seconds"]) > 0
    assert found["peak_bytes"] > found["held_bytes"] > 0
    assert found["host_seconds"] > 0
