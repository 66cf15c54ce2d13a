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
    (found, *_) = compare.changes(run(before), run(after)).changes
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
        return next(x for x in found.changes if x.what == "memory").verdict

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
    assert "3 measurements compared, 1 only in A, 1 only in B;" in text
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
        ('{"summary": {}}', "has no rows of a benchmark"),
    ],
)
def test_what_is_no_result_is_one_line(tmp_path, content, message):
    file = tmp_path / "some.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"some.json: {message}"):
        results.read(file)


@pytest.mark.parametrize(
    "broken",
    [
        lambda found: found.pop("hardware"),
        lambda found: found.pop("date"),
        lambda found: found.update(load_average="high"),
        lambda found: found.update(rows={}),
        lambda found: found["rows"].append("row"),
        lambda found: found["rows"][0].update(seconds=1.0),
        lambda found: found["rows"][0]["seconds"].update(median=0.0),
        lambda found: found["rows"][0]["seconds"].update(median=float("nan")),
        lambda found: found["rows"][0]["seconds"].update(lower=None),
        lambda found: found["rows"][0]["seconds"].pop("samples"),
        lambda found: found["rows"][0].update(peak_bytes="much"),
    ],
)
def test_of_a_file_that_lacks_something_nothing_is_taken(tmp_path, broken):
    found = run(row())
    file = tmp_path / "some.json"
    file.write_text(json.dumps(found))
    assert results.read(file) == found
    broken(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"some.json: has no rows of a benchmark; name a file"):
        results.read(file)


def job(batch_size=8, **more):
    """A run of a whole step with that setting."""
    options = {"steps": 3, "rounds": 2, "device": "cpu", "batch_size": batch_size} | more
    return {**run(row()), "jobs": {"glu": {"options": options}}}


def test_other_settings_are_another_measurement(tmp_path):
    found = compare.changes(job(), job(4))
    assert not found.changes and found.settings == {"glu": "batch_size 8 and 4"}
    for other in (job(device="cuda"), job(steps=5)):
        assert not compare.changes(job(), other).changes
    assert compare.changes(job(), job(rounds=9)).changes, "more of the same"
    assert compare.changes(job(), run(row())).changes, "what is not said is taken as the same"
    for name, content in (("a.json", job()), ("b.json", job(4))):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"b.json: glu has batch_size 8 and 4; compare two"):
        compare.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), print)


def test_kernels_of_another_device_are_another_measurement():
    on = [{**run(row()), "options": {"device": x, "samples": "15"}} for x in ("cpu", "cuda")]
    assert not compare.changes(*on).changes and compare.changes(on[0], on[0]).changes


def test_times_of_few_samples_are_not_compared():
    few = row(median=3.0, peak_bytes=2**30)
    few["seconds"]["samples"] = 2
    found = compare.changes(run(row(peak_bytes=2**30)), run(few))
    assert [x.what for x in found.changes] == ["memory"] and found.few == 1
    shown = compare.render(run(row()), run(few), found)
    assert "1 measurements compared, 1 times not, being of fewer than 3 samples;" in shown


def test_beside_busy_programs_a_step_is_compared_by_its_processor_time():
    def step(median, cpu):
        return row(median=median, cpu_seconds=row(median=cpu)["seconds"], ceiling=10.0)

    slow, busy = run(step(9.0, 1.0)), run(step(9.0, 1.0), load=5.0)
    (quiet,) = compare.changes(run(step(1.0, 1.0)), slow).changes
    assert quiet.what == "time" and quiet.verdict == "worse"
    (found,) = compare.changes(run(step(1.0, 1.0)), busy).changes
    assert found.what == "CPU time" and found.verdict == "same"
    (found,) = compare.changes(run(step(1.0, 1.0)), {**slow, "others_cores": 1.0}).changes
    assert found.what == "CPU time", "what was measured while it ran decides"


def test_a_kernel_beside_busy_programs_is_not_compared_by_time():
    """The same commit took 2.3 to 3.6 times as long, in units of the ceiling."""
    before = run(row(extra_bytes=0))
    after = {**run(row(median=3.0, extra_bytes=2**22)), "others_cores": 1.4}
    found = compare.changes(before, after)
    assert [x.what for x in found.changes] == ["memory"] and found.beside == 1
    shown = compare.render(before, after, found)
    assert "1 times not, taken beside busy programs; beyond noise 1 of ours became" in shown
    assert compare.changes(before, {**after, "others_cores": 0.1}).beside == 0


def test_the_ceiling_may_move_by_chance_too():
    loose = row(ceiling=10.0, ceiling_seconds=row(spread=0.2)["seconds"])
    found = change(loose, row(median=1.2, ceiling=10.0, ceiling_seconds=row()["seconds"]))
    assert found.noise == pytest.approx(0.157) and found.verdict == "worse"
    assert change(loose, row(median=1.15, ceiling=10.0)).verdict == "same"


def test_what_went_wrong_in_the_second_is_worse(tmp_path):
    before = run(row(), row("ours-unshared"), row("pytorch"))
    wrong = {**run(row("pytorch")), "failures": ["glu: ours left out: the loss is nan"]}
    for name, content in (("a.json", before), ("b.json", wrong)):
        (tmp_path / name).write_text(json.dumps(content))
    shown = []
    assert compare.compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"), shown.append) == 1
    assert "Wrong in B: glu: ours left out: the loss is nan" in shown[0]
    assert "2 only in A (of ours: glu tiny float32 forward ours, glu tiny" in shown[0]
    assert "none of ours became worse" in shown[0]


def test_versions_and_commits_are_told():
    first = {**run(row()), "software": {"torch": "2.12", "peft": "1"}, "commit": "abc"}
    second = {**run(row()), "software": {"torch": "2.13", "peft": "1", "trl": "1"}, "commit": "def"}
    shown = compare.render(first, second, compare.changes(first, second))
    assert "Versions differ: torch 2.12 and 2.13." in shown
    assert "commit abc, load" in shown and "commit def, load" in shown


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
