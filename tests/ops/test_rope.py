import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import TOLERANCE, check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.backends import launchers
from lora_engine.testing import error

OPERATION = "rope"
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def tables(rows: int, rotary: int, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, rotary // 2, generator=torch.Generator().manual_seed(3)) * 6
    both = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return both.cos(), both.sin()


def heads(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tokens, q_heads, kv_heads, dim = shape
    torch.manual_seed(0)
    return [torch.randn(tokens, n, dim).to(dtype) for n in (q_heads, kv_heads)]


def joined(outputs: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(outputs, 1)


SHAPES = {  # tokens, query heads, key heads, head size, rotary size
    "least": (1, 1, 1, 2, 2),
    "llama": (3, 17, 3, 128, 128),
    "padded_halves": (9, 9, 3, 80, 80),
    "partial": (5, 6, 2, 64, 16),
    "partial_ragged": (7, 3, 1, 26, 10),
    "no_tokens": (0, 2, 1, 4, 4),
}


@pytest.mark.reference
@layouts
@pytest.mark.parametrize("name", SHAPES)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, name: str, interleaved: bool
) -> None:
    *shape, rotary = SHAPES[name]
    cos, sin = backend.put(*tables(shape[0], rotary, interleaved))
    options = {"interleaved": interleaved}
    check(
        lambda q, k: joined(ops.rope(q, k, cos, sin, impl=backend.impl, **options)),
        lambda q, k: joined(reference.rope(q, k, cos, sin, **options)),
        backend.put(*heads(shape, dtype)),
    )


@layouts
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_rows_by_position(
    backend: Backend,
    poisoned: None,
    interleaved: bool,
    table_dtype: torch.dtype,
    index_dtype: torch.dtype,
) -> None:
    positions = torch.tensor([0, 1, 2, 0, 1, 12, 5], dtype=index_dtype)
    cos, sin, positions = backend.put(*tables(13, 12, interleaved), positions)
    cos, sin = cos.to(table_dtype), sin.to(table_dtype)
    options = {"position_ids": positions, "interleaved": interleaved}
    check(
        lambda q, k: joined(ops.rope(q, k, cos, sin, impl=backend.impl, **options)),
        lambda q, k: joined(reference.rope(q, k, cos, sin, **options)),
        backend.put(*heads((7, 3, 1, 20))),
    )


@layouts
def test_the_columns_of_a_pair_may_differ(backend: Backend, interleaved: bool) -> None:
    cos, sin = backend.put(torch.rand(4, 8), torch.rand(4, 8))
    check(
        lambda q, k: joined(ops.rope(q, k, cos, sin, interleaved=interleaved, impl=backend.impl)),
        lambda q, k: joined(reference.rope(q, k, cos, sin, interleaved=interleaved)),
        backend.put(*heads((4, 2, 2, 8))),
    )


def test_strided_heads_and_tables(backend: Backend, dtype: torch.dtype, poisoned: None) -> None:
    """Columns of one buffer, heads before tokens, a dimension of size one, tables of a batch."""
    cos, sin = (t[::2, 3:15] for t in backend.put(torch.rand(12, 20), torch.rand(12, 20)))
    qkv, x, wide = backend.put(
        torch.randn(6, 5 * 16).to(dtype),
        torch.randn(3, 6, 16).to(dtype),
        torch.randn(6, 2, 32).to(dtype),
    )
    for q, k in (
        (qkv[:, :48].view(6, 3, 16), qkv[:, 48:].view(6, 2, 16)),
        (x.transpose(0, 1), qkv[:, :16].view(6, 1, 16)),
        (wide[..., ::2], wide[..., :16]),
        (x[:1].transpose(0, 1).expand(6, 4, 16), wide[..., 16:]),
    ):
        ours = joined(ops.rope(q, k, cos, sin, impl=backend.impl))
        expected = joined(reference.rope(q.double(), k.double(), cos, sin))
        assert error(ours, expected) <= TOLERANCE[dtype]


def test_one_tensor_alone_and_either_gradient(backend: Backend) -> None:
    q, k, cos, sin = backend.put(*heads((5, 3, 2, 8)), *tables(5, 8))
    both = ops.rope(q, k, cos, sin, impl=backend.impl)
    for x, y in zip((q, k), both, strict=True):
        assert torch.equal(ops.rope(x, None, cos, sin, impl=backend.impl), y)
    for i in (0, 1):  # the other output unused, the other input a constant
        given = [q.clone(), k.clone()]
        given[i].requires_grad_()
        y = ops.rope(*given, cos, sin, impl=backend.impl)[i]
        dy = torch.randn_like(y)
        expected = torch.autograd.grad(reference.rope(given[i], None, cos, sin), given[i], dy)[0]
        assert torch.allclose(torch.autograd.grad(y, given[i], dy)[0], expected, atol=1e-6)


def test_a_position_outside_the_tables_is_loud(backend: Backend) -> None:
    q, k, cos, sin = backend.put(*heads((3, 2, 1, 8)), *tables(4, 4))
    for bad in (4, -1):
        (positions,) = backend.put(torch.tensor([1, bad, 2]))
        if backend.device.type == "cpu":
            with pytest.raises(ValueError, match="are not all in tables of 4 rows"):
                ops.rope(q, k, cos, sin, position_ids=positions, impl=backend.impl)
        if backend.impl == "triton":  # its launcher does not look at values
            out = [torch.empty_like(x) for x in (q, k)]
            kernels = launchers.rope(backend.impl)
            flags = {"interleaved": False, "inverse": False}
            kernels.rope(q, k, *out, cos, sin, positions, **flags)
            for y in out:
                assert y[1, :, :4].isnan().all()
                assert y[[0, 2]].isfinite().all() and y[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("value", [1e4, 1e-42, 3e38], ids=str)
def test_extreme_values(backend: Backend, value: float) -> None:
    q, k, cos, sin = backend.put(*heads((3, 2, 1, 8)), *tables(3, 8))
    q = torch.full_like(q, value) * 0.5
    ours = ops.rope(q, k, cos, sin, impl=backend.impl)[0]
    expected = reference.rope(q.double(), None, cos, sin)
    assert torch.allclose(ours.double(), expected, rtol=3e-6, atol=3e-6 * value + 2e-45)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    q_heads=st.integers(1, 5),
    kv_heads=st.integers(0, 3),
    half=st.integers(1, 40),
    rest=st.integers(0, 9),
    rows=st.integers(1, 30),
    interleaved=st.booleans(),
    by_position=st.booleans(),
)
def test_any_shape(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    half: int,
    rest: int,
    rows: int,
    interleaved: bool,
    by_position: bool,
) -> None:
    q, k = heads((tokens, q_heads, kv_heads, 2 * half + rest))
    cos, sin = tables(rows if by_position else tokens, 2 * half, interleaved)
    positions = torch.randint(rows, (tokens,)) if by_position else None
    options = {"position_ids": positions, "interleaved": interleaved}
    ours = joined(ops.rope(q, k, cos, sin, **options))
    assert torch.allclose(ours, joined(reference.rope(q, k, cos, sin, **options)), atol=1e-6)


@layouts
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str, interleaved: bool) -> None:
    cos, sin = torch.rand(2, 4).double(), torch.rand(2, 4).double()
    given = [x.double().requires_grad_() for x in heads((2, 2, 1, 6))]

    def rotate(q: Tensor, k: Tensor) -> Tensor:
        return joined(ops.rope(q, k, cos, sin, interleaved=interleaved, impl=impl))

    assert torch.autograd.gradcheck(rotate, given)
    assert torch.autograd.gradgradcheck(rotate, given)


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def assert_is_transformers(
    backend: Backend, apply: object, emb: object, rotary: int, interleaved: bool = False
) -> None:
    """Their module's tables with their function, ours with the same tables and with a long one."""
    q, k = heads((9, 4, 2, 16))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 200]])
    cos, sin = emb(q, positions)
    batched = (x.transpose(0, 1)[None] for x in (q, k))
    expected = [x[0].transpose(0, 1) for x in apply(*batched, cos, sin)]
    long_cos, long_sin = (t[0] for t in emb(q, torch.arange(256)[None]))
    assert cos.shape[-1] == rotary
    for given_cos, given_sin, ids in (
        (cos[0], sin[0], None),
        (long_cos, long_sin, positions[0]),
    ):
        put = backend.put(q, k, given_cos, given_sin)
        ids = None if ids is None else ids.to(backend.device)
        ours = ops.rope(*put, position_ids=ids, interleaved=interleaved, impl=backend.impl)
        for y, theirs in zip(ours, expected, strict=True):
            assert torch.allclose(y.cpu(), theirs, atol=2e-6)


