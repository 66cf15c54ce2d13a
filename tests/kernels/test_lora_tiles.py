"""How the rows of a LoRA group are divided among programs."""

import pytest
import torch

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [1, 31, 500, 8192, 100_001])
@pytest.mark.parametrize("tiles", [1, 4, 16, 56, 112, 265, 4000])
def test_chunks_cover_the_rows_once(monkeypatch: pytest.MonkeyPatch, rows: int, tiles: int) -> None:
    from lora_engine.backends.triton import lora_tiles

    monkeypatch.setattr(lora_tiles, "multiprocessors", lambda device: 132)
    chunks, chunk = lora_tiles.split_rows(rows, 32, tiles, CPU)
    assert chunk % 32 == 0
    assert (chunks - 1) * chunk < rows <= chunks * chunk
    assert chunks <= lora_tiles.MOST_CHUNKS


@pytest.mark.parametrize(
    ("tiles", "chunks"),
    [(16, 16), (24, 11), (32, 8), (112, 7)],
    ids=["one wave", "all of one wave", "most of one wave", "three, not 85 % of one"],
)
def test_no_wave_is_left_half_empty(
    monkeypatch: pytest.MonkeyPatch, tiles: int, chunks: int
) -> None:
    """132 multiprocessors run 264 programs at once; 8192 rows are 256 blocks of 32."""
    from lora_engine.backends.triton import lora_tiles

    monkeypatch.setattr(lora_tiles, "multiprocessors", lambda device: 132)
    assert lora_tiles.split_rows(8192, 32, tiles, CPU)[0] == chunks
