"""The choice is a pure function: of a request, and of what a machine has."""

from dataclasses import replace

import pytest
import torch

from lora_engine import backends
from lora_engine.backends import choice, plans
from lora_engine.backends.choice import choose
from lora_engine.backends.plans import CHUNK_BYTES, DECODED_ROWS, DecodingPlan, Strategy
from lora_engine.backends.request import (
    Decoding,
    Extent,
    Head,
    Heads,
    Packed,
    Present,
    Product,
    Request,
    Update,
)
from lora_engine.errors import UnavailableError

CPU = torch.device("cpu")
BARE = Present(
    isa="avx2",
    problem=None,
    triton=True,
    interpreted=False,
    architectures=(),
    emulated=False,
    gpu=False,
)
WITH_GPU = replace(BARE, gpu=True)


def on_cpu(operation: str, dtype: torch.dtype = torch.float32, **more) -> Request:
    return Request(operation, "cpu", None, dtype, **more)


def on_gpu(operation: str, capability: int | None = 90, **more) -> Request:
    return Request(operation, "cuda", capability, torch.float32, **more)


def test_a_cpu_takes_the_cpp_kernels_and_says_which() -> None:
    found = choose(on_cpu("rms_norm"), BARE)
    assert (found.impl, found.reason) == ("cpu", "C++ kernel, avx2")
    assert (found.plan, found.launch) == (None, None)


def test_what_the_kernels_do_not_take_runs_as_the_reference() -> None:
    found = choose(on_cpu("rms_norm", torch.float16), BARE)
    assert found.impl == "reference"
    assert found.reason == "the cpu kernels take float32, bfloat16, float64, not torch.float16"
    found = choose(on_cpu("lora_linear", format="ternary"), BARE)
    assert found.impl == "reference"
    known = ", ".join(choice.FORMATS["cpu"])
    assert found.reason == f"the cpu kernels take weights that are {known}, not ternary"


def test_without_the_extension() -> None:
    found = choose(on_cpu("glu"), replace(BARE, isa=None, problem="No module named '_C'"))
    assert (found.impl, found.reason) == ("reference", "No module named '_C'")


def test_a_forced_choice_is_made_or_refused() -> None:
    assert choose(on_cpu("rope", impl="reference"), BARE).reason == "asked for"
    with pytest.raises(UnavailableError, match="rope: impl='cpu' is not available: the tensors"):
        choose(on_gpu("rope", impl="cpu"), WITH_GPU)
    with pytest.raises(ValueError, match="expected one of reference, cpu, triton, cuda"):
        choose(on_cpu("rope", impl="metal"), BARE)
    with pytest.raises(ValueError, match="operation 'pool': expected one of rms_norm"):
        choose(on_cpu("pool"), BARE)


def test_only_force_interprets() -> None:
    interpreting = replace(BARE, interpreted=True)
    assert choose(on_cpu("glu"), interpreting).impl == "cpu"
    found = choose(on_cpu("glu", impl="triton"), interpreting)
    assert (found.impl, found.reason) == ("triton", "Triton kernel, interpreted")
    with pytest.raises(UnavailableError, match="the tensors are on cpu"):
        choose(on_cpu("glu", impl="triton"), BARE)
    with pytest.raises(UnavailableError, match="triton is not installed"):
        choose(on_cpu("glu", impl="triton"), replace(interpreting, triton=False))


@pytest.mark.parametrize(
    ("capability", "built", "impl"),
    [
        (90, ("80", "90a"), "cuda"),
        (89, ("80", "90a"), "cuda"),
        (100, ("80", "90a"), "triton"),
        (90, (), "triton"),
        (75, ("75",), "reference"),
        (None, ("90a",), "reference"),
    ],
)
def test_cuda_is_tried_before_triton(capability, built, impl) -> None:
    found = choose(on_gpu("adamw", capability), replace(WITH_GPU, architectures=built))
    assert found.impl == impl
    if impl != "reference":
        assert found.reason.endswith(f"kernel, capability {backends.capability_text(capability)}")


