"""Whole models trained and used as people do it, on every kind of device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from host_reads import HostReads, waits_for_the_gpu
from torch import Tensor
from whole_models import adapted, assert_trains_as_well, batch_of, exact, training_results

import lora_engine
from lora_engine import backends
from lora_engine.errors import UserError
from lora_engine.testing import error

needs_gpu = pytest.mark.gpu


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


def both(device: torch.device, *args: Any, **more: Any) -> tuple[Any, Any]:
    """An accelerated model on the device, and the same as transformers and PEFT have it."""
    ours, plain = (adapted(*args, **more).to(device) for _ in range(2))
    lora_engine.accelerate(ours)
    return ours, plain


def losses(model: Any, device: torch.device, *, steps: int) -> list[float]:
    """Of steps with torch's fused AdamW, each on a batch of another kind."""
    kinds = ("whole", "right", "packed")
    batches = [batch_of(kind, device) for kind in kinds]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2, fused=True)
    found = []
    for step in range(steps):
        loss = model.train()(**batches[step % len(batches)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.parametrize("adapters", ["lora", "dora", "trained_head"])
def test_every_step_is_as_pefts(adapters: str, device: torch.device) -> None:
    """What is kept of the adapters from call to call follows an optimiser that writes in place."""
    ours, theirs = (losses(m, device, steps=9) for m in both(device, "llama", adapters))
    assert theirs[-1] < 0.97 * theirs[2]
    assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_layers(dropout: float, reentrant: bool, device: torch.device) -> None:
    """Layers that run again draw the masks of dropout that they drew before."""
    model, given = adapted("llama", "lora", lora_dropout=dropout), batch_of("right", device)
    lora_engine.accelerate(model.to(device))
    torch.manual_seed(7)
    plain = training_results(model, given)
    plain = {name: x.clone() for name, x in plain.items()}
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(7)
    again = training_results(model, given)
    assert plain.keys() == again.keys()
    for name, expected in plain.items():
        assert error(again[name], expected) < 2e-5, name


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(weights: torch.dtype, device: torch.device) -> None:
    ours, plain = both(device, "qwen3", "lora", weights)
    given = batch_of("right", device)
    oracle = training_results(exact(plain), batch_of("right", torch.device("cpu")))
    with torch.autocast(device.type, torch.bfloat16):
        results = [training_results(model, given) for model in (ours, plain)]
    assert_trains_as_well(*results, oracle, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapters", ["lora", "two"])
def test_dropout_draws_the_same_everywhere(
    adapters: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The masks follow from torch's seed alone: not from the device, nor from the dtype."""
    model = adapted("llama", adapters, dtype, lora_dropout=0.25)
    oracle = copy.deepcopy(model).float()
    for each in (oracle, model.to(device)):
        assert not lora_engine.accelerate(each).left  # what PEFT draws depends on the device
    found = []
    for each, where in ((model, device), (oracle, torch.device("cpu"))):
        torch.manual_seed(3)
        found.append(training_results(each, batch_of("whole", where)))
    ours, expected = found
    assert ours.keys() == expected.keys()
    largest = max(x.abs().max().item() for name, x in expected.items() if name != "loss")
    for name, x in expected.items():
        floor = 1e-30 if name == "loss" else 0.1 * largest
        limit = 5e-5 if dtype == torch.float32 else 5e-2
        assert error(ours[name].cpu(), x, floor) < limit, name
    other = training_results(model, batch_of("whole", device))
    assert error(other["loss"], ours["loss"]) > 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_generation(name: str, device: torch.device) -> None:
    given = {k: x for k, x in batch_of("left", device).items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        texts, logits = zip(
            *(
                (m.generate(**given, **options), m(**given).logits)
                for m in (model.eval() for model in both(device, name, "lora"))
            ),
            strict=True,
        )
    seen = given["attention_mask"].bool()
    assert torch.equal(*texts)
    assert error(logits[0][seen], logits[1][seen]) < 2e-5


def test_a_step_reads_no_more_than_where_the_labels_are(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads a value waits for all that the GPU was given to do before."""
    monkeypatch.setattr(backends, "reads_at_once", lambda x: False)  # as on a GPU
    model, given = adapted("llama", "lora", torch.bfloat16).to(device), batch_of("whole", device)
    lora_engine.accelerate(model)
    training_results(model, given)
    with HostReads(device) as reads:
        training_results(model, given)
    # transformers itself looks whether positions begin anew.
    assert sorted(reads.found) == ["_local_scalar_dense", "nonzero"]


@needs_gpu
def test_a_step_waits_no_more_than_that(gpu: torch.device) -> None:
    model, given = adapted("llama", "lora", torch.bfloat16).to(gpu), batch_of("whole", gpu)
    lora_engine.accelerate(model)
    training_results(model, given)
    with waits_for_the_gpu() as waits:
        training_results(model, given)
    assert len(waits) == 2, waits  # as above


@contextmanager
def late_stream() -> Iterator[None]:
    """Within, work is queued behind a long wait on a stream that is not the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        yield
    torch.cuda.current_stream().wait_stream(stream)


def drawn(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in results.items()}


@needs_gpu
@pytest.mark.parametrize("adapters", ["lora", "dora", "two"])
def test_another_stream(adapters: str, gpu: torch.device) -> None:
    """Kernels queue on the stream that torch calls current: elsewhere they would run too early."""
    model = adapted("llama", adapters, torch.bfloat16).to(gpu)
    lora_engine.accelerate(model)
    given = batch_of("whole", gpu)
    expected = drawn(training_results(model, given))
    model.zero_grad()
    with late_stream():
        with torch.no_grad():  # what an early kernel would read
            for parameter in model.parameters():
                parameter.mul_(2)
        doubled = drawn(training_results(model, given))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        found = drawn(training_results(model, given))
    assert error(doubled["loss"], expected["loss"]) > 1e-3
    largest = max(x.abs().max().item() for x in expected.values())
    for name, x in expected.items():  # torch's attention may add up in another order
        assert error(found[name], x, 0.01 * largest) < 1e-2, name


@needs_gpu
def test_a_gpu_that_is_not_the_current_one(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", (gpu.index + 1) % torch.cuda.device_count())
    model = adapted("llama", "lora", torch.bfloat16)
    oracle = training_results(exact(model), batch_of("whole", torch.device("cpu")))
    theirs = drawn(training_results(model.to(other), batch_of("whole", other)))
    with pytest.raises(UserError, match=r"call torch\.cuda\.set_device"):
        lora_engine.accelerate(model)
    with torch.cuda.device(other):
        assert not lora_engine.accelerate(model).left
        ours = training_results(model, batch_of("whole", other))
    assert_trains_as_well(ours, theirs, oracle, torch.bfloat16)
