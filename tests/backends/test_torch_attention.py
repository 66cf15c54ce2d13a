"""Copies of rows that do not follow each other."""

import pytest

pytest.importorskip("triton")

import torch

from lora_engine.backends.torch_attention import copy_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("cols", "skipped", "padding"), [(16, 0, 8), (16, 8, 16), (12, 0, 8), (16, 3, 8), (16, 8, 3)]
)
def test_every_element_arrives_and_no_other_is_written(
    dtype: torch.dtype, cols: int, skipped: int, padding: int
) -> None:
    source = torch.arange(3 * 5 * cols, dtype=torch.float32).to(dtype).view(3, 5, cols)
    source[0, 0, 0] = float("nan")
    buffer = torch.full((3, 5, skipped + cols + padding), -1.0, dtype=dtype)
    copy_rows(source, buffer[..., skipped : skipped + cols])
    expected = torch.nn.functional.pad(source, (skipped, padding), value=-1.0)
    assert torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))


def test_rows_of_16_bytes_are_copied_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, y: (seen.append(x.dtype), copy(x, y))[1])
    source = torch.randn(4, 32).bfloat16()
    copy_rows(source, torch.empty(4, 40, dtype=torch.bfloat16)[:, :32])
    copy_rows(source, torch.empty(4, 36, dtype=torch.bfloat16)[:, :32])
    assert seen == [torch.complex128, torch.bfloat16]