@pytest.mark.parametrize(
    ("capability", "present", "problem"),
    [
        (100, {"architectures": ("80", "90a")}, "built for 80, 90a, the GPU has capability 10.0"),
        (75, {"architectures": ("80",)}, "the GPU has capability 7.5, the kernels need 8.0"),
        (90, {}, "the extension was built without nvcc"),
        (90, {"problem": "no _C"}, "no _C"),
        (None, {"architectures": ("80",), "gpu": False}, "torch finds no CUDA device"),
    ],
)
def test_why_cuda_cannot_run(capability, present, problem) -> None:
    with pytest.raises(UnavailableError, match=f"impl='cuda' is not available: {problem}"):
        choose(on_gpu("adamw", capability, impl="cuda"), replace(WITH_GPU, **present))


def test_cuda_needs_a_gpu_unless_emulated() -> None:
    built = replace(BARE, architectures=("90a",))
    with pytest.raises(UnavailableError, match="the tensors are on cpu"):
        choose(on_cpu("adamw", impl="cuda"), built)
    emulated = replace(built, emulated=True)
    assert choose(on_cpu("adamw", impl="cuda"), emulated).reason == "CUDA C++ kernel, emulated"
    assert choose(on_cpu("adamw"), emulated).impl == "cpu"


def test_a_block_runs_where_all_of_its_parts_have_kernels() -> None:
    assert choose(on_cpu("attention_block"), BARE).impl == "cpu"
    assert choose(on_gpu("attention_block"), WITH_GPU).impl == "triton"
    assert choose(on_gpu("mlp_block"), WITH_GPU).impl == "triton"
    found = choose(on_gpu("attention_block"), replace(WITH_GPU, triton=False))
    assert found.impl == "reference"
    assert found.reason == "rms_norm: triton is not installed"
    assert all(part in backends.OPERATIONS for parts in backends.BLOCKS.values() for part in parts)


def test_heads_wider_than_the_kernels_take_run_as_the_reference() -> None:
    wide = on_gpu("attention", sizes=Heads(256))
    assert choose(replace(wide, dtype=torch.bfloat16), WITH_GPU).impl == "triton"
    found = choose(wide, WITH_GPU)
    assert found.impl == "reference"
    assert found.reason == "the triton kernels take heads of up to 128 in float32"
    block = choose(replace(wide, operation="attention_block"), WITH_GPU)
    assert block.reason == f"attention: {found.reason}"
    assert choose(on_cpu("attention", sizes=Heads(512)), BARE).impl == "cpu"


def test_cudnn_takes_equal_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "CUDNN_HEADS", {90: (64, 128)})
    monkeypatch.setattr(plans, "CUDNN_LENGTH", 128)
    present = replace(WITH_GPU, cudnn=True)

    def plan(heads: Heads, capability: int = 90, present: Present = present, **more) -> str:
        request = on_gpu("attention", capability, sizes=heads)
        found = choose(replace(request, **{"dtype": torch.bfloat16, **more}), present)
        assert isinstance(found.plan, Strategy)
        return found.plan.name

    equal = Heads(128, length=2048)
    assert plan(equal) == plan(Heads(64, length=128)) == "cudnn"
    assert plan(Heads(128)) == plan(Heads(128, length=2000)) == plan(equal, 80) == "tiles"
    assert plan(equal._replace(window=True)) == plan(equal._replace(parents=True)) == "tiles"
    assert plan(equal._replace(repeatable=True)) == "tiles"
    assert plan(Heads(256, length=2048)) == plan(equal, present=WITH_GPU) == "tiles"
    assert plan(equal, dtype=torch.float32) == plan(equal, impl="triton") == "tiles"
    assert plan(Heads(132, length=2048)) == "tiles"
    on_a_cpu = choose(on_cpu("attention", sizes=equal), replace(BARE, cudnn=True))
    assert on_a_cpu.plan == Strategy(
        "tiles", "the implementation's own kernels: there are no others"
    )


