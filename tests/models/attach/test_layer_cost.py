"""What one decoder layer costs: launches, and bytes kept for the backward pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import lora_engine
from lora_engine.backends import launchers
from lora_engine.testing import tiny_llama, with_lora

HIDDEN, WIDTH, KV, RANK, TOKENS = 32, 48, 16, 4, 40
# Views, allocations and bookkeeping start nothing on a GPU.
NO_LAUNCH = (
    "empty",
    "new_empty",
    "view",
    "detach",
    "t.",
    "split",
    "slice",
    "expand",
    "select",
    "alias",
)
NO_LAUNCH += (
    "alias",
    "_unsafe_view",
    "unsqueeze",
    "transpose",
    "reshape",
    "_reshape_alias",
    "as_strided",
)


class Launches(TorchDispatchMode):
    """Counts what would be launched: torch's own operations and calls of our kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self._in_kernel = False
        for name, find in vars(launchers).copy().items():
            if hasattr(find, "cache_info"):  # of an operation
                monkeypatch.setattr(launchers, name, self._counting(find))

    def _counting(self, find: Callable[[str], object]) -> Callable[[str], Any]:
        return lambda impl: _Counted(find(impl), self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func).removeprefix("aten.")
        if not self._in_kernel and not name.startswith(NO_LAUNCH):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class _Counted:
    """A module of kernels whose calls are counted, and what they do inside is not."""

    def __init__(self, module: Any, launches: Launches) -> None:
        self.module, self.launches = module, launches

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)

        def call(*args: Any, **kwargs: Any) -> None:
            self.launches.count[name] += 1
            self.launches._in_kernel = True
            try:
                function(*args, **kwargs)
            finally:
                self.launches._in_kernel = False

        return call


def tiny_qwen3(layers: int) -> Any:
    """The sizes of `tiny_llama`, and norms of the heads."""
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return transformers.Qwen3ForCausalLM(config)


def build(layers: int, fused: bool = True, kind: str = "llama") -> Any:
    plain = (
        tiny_llama(hidden_size=HIDDEN, intermediate_size=WIDTH, layers=layers)
        if kind == "llama"
        else tiny_qwen3(layers)
    )
    model = with_lora(plain, r=RANK, alpha=8)
    lora_engine.accelerate(model)
    if not fused:
        for module in model.modules():
            if type(module).__name__.endswith("DecoderLayer"):
                del module.forward
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def launches(
    layers: int, monkeypatch: pytest.MonkeyPatch, kind: str
) -> tuple[Counter[str], Counter[str]]:
    model = build(layers, kind=kind)
    model(**batch()).loss.backward()
    model.zero_grad(set_to_none=False)
    with Launches(monkeypatch) as counted:
        loss = model(**batch()).loss
        forward = counted.count.copy()
        loss.backward()
    monkeypatch.undo()
    return forward, counted.count - forward


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    one, two, three = (launches(n, monkeypatch, kind) for n in (1, 2, 3))
    head_norms = 2 if kind == "qwen3" else 0
    forward, backward = (three[i] - two[i] for i in (0, 1))
    assert forward == two[0] - one[0]
    assert forward == {
        "rms_norm_fwd": 2 + head_norms,
        "lora_a_fwd": 4,
        "mm.out": 2,  # q, k, v; gate, up
        "addmm_.default": 2,  # output and down projections, to a copy of the residual by the norm
        "attention_fwd": 1,
        "glu_fwd": 1,
        "place_factors": 4,  # A and B, scaled, of seven linears into their groups' buffers
    }
    again = {"rms_norm_fwd": head_norms} if head_norms else {}  # the heads' outputs
    assert backward == again | {
        "mm.out": 4,
        "lora_b_bwd": 4,
        "lora_a_bwd": 4,
        "attention_bwd": 1,
        "glu_bwd": 1,
        "rms_norm_bwd": 2 + head_norms,
        "zero_.default": 2,  # padding columns behind gradients of the residual
        "add_.Tensor": 2 * 7,  # by autograd: A and B of seven linears
    }


def saved_bytes(model: Any) -> int:
    """Bytes of activations that autograd holds at the end of the forward pass."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(**batch()).loss
    total = sum(kept.values())
    del loss
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bytes_saved_by_a_layer(kind: str) -> None:
    """Norms of heads save nothing."""
    per_layer = saved_bytes(build(3, kind=kind)) - saved_bytes(build(2, kind=kind))
    rows = 64  # memory for activations comes in steps of 64 rows
    heads = 4
    whole = 2 * HIDDEN + (HIDDEN + 2 * KV) + 2 * WIDTH + (HIDDEN + RANK)  # x twice, qkv, gate up, o
    exact = TOKENS * (3 * RANK + 2 * RANK + RANK + 2 + heads)  # S of two groups and down, rstd, lse
    assert per_layer <= 4 * (rows * whole + exact)
    modules = saved_bytes(build(3, False, kind)) - saved_bytes(build(2, False, kind))
    assert per_layer < 0.75 * modules
