import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lora_engine.errors import UserError
from lora_engine.training.run import checkpoint
from lora_engine.training.run.checkpoint import CheckpointStore
from lora_engine.training.run.fingerprint import json_sha256


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (1, 5, 12):
        tensors = {
            "weights": {"w": torch.full((2, 3), float(step))},
            "random": {"r": torch.ones(2)},
        }
        store.save(step, tensors, {"note": step})
    return store


def test_round_trip(store):
    assert store.steps() == [1, 5, 12]
    assert store.latest() == 12
    assert store.state(5) == {"note": 5}
    assert store.tensors(5, "weights")["w"].tolist() == [[5.0] * 3] * 2
    assert {p.suffix for p in store.path(5).iterdir()} == {".safetensors", ".json"}


def _truncate(folder):
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _cut_json(folder):
    path = folder / "state.json"
    path.write_text(path.read_text()[:-5])


def _rename_to_temporary(folder):
    shutil.move(folder, folder.with_name(f".tmp-{folder.name}-123"))


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _cut_json,
        _rename_to_temporary,
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "state.json").write_text("[]"),
    ],
    ids=["truncated", "cut json", "temporary", "file missing", "no state", "other json"],
)
def test_half_written_is_ignored(store, damage):
    damage(store.path(12))
    assert store.latest() == 5
    assert store.steps() == [1, 5]
    store.save(12, {"weights": {"w": torch.ones(1)}}, {"note": "again"})
    assert store.state(12) == {"note": "again"}


def test_step_moved_by_hand_is_not_taken_for_another(store):
    shutil.move(store.path(12), store.path(99))
    assert store.latest() == 5


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.safetensors", "random.safetensors", "state.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(store, name, caplog):
    path = store.path(12) / name
    flip(path, path.stat().st_size // 2)
    assert store.newest_sound() == 5
    [message] = caplog.messages
    assert str(path) in message
    assert message.endswith("; continuing from step 5 instead")


def test_no_flipped_bit_of_the_state_goes_unnoticed(store):
    path = store.path(12) / "state.json"
    whole, state = path.read_bytes(), store.state(12)
    for position in range(0, len(whole), 3):
        flip(path, position)
        # A space turned into another is the one change that JSON does not see.
        assert store.newest_sound() == 5 or store.state(12) == state
        path.write_bytes(whole)
    assert store.newest_sound() == 12


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "9", '{"format": 2}', "[" * 100_000, '{"a": ' * 5000, "9" * 5000],
    ids=["empty", "cut", "list", "null", "number", "keys", "deep list", "deep object", "digits"],
)
def test_a_damaged_state_is_not_a_checkpoint(store, content):
    (store.path(12) / "state.json").write_text(content)
    assert store.latest() == 5
    assert store.newest_sound() == 5


def test_without_a_sound_checkpoint_there_is_one_line(store):
    for step in (1, 5, 12):
        flip(store.path(step) / "weights.safetensors", -1)
    with pytest.raises(UserError, match=r"step-00000012/weights.safetensors: is damaged.*no other"):
        store.newest_sound()


def test_damaged_newer_checkpoints_do_not_push_out_older_ones(store):
    flip(store.path(12) / "weights.safetensors", -1)
    store.save(6, {"weights": {"w": torch.ones(1)}}, {})
    store.prune(6, keep=1, also=())
    assert store.newest_sound() == 6


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
def test_only_what_a_run_wrote_is_deleted(store, make):
    make(store.path(5) / "mine")
    for delete in (store.check_removable, store.clear, lambda: store.prune(12, 1, ())):
        with pytest.raises(UserError, match=r"step-00000005/mine: was not made by a run"):
            delete()
    with pytest.raises(UserError, match=r"step-00000005/mine: was not made by a run"):
        store.save(5, {}, {})
    assert (store.path(5) / "mine").exists()


def test_a_link_among_the_checkpoints_is_left_alone(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weights.safetensors").touch()
    store.path(7).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="step-00000007: was not made by a run"):
        store.clear()
    assert (tmp_path / "elsewhere" / "weights.safetensors").exists()


def test_what_cannot_be_written_names_the_checkpoint(store, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: no space (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"No space left on device.*step-00000013") as caught:
        store.save(13, {"weights": {}}, {})
    assert caught.value.errno == errno.ENOSPC
    assert store.steps() == [1, 5, 12]
    assert not list(store.folder.glob(".*"))


def test_damaged_content_of_the_right_size_is_a_clear_error(store):
    path = store.path(12) / "weights.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"weights.safetensors: cannot be read.*delete"):
        store.tensors(12, "weights")


def test_prune_keeps_the_newest_and_the_best(store):
    store.save(20, {}, {})
    store.prune(20, keep=2, also=[1])
    assert store.steps() == [1, 12, 20]
    assert sorted(p.name for p in store.folder.iterdir()) == [
        store.path(step).name for step in (1, 12, 20)
    ]


def test_unknown_format(store):
    content = {"format": 99, "step": 12, "files": {}, "state": {}}
    sealed = {**content, "sha256": json_sha256(content)}
    (store.path(12) / "state.json").write_text(json.dumps(sealed))
    with pytest.raises(UserError, match="checkpoint format 99, this version reads 2: continue"):
        store.newest_sound()


def test_checkpoints_of_the_first_format_had_no_checksums(store):
    content = {"format": 1, "step": 12, "files": {"weights.safetensors": 7}, "state": {}}
    (store.path(12) / "state.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="checkpoint format 1, this version reads 2: continue"):
        store.newest_sound()


def test_clear(store):
    (store.folder / ".tmp-step-00000013-7").mkdir()
    (store.folder / "step-00000077").mkdir()
    store.clear()
    assert list(store.folder.iterdir()) == []
    assert store.latest() is None


def test_empty_store(tmp_path):
    store = CheckpointStore(tmp_path / "nothing")
    assert store.steps() == []
    assert store.latest() is None
