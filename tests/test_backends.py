import pytest
import torch

from lora_engine import backends
from lora_engine.errors import UnavailableError

CPU = torch.device("cpu")


def test_the_choice_and_its_reason() -> None:
    choice = backends.explain("rms_norm")
    assert choice.impl == "cpu" and backends.native().isa() in choice.reason
    assert backends.explain("rms_norm", "cpu", torch.float16).impl == "reference"
    assert "float16" in backends.explain("rms_norm", "cpu", torch.float16).reason


def test_a_forced_choice_is_made_or_refused() -> None:
    assert backends.choose("rope", CPU, torch.float32, "reference").impl == "reference"
    with pytest.raises(UnavailableError, match="impl='cpu' is not available"):
        backends.choose("rope", torch.device("cuda"), torch.float32, "cpu")


def test_the_reference_is_never_silent() -> None:
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="rope runs as the PyTorch reference: .*float16"):
        assert backends.select("rope", CPU, torch.float16) == "reference"


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends.Extension(None, "No module named 'lora_engine._C'")
    monkeypatch.setattr(backends, "extension", lambda: missing)
    choice = backends.explain("glu")
    assert choice.impl == "reference" and "_C" in choice.reason
    with pytest.raises(UnavailableError, match="doctor"):
        backends.native()


def test_the_chosen_instruction_set_is_one_the_processor_has() -> None:
    features = backends.cpu_features()
    isa = backends.native().isa()
    needs = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}, "avx512_bf16": {"avx512_bf16"}}
    assert needs.get(isa, set()) <= features
    assert not backends.native().select_isa("sse9")


GPU = torch.device("cuda", 0)


def on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    """As if this machine had a GPU of `capability`, and CUDA kernels were built for `built`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    monkeypatch.setattr(backends, "cuda_architectures", lambda: tuple(built))


@pytest.mark.parametrize(
    ("capability", "built", "impl"),
    [
        ((9, 0), ["80", "90a"], "cuda"),
        ((8, 9), ["80", "90a"], "cuda"),
        ((12, 0), ["80", "90a"], "triton"),
        ((9, 0), [], "triton"),
    ],
)
def test_cuda_is_tried_before_triton(monkeypatch, capability, built, impl) -> None:
    on_a_gpu(monkeypatch, capability, built)
    assert backends.explain("adamw", GPU).impl == impl


@pytest.mark.parametrize(
    ("capability", "built", "problem"),
    [
        ((9, 0), [], "the extension was built without nvcc"),
        ((10, 0), ["80", "90a"], "built for 80, 90a, the GPU has capability 10.0"),
        ((7, 5), ["80"], "the GPU has capability 7.5, the kernels need 8.0"),
    ],
)
def test_why_cuda_cannot_run(monkeypatch, capability, built, problem) -> None:
    on_a_gpu(monkeypatch, capability, built)
    with pytest.raises(UnavailableError, match=f"impl='cuda' is not available: {problem}"):
        backends.choose("adamw", GPU, torch.float32, "cuda")


def test_cuda_needs_a_gpu_unless_emulated(monkeypatch) -> None:
    monkeypatch.setattr(backends, "cuda_architectures", lambda: ("90a",))
    with pytest.raises(UnavailableError, match="the tensors are on cpu"):
        backends.choose("adamw", CPU, torch.float32, "cuda")
    monkeypatch.setattr(backends, "cuda_emulation", object())
    assert "emulated" in backends.choose("adamw", CPU, torch.float32, "cuda").reason
    assert backends.explain("adamw").impl == "cpu"


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("90a", (9, 0), True),
        ("100", (10, 3), True),
        ("120", (10, 0), False),
        ("100a", (10, 3), False),
    ],
)
def test_what_machine_code_runs_on(architecture, capability, runs) -> None:
    assert backends.runs_on(architecture, capability) is runs
