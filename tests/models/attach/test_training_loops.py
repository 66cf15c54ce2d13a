"""What people's training loops do to a model: an accelerated one takes it as a plain one does."""

import copy
import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import lora_engine
from lora_engine.models.attach.accelerate import is_accelerated
from lora_engine.testing import error, tiny_llama, with_lora

IDS = torch.arange(3, 43).view(2, 20)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "head and embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}

Loop = Callable[[Any], Iterator[torch.Tensor]]


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return loss


def gradients(model: Any, loss: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    (loss_of(model) if loss is None else loss).backward()
    yield from (p.grad for p in trained(model) if p.grad is not None)


def steps(model: Any, count: int) -> Iterator[torch.Tensor]:
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2, fused=True)
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def average_swapped_in_and_out(model: Any) -> Iterator[torch.Tensor]:
    average = [p.detach().clone() for p in trained(model)]
    for _ in range(2):
        yield from steps(model, 1)
        torch._foreach_lerp_(average, [p.detach() for p in trained(model)], 0.3)
        own = [p.data for p in trained(model)]
        for p, mean in zip(trained(model), average, strict=True):
            p.data = mean
        with torch.no_grad():
            yield loss_of(model)
        for p, data in zip(trained(model), own, strict=True):
            p.data = data


def average_in_a_copy(model: Any) -> Iterator[torch.Tensor]:
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(2):
        yield from steps(model, 1)
        average.update_parameters(model)
    with torch.no_grad():
        yield average(input_ids=IDS, labels=IDS).loss


def perturbed_by_its_gradient(model: Any) -> Iterator[torch.Tensor]:
    """Sharpness-aware minimisation, arXiv:2010.01412."""
    for _ in range(2):
        moves = [0.1 * grad / grad.norm().clamp(min=1e-9) for grad in gradients(model)]
        with torch.no_grad():
            torch._foreach_add_(trained(model), moves)
        yield from gradients(model)
        with torch.no_grad():
            torch._foreach_sub_(trained(model), moves)
            torch._foreach_add_(trained(model), [p.grad for p in trained(model)], alpha=-0.1)


def stepped_while_going_back(model: Any) -> Iterator[torch.Tensor]:
    """Each parameter is written as soon as its gradient is there, layers again before it."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trained(model)}

    def step(p: torch.Tensor) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        loss = loss_of(model)
        loss.backward()
        yield loss.detach()


def merged_for_a_look(model: Any) -> Iterator[torch.Tensor]:
    """As trainers merge to hand weights to another engine, and go on."""
    for safe in (False, True):
        yield from steps(model, 1)
        model.merge_adapter(safe_merge=safe)
        with torch.no_grad():
            yield loss_of(model)
        model.unmerge_adapter()
    yield from steps(model, 2)


def some_layers_at_a_time(model: Any) -> Iterator[torch.Tensor]:
    everything = trained(model)
    for turn in range(2):
        for i, p in enumerate(everything):
            p.requires_grad_(i % 2 == turn)
        yield from gradients(model)


def copied_between(model: Any) -> Iterator[torch.Tensor]:
    loss = loss_of(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        torch._foreach_mul_(trained(other), 0.5)
    yield loss_of(other).detach()
    yield from gradients(model, loss)
    yield from gradients(other)


def stored_and_read(model: Any) -> Iterator[torch.Tensor]:
    yield from steps(model, 1)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    yield from steps(again, 2)
    yield from steps(model, 1)


def backward_on_another_thread(model: Any) -> Iterator[torch.Tensor]:
    model.zero_grad()
    thread = threading.Thread(target=loss_of(model).backward)
    thread.start()
    thread.join()
    yield from (p.grad for p in trained(model) if p.grad is not None)


def checkpointed_from_outside(model: Any) -> Iterator[torch.Tensor]:
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: model(inputs_embeds=x, labels=IDS).loss, embedded, use_reentrant=reentrant
        )
        yield from gradients(model, loss)


def scaled_anew(model: Any) -> Iterator[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 0.3)
    yield from gradients(model)
    scales = [torch.tensor(0.7) for _ in layers]
    for layer, scale in zip(layers, scales, strict=True):
        layer.scaling["default"] = scale
    yield from gradients(model)
    for scale in scales:
        scale.fill_(1.9)
    yield from gradients(model)


def accelerated_anew_between(model: Any) -> Iterator[torch.Tensor]:
    accelerated = is_accelerated(model)
    for change in (lora_engine.accelerate, lora_engine.restore, lora_engine.accelerate):
        loss = loss_of(model)
        if accelerated:
            change(model)
        yield from gradients(model, loss)


LOOPS: list[Loop] = [
    average_swapped_in_and_out,
    average_in_a_copy,
    perturbed_by_its_gradient,
    stepped_while_going_back,
    merged_for_a_look,
    some_layers_at_a_time,
    copied_between,
    stored_and_read,
    backward_on_another_thread,
    checkpointed_from_outside,
    scaled_anew,
    accelerated_anew_between,
]


@pytest.mark.filterwarnings("ignore::lora_engine.errors.EngineWarning")
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_gets_what_it_gets_of_a_plain_model(variant: str, loop: Loop) -> None:
    plain = with_lora(tiny_llama(), **{"init_lora_weights": False, **VARIANTS[variant]}).train()
    ours = copy.deepcopy(plain)
    lora_engine.accelerate(ours)
    before = loss_of(plain)
    expected = [x.detach().clone() for x in loop(plain)]
    assert before.isfinite() and expected
    found = [x.detach().clone() for x in loop(ours)]
    assert len(found) == len(expected)
    largest = max(x.abs().max().item() for x in expected)
    for actual, oracle in zip(found, expected, strict=True):
        assert error(actual, oracle, floor=1e-3 * largest) < 1e-3


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_what_autograd_does_not_see_written_leaves_the_backward_pass_its_values(
    variant: str,
) -> None:
    model = with_lora(tiny_llama(), init_lora_weights=False, **VARIANTS[variant]).train()
    lora_engine.accelerate(model)
    expected = [grad.clone() for grad in gradients(model)]
    loss = loss_of(model)
    for p in trained(model):
        p.data.mul_(0.5)
    for actual, oracle in zip(gradients(model, loss), expected, strict=True):
        assert error(actual, oracle) < 1e-5


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_dora_in_float16_is_as_near_to_float64_as_peft_s(loss_scale: float) -> None:
    """Without a scale the magnitudes' gradients are too small for float16, PEFT's as ours."""
    targets = ["q_proj", "down_proj", "embed_tokens"]
    plain = with_lora(
        tiny_llama(), init_lora_weights=False, use_dora=True, target_modules=targets
    ).train()
    cast = copy.deepcopy(plain)
    lora_engine.accelerate(cast)
    plain, cast = plain.half(), cast.half()
    anew = copy.deepcopy(plain)
    lora_engine.accelerate(anew)

    def scaled_gradients(model: Any) -> list[torch.Tensor]:
        return [grad.double() for grad in gradients(model, loss_of(model) * loss_scale)]

    exact = scaled_gradients(copy.deepcopy(plain).double())

    def distances(model: Any) -> torch.Tensor:
        pairs = zip(scaled_gradients(model), exact, strict=True)
        return torch.stack([(grad - oracle).norm() / oracle.norm() for grad, oracle in pairs])

    theirs = distances(plain)
    for ours in map(distances, (cast, anew)):
        assert ours.mean() < 1.5 * theirs.mean()
        assert ours.median() < 1.5 * theirs.median()
