"""The divergence of two heads, chunk by chunk, against its formula and its gradient."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lora_engine.ops import HeadInput, LoraFactors, linear_divergence

# Made of PyTorch's own products, on every device.
OPERATION = "linear_divergence"
BETAS = [0.0, 0.3, 1.0]


def heads(dtype=torch.float64, rows=7, classes=19, width=6, parts="", softcap=None):
    """A student's and a teacher's, of different widths."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    lora = (
        LoraFactors(draw(3, width) * 0.5, draw(classes, 3) * 0.5, 1.5) if "lora" in parts else None
    )
    bias = draw(classes) if "bias" in parts else None
    student = HeadInput(draw(rows, width), draw(classes, width), bias, lora, softcap)
    return student, HeadInput(draw(rows, width + 2), draw(classes, width + 2), softcap=softcap)


def on(backend, *heads):
    """The heads on the backend's device."""
    return [
        replace(
            head,
            hidden=head.hidden.to(backend.device),
            weight=head.weight.to(backend.device),
            bias=None if head.bias is None else head.bias.to(backend.device),
            lora=head.lora
            and replace(
                head.lora,
                lora_a=head.lora.lora_a.to(backend.device),
                lora_b=head.lora.lora_b.to(backend.device),
            ),
        )
        for head in heads
    ]


def leaves(head):
    """The head with fresh tensors that require gradients, and those."""
    lora = head.lora
    if lora is not None:
        lora = replace(lora, lora_a=leaf(lora.lora_a), lora_b=leaf(lora.lora_b))
    bias = None if head.bias is None else leaf(head.bias)
    made = replace(head, hidden=leaf(head.hidden), weight=leaf(head.weight), bias=bias, lora=lora)
    parts = [made.hidden, made.weight, bias, *((lora.lora_a, lora.lora_b) if lora else ())]
    return made, [part for part in parts if part is not None]


def leaf(x):
    return x.detach().clone().requires_grad_()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("parts", ["", "bias", "lora", "bias lora"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_it_is_the_reference_with_its_gradients(backend, beta, parts, softcap):
    student, teacher = on(backend, *heads(parts=parts, softcap=softcap))
    results, gradients = [], []
    for options in ({"impl": "reference"}, {"chunk_rows": 3}, {}):
        head, tensors = leaves(student)
        result = linear_divergence(head, teacher, beta=beta, temperature=1.7, **options)
        results.append(result)
        gradients.append(torch.autograd.grad(2 * result.total, tensors))
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        torch.testing.assert_close(result, results[0])
        torch.testing.assert_close(gradient, gradients[0])


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    student, teacher = heads(rows=3, classes=5, parts="lora")
    head, tensors = leaves(student)

    def total(hidden, weight, lora_a, lora_b):
        lora = replace(head.lora, lora_a=lora_a, lora_b=lora_b)
        own = HeadInput(hidden, weight, lora=lora)
        return linear_divergence(own, teacher, beta=beta, chunk_rows=2).total

    assert torch.autograd.gradcheck(total, tensors)


def test_it_is_torchs_divergence(backend):
    student, teacher = on(backend, *heads(torch.float32))
    logs = [(h.hidden @ h.weight.T).log_softmax(-1) for h in (student, teacher)]
    forward = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(*logs[::-1], reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(linear_divergence(student, teacher).by_row, forward)
    torch.testing.assert_close(linear_divergence(student, teacher, beta=1.0).by_row, reverse)


@pytest.mark.parametrize("beta", BETAS)
def test_of_itself_it_is_zero(beta):
    student, _ = heads(torch.float32)
    head, tensors = leaves(student)
    result = linear_divergence(head, student, beta=beta)
    assert result.total.item() == pytest.approx(0, abs=1e-5)
    for gradient in torch.autograd.grad(result.total, tensors):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)


@pytest.mark.parametrize("beta", BETAS)
def test_half_precision_loses_no_more_than_its_logits(backend, beta):
    exact, rounded = (
        on(backend, *heads(dtype, rows=40)) for dtype in (torch.float64, torch.bfloat16)
    )
    student, teacher = rounded
    head, tensors = leaves(student)
    result = linear_divergence(head, teacher, beta=beta, chunk_rows=16)
    assert result.total.dtype == torch.float32
    expected = linear_divergence(*exact, beta=beta).total.item()
    assert result.total.item() == pytest.approx(expected, rel=0.03)
    gradients = torch.autograd.grad(result.total, tensors)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2


def test_the_teacher_gets_no_gradient():
    student, teacher = heads()
    theirs, tensors = leaves(teacher)
    head, _ = leaves(student)
    total = linear_divergence(head, theirs, beta=0.5).total
    assert torch.autograd.grad(total, tensors, allow_unused=True) == (None, None)


WRONG = {
    "another vocabulary": ({"classes": 18}, {}, "7 rows of 19 classes, the teacher's 7 of 18"),
    "other rows": ({"rows": 6}, {}, "the teacher's 6 of 19"),
    "beta": ({}, {"beta": 1.5}, r"beta=1\.5 is not in \[0, 1\]"),
    "temperature": ({}, {"temperature": 0.0}, r"temperature=0\.0 is not positive"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_does_not_fit_is_refused(name):
    sizes, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        linear_divergence(heads()[0], heads(**sizes)[1], **options)
