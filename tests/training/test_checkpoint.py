import json
import shutil

import pytest
import torch

from lora_engine.errors import UserError
from lora_engine.training.checkpoint import CheckpointStore


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


def test_damaged_content_of_the_right_size_is_a_clear_error(store):
    path = store.path(12) / "weights.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match=r"weights.safetensors: cannot be read.*delete"):
        store.tensors(12, "weights")


def test_prune_keeps_the_newest_and_the_best(store):
    store.save(20, {}, {})
    store.prune(keep=2, also=[1])
    assert store.steps() == [1, 12, 20]
    assert sorted(p.name for p in store.folder.iterdir()) == [
        store.path(step).name for step in (1, 12, 20)
    ]


def test_unknown_format(store):
    path = store.path(12) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="checkpoint format 99"):
        store.state(12)


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
