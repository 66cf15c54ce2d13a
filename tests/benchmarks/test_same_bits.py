import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.train import same_bits, short_trainings
from benchmarks.train.same_bits import Difference, compare, compare_folders, compare_tensors


def test_the_same_bits_are_the_same():
    odd = torch.tensor([1.0, math.nan, math.inf, -0.0, 1e-45])
    assert compare_tensors("x", odd, odd.clone()) is None
    assert compare_tensors("x", odd.bfloat16(), odd.bfloat16()) is None
    assert compare_tensors("x", torch.empty(0, 3), torch.empty(0, 3)) is None
    assert compare_tensors("x", torch.tensor(2.0), torch.tensor(2.0)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_unit_in_the_last_place_differs(dtype):
    a = torch.ones(2, 3, dtype=dtype)
    b = a.clone()
    step = torch.finfo(dtype).eps
    b[1, 0] += step
    assert compare_tensors("x", a, b) == Difference("x", 1, 6, step, 3)
    assert str(Difference("x", 1, 6, 0.5, 3)) == "x: 1 of 6 values, from [3] on, by at most 5.0e-01"


def test_minus_zero_and_nan_differ_from_zero():
    zero = torch.zeros(2)
    assert compare_tensors("x", zero, -zero) == Difference("x", 2, 2, 0.0, 0)
    found = compare_tensors("x", zero, torch.tensor([0.0, math.nan]))
    assert isinstance(found, Difference) and found.first == 1 and math.isnan(found.largest)


def test_columns_of_a_larger_tensor_are_compared_as_they_are():
    wide = torch.arange(12.0).view(3, 4)
    assert compare_tensors("x", wide[:, 1:3], wide[:, 1:3].clone()) is None


def test_other_shapes_and_dtypes_are_told():
    a = torch.zeros(2)
    assert compare_tensors("x", a, torch.zeros(3)) == "x: [2] torch.float32, then [3] torch.float32"
    assert "torch.float64" in str(compare_tensors("x", a, a.double()))


def test_a_tensor_that_only_one_has_is_a_problem():
    loss = torch.tensor([2.0, 1.5], dtype=torch.float64)
    verdict = compare("lora", {"loss": loss, "weight a": loss}, {"loss": loss, "weight b": loss})
    assert verdict.problems == ("weight a: only at the first", "weight b: only at the second")
    assert (verdict.steps, verdict.values, verdict.last_loss) == (2, 4, 1.5)
    assert compare("lora", {"loss": loss}, {"loss": loss[:1]}).problems
    assert not compare("lora", {"loss": loss}, {"loss": loss.clone()}).problems


def test_a_failed_training_is_a_problem(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        save_file({"loss": torch.ones(2)}, folder / "dora.safetensors")
    assert compare_folders("dora", folders).problems == ()
    assert compare_folders("full", folders).problems[0] == "failed at the first: no result"
    (folders[1] / "dora.safetensors").rename(folders[1] / "other")
    (folders[1] / "dora.error").write_text("Traceback:\n  line\nKeyError: 'x'\n")
    verdict = compare_folders("dora", folders)
    assert verdict.problems == ("failed at the second: KeyError: 'x'",)
    said = same_bits.render([verdict, same_bits.Verdict("lora", 4, 9, 1.0)])
    assert "dora: failed at the second: KeyError: 'x'" in said
    assert "1 of 2 trainings have the same bits." in said


def test_trainings_are_chosen_by_words(capsys):
    cases = same_bits.parse_arguments(["main", "HEAD", "dora", "resumed"]).cases
    assert cases == [f"{n}, {d}" for n in ("dora", "resumed") for d in ("float32", "bfloat16")]
    assert same_bits.parse_arguments(["main", "HEAD"]).cases == short_trainings.CASES
    with pytest.raises(SystemExit):
        same_bits.parse_arguments(["main", "HEAD", "no such"])
    assert "no training is called so" in capsys.readouterr().err


def test_it_starts_by_its_path_as_well_as_by_its_module_s_name(monkeypatch):
    script = Path(same_bits.__file__)
    for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    elsewhere = [path for path in sys.path if Path(path or ".").resolve() != same_bits.ROOT]
    monkeypatch.setattr(sys, "path", [str(script.parent), *elsewhere])
    assert runpy.run_path(str(script))["CASES"] == short_trainings.CASES


def test_a_training_repeats_its_bits_and_another_rate_changes_them():
    def run(**train):
        training = short_trainings.Training(train={"max_steps": 2, **train})
        return short_trainings.train(training, torch.float32, "cpu")

    first = run()
    assert compare("lora", first, run()).problems == ()
    assert len(first["loss"]) == len(first["grad_norm"]) == 2
    problems = compare("lora", first, run(learning_rate=0.010001)).problems
    assert any(problem.startswith("weight ") and "lora_A" in problem for problem in problems)
    assert not any("base_layer" in problem for problem in problems)


@pytest.mark.parametrize("name", ["resumed", "several adapters", "shared prefixes"])
def test_the_trainings_are_what_they_are_called(name):
    training = short_trainings.TRAININGS[name]
    data = short_trainings.make_dataset(training, 6, seed=1)
    assert (len({tuple(e.input_ids[:20]) for e in data}) == 1) == (name == "shared prefixes")
    assert {e.adapter for e in data} == ({"default", "other"} if "several" in name else {""})
    assert training.interrupted == (name == "resumed")


def test_the_checkout_s_extension_is_taken_for_its_own_sources_only(tmp_path, monkeypatch):
    monkeypatch.setattr(same_bits, "ROOT", tmp_path)
    monkeypatch.setattr(same_bits, "EXTENSION_SOURCES", ("csrc",))
    source, extension = tmp_path / "csrc" / "a.cpp", tmp_path / "_C.so"
    source.parent.mkdir()
    source.write_text("1")
    for command in (["init", "-q"], ["add", "csrc"], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    assert not same_bits.is_built_of(extension, "HEAD")
    extension.touch()
    os.utime(source, (1, 1)), os.utime(source.parent, (1, 1))
    assert same_bits.is_built_of(extension, "HEAD")
    os.utime(extension, (0, 0))
    assert not same_bits.is_built_of(extension, "HEAD")
    source.write_text("changed")
    extension.touch()
    os.utime(source, (1, 1))
    assert not same_bits.is_built_of(extension, "HEAD")
