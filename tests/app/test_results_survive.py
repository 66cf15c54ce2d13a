"""A merge or an export that is killed, or whose disk fills up, leaves the old result or the new."""

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from broken_machine import file_size_limit, killed_at
from small_ggufs import byte_level, save_model
from tries import FAILED, run, snapshot

from lora_engine.app.deploy import merge
from lora_engine.app.export import export
from lora_engine.export.verify import load_plain
from lora_engine.testing import with_lora

# What makes a result in a folder, and what makes another one in its place.
RESULTS = {
    "merge": (partial(merge, dtype="float32"), partial(merge, dtype="bfloat16")),
    "hf": (
        partial(export, format="hf", dtype="float32"),
        partial(export, format="hf", dtype="float16"),
    ),
    "gguf": (
        partial(export, format="gguf", kind="f32"),
        partial(export, format="gguf", kind="f16"),
    ),
    "adapter": (partial(export, format="peft"), partial(export, format="vllm")),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapter/, to be copied."""
    place = tmp_path_factory.mktemp("survive")
    save_model(place / "base", byte_level("qwen2"))
    with_lora(load_plain(place / "base"), r=16).save_pretrained(place / "adapter")
    return place


@pytest.fixture
def place(folder: Path, material: Path) -> Path:
    """The working folder is a copy of `material`."""
    shutil.copytree(material, folder, dirs_exist_ok=True)
    return folder


SLOW = ("hf", "adapter")  # the same steps as the others


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in RESULTS]
)
def test_a_kill_leaves_the_old_or_the_new(place: Path, name: str) -> None:
    torch.set_num_threads(1)  # a process that is forked has no others
    made = {"base": "base", "verify": False, "overwrite": True}
    make_old, make_new = (partial(make, "adapter", "made", **made) for make in RESULTS[name])
    make_new()
    new = snapshot(place / "made")
    make_old()
    old = snapshot(place / "made")
    assert old != new
    seen: list[str] = []
    event = status = 1
    while status != 0:
        status = killed_at(event, make_new)
        left = snapshot(place / "made")
        assert status in (0, signal.SIGKILL)
        seen.append("old" if left == old else "new" if left == new else f"half at {event}")
        if left != old:
            make_old()
        event += len(seen)  # events are many at first, where files are read
    assert set(seen) == {"old", "new"} and seen[-1] == "new" and len(seen) > 8
    names = {path.name for path in place.iterdir()}
    assert not [left for left in names if left.startswith((".tmp", ".old"))]


CALLS = {
    "merge": ("merge",),
    "hf": ("export", "--format", "hf"),
    "gguf": ("export", "--format", "gguf", "--type", "f32"),
    "gguf-lora": ("export", "--format", "gguf-lora"),
    "adapter": ("export", "--format", "peft"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_disk_that_fills_up_is_one_line(place: Path, capsys, name, size) -> None:
    """0: nothing can be written; 1000: not the small files; 20000: not the weights."""
    before = snapshot(place)
    with file_size_limit(size):
        status, _, err = run(
            capsys, *CALLS[name], "adapter", "--base", "base", "--to", "made", "--no-verify"
        )
    assert status == FAILED, err
    assert err.startswith("lora-engine: ") and err.count("\n") == 1 and "made" in err
    assert "size limit; raise it with ulimit -f" in err
    after = snapshot(place)
    assert {path: after.get(path) for path in before} == before
    assert not (place / "made").exists()
    assert not [path for path in after if Path(path).name.startswith((".tmp", ".old", ".lora"))]
