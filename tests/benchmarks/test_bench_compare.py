"""Two result files beside each other: what counts as worse, and what is no result at all."""

import json

import pytest

from benchmarks.common import compare, results
from lora_engine.errors import UserError


def row(implementation="ours", median=1.0, spread=0.0, **more):
    seconds = {"median": median, "lower": median - spread, "upper": median + spread, "samples": 16}
    seconds |= {"fastest": median - spread, "slowest": median + spread}
    key = {"case": "glu", "size": "tiny", "dtype": "float32", "pass": "forward"}
    return {**key, "implementation": implementation, "seconds": seconds, **more}


def run(*rows, processor="P", load=0.1):
    hardware = {"processor": processor, "cores used": "2 of 2"}
    return {"hardware": hardware, "date": "2030-01-01", "load_average": load, "rows": list(rows)}


def change(before, after):
    (found, *_) = compare.changes(run(before), run(after))
    return found


@pytest.mark.parametrize(
    ("after", "verdict"), [(1.04, "same"), (1.07, "worse"), (0.97, "same"), (0.9, "better")]
)
def test_small_changes_are_noise(after, verdict):
    assert change(row(), row(median=after)).verdict == verdict


def test_what_scatters_may_change_more():
    # 1.57 * 0.4 / 4 of each: 0.157 * sqrt(2)
    found = change(row(spread=0.2), row(median=1.2, spread=0.24))
    assert found.noise == pytest.approx(0.157 * 2**0.5) and found.verdict == "same"
    assert change(row(spread=0.2), row(median=1.3, spread=0.26)).verdict == "worse"


def test_times_are_in_units_of_the_ceiling_where_both_have_one():
    slower_machine = change(row(ceiling=10.0), row(median=2.0, ceiling=5.0))
    assert slower_machine.ratio == 1 and slower_machine.verdict == "same"
    assert change(row(ceiling=10.0), row(median=1.0, ceiling=20.0)).verdict == "worse"


def test_memory_counts_beyond_what_an_allocator_may_take():
    def memory(before, after):
        found = compare.changes(run(row(extra_bytes=before)), run(row(extra_bytes=after)))
        return next(x for x in found if x.what == "memory").verdict

    assert memory(0, 2**19) == "same"
    assert memory(0, 2**22) == "worse"
    assert memory(2**30, 2**30 + 2**22) == "same"


def test_only_ours_can_be_a_regression(tmp_path):
    before = run(row(), row("ours-unshared"), row("pytorch"), row("gone"))
    after = run(row(median=2), row("ours-unshared"), row("pytorch", median=3), row("new"))
    for name, content in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(content))
    shown = []
    assert compare.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), shown.append) == 1
    (text,) = shown
    assert "3 measurements in both, 1 only in A, 1 only in B" in text
    assert "beyond noise 1 of ours became worse" in text
    first, second = (x for x in text.splitlines() if "| worse |" in x or " worse |" in x)
    assert "pytorch" in first and "3.00" in first, "the largest change is first"
    assert "ours" in second and " 2.00 |" in second
    again = compare.compare(str(tmp_path / "a.json"), str(tmp_path / "a.json"), shown.append)
    assert again == 0 and "none of ours became worse" in shown[1]


def test_a_busy_or_another_machine_is_told():
    found = compare.changes(run(row()), run(row()))
    assert "Other programs ran beside" in compare.render(run(row()), run(row(), load=9.0), found)
    other = compare.render(run(row()), run(row(), processor="Q", load=9.0), found)
    assert "The machines differ" in other and "Other programs" not in other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\x93", "is not JSON"),
        ("[1]", "has no rows of a benchmark"),
        ('{"rows": [{"case": "glu"}]}', "has no rows of a benchmark"),
        ('{"summary": {}}', None),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, content, message):
    file = tmp_path / "some.json"
    file.write_bytes(content.encode("latin-1"))
    if message is None:
        assert results.read(file)["rows"] == []
        return
    with pytest.raises(UserError, match=f"some.json: {message}"):
        results.read(file)


def test_no_file_a_folder_and_nothing_in_common(tmp_path):
    with pytest.raises(UserError, match=r"gone.json: no such file; bench writes"):
        results.read(tmp_path / "gone.json")
    with pytest.raises(UserError, match="is a folder"):
        results.read(tmp_path)
    for name, implementation in (("a.json", "ours"), ("b.json", "other")):
        (tmp_path / name).write_text(json.dumps(run(row(implementation))))
    with pytest.raises(UserError, match="measures nothing that"):
        compare.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), print)


def test_committed_results_of_every_form_are_read():
    folder = results.Path(results.__file__).parents[1] / "results"
    (old,) = folder.glob("train_step-bfloat16-epyc-2cores.json")
    rows = {x["implementation"]: x for x in results.read(old)["rows"]}
    assert rows["ours"]["seconds"]["samples"] == 6 and "compared" not in rows["ours"]
    theirs = rows["trl-padded"]
    assert theirs["compared"]["times_as_long"]["median"] == pytest.approx(8.47, abs=0.01)
    assert theirs["rate"] == pytest.approx(101, abs=1) and theirs["case"] == "sft"
    for path in folder.glob("kernels-*.json"):
        assert results.read(path)["rows"]
