"""Runs keep each other out of a folder, in other processes and in this one."""

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest
from broken_machine import file_size_limit

from lora_engine.errors import UserError
from lora_engine.training.run import lock
from lora_engine.training.run.lock import locked

NAME = ".lock"
HOLD = (
    "import sys, pathlib; from lora_engine.training.run.lock import locked\n"
    "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """Another process in tmp_path / "run"."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run" / NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_process_that_is_there_is_named(tmp_path, holder):
    (tmp_path / "link").symlink_to("run")
    for name in ("run", "link"):
        message = rf"{name}: process {holder.pid} on \S+ is running in it"
        with pytest.raises(UserError, match=message), locked(tmp_path / name / NAME):
            pytest.fail("two are in")
    assert (tmp_path / "run" / NAME).exists()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists()
    with locked(tmp_path / "run" / NAME):
        pass


def test_a_thread_keeps_others_out_but_may_enter_again(tmp_path):
    errors = []

    def enter():
        try:
            with locked(tmp_path / NAME):
                pass
        except UserError as error:
            errors.append(str(error))

    with locked(tmp_path / NAME), locked(tmp_path / NAME):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert ["another thread of this process is running in it" in error for error in errors] == [
        True
    ]
    enter()
    assert len(errors) == 1


def test_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "a" / "b" / NAME):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b" / NAME):
        (tmp_path / "a" / "mine").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_full_disk_leaves_no_lock(tmp_path):
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with (
            file_size_limit(0),
            pytest.raises(OSError, match=NAME) as caught,
            locked(folder / NAME),
        ):
            pytest.fail("is in without a name")
        assert caught.value.errno == errno.EFBIG
        assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_just_given_up_is_not_taken_for_one(tmp_path, monkeypatch):
    """Between opening the file and locking it the one who had it may have removed it."""
    real, calls = lock._lock, []

    def after_removal(descriptor, folder):
        calls.append(descriptor)
        if len(calls) == 1:
            (folder / NAME).unlink()
        return real(descriptor, folder)

    monkeypatch.setattr(lock, "_lock", after_removal)
    with locked(tmp_path / NAME):
        assert len(calls) == 2
        assert (tmp_path / NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with locked(tmp_path / NAME):
        pass
    assert caplog.messages == [
        f"{tmp_path}: cannot be locked (No locks available): see to it that no second run is "
        "started in it"
    ]


def test_a_link_in_the_locks_place_is_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("text")
    (tmp_path / NAME).symlink_to("mine")
    with pytest.raises(OSError, match=NAME), locked(tmp_path / NAME):
        pass
    assert (tmp_path / "mine").read_text() == "text"


def test_a_file_where_the_folder_belongs(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(OSError, match=str(path)), locked(path / NAME):
            pass
