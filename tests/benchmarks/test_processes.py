"""Contenders as processes: what they measured, and what is said of those that end otherwise."""

import math
import time

import pytest

from benchmarks.common import processes
from benchmarks.common.worker import __main__ as worker
from lora_engine import openmp


@pytest.fixture
def contender(monkeypatch, tmp_path):
    """Runs a contender that is these lines of Python, which know its folder as `folder`."""
    place = tmp_path / "worker"
    place.mkdir()
    monkeypatch.setattr(processes, "WORKER", place)

    def run(code, seconds=math.inf):
        head = "import os, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[3])\n"
        (place / "__main__.py").write_text(head + code)
        given = dict(processes.os.environ)
        return processes.run("sft", "ours", "", tmp_path, given, time.monotonic() + seconds)

    return run


WROTE = "(folder / 'result.json').write_text('{\"steps\": []}')\n"


def test_what_it_wrote_is_its_result(contender):
    assert contender(WROTE) == {"steps": []}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            WROTE + "print('a warning', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)",
            "its process was killed by SIGKILL, as where memory runs out",
        ),
        ("os.kill(os.getpid(), 11)", "its process was killed by SIGSEGV"),
        ("sys.exit('line\\nlast line')", "last line"),
        ("sys.exit(7)", "exit status 7"),
        ("pass", "exit status 0"),
    ],
    ids=["killed", "crashed", "told", "status", "nothing"],
)
def test_what_ends_otherwise_is_told(contender, code, said):
    with pytest.raises(processes.FailedError) as caught:
        contender(code)
    assert str(caught.value) == said


def test_the_time_ends_it(contender, tmp_path):
    begun = time.monotonic()
    with pytest.raises(processes.OutOfTimeError, match=f"^stopped, {processes.OVER}$"):
        contender("time.sleep(600)", seconds=1.0)
    assert time.monotonic() - begun < 300
    with pytest.raises(processes.OutOfTimeError, match=f"^not measured, {processes.OVER}$"):
        contender("(folder / 'begun').touch()", seconds=0.0)
    assert not (tmp_path / "begun").exists()


def test_an_error_is_told_with_its_kind(monkeypatch, tmp_path, capsys):
    def fail(*given):
        raise ValueError("of two\nlines")

    monkeypatch.setattr(worker, "measure", fail)
    assert worker.main(["sft", "ours", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
    found = (tmp_path / "result.json").read_text()
    assert found == '{"failed": "ValueError: of two\\\\nlines"}'


def test_a_package_of_our_name_in_the_working_directory_is_not_taken(monkeypatch, tmp_path):
    """Many checkouts have one."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(processes.FailedError) as caught:
        processes.run("gone", "ours", "", tmp_path, dict(processes.os.environ), math.inf)
    assert str(caught.value) == "KeyError: 'gone'", "our worker ran, and knows no such job"


BRIEF = openmp.Waiting("brief", "set by lora_engine")
USERS = openmp.Waiting("the user's", "OMP_WAIT_POLICY=active")


@pytest.mark.parametrize(
    ("waiting", "used", "turns", "said"),
    [
        (BRIEF, 3.0, "300000", ""),
        (BRIEF, 50.0, openmp.OURS["GOMP_SPINCOUNT"], "other programs were busy"),
        (USERS, 3.0, openmp.OURS["GOMP_SPINCOUNT"], "threads of all: the user's"),
    ],
)
def test_threads_of_peers_wait_as_is_best_for_them(monkeypatch, waiting, used, turns, said):
    for name, value in openmp.OURS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(openmp, "waiting", lambda: waiting)
    monkeypatch.setattr(processes.psutil, "cpu_percent", lambda interval: used)
    environment, how = processes.environment_of_peers()
    assert environment["GOMP_SPINCOUNT"] == turns
    assert ("OMP_WAIT_POLICY" in environment) is (turns != "300000")
    assert said in how and environment["PATH"] == processes.os.environ["PATH"]
