"""A result's folder is the old one or the new one at every moment, and never another's files."""

import errno
import json
import signal
from pathlib import Path

import pytest
from broken_machine import file_size_limit, in_a_child, killed_at

from lora_engine.errors import UserError
from lora_engine.export.folder import check_space, result_folder, write_report

REPORT = "report.json"
BIG = 20_000


def write_result(target, text, overwrite=False):
    with result_folder(target, REPORT, overwrite=overwrite) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_text(text * BIG)
        write_report(folder, REPORT, {"text": text})


def content(target):
    """What a reader of the folder sees: the one text that all of its files agree on."""
    text = json.loads((target / REPORT).read_text())["text"]
    assert (target / "inner" / "weights").read_text() == text * BIG
    assert {p.name for p in target.iterdir()} == {"inner", REPORT}
    return text


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    target = tmp_path / "result"
    seen = []
    for event in range(1, 200):
        write_result(target, "old", overwrite=True)
        status = killed_at(event, lambda: write_result(target, "new", overwrite=True))
        seen.append(content(target))
        if status == 0:
            break
        assert status == signal.SIGKILL
    assert seen[0] == "old" and seen[-1] == "new" and len(seen) > 20
    assert sorted(seen, reverse=True) == seen  # old up to a moment, and new from then on
    write_result(target, "last", overwrite=True)  # removes what the killed ones left
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_disk_that_is_full_leaves_the_old(tmp_path):
    target = tmp_path / "result"
    write_result(target, "old")

    def work():
        with file_size_limit(BIG), pytest.raises(OSError) as caught:
            write_result(target, "new", overwrite=True)
        assert caught.value.errno == errno.EFBIG and caught.value.filename == str(target)

    assert in_a_child(work) == 0
    assert content(target) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_an_error_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(ZeroDivisionError), result_folder(tmp_path / "r", REPORT, overwrite=False):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_other_people_s_files_are_not_replaced(tmp_path):
    target = tmp_path / "result"
    write_result(target, "old")
    with pytest.raises(UserError, match=r"is not empty; give another folder, or --overwrite"):
        write_result(target, "new")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt: was not written by this command"):
        write_result(target, "new", overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / REPORT).write_text("[]")
    with pytest.raises(UserError, match="was not written by this command"):
        write_result(other, "new", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: is a file, --to must be a folder"):
        write_result(tmp_path / "file", "new", overwrite=True)


def test_a_link_in_a_result_is_somebody_s(tmp_path):
    """Of a link to a folder no file is found below it."""
    target = tmp_path / "result"
    write_result(target, "old")
    (target / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"link: was not written by this command"):
        write_result(target, "new", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"other: is not empty"):
        write_result(tmp_path / "other", "new")


def test_what_a_result_is_made_from_is_not_replaced(tmp_path):
    adapter, model = tmp_path / "adapter", tmp_path / "model"
    for source in (adapter, model):
        write_result(source, "old")
    (model / "config.json").touch()
    (tmp_path / "link").symlink_to(adapter)
    sources = [tmp_path / "link", model]
    for place in (adapter, tmp_path / "x" / ".." / "adapter", adapter / "more" / "inner", model):
        with (
            pytest.raises(UserError, match=r"is what is read; give a folder outside of it"),
            result_folder(place, REPORT, overwrite=True, sources=sources),
        ):
            pass
    assert content(adapter) == "old"
    # A model's folder may have folders in it.
    with result_folder(model / "gguf", REPORT, overwrite=False, sources=sources):
        pass
    assert (model / "gguf").is_dir()


def test_the_working_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "inner" / "most").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "inner" / "most")
    for place in (".", "..", "../../inner", "/"):
        with pytest.raises(UserError, match=r"is the working folder, or holds it"):
            write_result(place, "new")
    write_result("../result", "new")
    assert content(tmp_path / "inner" / "result") == "new"


def test_names_that_are_no_utf_8_are_known_again(tmp_path):
    for text in ("old", "new"):
        with result_folder(tmp_path / "r", REPORT, overwrite=True) as folder:
            (folder / "caf\udce9").touch()
            write_report(folder, REPORT, {"text": text, "data": "caf\udce9.jsonl"})
    report = json.loads((tmp_path / "r" / REPORT).read_text())
    assert report == {"text": "new", "data": "caf\udce9.jsonl", "files": ["caf\udce9", REPORT]}


def test_a_folder_of_many_files_is_refused_at_its_first(tmp_path, monkeypatch):
    """A slip such as --to / would take long to walk through."""
    (tmp_path / "result").mkdir()
    for name in "abc":
        (tmp_path / "result" / name).touch()
    seen = []
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: seen.append(self.name) or is_dir(self))
    with pytest.raises(UserError, match="is not empty"):
        write_result(tmp_path / "result", "new")
    assert len({"a", "b", "c"}.intersection(seen)) == 1


def test_where_a_disk_is_mounted_no_folder_can_be_put():
    with pytest.raises(UserError, match=r"/proc: is where a disk is mounted; give a folder in it"):
        write_result("/proc", "new")


def test_one_writer_at_a_time(tmp_path):
    with result_folder(tmp_path / "result", REPORT, overwrite=False):

        def work():
            with pytest.raises(UserError, match="is running in it"):
                from lora_engine.training.run import lock

                lock._holders.clear()  # which the fork has copied
                write_result(tmp_path / "result", "new")

        assert in_a_child(work) == 0


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match=r"not: the disk has .* free and 9e\+03 TB are to be"):
        check_space(tmp_path / "not" / "there", 9 * 10**15)
