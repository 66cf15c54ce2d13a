"""What the machine refuses: disks, memory, paths, interruptions; and bugs of our own."""

import errno
import os
from pathlib import Path

import pytest
import torch
from broken_machine import file_size_limit
from safetensors import SafetensorError
from tries import FAILED, INTERRUPTED, MISTAKE, Try, check, run, snapshot, tries

from lora_engine.app import commands
from lora_engine.app.failures import describe
from lora_engine.errors import UnavailableError

ALLOCATOR = "DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000000 bytes."
GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 10 GiB"

REFUSALS = [
    (OSError(errno.ENOSPC, "", "run/a"), "run/a: the disk is full; free some space"),
    (OSError(errno.ENOSPC, ""), "run: the disk is full; free some space"),
    (OSError(errno.EDQUOT, "", "run/a"), "run/a: the disk quota is used up; free some space"),
    (OSError(errno.EFBIG, "", "run/a"), "run/a: the file would exceed the size limit; raise"),
    (OSError(errno.EROFS, "", "run"), "run: the file system is read-only; take another folder"),
    (OSError(errno.EIO, "", "run"), "run: the disk failed to read or write; check it"),
    (OSError(errno.EMFILE, "", "run"), "run: too many open files; raise the limit"),
    (OSError(errno.ESTALE, "", "run"), "run: stale file handle; see what holds it"),
    (PermissionError(errno.EACCES, "", "run"), "run: permission denied; change its permissions"),
    (NotADirectoryError(errno.ENOTDIR, "", "a/b"), "a/b: a file stands where a folder belongs; "),
    (IsADirectoryError(errno.EISDIR, "", "a"), "a: a folder stands where a file belongs; move it"),
    (FileExistsError(errno.EEXIST, "", "a"), "a: is in the way; move it"),
    (FileNotFoundError(errno.ENOENT, "", b"a"), "a: no such file or folder; check the path"),
    (OSError(errno.ELOOP, "", "a"), "a: a loop of symbolic links; remove the link"),
    (OSError(errno.ENAMETOOLONG, "", "a"), "a: the path is too long; take a shorter one"),
    (OSError(errno.EACCES, "", "a\nb\x1b[2J"), r"a\nb\x1b[2J: permission denied; "),
    (SafetensorError("No space left on device (os error 28)"), "run: the disk is full; free some"),
    (ValueError("embedded null byte"), "a path holds a NUL character, which no file's name can; "),
    (MemoryError(), "not enough memory; lower train.tokens_per_batch"),
    (MemoryError("Unable to allocate 7.28 TiB"), "not enough memory (7.28 TiB were asked for); "),
    (RuntimeError(ALLOCATOR), "not enough memory (8 TB were asked for); lower train"),
    (RuntimeError("std::bad_alloc"), "not enough memory; lower train.tokens_per_batch"),
    (torch.OutOfMemoryError(GPU), "not enough memory (20.00 GiB were asked for); lower train"),
    (RuntimeError("CUDA error: unspecified launch failure"), "the GPU failed: CUDA error: unsp"),
    (UnavailableError("cuda: not here"), "cuda: not here"),
    (RecursionError("maximum recursion depth"), "what was given is nested too deeply to be read; "),
]

BUGS = [ZeroDivisionError("by zero"), AssertionError(), KeyError("a"), RuntimeError("odd\nvery")]


@pytest.fixture
def failing(monkeypatch, run_folder):
    """Makes the run end with an error of one's choice, after its first steps."""

    def fail_with(error: BaseException) -> None:
        def finetune(*arguments, **options):
            raise error

        monkeypatch.setattr("lora_engine.app.finetune.finetune", finetune)

    return fail_with


