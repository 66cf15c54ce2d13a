import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend, dtypes_of
from oracle import check
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.backends import hardware, launchers
from lora_engine.ops.attention import heads_of
from lora_engine.testing import cu_seqlens

OPERATION = "attention"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
LENGTHS = {
    "one_token": [1],
    "ragged": [1, 63, 0, 32, 33],
    "several_key_blocks": [300, 5],
    "many_short": [7] * 9,
    "none": [],
}


def inputs(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    tokens = sum(lengths)
    return [torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads)]


def tables(tokens: int, dim: int) -> dict[str, Tensor]:
    angle = torch.rand(tokens, dim // 2) * 6
    return {"cos": torch.cat([angle.cos()] * 2, -1), "sin": torch.cat([angle.sin()] * 2, -1)}


def on(backend: Backend, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(backend.device) for name, x in named.items()}


def peer(lengths: list[int], causal: bool = True):
    """PyTorch's own attention, sequence by sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in part), is_causal=causal, enable_gqa=True
            )[0].transpose(0, 1)
            for part in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
            if part[0].shape[0]
        ]
        return torch.cat(pieces)

    return attend


def interpreted(backend: Backend) -> bool:
    """Whether a GPU's kernels run on a CPU, slowly: not every gradient is asked for alone."""
    return backend.impl in ("triton", "cuda") and backend.device.type == "cpu"


def skip_if_slow(backend: Backend, dtype: torch.dtype) -> None:
    if interpreted(backend) and backend.impl == "triton" and dtype == torch.float16:
        pytest.skip("interpreted, it differs from bfloat16 in nothing but the rounding")


def dtype_of(backend: Backend) -> torch.dtype:
    """float32, or what the implementation has in its place."""
    return torch.float32 if torch.float32 in dtypes_of(OPERATION, backend) else torch.bfloat16


@pytest.mark.reference
@pytest.mark.parametrize("name", ["one_token", "ragged", "several_key_blocks", "many_short"])
@pytest.mark.parametrize("heads,kv_heads,dim", [(6, 2, 64), (2, 2, 80)], ids=str)
def test_matches_pytorch(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    name: str,
    heads: int,
    kv_heads: int,
    dim: int,
) -> None:
    skip_if_slow(backend, dtype)
    lengths = LENGTHS[name]
    (bounds,) = backend.put(cu_seqlens(lengths))
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, impl=backend.impl),
        peer(lengths),
        backend.put(*inputs(lengths, heads, kv_heads, dim, dtype)),
        floor=0.5,  # one token's scores have no gradient but rounding's
        alone=not interpreted(backend),
    )


@pytest.mark.parametrize(
    ("options", "rotated"),
    [
        ({"causal": False}, True),
        ({"window": 1}, False),
        ({"window": 17}, True),
        ({"window": 150}, False),
        ({"softmax_scale": 0.3}, True),
    ],
    ids=str,
)
def test_options(
    backend: Backend, dtype: torch.dtype, poisoned: None, options: dict, rotated: bool
) -> None:
    skip_if_slow(backend, dtype)
    lengths = [1, 40, 0, 201]
    (bounds,) = backend.put(cu_seqlens(lengths))
    options = options | (on(backend, tables(sum(lengths), 16)) if rotated else {})
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, impl=backend.impl, **options),
        lambda q, k, v: reference.attention(q, k, v, bounds, **options),
        backend.put(*inputs(lengths, 4, 2, 16, dtype)),
        tolerance=TOLERANCE.get(dtype, 3e-5),
        floor=0.3,
        alone=not interpreted(backend),
    )


TREES = {  # lengths of the sequences, and which earlier one each continues
    "one_prefix": ([37, 5, 64, 1, 33], [-1, 0, 0, 0, 0]),
    "tree": ([20, 3, 40, 9, 0, 131, 7, 12], [-1, 0, 1, 1, 0, -1, 5, 6]),
}