@pytest.mark.parametrize("name", ROPES)
def test_agrees_with_transformers(backend: Backend, name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as theirs

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters=ROPES[name],
    )
    emb = theirs.LlamaRotaryEmbedding(config)
    if name == "yarn":
        assert emb.attention_scaling != 1.0
    assert_is_transformers(backend, theirs.apply_rotary_pos_emb, emb, 16)


def test_agrees_with_transformers_partial(backend: Backend) -> None:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox import modeling_gpt_neox as theirs

    config = GPTNeoXConfig(hidden_size=64, num_attention_heads=4, rotary_pct=0.5)
    emb = theirs.GPTNeoXRotaryEmbedding(config)
    assert_is_transformers(backend, theirs.apply_rotary_pos_emb, emb, 8)


def test_agrees_with_transformers_interleaved(backend: Backend) -> None:
    from transformers import CohereConfig
    from transformers.models.cohere import modeling_cohere as theirs

    config = CohereConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    emb = theirs.CohereRotaryEmbedding(config)
    assert_is_transformers(backend, theirs.apply_rotary_pos_emb, emb, 16, interleaved=True)


def test_errors_name_the_shapes() -> None:
    q, k = heads((3, 2, 1, 8))
    cos, sin = torch.ones(3, 8), torch.ones(3, 8)
    for match, wrong, ids in (
        (r"cos \[4, 8\] float32 does not fit q \[3, 2, 8\]", (q, k, *[torch.ones(4, 8)] * 2), None),
        (r"even R of at most D", (q, k, *[torch.ones(3, 7)] * 2), None),
        (r"even R of at most D", (q, k, *[torch.ones(3, 10)] * 2), None),
        (r"cos .* and sin .* are not two tables", (q, k, cos, torch.ones(4, 8)), None),
        (r"k \[3, 1, 6\] float32 does not fit q", (q, k[..., :6], cos, sin), None),
        (r"differ in dtype", (q, k.bfloat16(), cos, sin), None),
        (r"q \[3, 8\] float32 is not \[T, heads, D\]", (q[:, 0], None, cos, sin), None),
        (r"position_ids \[2\] int64 is not \[T\]", (q, k, cos, sin), torch.zeros(2).long()),
        (r"position_ids \[3\] float32 is not", (q, k, cos, sin), torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match=match):
            ops.rope(*wrong, position_ids=ids)