def test_kernels_for_hopper_take_the_heads_of_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "HOPPER_HEADS", (64, 128))
    monkeypatch.setattr(plans, "CUDNN_HEADS", {90: (64, 256)})
    built = replace(WITH_GPU, architectures=("80", "90a"), cudnn=True)

    def plan(heads: Heads, capability: int = 90, present: Present = built, **more) -> str:
        request = on_gpu("attention", capability, sizes=heads)
        found = choose(replace(request, **{"dtype": torch.bfloat16, **more}), present)
        assert isinstance(found.plan, Strategy)
        return found.plan.name

    assert plan(Heads(64)) == plan(Heads(128), dtype=torch.float16) == "hopper"
    assert plan(Heads(128, length=2048)) == plan(Heads(128, length=2000)) == "hopper"
    assert plan(Heads(256, length=2048)) == "cudnn"
    for other in (Heads(96), Heads(64, window=True), Heads(64, parents=True)):
        assert plan(other) == "tiles"
    assert plan(Heads(64, repeatable=True)) == plan(Heads(64), dtype=torch.float32) == "tiles"
    assert plan(Heads(64), capability=100) == plan(Heads(64), impl="triton") == "tiles"
    assert plan(Heads(64), present=replace(built, architectures=("80",))) == "tiles"


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_attention_in_cuda_runs_where_it_is_forced(capability: int) -> None:
    built = replace(WITH_GPU, architectures=("80", "86", "89", "90a", "100", "120"))
    request = replace(on_gpu("attention", capability, sizes=Heads(96)), dtype=torch.bfloat16)
    assert choose(request, built).impl == "triton"
    assert choose(request, replace(built, triton=False)).impl == "reference"
    everything = Heads(96, parents=True, window=True, repeatable=True)
    for heads in (everything, Heads(64), Heads(128)):
        forced = choose(replace(request, impl="cuda", sizes=heads), built)
        assert (forced.impl, forced.plan.name) == ("cuda", "tiles")
        assert forced.reason.startswith("CUDA C++ kernel, capability")


@pytest.mark.parametrize(
    ("heads", "dtype", "problem"),
    [
        (256, torch.bfloat16, "the cuda kernels take heads of up to 128, multiples of 8, not 256"),
        (20, torch.float16, "the cuda kernels take heads of up to 128, multiples of 8, not 20"),
        (64, torch.float32, "the cuda kernels take bfloat16, float16, not torch.float32"),
    ],
)
def test_what_attention_in_cuda_does_not_take(heads, dtype, problem) -> None:
    built = replace(WITH_GPU, architectures=("90a",))
    request = replace(on_gpu("attention", sizes=Heads(heads), impl="cuda"), dtype=dtype)
    with pytest.raises(UnavailableError, match=f"impl='cuda' is not available: {problem}"):
        choose(request, built)


def test_attention_in_cuda_needs_triton_s_rotation() -> None:
    without = replace(WITH_GPU, architectures=("90a",), triton=False)
    request = replace(on_gpu("attention", impl="cuda"), dtype=torch.bfloat16)
    with pytest.raises(UnavailableError, match="triton, which rotates for the cuda kernels"):
        choose(request, without)


def test_a_product_s_plan_is_its_strategy() -> None:
    masked, plain = Product(8192, 4096, 6144, 48, dropout=True), Product(8192, 6144, 4096, 48)

    def name(request: Request) -> str:
        plan = choose(request, WITH_GPU).plan
        assert isinstance(plan, Strategy) and plan.reason
        return plan.name

    hopper = replace(on_gpu("lora_linear"), dtype=torch.bfloat16)
    assert name(replace(hopper, sizes=plain)) == "augmented"
    assert name(replace(hopper, sizes=masked)) == "two_segment"
    assert name(replace(hopper, sizes=masked._replace(r=0))) == "augmented"
    assert name(on_gpu("lora_linear", sizes=masked)) == "base_add"
    assert name(on_cpu("lora_linear", sizes=masked)) == "base_add"
    assert name(on_cpu("lora_linear", sizes=plain)) == "augmented"
    in_blocks = plain._replace(augmentable=False)
    assert name(on_cpu("lora_linear", sizes=in_blocks)) == "base_add"
    assert name(replace(hopper, sizes=in_blocks)) == "base_add"


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_gpu_has_a_rule(capability: int, dtype: torch.dtype, dropout: bool) -> None:
    request = replace(on_gpu("lora_linear", capability), dtype=dtype)
    plan = choose(replace(request, sizes=Product(64, 64, 64, 8, dropout)), WITH_GPU).plan
    assert isinstance(plan, Strategy) and plan.name in backends.STRATEGIES


