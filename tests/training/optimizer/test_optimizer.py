import re

import peft.optimizers
import pytest
import torch
from torch import nn

from lora_engine.errors import UserError
from lora_engine.testing import tiny_llama, with_lora
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.optimizer.rates import check_rates, rate_of


def test_is_torchs_adamw_with_clipping():
    torch.manual_seed(1)
    config = TrainConfig(weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6, max_grad_norm=0.5)
    ours = [nn.Parameter(torch.randn(s)) for s in [(5, 3), (7,)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    flat = FlatParameters([(f"p{i}", p) for i, p in enumerate(ours)])
    optimizer = FlatAdamW(flat, config)
    oracle = torch.optim.AdamW(theirs, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    norms = []
    for step in range(6):
        learning_rate = 0.1 / (step + 1)
        scale = 10.0 if step % 2 else 1e-2  # clipped every other step
        flat.zero_grad()
        oracle.zero_grad()
        for parameters in (ours, theirs):
            (scale * sum((p.sin() * p).sum() for p in parameters)).backward()
        norm = optimizer.grad_norm()
        norms.append(norm.item())
        optimizer.step(learning_rate, norm)
        nn.utils.clip_grad_norm_(theirs, 0.5)
        oracle.param_groups[0]["lr"] = learning_rate
        oracle.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    assert min(norms) < 0.5 < max(norms)
    assert optimizer.updates == 6


@pytest.mark.parametrize(
    ("gradient", "maximum", "applied"),
    [(4.0, 1.0, 1.0), (0.5, 1.0, 0.5), (1e9, None, 1e9), (0.0, 1.0, 0.0)],
)
def test_gradients_are_clipped_to_the_maximum(gradient, maximum, applied):
    flat = FlatParameters([("p", nn.Parameter(torch.zeros(1)))])
    optimizer = FlatAdamW(flat, TrainConfig(max_grad_norm=maximum, beta1=0.5))
    flat.grad[0] = gradient
    optimizer.step(0.1, optimizer.grad_norm())
    assert optimizer.exp_avg[0].item() == applied / 2  # the first moment begins at 0


@pytest.mark.parametrize("maximum", [0.1, 0.3, 1.0])
def test_the_kernel_rounds_the_clipping_factor_once(maximum):
    """As for a factor that the host divides in float64: the norm is not a power of two."""
    flat = FlatParameters([("p", nn.Parameter(torch.zeros(64)))])
    for seed in range(20):
        torch.manual_seed(seed)
        flat.grad.normal_()
        optimizer = FlatAdamW(flat, TrainConfig(max_grad_norm=maximum, beta1=0.5))
        norm = optimizer.grad_norm()
        optimizer.step(0.1, norm)
        factor = torch.tensor(maximum / norm.item(), dtype=torch.float32)
        assert torch.equal(optimizer.exp_avg, flat.grad * factor / 2)


def test_step_bumps_versions():
    parameter = nn.Parameter(torch.ones(3))
    flat = FlatParameters([("p", parameter)])
    version = parameter._version
    flat.grad.fill_(1.0)
    FlatAdamW(flat, TrainConfig()).step(0.1, torch.tensor(1.0))
    assert parameter._version > version
    assert parameter[0].item() == pytest.approx(0.9, abs=1e-6)


def test_8bit_moments_take_a_quarter_and_move_the_same_way():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s)) for s in [(40, 30), (7,)]]
    moved, sizes = {}, {}
    for name in ("adamw", "adamw_8bit"):
        ours = [nn.Parameter(p.detach().clone()) for p in parameters]
        flat = FlatParameters([(f"p{i}", p) for i, p in enumerate(ours)])
        before = flat.data.clone()
        optimizer = FlatAdamW(flat, TrainConfig(optimizer=name))
        for _ in range(10):
            flat.zero_grad()
            sum((p.sin() * p).sum() for p in ours).backward()
            optimizer.step(1e-2, optimizer.grad_norm())
        moved[name] = flat.data - before
        buffers = [x for x in vars(optimizer).values() if isinstance(x, torch.Tensor)]
        sizes[name] = sum(x.nbytes for x in buffers)
        padding = torch.ones_like(flat.data, dtype=torch.bool)
        for entry in flat.entries:
            entry.view(padding)[...] = False
        assert padding.any() and not flat.data[padding].any()
    assert sizes["adamw_8bit"] < 0.26 * sizes["adamw"] + 8
    assert not torch.equal(*moved.values())
    torch.testing.assert_close(moved["adamw_8bit"], moved["adamw"], rtol=0.1, atol=2e-3)


