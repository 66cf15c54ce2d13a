"""Options of `pytest benchmarks --benchmark-only`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-size", default="smollm2", help="of benchmarks/common/registry.py")
    parser.addoption("--bench-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.addoption("--bench-device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption(
        "--bench-model", default="smollm2", help="of whole steps: what load_model takes"
    )
