"""What a run does to its folder, and what is left when the system refuses to write."""

import ast
import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
from training_helpers import (
    assert_same_bits,
    make_trainer,
    saved_steps,
    tiny_lora,
    trainable,
)

import lora_engine
from lora_engine.errors import UserError
from lora_engine.files import write_text
from lora_engine.training import trainer
from lora_engine.training.run import checkpoint
from lora_engine.training.run.folder import RunFolder


def files_of(folder):
    """Names and contents; links as what they point to."""
    return {
        path.relative_to(folder): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def theirs(name):
    def make(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")

    return pytest.param(make, id=name)


def link_as_adapter(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "adapter_model.safetensors").write_text("mine")
    (folder / "adapter").symlink_to("elsewhere")


@pytest.mark.parametrize("resume", [False, True], ids=["overwrite", "resume"])
@pytest.mark.parametrize(
    "make",
    [
        theirs("metrics.jsonl"),
        theirs("adapter/adapter_model.safetensors"),
        theirs("checkpoints/step-00000005/model.safetensors"),
        theirs("checkpoints"),
        pytest.param(link_as_adapter, id="link"),
    ],
)
def test_a_folder_with_files_that_no_run_wrote_is_left_as_it_is(tmp_path, make, resume):
    make(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(UserError, match=r"move it away|begin the run again"):
        make_trainer(tmp_path, overwrite=True).fit(resume=resume)
    assert files_of(tmp_path) == before


def test_overwriting_a_run_leaves_everything_else(tmp_path):
    make_trainer(tmp_path).fit()
    mine = ["notes.txt", ".tmp-mine/a", "checkpoints/best/a", "config.yaml", "adapter-old/a"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = {Path(name): b"mine" for name in mine}
    make_trainer(tmp_path, max_steps=2, overwrite=True).fit()
    after = files_of(tmp_path)
    assert before.items() <= after.items()
    assert saved_steps(tmp_path)[-1] == 2


def test_checkpoints_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    make_trainer(tmp_path / "run").fit()
    make_trainer(tmp_path / "run", max_steps=2, overwrite=True).fit()
    assert saved_steps(tmp_path / "run")[-1] == 2
    assert (tmp_path / "disk" / "step-00000002").is_dir()


def test_a_run_keeps_others_out(tmp_path):
    with RunFolder(tmp_path / "free").locked():
        assert make_trainer(tmp_path / "free").fit().stopped == "finished"
    seen = []

    class Look:
        def on_step(self, metrics):
            seen.append(RunFolder(tmp_path / "run").lock_file.read_text())

    make_trainer(tmp_path / "run", callbacks=[Look()]).fit()
    assert set(seen) == {f"process {os.getpid()} on {os.uname().nodename}"}
    assert not RunFolder(tmp_path / "run").lock_file.exists()


def resumed_equals_uninterrupted(folder, **config):
    model, expected = tiny_lora(), tiny_lora()
    result = make_trainer(folder, model, **config).fit(resume=True)
    make_trainer(folder.with_name("straight"), expected, **config).fit()
    assert_same_bits(trainable(model), trainable(expected))
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    return result


def refusing(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=os.strerror)
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch, number):
    folder, write = tmp_path / "run", checkpoint.save_file

    def until_step_4(tensors, path):
        refusing(number)() if "step-00000004" in str(path) else write(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", until_step_4)
        with pytest.raises(OSError, match="checkpoints/step-00000004") as caught:
            make_trainer(folder, save_every=2).fit()
    assert caught.value.errno == number
    assert saved_steps(folder)[-1] == 2
    assert not list(folder.rglob(".tmp*"))
    resumed_equals_uninterrupted(folder, save_every=2)


def test_a_full_disk_at_the_end_does_not_lose_the_training(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "export_model", refusing(errno.ENOSPC))
        with pytest.raises(OSError, match=r"No space left on device: '.*/run/adapter'"):
            make_trainer(folder).fit()
    assert saved_steps(folder)[-1] == 6
    assert resumed_equals_uninterrupted(folder).steps == 6


@pytest.fixture
def file_limit():
    """Sets the size in bytes that no file may exceed, as `ulimit -f` does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [10, 1_500, 6_000, 12_000])
def test_a_limit_on_the_size_of_files_is_an_error_that_names_the_file(tmp_path, file_limit, size):
    """In metrics.jsonl, in the manifest, in tensors, in state.json, wherever it comes first."""
    folder = tmp_path / "run"

    class Limit:
        def on_step(self, metrics):
            if metrics.step == 3:
                file_limit(size)

    with pytest.raises(OSError, match=f"File too large: '{folder}/") as caught:
        try:
            make_trainer(folder, callbacks=[Limit()], save_every=2).fit()
        finally:
            file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert caught.value.errno == errno.EFBIG
    assert saved_steps(folder)[-1] == 2
    resumed_equals_uninterrupted(folder, save_every=2)


def test_a_folder_that_is_removed_during_the_run(tmp_path):
    class Remove:
        def on_step(self, metrics):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(
        OSError, match=r"the folder is gone, it was removed during the run: '.*run'"
    ):
        make_trainer(tmp_path / "run", callbacks=[Remove()], save_every=1).fit()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [("file", "is a file, output_dir must"), ("file/run", "Not a directory"),
     ("loop/run", "levels of symbolic"), ("x" * 300, "File name too long")],
    ids=["file", "in a file", "loop", "too long"],
)  # fmt: skip
def test_a_folder_that_cannot_be(tmp_path, path, message):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((UserError, OSError), match=message) as caught:
        make_trainer(tmp_path / path).fit()
    assert path in str(caught.value)
    assert "None" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


@pytest.mark.parametrize("name", [RunFolder(Path()).manifest.name, "metrics.jsonl"])
def test_what_a_killed_process_left_of_a_file_goes(tmp_path, monkeypatch, name):
    def killed(*paths, **options):
        raise SystemExit

    monkeypatch.setattr("os.replace", killed)
    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(SystemExit):
        write_text(tmp_path / name, "half")
    monkeypatch.undo()
    assert [path.name[: -len("12345678")] for path in tmp_path.iterdir()] == [f".tmp-{name}-"]
    make_trainer(tmp_path).fit()
    assert not list(tmp_path.glob(".tmp-*"))


def test_no_other_module_names_a_file_of_the_folder():
    run = RunFolder(Path())
    names = {path.name for path in vars(run).values() if isinstance(path, Path)} - {""}
    names.add(run.checkpoints.folder.name)
    assert names > {"metrics.jsonl", "summary.json", "config.yaml", "adapter", "checkpoints"}
    assert names > {".lora-engine.json", ".lora-engine.lock"}
    package = Path(lora_engine.__file__).parent
    owner = package / "training/run/folder.py"
    named = []
    for source in package.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            # "adapter" has other meanings, but not behind a slash.
            joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            text = getattr(node.right if joined else node, "value", None)
            if text in names and (joined or "." in text) and source != owner:
                named.append(f"{source.relative_to(package)}:{node.lineno}: {text}")
    assert named == []