def test_a_product_on_a_device_without_rules() -> None:
    with pytest.raises(ValueError, match="no rule fits a mps device"):
        choose(Request("lora_linear", "mps", None, torch.float32, Product(8, 8, 8, 2, True)), BARE)


def test_chunks_of_logits_are_even_and_bounded() -> None:
    most = CHUNK_BYTES["cpu"] // (50000 * 2)
    for rows in (0, 1, 100, most, most + 7, 5 * most + 1):
        step = backends.chunk_rows(CPU, torch.bfloat16, rows, 50000)
        assert 1 <= step <= most
        chunks = -(-rows // step)
        assert chunks == -(-rows // most) and rows - (chunks - 1) * step >= min(rows, step // 2)


def test_a_gpu_s_chunks_are_larger() -> None:
    sizes = Head(4096, 128256)
    assert choose(on_gpu("linear_cross_entropy", sizes=sizes), WITH_GPU).plan == 512
    assert choose(on_cpu("linear_cross_entropy", sizes=sizes), BARE).plan == 128


def test_rows_of_a_head_without_classes() -> None:
    assert choose(on_cpu("linear_cross_entropy", sizes=Head(10, 0)), BARE).plan == 64


def test_a_cpu_decodes_packed_weights_in_pieces() -> None:
    for rows, expected in ((4096, DECODED_ROWS), (100, 100), (0, 1)):
        sizes = Packed(rows)
        assert choose(on_cpu("blockwise_4bit", sizes=sizes), BARE).plan == expected
        assert choose(on_gpu("blockwise_4bit", sizes=sizes), WITH_GPU).plan == max(1, rows)


def test_a_launch_s_line() -> None:
    request = Request("rms_norm_bwd", "cuda", 90, torch.bfloat16, Extent(3000))
    key = choose(request, WITH_GPU).launch
    assert key == ("rms_norm_bwd", "90", "*", 4096)
    assert choose(replace(request, capability=86), WITH_GPU).launch == (
        "rms_norm_bwd", "*", "*", 4096,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"pool: launch_table\.json has no such kernel"):
        choose(replace(request, operation="pool"), WITH_GPU)


def test_texts_are_gone_on_with_by_what_the_products_take() -> None:
    def found(request: Request, present: Present) -> object:
        return choose(replace(request, sizes=Decoding()), present).plan

    with_unit = replace(BARE, isa="amx_bf16")
    of_bfloat16, of_float32 = on_cpu("lora_linear", torch.bfloat16), on_cpu("lora_linear")
    assert found(of_bfloat16, with_unit) == DecodingPlan(32, 64, 64, 4096)
    for request, present in ((of_bfloat16, BARE), (of_float32, with_unit)):
        assert found(request, present) == DecodingPlan(32, 32, 64, 0)
    without = replace(BARE, isa=None, problem="not built")
    assert found(of_float32, without) == DecodingPlan(32, 0, 0, 0)
    assert found(on_gpu("lora_linear"), WITH_GPU) == DecodingPlan(128, 0, 0, 0)


def test_an_update_s_temporary_tensors_are_larger_on_a_gpu() -> None:
    on_both = [on_cpu("adamw", sizes=Update()), on_gpu("adamw", sizes=Update())]
    assert [choose(request, WITH_GPU).plan for request in on_both] == [2**18, 2**24]
