"""Models that cannot be trained: folders, files and devices."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tries import Try, check, check_line, tries

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def with_config(**changes):
    def prepare(folder: Path) -> None:
        path = folder / "tiny/config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return prepare


def with_weights(change):
    """The model's tensors as `change` makes them out of what they are."""

    def prepare(folder: Path) -> None:
        path = folder / "tiny/model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return prepare


def written(name: str, content: bytes):
    return lambda folder: (folder / "tiny" / name).write_bytes(content)


def without(*names: str):
    def prepare(folder: Path) -> None:
        for name in names:
            (folder / "tiny" / name).unlink()

    return prepare


def cut(name: str, size: int):
    """The file without its last `size` bytes."""

    def prepare(folder: Path) -> None:
        path = folder / "tiny" / name
        path.write_bytes(path.read_bytes()[:-size])

    return prepare


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "tiny/model.safetensors")
    torch.save(tensors, folder / "tiny/pytorch_model.bin")
    (folder / "tiny/model.safetensors").unlink()


def index_without_files(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "tiny/model.safetensors"), "model-1.safetensors")
    (folder / "tiny/model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "tiny/model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / "tiny/model.safetensors").unlink()
    (folder / "tiny/model.safetensors.index.json").write_text("{")


def renamed(tensors):
    return {name.replace("q_proj", "query"): value for name, value in tensors.items()}


def longer(tensors):
    """One layer more than config.json says."""
    more = {k.replace("layers.0", "layers.7"): v.clone() for k, v in tensors.items()}
    return {**tensors, **more}


def header(size: int, text: bytes) -> bytes:
    return struct.pack("<Q", size) + text