def unshared(lengths: list[int], parents: list[int], **options):
    """Attention over every sequence written out with all that it continues."""
    own = torch.arange(sum(lengths)).split(lengths)
    whole: list[Tensor] = []
    for tokens, parent in zip(own, parents, strict=True):
        whole.append(tokens if parent < 0 else torch.cat((whole[parent], tokens)))
    index = torch.cat(whole)
    bounds = cu_seqlens([len(tokens) for tokens in whole])
    kept = torch.cat(
        [end - n + torch.arange(n) for end, n in zip(bounds[1:], lengths, strict=True)]
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tables = {name: options[name][index] for name in ("cos", "sin") if name in options}
        given = (q[index], k[index], v[index], bounds)
        return reference.attention(*given, **(options | tables))[kept]

    return attend


@pytest.mark.reference
@pytest.mark.parametrize(
    ("tree", "window", "rotated"),
    [
        ("one_prefix", 0, False),
        ("one_prefix", 25, True),
        ("tree", 0, True),
        ("tree", 25, False),
    ],
)
def test_continued_sequences_are_as_if_written_out(
    backend: Backend,
    dtype: torch.dtype,
    poisoned: None,
    tree: str,
    window: int,
    rotated: bool,
) -> None:
    skip_if_slow(backend, dtype)
    lengths, parents = TREES[tree]
    options = {"window": window} | (on(backend, tables(sum(lengths), 16)) if rotated else {})
    bounds, continued = backend.put(cu_seqlens(lengths), torch.tensor(parents, dtype=torch.int32))
    impl = backend.impl
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, parents=continued, impl=impl, **options),
        unshared(lengths, parents, **options),
        backend.put(*inputs(lengths, 4, 2, 16, dtype)),
        tolerance=TOLERANCE.get(dtype, 3e-5),
        floor=0.3,
        alone=not interpreted(backend),
    )


def test_reference_of_continued_sequences() -> None:
    lengths, parents = TREES["tree"]
    q, k, v = inputs(lengths, 4, 2, 16, torch.float64)
    continued = torch.tensor(parents, dtype=torch.int32)
    out = reference.attention(q, k, v, cu_seqlens(lengths), parents=continued)
    assert torch.allclose(out, unshared(lengths, parents)(q, k, v), rtol=1e-12)


def test_shared_gradients_do_not_depend_on_the_threads(isa: str) -> None:
    lengths, parents = TREES["tree"]
    continued = torch.tensor(parents, dtype=torch.int32)
    found = []
    for threads in (1, 3):
        leaves = [x.requires_grad_() for x in inputs(lengths, 4, 2, 16, torch.bfloat16)]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out = ops.attention(*leaves, cu_seqlens(lengths), parents=continued)
            found.append(torch.autograd.grad(out.float().square().sum(), leaves))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    "lengths,heads,kv_heads,head_dim",
    [
        ([1, 63, 0, 200, 64, 65], 4, 2, 64),
        ([300, 1, 129, 128], 8, 2, 128),
        ([1000], 9, 3, 64),
        ([7] * 20 + [500], 2, 2, 128),
    ],
)
def test_kernels_for_hopper_where_they_are_chosen(
    monkeypatch: pytest.MonkeyPatch,
    poisoned: None,
    dtype: torch.dtype,
    causal: bool,
    rotated: bool,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    gpu = torch.device("cuda")
    if hardware.capability(gpu) != 90 or "90a" not in backends.cuda_architectures():
        pytest.skip("needs capability 9.0 and kernels built for it")
    monkeypatch.setattr(backends, "attention_plan", lambda *_: "hopper")
    monkeypatch.setattr(launchers, "attention", lambda impl: pytest.fail("Triton's kernels run"))
    bounds = cu_seqlens(lengths).to(gpu)
    options: dict = {"causal": causal}
    if rotated:
        options |= {name: x.to(gpu) for name, x in tables(sum(lengths), head_dim).items()}
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, **options),
        lambda q, k, v: reference.attention(q, k, v, bounds, **options),
        [x.to(gpu) for x in inputs(lengths, heads, kv_heads, head_dim, dtype)],
        tolerance=TOLERANCE[dtype],
        floor=0.3,
        alone=False,  # dQ's sum has no fixed order
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 100}], ids=str)
@pytest.mark.parametrize(
    "lengths,heads,kv_heads,head_dim",
    [
        ([1, 63, 0, 200, 64, 65], 4, 2, 64),
        ([300, 1, 129, 128], 8, 2, 128),
        ([7] * 20 + [1500], 6, 2, 128),
        ([700, 0, 3], 3, 3, 96),
    ],
)
def test_kernels_of_mma_sync_on_a_gpu(
    poisoned: None,
    dtype: torch.dtype,
    options: dict,
    lengths: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    gpu = torch.device("cuda")
    bounds = cu_seqlens(lengths).to(gpu)
    options = options | {name: x.to(gpu) for name, x in tables(sum(lengths), head_dim).items()}
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, impl="cuda", **options),
        lambda q, k, v: reference.attention(q, k, v, bounds, **options),
        [x.to(gpu) for x in inputs(lengths, heads, kv_heads, head_dim, dtype)],
        tolerance=TOLERANCE[dtype],
        floor=0.3,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    "count,length,heads,kv_heads,head_dim",
    [(3, 128, 4, 2, 64), (1, 384, 9, 3, 64), (2, 256, 8, 1, 128), (2, 128, 2, 2, 96)],
)
def test_cudnn_s_attention_where_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    causal: bool,
    rotated: bool,
    count: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    monkeypatch.setattr(backends, "attention_plan", lambda *_: "cudnn")
    monkeypatch.setattr(launchers, "attention", lambda impl: pytest.fail("our kernels run"))
    lengths = [length] * count
    gpu = torch.device("cuda")
    bounds = cu_seqlens(lengths).to(gpu)
    options: dict = {"causal": causal}
    if rotated:
        options |= {name: x.to(gpu) for name, x in tables(sum(lengths), head_dim).items()}
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, equal_lengths=True, **options),
        lambda q, k, v: reference.attention(q, k, v, bounds, **options),
        [x.to(gpu) for x in inputs(lengths, heads, kv_heads, head_dim, dtype)],
        tolerance=TOLERANCE[dtype],
        floor=0.3,
        alone=False,  # dq is added up in no fixed order
    )


