import importlib
from types import SimpleNamespace

import pytest
import torch

from lora_engine import backends
from lora_engine.errors import UnavailableError


def test_without_the_extension_nothing_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = backends.Extension(None, "No module named 'lora_engine._C'")
    monkeypatch.setattr(backends.extension, "loaded", lambda: missing)
    choice = backends.explain("glu")
    assert choice.impl == "reference" and "_C" in choice.reason
    assert not backends.extension_available() and backends.cuda_architectures() == ()
    assert not backends.keep_freed_memory(torch.device("cpu"))
    with pytest.raises(UnavailableError, match="doctor"):
        backends.native()


@pytest.mark.parametrize(
    ("names", "said"),
    [(["packed_weight"], ""), (["glu_fwd"], "without glu_fwd"), (["isa", "DType"], "and 1 more")],
)
def test_an_extension_of_older_sources_says_so(
    monkeypatch: pytest.MonkeyPatch, names: list[str], said: str
) -> None:
    built = {name: value for name, value in vars(backends.native()).items() if name not in names}
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**built))
    backends.extension.loaded.cache_clear()
    try:
        problem = backends.extension.loaded().problem
        assert (problem is None) == (not said)
        if problem is not None:
            assert said in problem
            with pytest.raises(UnavailableError, match=r"older sources, .*builds it"):
                backends.native()
    finally:
        backends.extension.loaded.cache_clear()


def test_the_chosen_instruction_set_is_one_the_processor_has() -> None:
    features = backends.cpu_features()
    isa = backends.native().isa()
    needs = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f"}, "avx512_bf16": {"avx512_bf16"}}
    assert needs.get(isa, set()) <= features
    assert not backends.native().select_isa("sse9")
