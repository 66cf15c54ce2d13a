"""Which files of a folder are a run's."""

import pytest

from lora_engine.errors import UserError
from lora_engine.training.run.manifest import Manifest

NAME = "manifest.json"
FOREIGN = "was not written by this run: move it away, or choose another output_dir"


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    return tmp_path / "adapter"


def manifest(adapter):
    return Manifest(adapter.parent / NAME, adapter)


def test_files_that_were_there_before_are_not_the_runs(adapter):
    (adapter.parent / "config.yaml").write_text("mine")
    manifest(adapter).check_files(["metrics.jsonl"])
    with pytest.raises(UserError, match=f"config.yaml: {FOREIGN}"):
        manifest(adapter).check_files(["metrics.jsonl", "config.yaml"])


def test_files_that_the_run_wrote_are(adapter):
    manifest(adapter).add_files(["metrics.jsonl"])
    manifest(adapter).add_files(["config.yaml"])
    for name in ("metrics.jsonl", "config.yaml"):
        (adapter.parent / name).touch()
    manifest(adapter).check_files(["metrics.jsonl", "config.yaml"])
    assert manifest(adapter).exists


def test_a_link_is_never_the_runs(adapter):
    manifest(adapter).add_files(["metrics.jsonl"])
    (adapter.parent / "metrics.jsonl").symlink_to("gone")
    with pytest.raises(UserError, match=f"metrics.jsonl: {FOREIGN}"):
        manifest(adapter).check_files(["metrics.jsonl"])


def write_adapter(adapter):
    writer = manifest(adapter)
    writer.adapter_begins()
    (adapter / "twice").mkdir()
    (adapter / "twice" / "weights").touch()
    (adapter / "README.md").touch()
    return writer


@pytest.mark.parametrize("name", ["mine", "twice/mine"])
def test_the_adapters_folder_holds_what_the_run_wrote_and_nothing_else(adapter, name):
    write_adapter(adapter).adapter_ends()
    manifest(adapter).check_adapter()
    (adapter / name).touch()
    for check in (manifest(adapter).check_adapter, manifest(adapter).adapter_begins):
        with pytest.raises(UserError, match=f"{name}: {FOREIGN}"):
            check()


def test_an_adapter_that_was_being_written_when_the_run_was_killed_is_the_runs(adapter):
    write_adapter(adapter)
    manifest(adapter).check_adapter()


def test_somebodys_adapter_is_not_the_runs(adapter):
    (adapter / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=f"adapter_model.safetensors: {FOREIGN}"):
        manifest(adapter).check_adapter()


@pytest.mark.parametrize("make", ["link", "file"])
def test_a_link_or_file_in_the_adapters_place_is_not_the_runs(tmp_path, make):
    adapter = tmp_path / "adapter"
    adapter.symlink_to(tmp_path) if make == "link" else adapter.touch()
    with pytest.raises(UserError, match=f"adapter: {FOREIGN}"):
        manifest(adapter).check_adapter()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[1]",
        '{"files": 3}',
        '{"files": [], "adapter": 7}',
        "[" * 100_000,
        "\udcff",
    ],
    ids=["empty", "cut", "null", "list", "number", "adapter", "deep", "no UTF-8"],
)
def test_a_damaged_manifest_names_nothing(adapter, content):
    (adapter.parent / NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    (adapter.parent / "metrics.jsonl").touch()
    (adapter / "file").touch()
    with pytest.raises(UserError, match=f"metrics.jsonl: {FOREIGN}"):
        manifest(adapter).check_files(["metrics.jsonl"])
    with pytest.raises(UserError, match=f"file: {FOREIGN}"):
        manifest(adapter).check_adapter()