@pytest.mark.parametrize(("error", "line"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_is_one_line(capfd, failing, run_folder, error, line):
    failing(error)
    err = check(capfd, run_folder, Try("", ["train", "run.yaml"], [], status=FAILED))
    assert err.startswith(f"lora-engine: {line}")
    assert err.endswith("; there is no checkpoint yet, start again with the same command\n")


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_is_one_line_that_says_so(capfd, failing, run_folder, error):
    failing(error)
    status, out, err = run(capfd, "train", "run.yaml")
    assert (status, out, err.count("\n")) == (FAILED, "", 1)
    assert f"unexpected {type(error).__name__} at " in err
    assert "this is a bug of lora_engine: run again with --debug and report what it prints" in err


def test_debug_shows_where_it_happened(capfd, failing, run_folder):
    failing(ZeroDivisionError("by zero"))
    status, _, err = run(capfd, "train", "--debug", "run.yaml")
    assert status == FAILED
    assert err.startswith("Traceback")
    assert "\nZeroDivisionError: by zero\n" in err


def test_a_failed_run_says_how_to_go_on(capfd, failing, run_folder, monkeypatch):
    failing(OSError(errno.ENOSPC, "", "run/metrics.jsonl"))
    monkeypatch.setattr("lora_engine.app.finetune.RunFolder.is_used", lambda folder: True)
    _, _, err = run(capfd, "train", "run.yaml")
    assert err.endswith("; continue with: lora-engine train run/config.yaml --resume\n")


@pytest.mark.parametrize(
    "place", ["lora_engine.app.config.load_config", "lora_engine.app.commands._train"]
)
def test_ctrl_c_at_any_time(capfd, run_folder, monkeypatch, place):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    assert run(capfd, "train", "run.yaml") == (INTERRUPTED, "", "lora-engine: interrupted\n")


def test_ctrl_c_while_arguments_are_read(capfd, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "app", interrupted)
    assert run(capfd, "--help") == (INTERRUPTED, "", "lora-engine: interrupted\n")


def test_every_exception_has_a_line():
    for error in (Exception(), OSError(), OSError("no number"), BaseException("x"), SystemError()):
        assert describe(error).status == FAILED
        assert describe(error).line.strip()


def file_at(name: str):
    return lambda folder: (folder / name).write_text("mine")


def folder_at(name: str):
    return lambda folder: (folder / name / "mine").mkdir(parents=True)


def loop_at(name: str):
    return lambda folder: (folder / name).symlink_to(folder / name)


def at(name: str, place: str, *words: str, prepare=lambda folder: None, status=FAILED) -> Try:
    """A run whose output_dir is `place`."""
    arguments = ["train", "run.yaml", f"train.output_dir={place}"]
    return Try(name, arguments, words, prepare=prepare, status=status)


def inside(name: str, prepare, status=FAILED) -> Try:
    """Something stands in the run's folder under the name of one of its files."""
    words = [name.partition(" ")[0]]
    return Try(name, ["train", "run.yaml"], words, prepare=prepare, status=status)


PLACES = [
    at("a file", "rows.jsonl", "rows.jsonl", "folder", status=MISTAKE),
    at("below a file", "rows.jsonl/a", "rows.jsonl", "folder"),
    at("a device", "/dev/null", "/dev/null", "folder", status=MISTAKE),
    at("below a device", "/dev/full/a", "/dev/full", "folder"),
    at("a loop", "loop/a", "loop", "symbolic links", prepare=loop_at("loop")),
    at("a long name", "x" * 300, "xxx", "too long"),
    at("a long path", "/".join(["x" * 200] * 30), "xxx", "too long"),
    at("a kernel's folder", "/proc/nothing", "/proc/nothing"),
    at("a read-only kernel's folder", "/sys/nothing", "/sys/nothing"),
]


@tries(PLACES)
def test_places_that_cannot_hold_a_run(capfd, run_folder, entry):
    check(capfd, run_folder, entry)


@pytest.mark.parametrize("size", [0, 100, 1500, 4000, 20_000])
def test_a_disk_that_fills_up(capsys, run_folder, size):
    """0: not even an empty summary; 100 and 1500: the configuration or the metrics; 4000 and
    20000: some file of a checkpoint."""
    before = snapshot(run_folder)
    with file_size_limit(size):
        status, _, err = run(capsys, "train", "run.yaml")
    assert status == FAILED
    assert err.startswith("lora-engine: ")
    assert err.count("\n") == 1
    assert "size limit; raise it with ulimit -f" in err
    assert "run" in err
    after = snapshot(run_folder)
    assert {path: after.get(path) for path in before} == before
    left = [path.name for path in Path("run").rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith((".tmp", ".summary", ".config"))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(capfd, run_folder):
    (run_folder / "locked").mkdir(mode=0o500)
    check(capfd, run_folder, at("", "locked/run", "locked", "permission"))
