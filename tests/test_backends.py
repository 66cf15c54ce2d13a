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
