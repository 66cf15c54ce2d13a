"""A model over weights that are stored otherwise: the door to a new storage is two lists.

Those are STORAGES, where a base weight's class stands, and FORMATS, where its name does.
"""

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from base_weights import Pieces
from torch import nn

import lora_engine
from lora_engine import backends, ops
from lora_engine.backends import choice, selection
from lora_engine.errors import EngineWarning
from lora_engine.models.attach import decoder_layer
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.attach.patches import Patches
from lora_engine.models.peft.router import AdapterRouter
from lora_engine.ops.lora import storage
from lora_engine.testing import error, tiny_llama, with_lora

pytestmark = pytest.mark.skipif(
    not backends.extension_available(), reason="the C++ kernels cannot run here"
)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that are accelerated keep their weights in pieces."""
    monkeypatch.setattr(storage, "STORAGES", [Pieces, *storage.STORAGES])
    selection._choose_once.cache_clear()
    yield
    selection._choose_once.cache_clear()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels read weights in pieces."""
    for impl, formats in choice.FORMATS.items():
        monkeypatch.setitem(choice.FORMATS, impl, (*formats, Pieces.format))


def model_of() -> Any:
    torch.manual_seed(0)
    return with_lora(tiny_llama(vocab_size=97, layers=2), r=4)


def results(model: Any) -> dict[str, torch.Tensor]:
    """The loss and all gradients, and logits made without gradients, of one row among others."""
    ids = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(5))
    loss = model(input_ids=ids, labels=ids).loss
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()))
    with torch.no_grad():
        logits = model(input_ids=ids[:1, :5]).logits
    return {"loss": loss.detach(), "logits": logits, **dict(zip(named, grads, strict=True))}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, expected in theirs.items():
        assert error(ours[name], expected) < 1e-4, name


def test_a_model_is_served(stored: None, known: None, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, model = results(model_of()), model_of()
    halves = []
    for name in ("attention_block", "mlp_block"):
        half = getattr(decoder_layer, name)

        def counted(
            x: Any, norm: Any, branch: Any, *args: Any, _half: Any = half, **kw: Any
        ) -> Any:
            halves.append({type(group.base) for group in (branch.inner, branch.outer)})
            return _half(x, norm, branch, *args, **kw)

        monkeypatch.setattr(decoder_layer, name, counted)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    report = lora_engine.accelerate(model)
    assert not report.left
    products = {e.detail for e in report.entries if e.operation == "lora_linear"}
    assert len(products) == 1 and products.pop().startswith("base_add product, C++ kernel")
    assert_same(results(model), theirs)
    assert halves and all(kinds == {Pieces} for kinds in halves)
    lora_engine.restore(model)
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert_same(results(model), theirs)


def test_a_format_that_no_kernel_reads_runs_as_the_reference(stored: None) -> None:
    theirs, model = results(model_of()), model_of()
    report = lora_engine.accelerate(model)
    known = ", ".join(choice.FORMATS["cpu"])
    reason = f"the cpu kernels take weights that are {known}, not pieces"
    products = {e.detail for e in report.entries if e.operation == "lora_linear"}
    assert products == {f"base_add product, {reason}"}
    selection._warn_once.cache_clear()
    with pytest.warns(EngineWarning, match=f"lora_linear runs as the PyTorch reference: {reason}"):
        ours = results(model)
    assert_same(ours, theirs)


def test_a_block_runs_where_both_of_its_groups_can(stored: None) -> None:
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    dense, pieces = (
        ops.LoraGroup.dense([weight], [None]),
        ops.LoraGroup(Pieces([weight], 0), [None]),
    )
    fused = decoder_layer.runs_fused
    assert fused("mlp_block", x, dense, dense)
    assert not fused("mlp_block", x, dense, pieces) and not fused("mlp_block", x, pieces, dense)


def test_few_rows_are_for_formats_that_the_kernel_reads() -> None:
    device = torch.device("cpu")
    assert backends.few_rows_impl(1, device, torch.float32) == "cpu"
    assert backends.few_rows_impl(1, device, torch.float32, format="pieces") is None


def test_weights_that_are_not_alike_are_left_to_peft() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8).double()

    config = peft.LoraConfig(r=2, target_modules=["q", "k"])
    modules = list(peft.inject_adapter_in_model(config, Two()).children())
    group = LinearGroup(modules, Patches(), AdapterRouter(), torch.float32)
    assert group.lora is None and group.reason == "their weights are not stored alike"


def test_what_no_base_keeps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no base weight keeps \[4, 2\] int8 as one group"):
        ops.base_of([torch.zeros(4, 2, dtype=torch.int8)], 2)
    mixed = [ops.quantize_weight(torch.zeros(4, 64), "int8"), torch.zeros(4, 64)]
    with pytest.raises(ValueError, match=r"\[4, 64\] QuantizedWeight, \[4, 64\] float32 as one"):
        ops.base_of(mixed, 2)
    with pytest.raises(ValueError, match="needs weights"):
        ops.base_of([], 2)
