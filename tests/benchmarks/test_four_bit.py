from pathlib import Path

import pytest
import torch

from benchmarks.kernels import four_bit
from lora_engine import backends

SMALL = ["--rows", "64", "--cols", "128", "--rounds", "2"]


@pytest.mark.parametrize("more", [[], ["--double-quant"], ["--format", "fp4"]])
def test_all_is_timed_beside_bitsandbytes(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four_bit.main([*SMALL, *more, "--out", str(tmp_path / "result")])
    printed = capsys.readouterr().out
    assert "times bitsandbytes" in printed
    assert printed.count("%") == 5
    assert (tmp_path / "result.json").is_file()


def test_other_bits_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = four_bit.quantize_weight

    def wrong(weight: torch.Tensor, *args: object, **options: object) -> object:
        return honest(weight + 1, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(four_bit, "quantize_weight", wrong)
    with pytest.raises(SystemExit, match="the codes are not those of bitsandbytes"):
        four_bit.main(SMALL)


def test_other_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = four_bit.QuantizedWeight.from_state_dict
    monkeypatch.setattr(
        four_bit.QuantizedWeight,
        "from_state_dict",
        staticmethod(lambda state, name: read({**state, "w": state["w"] ^ 1}, name)),
    )
    with pytest.raises(SystemExit, match="the values are not those of bitsandbytes"):
        four_bit.main(SMALL)


def test_rows_that_end_inside_a_block_are_refused() -> None:
    with pytest.raises(SystemExit):
        four_bit.parse_arguments(["--cols", "100"])


def test_kernels_of_every_implementation_that_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    if not backends.triton_interpreted():
        pytest.skip("triton is not installed, or compiles for the GPU in this process")
    weight = torch.randn(8, 128).bfloat16()
    packed = four_bit.quantize_weight(weight, double_quant=True)
    out = torch.empty_like(weight)
    runs = four_bit.kernel_runs(weight, packed, out)
    assert "impl='cuda' is not available" in capsys.readouterr().out
    assert set(runs) == {"dequantise, triton", "quantise, triton kernel"}
    for run in runs.values():
        run()
    assert torch.equal(out, packed.dequantize())
