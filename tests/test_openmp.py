"""OpenMP threads spin briefly and then sleep, by our doing, unless the user has said how."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_engine import backends, openmp
from lora_engine.app import doctor

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TWO_CORES = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one core the runtime lets threads sleep anyway"
)
# Prints the most processor time, of three times 50 ms asleep, that follows a loop of two threads.
PROCESSOR_TIME_ASLEEP = """
import time
x = torch.ones(1 << 20)
used = []
for _ in range(3):
    x.mul_(1.0)
    begin = time.process_time()
    time.sleep(0.05)
    used.append(time.process_time() - begin)
from lora_engine import openmp
print(max(used), openmp.waiting(), sep="\\n")
"""


def run_python(code: str, **variables: str) -> str:
    """What a new interpreter prints, its environment holding no other variables of OpenMP."""
    kept = {k: v for k, v in os.environ.items() if k not in openmp.USERS_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def new_process(monkeypatch):
    """As in a process that has not imported lora_engine yet; torch neither."""
    backends.extension.loaded()  # its first import in this process settles what is left to settle
    for name in openmp.USERS_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(openmp, "_waiting", None)
    monkeypatch.setattr(openmp, "loaded_runtimes", list)


@pytest.mark.parametrize("module", ["lora_engine", "lora_engine.errors", "lora_engine.app.cli"])
def test_an_import_sets_the_policy_before_torch_is_there(module) -> None:
    code = (
        f"import os, sys, {module}; print(os.environ['OMP_WAIT_POLICY'],"
        "os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    assert run_python(code) == "passive 2000 False"


@pytest.mark.parametrize("name", openmp.USERS_VARIABLES)
def test_what_the_user_set_stays(new_process, monkeypatch, name) -> None:
    monkeypatch.setenv(name, "active")
    openmp.settle()
    assert [n for n in openmp.USERS_VARIABLES if n in os.environ] == [name]
    assert os.environ[name] == "active"
    openmp.settle_late(lambda: pytest.fail("the user's setting was overruled"))
    assert str(openmp.waiting()) == f"the user's: {name}=active"


def test_what_a_process_of_ours_handed_down_is_ours(new_process, monkeypatch) -> None:
    for name, value in openmp.OURS.items():
        monkeypatch.setenv(name, value)
    # Whenever the runtime was loaded, the variables were there.
    monkeypatch.setattr(openmp, "loaded_runtimes", lambda: ["/lib/libgomp.so.1"])
    openmp.settle()
    assert str(openmp.waiting()) == "brief: set by lora_engine"


def test_one_of_our_variables_alone_is_the_user_s(new_process, monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", openmp.OURS["OMP_WAIT_POLICY"])
    openmp.settle()
    assert str(openmp.waiting()) == "the user's: OMP_WAIT_POLICY=passive"
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_variable_set_to_nothing_is_not_set(new_process, monkeypatch) -> None:
    """The runtime takes it for a mistake, and spins."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    openmp.settle()
    assert {name: os.environ.get(name) for name in openmp.OURS} == openmp.OURS


def test_several_of_gnu_s_runtimes_are_crowded_once(new_process, monkeypatch) -> None:
    monkeypatch.setattr(openmp, "loaded_runtimes", lambda: ["/a/libgomp.so.1", "/b/libgomp.so.1"])
    openmp.settle()
    calls = []
    openmp.settle_late(lambda: not calls.append("crowd"))
    assert calls == ["crowd"] and openmp.waiting().policy == "passive"


def preloadable() -> str:
    """The runtime's file by its real name, as a preloaded one is listed."""
    from lora_engine.openmp import loaded_runtimes

    backends.extension.loaded()
    return next((path for path in loaded_runtimes() if "libgomp" in path), "")


@LINUX
@TWO_CORES
def test_a_preloaded_runtime_under_its_full_name(tmp_path) -> None:
    """It has read its variables before Python began."""
    runtime = preloadable()
    if not runtime:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    full = tmp_path / "libgomp.so.1.0.0"
    full.write_bytes(Path(runtime).read_bytes())
    code = (
        "import lora_engine, torch; from lora_engine import openmp\n"
        "before = str(openmp.waiting())\n"
        "from lora_engine.backends import extension; extension.loaded()\n"
        f"{PROCESSOR_TIME_ASLEEP}\nprint(before)"
    )
    said = run_python(code, OMP_NUM_THREADS="2", LD_PRELOAD=str(full)).splitlines()
    assert float(said[0]) < 1.5e-3
    assert said[1:] == [
        "passive: the OpenMP runtime was loaded before lora_engine",
        "active: an OpenMP runtime was loaded before lora_engine",
    ]


@LINUX
@TWO_CORES
@pytest.mark.parametrize(
    ("imports", "variables", "sleeps", "waiting"),
    [
        ("import lora_engine, torch", {}, True, "brief: set by lora_engine"),
        (
            "import torch; from lora_engine import backends; backends.native()",
            {},
            True,
            "passive: the OpenMP runtime was loaded before lora_engine",
        ),
        (
            "import lora_engine, torch",
            {"OMP_WAIT_POLICY": "active"},
            False,
            "the user's: OMP_WAIT_POLICY=active",
        ),
    ],
    ids=["engine first", "torch first", "user's"],
)
def test_threads_do_as_the_doctor_says(imports, variables, sleeps, waiting) -> None:
    code = f"{imports}\n{PROCESSOR_TIME_ASLEEP}"
    seconds, said = run_python(code, OMP_NUM_THREADS="2", **variables).splitlines()
    assert (float(seconds) < 1.5e-3) is sleeps  # libgomp spins for 3 ms by itself, here for ever
    assert said == waiting


def test_no_doing_of_ours_is_no_claim_of_ours(new_process, monkeypatch) -> None:
    monkeypatch.setattr(openmp, "loaded_runtimes", lambda: ["/lib/libgomp.so.1"])
    openmp.settle()
    assert openmp.waiting().policy == "active"
    openmp.settle_late(lambda: False)
    [fact] = [fact for fact in doctor._torch_facts() if fact.name == "OpenMP waits"]
    assert fact.status == "absent"
    assert fact.value == "active: an OpenMP runtime was loaded before lora_engine"
    assert "OMP_WAIT_POLICY=passive" in fact.hint


def test_another_runtime_without_the_call_is_no_success(new_process, monkeypatch) -> None:
    monkeypatch.setattr(openmp, "loaded_runtimes", lambda: ["/nowhere/libiomp5.so"])
    openmp.settle()
    openmp.settle_late(lambda: True)
    assert openmp.waiting().policy == "active"


@LINUX
def test_runtimes_are_found_by_their_files(monkeypatch, tmp_path) -> None:
    maps = tmp_path / "maps"
    row = "7f0000000000-7f0000001000 r--p 00000000 08:01 42        "
    ours = ["/a b/libiomp5.so", "/a/libgomp-9f.so.1.0.0", "/a/libgomp.so.1", "/b/libgomp.so.1.0.0"]
    paths = [*ours, ours[2], "/a/libgomp.so.1.py", "/a/libgomp-plugin-nvptx.so.1"]
    maps.write_text("".join(f"{row}{path}\n" for path in paths) + "7ff0-7ff1 rw-p 0 00:00 0\n")
    monkeypatch.setattr(openmp, "MAPS", str(maps))
    assert openmp.loaded_runtimes() == ours
    monkeypatch.setattr(openmp, "MAPS", str(tmp_path / "none"))
    assert openmp.loaded_runtimes() == []
