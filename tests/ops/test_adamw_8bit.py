import importlib.util
from dataclasses import dataclass

import pytest
import torch
from implementations import Backend
from torch import Tensor, nn

from lora_engine import ops
from lora_engine.backends import launchers
from lora_engine.quantization.dynamic_code import dynamic_code
from lora_engine.reference.dynamic_code import dequantize_blockwise, quantize_blockwise
from lora_engine.values import AdamWHyper

OPERATION = "adamw_8bit"
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
COUNTS = [0, 1, 63, 256, 1000, 4 * 256 + 1]


@dataclass
class State:
    """Parameters and their quantised moments."""

    params: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor
    exp_avg_sq_absmax: Tensor

    @classmethod
    def zeros(cls, params: Tensor) -> "State":
        codes = [torch.zeros(params.shape, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.zeros(-(-params.numel() // 256)) for _ in range(2)]
        return cls(params.clone(), *codes, *absmax)

    def on(self, backend: Backend) -> "State":
        return State(*backend.put(*(x.clone() for x in vars(self).values())))

    def step(self, grads: Tensor, step: int, impl: str, **kwargs: object) -> None:
        params, *moments = vars(self).values()
        ops.adamw_8bit_(
            params, grads.to(params.device), *moments, step=step, impl=impl, **kwargs, **HYPER
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        codes = ((self.exp_avg, self.exp_avg_absmax), (self.exp_avg_sq, self.exp_avg_sq_absmax))
        (m, m_max), (v, v_max) = codes
        return (
            dequantize_blockwise(m.cpu(), m_max.cpu(), signed=True),
            dequantize_blockwise(v.cpu(), v_max.cpu(), signed=False),
        )


def gradients(count: int) -> list[Tensor]:
    """Three steps of gradients whose elements are 1 to 1e-9 in size."""
    torch.manual_seed(count)
    sizes = 10.0 ** (-9 * torch.rand(count))
    return [torch.randn(count) * sizes for _ in range(3)]


def assert_codes_alike(actual: Tensor, expected: Tensor) -> None:
    """The same codes, but for the few values that lie halfway between two."""
    difference = (actual.cpu().int() - expected.int()).abs()
    assert (difference <= 1).all()
    assert difference.sum() <= max(1, 1e-3 * difference.numel())


@pytest.mark.parametrize("count", COUNTS)
def test_matches_reference(backend: Backend, count: int) -> None:
    """Every step from the reference's state, so that what differs is one step's rounding."""
    expected = State.zeros(torch.randn(count))
    for step, grad in enumerate(gradients(count), 1):
        actual = expected.on(backend)
        actual.step(grad, step, backend.impl)
        expected.step(grad, step, "reference")
        torch.testing.assert_close(actual.params.cpu(), expected.params, rtol=2e-6, atol=2e-6)
        for name in ("exp_avg_absmax", "exp_avg_sq_absmax"):
            found, wanted = getattr(actual, name), getattr(expected, name)
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=0)
        assert_codes_alike(actual.exp_avg, expected.exp_avg)
        assert_codes_alike(actual.exp_avg_sq, expected.exp_avg_sq)


@pytest.mark.parametrize("scale", [1.0, 3e-30, 7e30])
def test_every_code_is_read_and_kept(backend: Backend, scale: float) -> None:
    """A step that changes no moment shows what all 256 codes mean, and gives them back.

    Called below `ops`, which cannot correct the bias of betas that are 1.
    """
    codes = torch.arange(256, dtype=torch.uint8)
    m, v = torch.cat((codes, torch.full_like(codes, 255))), codes.repeat(2)
    absmax = torch.tensor([[scale, 1.0], [0.0, scale]])
    state = State(torch.zeros(512), m, v, *absmax).on(backend)
    params, *moments = vars(state).values()
    hyper = AdamWHyper(
        lr=1.0,
        beta1=1.0,
        beta2=1.0,
        eps=1.0,
        weight_decay=0.0,
        bias_correction1=1.0,
        bias_correction2=1.0,
    )
    zeros = torch.zeros_like(params)
    launchers.adamw_8bit(backend.impl).adamw_8bit(params, zeros, *moments, hyper, None)
    read = (-scale * dynamic_code(True), -1 / ((scale * dynamic_code(False)).sqrt() + 1))
    torch.testing.assert_close(params.cpu(), torch.cat(read), rtol=1e-6, atol=0)
    assert torch.equal(state.exp_avg.cpu(), m)
    assert state.exp_avg_sq.cpu().tolist() == [*[0] * 256, *range(256)]
    torch.testing.assert_close(state.exp_avg_absmax.cpu(), absmax[0])
    torch.testing.assert_close(state.exp_avg_sq_absmax.cpu(), absmax[1])


def test_takes_the_nearest_code(backend: Backend) -> None:
    """Values a little to either side of every halfway point, by way of a first step's moments."""
    for signed in (True, False):
        code = dynamic_code(signed).double()
        halfway = (code[1:] + code[:-1]) / 2
        if not signed:
            halfway = halfway[1:]  # nothing positive becomes 0
        for side in (1 - 1e-5, 1 + 1e-5):
            x = torch.cat((halfway * side, torch.ones(256 - halfway.numel()).double()))
            # m = 0.1 g and v = 0.02 g² of the first step
            grads = (x / 0.1 if signed else (x / 0.02).sqrt()).float()
            state = State.zeros(torch.zeros(256)).on(backend)
            state.step(grads, 1, backend.impl)
            wanted = quantize_blockwise(x, signed=signed)[0]
            found = state.exp_avg if signed else state.exp_avg_sq
            assert found.cpu().tolist() == wanted.tolist(), (signed, side)


def test_clips_by_a_norm_it_reads_itself(backend: Backend) -> None:
    grads = torch.randn(300)
    norm = ops.grad_norm(*backend.put(grads), impl=backend.impl)
    clipped, scaled = (State.zeros(torch.ones(300)).on(backend) for _ in range(2))
    clipped.step(grads, 1, backend.impl, grad_norm=norm, max_grad_norm=0.5)
    scaled.step(grads * (0.5 / norm.item()), 1, backend.impl)
    torch.testing.assert_close(clipped.params, scaled.params, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(clipped.exp_avg_absmax, scaled.exp_avg_absmax)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-19, 1e-12])
def test_blocks_of_tiny_gradients(backend: Backend, size: float) -> None:
    """Zero gradients beside others, and ones whose squares have no float32."""
    grads = torch.cat((torch.randn(256) * size, torch.randn(256)))
    expected = State.zeros(torch.ones(512))
    actual = expected.on(backend)
    for step in (1, 2):
        actual.step(grads, step, backend.impl)
        expected.step(grads, step, "reference")
    torch.testing.assert_close(actual.params.cpu(), expected.params, rtol=1e-5, atol=1e-5)
    assert all(torch.isfinite(x).all() for x in (actual.exp_avg_absmax, actual.exp_avg_sq_absmax))


def test_small_gradients_beside_a_large_one_do_not_blow_up(backend: Backend) -> None:
    """A second moment that became 0 would divide the next step by eps alone."""
    state = State.zeros(torch.zeros(256)).on(backend)
    grads = torch.full((256,), 1e-5)
    grads[0] = 1.0
    for step in range(1, 6):
        before = state.params.clone()
        state.step(grads if step < 4 else grads * (torch.arange(256) == 0), step, backend.impl)
        moved = (state.params - before).abs().max().item()
        assert moved <= 2 * HYPER["lr"], step


@pytest.mark.parametrize("start", [3, 4], ids=["unaligned", "aligned"])
def test_views_and_their_neighbours(backend: Backend, start: int) -> None:
    """Buffers that start anywhere; what lies around them stays."""
    count = 3 * 256 + 5
    (grads,) = backend.put(torch.cat((torch.zeros(start), gradients(count)[0])))
    around = State.zeros(torch.full((count + 9,), 7.0))
    for codes in (around.exp_avg, around.exp_avg_sq):
        codes.fill_(77)
        codes[start : start + count] = 0
    around.exp_avg_absmax, around.exp_avg_sq_absmax = torch.zeros(4), torch.zeros(4)
    expected = State.zeros(torch.full((count,), 7.0))
    around = around.on(backend)
    views = State(
        *(x[start : start + count] for x in (around.params, around.exp_avg, around.exp_avg_sq)),
        around.exp_avg_absmax,
        around.exp_avg_sq_absmax,
    )
    views.step(grads[start:], 1, backend.impl)
    expected.step(grads[start:].cpu(), 1, "reference")
    torch.testing.assert_close(views.params.cpu(), expected.params)
    assert_codes_alike(views.exp_avg, expected.exp_avg)
    for x, outside in ((around.params, 7), (around.exp_avg, 77), (around.exp_avg_sq, 77)):
        assert (x[:start] == outside).all() and (x[start + count :] == outside).all()


def test_the_same_bits_every_time(backend: Backend) -> None:
    results = []
    for _ in range(2):
        state = State.zeros(torch.ones(1000)).on(backend)
        for step, grad in enumerate(gradients(1000), 1):
            state.step(grad, step, backend.impl)
        results.append([x.clone() for x in vars(state).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_training_follows_float32_moments(impl: str) -> None:
    """A small network learns as well with 8-bit moments: its loss is within 5 % all along."""

    def losses(bits: int) -> list[float]:
        torch.manual_seed(0)
        teacher, student = (
            nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(2)
        )
        x = torch.randn(256, 16)
        y = 3 * teacher(x).detach()
        weights = list(student.parameters())
        flat = nn.utils.parameters_to_vector(weights).detach()
        state = State.zeros(flat)
        m, v = torch.zeros_like(flat), torch.zeros_like(flat)
        found = []
        for step in range(1, 121):
            loss = nn.functional.mse_loss(student(x), y)
            grads = torch.cat([g.view(-1) for g in torch.autograd.grad(loss, weights)])
            if bits == 8:
                state.step(grads, step, impl)
            else:
                ops.adamw_(state.params, grads, m, v, step=step, impl=impl, **HYPER)
            nn.utils.vector_to_parameters(state.params, weights)
            found.append(loss.item())
        return found

    exact, quantised = losses(32), losses(8)
    assert exact[-1] < 0.3 * exact[0]
    assert quantised != exact
    worst = max(abs(q / e - 1) for q, e in zip(quantised, exact, strict=True))
    assert worst < 0.05, worst


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_code_is_bitsandbytes_dynamic_map(signed: bool) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    from bitsandbytes.functional import create_dynamic_map

    torch.testing.assert_close(
        dynamic_code(signed), create_dynamic_map(signed=signed), rtol=2e-7, atol=0
    )


def test_code_is_the_papers() -> None:
    """Seven decades, each of twice as many values; 0 and 1; symmetric but for the 1."""
    for signed, first in ((True, 1), (False, 2)):
        code = dynamic_code(signed)
        assert len(code.unique()) == 256 and (code.diff() > 0).all() and code[-1] == 1
        positive = code[code > 0][:-1]
        counts = [
            int(((positive > 10.0**-k) & (positive < 10.0 ** (1 - k))).sum())
            for k in range(7, 0, -1)
        ]
        assert counts == [first * 2**i for i in range(7)]
        if signed:
            assert torch.equal(code[:127], -code[128:255].flip(0)) and code[127] == 0


def test_errors() -> None:
    state = list(vars(State.zeros(torch.zeros(300))).values())
    buffers = [state[0], torch.zeros(300), *state[1:]]
    for index, wrong, message in (
        (1, torch.zeros(299), r"grads \[299\] float32, expected \[300\] float32"),
        (2, torch.zeros(300), r"exp_avg \[300\] float32, expected \[300\] uint8"),
        (5, torch.zeros(1), r"exp_avg_sq_absmax \[1\] float32, expected \[2\] float32"),
    ):
        given = [*buffers[:index], wrong, *buffers[index + 1 :]]
        with pytest.raises(ValueError, match=message):
            ops.adamw_8bit_(*given, step=1, **HYPER)
    with pytest.raises(ValueError, match="step 0 must count from 1"):
        ops.adamw_8bit_(*buffers, step=0, **HYPER)
