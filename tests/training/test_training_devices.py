"""The training loop on a GPU, beside itself on the CPU."""

from typing import Any

import pytest
import torch
from host_reads import HostReads, waits_for_the_gpu
from training_helpers import (
    SignalAtStep,
    assert_same_bits,
    lines,
    make_examples,
    make_trainer,
    one_batch,
    trainable,
)
from whole_models import adapted, model_of

from lora_engine import backends
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.objectives.sft import SFT
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cpu":
        return CPU
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def on(device: torch.device, model: Any) -> Any:
    accelerate(model.to(device))
    return model


def step_of(model: Any, **config: Any) -> TrainStep:
    flat = FlatParameters(model.train().named_parameters())
    return TrainStep(model, SFT(), FlatAdamW(flat, TrainConfig(**config)))


def losses(step: TrainStep, *, count: int) -> list[float]:
    """Of steps of two micro-batches each, the same examples again and again."""
    examples = make_examples(12)
    batches = [one_batch(examples[:5]), one_batch(examples[5:])]
    return [step(n, batches, 1e-2, lambda: None).loss for n in range(1, count + 1)]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_learns_as_on_the_cpu(
    dtype: torch.dtype, optimizer: str, device: torch.device
) -> None:
    model = on(device, adapted("llama", "lora", dtype))
    found = losses(step_of(model, optimizer=optimizer), count=8)
    expected = losses(step_of(adapted("llama", "lora"), optimizer=optimizer), count=8)
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_all_weights_learn_with_float32_masters(optimizer: str, device: torch.device) -> None:
    model = on(device, model_of("qwen3", torch.bfloat16))
    found = losses(step_of(model, optimizer=optimizer), count=6)
    expected = losses(step_of(model_of("qwen3"), optimizer=optimizer), count=6)
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=5e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_interrupted_and_resumed_is_bitwise_the_same(
    tmp_path: Any, dropout: float, device: torch.device
) -> None:
    def fit(name: str, callbacks: Any = (), resume: bool = False) -> tuple[Any, Any]:
        model = on(device, adapted("llama", "lora", torch.bfloat16, lora_dropout=dropout))
        trainer = make_trainer(tmp_path / name, model, callbacks=callbacks, final_weights="last")
        return trainer.fit(resume=resume), model

    straight, expected = fit("straight")
    interrupted, _ = fit("broken", [SignalAtStep(3)])
    assert (interrupted.stopped, interrupted.steps) == ("interrupted", 3)
    resumed, model = fit("broken", resume=True)
    assert resumed.stopped == straight.stopped == "finished"
    assert_same_bits(trainable(model), trainable(expected))
    assert len(lines(tmp_path / "broken")) == len(lines(tmp_path / "straight"))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "lion", "adafactor"])
def test_a_step_reads_nothing_but_its_result(
    optimizer: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "reads_at_once", lambda x: False)  # as on a GPU
    step = step_of(on(device, adapted("llama", "lora", torch.bfloat16)), optimizer=optimizer)
    losses(step, count=1)
    with HostReads(device) as reads:
        losses(step, count=1)
    assert reads.found == []


def test_a_read_within_a_micro_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails where a layer asks for a value, as here a norm's."""
    monkeypatch.setattr(backends, "reads_at_once", lambda x: False)
    model = on(CPU, adapted("llama", "lora", torch.bfloat16))
    layer = model.get_base_model().model.layers[1]
    layer.register_forward_hook(lambda module, inputs, result: float(result.sum()) and None)
    step = step_of(model)
    with HostReads(CPU) as reads:
        losses(step, count=1)
    assert reads.found == ["_local_scalar_dense"] * 2


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_once() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    step = step_of(on(torch.device("cuda"), adapted("llama", "lora", torch.bfloat16)))
    losses(step, count=1)
    with waits_for_the_gpu() as waits:
        losses(step, count=1)
    assert len(waits) == 1, waits  # the step's result