def gguf(version: int, tensors: int, entries: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def model(name: str, prepare, *words: str) -> Try:
    """Something is wrong in the folder tiny."""
    return Try(name, ["train", "run.yaml"], ["tiny", *words], prepare=prepare)


def weights(name: str, content: bytes, *words: str) -> Try:
    return model(name, written("model.safetensors", content), *words)


def path(name: str, given: str, *words: str, files=(), status: int = 2) -> Try:
    arguments = ["train", "run.yaml", f"model.path={given}"]
    return Try(name, arguments, words, dict(files), status=status)


def gguf_file(name: str, content: bytes, *words: str) -> Try:
    return path(name, "a.gguf", "a.gguf", *words, files=[("a.gguf", content)])


MODELS = [
    model("another shape", with_config(intermediate_size=40), "another shape", "mlp.down_proj"),
    model("one shape", with_weights(lambda t: {**t, Q_PROJ: torch.ones(3, 3)}), Q_PROJ, "[3, 3]"),
    model("more layers wanted", with_config(num_hidden_layers=5), "lack", "layers."),
    model("fewer layers wanted", with_weights(longer), "no place", "layers.7."),
    model("other names", with_weights(renamed), "lack", "q_proj"),
    model("no tensors", with_weights(lambda t: {}), "lack"),
    model("one tensor", with_weights(lambda t: {Q_PROJ: t[Q_PROJ]}), "lack"),
    weights("cut weights", b"", "cannot be loaded"),
    model("truncated weights", cut("model.safetensors", 1000), "cannot be loaded"),
    weights("random weights", b"x" * 500, "cannot be loaded"),
    weights("header of 2^60 bytes", header(2**60, b"{}"), "cannot be loaded"),
    weights("header no JSON", header(8, b"{{{{{{{{"), "cannot be loaded"),
    weights("header nested", header(80_000, b'{"a":' * 16_000), "cannot be loaded"),
    model("no weights", without("model.safetensors"), "has no weights"),
    model("pickled weights", pickled, "pickled", "convert them to safetensors"),
    model("index of missing files", index_without_files, "model-1.safetensors"),
    model("broken index", broken_index, "cannot be loaded"),
    model("no config", without("config.json"), "config.json"),
    model("empty config", written("config.json", b""), "config.json", "JSON"),
    model("config no JSON", written("config.json", b"{oops"), "config.json:1", "JSON"),
    model("config a list", written("config.json", b"[]"), "config.json", "object"),
    model("config nested", written("config.json", b"[" * 100_000), "config.json", "nested"),
    model("config nested objects", written("config.json", b'{"a":' * 50_000), "nested"),
    model("config giant", written("config.json", b" " * 11_000_000), "config.json", "larger"),
    model("config not UTF-8", written("config.json", b"\xff\xfe{}"), "config.json", "UTF-8"),
    model("config giant integer", written("config.json", b"9" * 5000), "config.json", "number"),
    model("unknown model", with_config(model_type="martian"), "martian"),
    model("no model type", written("config.json", b"{}"), "cannot be"),
    model("model type a list", with_config(model_type=["llama"]), "cannot be"),
    model("giant layer count", with_config(num_hidden_layers=10**9), "num_hidden_layers"),
    model("giant size", with_config(hidden_size=10**15), "hidden_size"),
    model("size a text", with_config(hidden_size="big"), "hidden_size"),
    model("negative size", with_config(hidden_size=-64), "cannot be loaded"),
    model("no heads", with_config(num_attention_heads=0), "cannot be loaded"),
    model("heads of no whole size", with_config(num_attention_heads=3), "tiny"),
    model("unknown activation", with_config(hidden_act="wobble"), "wobble"),
    model("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    model("broken tokenizer", written("tokenizer.json", b"{"), "tokenizer"),
    model("tokenizer a list", written("tokenizer.json", b"[]"), "tokenizer"),
    model("tokenizer settings", written("tokenizer_config.json", b"[1"), "tokenizer"),
    path("no folder", "./gone", "./gone", "no such model folder"),
    path("near folder", "./tinny", "./tinny", "did you mean tiny"),
    path("below a file", "./rows.jsonl/a", "./rows.jsonl/a", "no such model"),
    path("text file", "rows.jsonl", "rows.jsonl", "give its folder"),
    path("adapter", "a", "a", "adapter", files=[("a/adapter_config.json", b"{}")]),
    path("empty folder", "a", "a", "config.json", files=[("a/b", b"")]),
    path("no hub", "nobody/nothing", "nobody/nothing", "hub"),
    path("no hub id", "a b c", "a b c"),
    path("near short name", "smolm2", "smolm2", "did you mean smollm2"),
    path("blank", "' '", "model.path", "is empty"),
    path("long", "./" + "x" * 300, "xxx", "too long", status=1),
    gguf_file("no GGUF", b"nothing", "does not start with 'GGUF'"),
    gguf_file("empty GGUF", b"", "does not start with 'GGUF'"),
    gguf_file("short GGUF", b"GGUF\x03", "5 bytes"),
    gguf_file("GGUF of another version", gguf(99, 0, 0), "version 99"),
    gguf_file("GGUF of 2^60 tensors", gguf(3, 2**60, 0), "more than its size"),
    gguf_file("GGUF of 2^60 entries", gguf(3, 0, 2**60), "more than its size"),
    gguf_file("GGUF without entries", gguf(3, 0, 0, b"\0" * 64), "GGUF"),
    gguf_file("GGUF with a giant key", gguf(3, 0, 1, b"\xff" * 64), "GGUF"),
    gguf_file("GGUF cut in an entry", gguf(3, 0, 2, b"\x03" + b"\0" * 40), "GGUF"),
]

DEVICES = [
    "meta",
    "cuda:99",
    "cuda:-1",
    "gpu",
    "cpu:x",
    "''",
    "mps",
    "xla:3",
    "CPU",
    "privateuseone",
]


@tries(MODELS)
def test_models(capfd, run_folder, entry):
    check(capfd, run_folder, entry)


@pytest.mark.parametrize("device", DEVICES)
def test_devices(capfd, run_folder, device):
    arguments = ["train", "run.yaml", f"model.device={device}"]
    check(capfd, run_folder, Try(device, arguments, ["device", device.strip("'")]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_that_is_not_here(capfd, run_folder):
    arguments = ["train", "run.yaml", "model.device=cuda"]
    check(capfd, run_folder, Try("cuda", arguments, ["'cuda'", "0 GPU(s)", "use auto"]))


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf16", "torch.float32", "64"])
def test_dtypes(capfd, run_folder, dtype):
    arguments = ["train", "run.yaml", f"model.dtype={dtype}"]
    check(capfd, run_folder, Try(dtype, arguments, ["model.dtype", dtype, "expected"]))


def test_no_report_of_a_library_comes_before_the_line(run_folder):
    with_config(intermediate_size=40)(run_folder)
    command = [sys.executable, "-c", "from lora_engine.app.cli import main; main()"]
    done = subprocess.run([*command, "train", "run.yaml"], capture_output=True, text=True)
    check_line(Try("", [], ["another shape"]), done.returncode, done.stdout, done.stderr)
