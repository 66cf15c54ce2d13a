import pytest

from lora_engine.backends import STRATEGIES, tables

VALUES = {"device": "cuda", "capability": 90, "format": "dense", "dropout": False, "aligned": True}
VALUES |= {"augmentable": True}
VALUES |= {"m": 8192, "n": 6144, "k": 4096, "r": 48}


def test_the_first_rule_that_fits_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [
        {"when": {"m": [100, 200]}, "reason": "middle"},
        {"when": {"m": [None, 99], "dtypes": ["bfloat16"]}, "reason": "few"},
        {"when": {"format": "nf4"}, "reason": "packed"},
        {"when": {"aligned": True, "capability": [80, None]}, "reason": "rest"},
    ]
    monkeypatch.setattr(tables, "product_rules", lambda: rules)

    def reason(m: int, dtype: str = "bfloat16", **values: object) -> str | None:
        rule = tables.find_rule({**VALUES, "m": m, **values}, dtype)
        return None if rule is None else rule["reason"]

    assert [reason(m) for m in (99, 100, 200, 201)] == ["few", "middle", "middle", "rest"]
    assert reason(99, "float16") == "rest"
    assert reason(300, format="nf4") == "packed"
    assert reason(300, aligned=False) is None
    assert reason(300, capability=None) is None
    assert reason(300, capability=75) is None


def test_the_rules_name_what_exists() -> None:
    for rule in tables.product_rules():
        assert set(rule["when"]) <= {*VALUES, "dtypes"}
        assert rule["strategy"] in STRATEGIES


def test_a_line_for_a_capability_and_dtype_goes_before_those_for_any(monkeypatch) -> None:
    def line(value: int) -> list:
        return [[16, {"BLOCK": value}], [None, {"BLOCK": value + 1}]]

    table = {"k": {"*": {"*": line(1)}, "90": {"bfloat16": line(3), "*": line(5)}}}
    monkeypatch.setattr(tables, "launch_table", lambda: table)

    def block(capability: int | None, dtype: str, size: int) -> int:
        return tables.launch_parameters(tables.launch_key("k", capability, dtype, size))["BLOCK"]

    assert [block(90, "bfloat16", size) for size in (1, 16, 17)] == [3, 3, 4]
    assert block(90, "float32", 16) == 5
    assert block(None, "bfloat16", 16) == block(80, "bfloat16", 16) == 1
    table["k"]["*"]["*"].pop()
    with pytest.raises(ValueError, match="k: no launch parameters for size 17"):
        block(80, "bfloat16", 17)


def test_every_line_has_a_size_and_parameters() -> None:
    for kernel, by_capability in tables.launch_table().items():
        assert "*" in by_capability and "*" in by_capability["*"], kernel
        for by_dtype in by_capability.values():
            for lines in by_dtype.values():
                limits = [limit for limit, _ in lines]
                assert limits[-1] is None and limits[:-1] == sorted(limits[:-1]), kernel