def test_equal_sequences_have_equal_lengths() -> None:
    q, k, v = inputs([3, 4], 2, 2, 8, torch.float32)
    with pytest.raises(ValueError, match="7 tokens are no 2 equal sequences"):
        ops.attention(q, k, v, cu_seqlens([3, 4]), equal_lengths=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 17}], ids=str)
def test_tiles_by_tensor_descriptors(
    monkeypatch: pytest.MonkeyPatch, poisoned: None, dim: int, options: dict
) -> None:
    gpu = torch.device("cuda")
    if (backends.capability(gpu) or 0) < 90:
        pytest.skip("the GPU has no tensor descriptors")
    from lora_engine.backends.triton import launch

    table = launch.launch_parameters

    def with_descriptors(kernel: str, *line: object) -> dict[str, int]:
        return table(kernel, *line) | ({"TMA": 1} if kernel.startswith("attention") else {})

    monkeypatch.setattr(launch, "launch_parameters", with_descriptors)
    lengths = [1, 40, 0, 301]
    bounds = cu_seqlens(lengths).to(gpu)
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, impl="triton", **options),
        lambda q, k, v: reference.attention(q, k, v, bounds, **options),
        [x.to(gpu) for x in inputs(lengths, 4, 2, dim, torch.bfloat16)],
        tolerance=TOLERANCE[torch.bfloat16],
        floor=0.3,
    )


def test_only_our_kernels_give_the_same_bits_twice() -> None:
    bounds = cu_seqlens([8, 8])
    assert not heads_of(64, bounds, 16, None, 0, True).repeatable
    torch.use_deterministic_algorithms(True)
    try:
        assert heads_of(64, bounds, 16, None, 0, True).repeatable
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_sequence_with_nan_leaves_the_others_alone(backend: Backend) -> None:
    lengths = [20, 30, 200]
    bounds, *qkv = backend.put(cu_seqlens(lengths), *inputs(lengths, 4, 2, 16, dtype_of(backend)))
    whole = [x.clone().requires_grad_() for x in qkv]
    broken = [x.clone() for x in qkv]
    for x in broken:
        x[20:50] = float("nan")
        x.requires_grad_()
    results = []
    for leaves in (whole, broken):
        out = ops.attention(*leaves, bounds, impl=backend.impl)
        results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    rest = torch.cat((torch.arange(20), torch.arange(50, 250))).to(backend.device)
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[rest], after[rest])
        assert after[20:50].isnan().any()


@pytest.mark.parametrize("scale", [0.0, -0.4], ids=str)
def test_scales_that_are_not_positive(backend: Backend, scale: float) -> None:
    lengths = [5, 150]
    (bounds,) = backend.put(cu_seqlens(lengths))
    if backend.impl == "cpu":
        q, k, v = inputs(lengths, 2, 1, 16, torch.float32)
        with pytest.raises(ValueError, match="positive softmax_scale, not"):
            ops.attention(q, k, v, bounds, softmax_scale=scale)
        return
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, softmax_scale=scale, impl=backend.impl),
        lambda q, k, v: reference.attention(q, k, v, bounds, softmax_scale=scale),
        backend.put(*inputs(lengths, 2, 1, 16, dtype_of(backend))),
        tolerance=TOLERANCE.get(dtype_of(backend), 3e-5),
        floor=0.3,
        alone=not interpreted(backend),
    )