def test_moments_of_other_parameters_are_refused():
    config = TrainConfig(optimizer="adamw_8bit")
    small, large = (
        FlatAdamW(FlatParameters([("p", nn.Parameter(torch.ones(n)))]), config) for n in (300, 700)
    )
    with pytest.raises(UserError, match="exp_avg: not the moments of this model"):
        large.load(small.tensors().__getitem__)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_learning_rates_by_factor_and_adapter(name):
    torch.manual_seed(0)
    config = TrainConfig(
        optimizer=name, loraplus_lr_ratio=16.0, adapter_learning_rates={"other": 0.5}
    )
    rates = {"q.lora_A.default.weight": 1.0, "q.lora_B.default.weight": 16.0}
    rates |= {"q.lora_A.other.weight": 0.5, "q.lora_B.other.weight": 8.0}
    together = [(key, nn.Parameter(torch.randn(300))) for key in rates]
    alone = [(key, nn.Parameter(p.detach().clone())) for key, p in together]
    flat = FlatParameters(together, rate_of(config))
    assert [rate for _, rate in flat.rates] == [1.0, 16.0, 0.5, 8.0]
    optimizers = [(FlatAdamW(flat, config), 1.0)]
    optimizers += [(FlatAdamW(FlatParameters([pair]), config), rates[pair[0]]) for pair in alone]
    for step in range(3):
        for optimizer, rate in optimizers:
            for entry in optimizer.flat.entries:
                generator = torch.Generator().manual_seed(step)
                entry.view(optimizer.flat.grad).copy_(torch.randn(300, generator=generator))
            optimizer.step(0.01 * rate, torch.tensor(1.0))
    for (key, ours), (_, theirs) in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs), key


def test_lora_plus_is_pefts():
    """Three steps on the same gradients as PEFT's own optimizer for LoRA+ takes them."""
    models = [with_lora(tiny_llama(layers=1)) for _ in range(2)]
    config = TrainConfig(learning_rate=0.01, loraplus_lr_ratio=16.0)
    flat = FlatParameters(models[0].named_parameters(), rate_of(config))
    ours = FlatAdamW(flat, config)
    theirs = peft.optimizers.create_loraplus_optimizer(
        models[1], torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0
    )
    trained = {n: p for n, p in models[1].named_parameters() if p.requires_grad}
    for step in range(3):
        grads = {}
        for name, parameter in trained.items():
            torch.manual_seed(step)
            grads[name] = parameter.grad = torch.randn_like(parameter)
        flat.load_named(flat.grad, grads)
        ours.step(config.learning_rate, torch.tensor(0.0))
        theirs.step()
    flat.release()
    assert len(trained) == 14
    for name, parameter in models[0].named_parameters():
        if name in trained:
            torch.testing.assert_close(parameter, trained[name], rtol=1e-5, atol=1e-6)


def test_an_adapters_rate_is_its_tensors_alone():
    rate = rate_of(TrainConfig(adapter_learning_rates={"model": 0.5, "0": 3.0, "en": 2.0}))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert rate(f"{layer}.lora_A.en.weight") == 2.0
    assert rate(f"{layer}.lora_A.de.weight") == 1.0
    assert rate(f"{layer}.lora_magnitude_vector.0.weight") == 3.0
    assert rate("base_model.model.model.embed_tokens.lora_embedding_B.en") == 2.0
    assert rate("base_model.model.lm_head.modules_to_save.en.weight") == 2.0


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("default", "other"), "no adapter 'othr'; did you mean other?"),
        (("en",), "no adapter 'othr'; there is en"),
        ((), "no adapter 'othr'; no adapter is trained"),
    ],
)
def test_a_rate_for_no_adapter_is_refused(adapters, message):
    config = TrainConfig(adapter_learning_rates={"othr": 0.5})
    with pytest.raises(UserError, match=re.escape(f"adapter_learning_rates: {message}")):
        check_rates(config, adapters)
