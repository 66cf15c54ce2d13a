from typing import Any

import pytest
import torch

from lora_engine.ops.lora_strategy import STRATEGIES, choose_strategy, table

MODEL = {"m": 8192, "n": 6144, "k": 4096, "r": 48, "aligned": True}
HOPPER = {"device_type": "cuda", "capability": 90, "dtype": torch.bfloat16}
CPU = {"device_type": "cpu", "capability": None, "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({**HOPPER, "dropout": False}, "augmented"),
        ({**HOPPER, "dropout": True}, "two_segment"),
        ({**HOPPER, "dropout": True, "dtype": torch.float32}, "base_add"),
        ({**HOPPER, "dropout": True, "r": 0}, "augmented"),
        ({**CPU, "dropout": False}, "augmented"),
        ({**CPU, "dropout": True}, "base_add"),
        ({**CPU, "dropout": True, "dtype": torch.float64, "aligned": False}, "base_add"),
    ],
)
def test_defaults(asked: dict[str, Any], name: str) -> None:
    found = choose_strategy(**{**MODEL, **asked})
    assert found.name == name
    assert found.reason


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_every_gpu_has_a_rule(capability: int, dtype: torch.dtype, dropout: bool) -> None:
    asked = {"device_type": "cuda", "capability": capability, "dtype": dtype}
    assert choose_strategy(**{**MODEL, **asked, "dropout": dropout}).name in STRATEGIES


def test_ranges_have_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [
        {"when": {"m": [100, 200]}, "strategy": "two_segment", "reason": "middle"},
        {
            "when": {"m": [None, 99], "dtypes": ["bfloat16"]},
            "strategy": "base_add",
            "reason": "few",
        },
        {"when": {"aligned": True}, "strategy": "augmented", "reason": "rest"},
    ]
    monkeypatch.setattr("lora_engine.ops.lora_strategy.table", lambda: rules)

    def reason(m: int, **asked: Any) -> str:
        return choose_strategy(**{**MODEL, **HOPPER, "dropout": False, "m": m, **asked}).reason

    assert [reason(m) for m in (99, 100, 200, 201)] == ["few", "middle", "middle", "rest"]
    assert reason(99, dtype=torch.float16) == "rest"
    with pytest.raises(ValueError, match="no rule fits a cuda device"):
        reason(300, aligned=False)


def test_the_table_names_what_exists() -> None:
    known = {"device", "dropout", "aligned", "dtypes", "capability", "m", "n", "k", "r"}
    for rule in table():
        assert set(rule["when"]) <= known
        assert rule["strategy"] in STRATEGIES