def test_sequences_do_not_see_each_other(backend: Backend) -> None:
    q, k, v, both, second = backend.put(
        *inputs([20, 30], 4, 2, 16, dtype_of(backend)), cu_seqlens([20, 30]), cu_seqlens([30])
    )
    together = ops.attention(q, k, v, both, impl=backend.impl)
    alone = ops.attention(q[20:], k[20:], v[20:], second, impl=backend.impl)
    assert torch.equal(together[20:], alone)


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    bounds, *qkv = backend.put(cu_seqlens([40]), *inputs([40], 2, 1, 16, dtype_of(backend)))
    check(
        lambda q, k, v: ops.attention(q, k, v, bounds, impl=backend.impl),
        peer([40]),
        [x * 100 for x in qkv],
        # Scores of 60000, whose ulp is 4e-3, are turned into units of log 2 and back.
        tolerance={"triton": 4e-3, "cuda": 2e-2}.get(backend.impl, 1e-4),
        # In 16 bits no two scores are near each other: gradients of q and k are of numbers of a few
        # thousand that cancel.
        floor=100.0 if backend.impl == "cuda" else 1e-30,
    )


def test_no_tokens(backend: Backend) -> None:
    qkv = backend.put(*inputs(LENGTHS["none"], 4, 2, 16, dtype_of(backend)))
    q, k, v = (x.requires_grad_() for x in qkv)
    out = ops.attention(q, k, v, *backend.put(cu_seqlens([])), impl=backend.impl)
    assert out.shape == (0, 4, 16)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_flat_heads_give_the_same(backend: Backend) -> None:
    q, k, v, bounds = backend.put(
        *inputs([9, 30], 4, 2, 16, dtype_of(backend)), cu_seqlens([9, 30])
    )
    options = {
        "head_dim": 16,
        "padding_columns": 8,
        "grad_padding_columns": 8,
        "impl": backend.impl,
    }
    flat = ops.attention(*(x.reshape(3, 13, -1) for x in (q, k, v)), bounds, **options)
    whole = ops.attention(q, k, v, bounds, impl=backend.impl)
    assert torch.equal(flat.reshape(39, 4, 16), whole)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    half_dim=st.integers(1, 40),
    window=st.integers(0, 200),
)
def test_any_shape(
    lengths: list[int], kv_heads: int, group: int, half_dim: int, window: int
) -> None:
    q, k, v = inputs(lengths, kv_heads * group, kv_heads, 2 * half_dim, torch.float32)
    bounds = cu_seqlens(lengths)
    out = ops.attention(q, k, v, bounds, window=window)
    assert torch.allclose(
        out, reference.attention(q, k, v, bounds, window=window), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_gradcheck(impl: str, rotated: bool) -> None:
    leaves = [x.requires_grad_() for x in inputs([1, 4], 4, 2, 4, torch.float64)]
    options = {k: v.double() for k, v in tables(5, 4).items()} if rotated else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, cu_seqlens([1, 4]), impl=impl, **options)

    assert torch.autograd.gradcheck(attend, leaves)


def test_errors_name_what_does_not_fit() -> None:
    q, k, v = inputs([5], 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="rise from 0 to 5"):
        ops.attention(q, k, v, cu_seqlens([4]))
    with pytest.raises(ValueError, match="4 query heads are no multiple of 3 key heads"):
        ops.attention(q, torch.randn(5, 3, 16), torch.randn(5, 3, 16), cu_seqlens([5]))
    with pytest.raises(ValueError, match=r"is not \[S \+ 1\] int32"):
        ops.attention(q, k, v, cu_seqlens([5]).long())
    with pytest.raises(ValueError, match="window needs causal"):
        ops.attention(q, k, v, cu_seqlens([5]), causal=False, window=2)
    for parents in ([0], [-2]):
        with pytest.raises(ValueError, match="-1 or an earlier sequence"):
            continued = torch.tensor(parents, dtype=torch.int32)
            ops.attention(q, k, v, cu_seqlens([5]), parents=continued)
    with pytest.raises(ValueError, match=r"is not \[1\] int32"):
        ops.attention(q, k, v, cu_seqlens([5]), parents=torch.tensor([-1]))
    with pytest.raises(ValueError, match="both cos and sin"):
        ops.attention(q, k, v, cu_seqlens([5]), cos=torch.ones(5, 16))
