"""`lora-engine serve`: what it serves under which names, what it refuses, and how it ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from running_server import running
from tiny_model import save_tiny_model
from tries import Try, check, tries

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")


def names(server) -> list[str]:
    return [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]]


@pytest.mark.parametrize(
    ("model", "adapters", "expected"),
    [
        ("run", (), ["run", "tiny"]),
        ("run/adapter", (), ["run", "tiny"]),
        ("tiny", (), ["tiny"]),
        ("tiny", ("mine=run", "tiny=run"), ["mine", "tiny", "base"]),
        ("run", ("again=run/adapter",), ["run", "again", "tiny"]),
    ],
    ids=["run", "adapter", "model", "the base's name taken", "a run and one more"],
)
def test_names(finished, model, adapters, expected):
    with running(Path(model), *adapters) as server:
        assert names(server) == expected
        for name in expected:
            body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
            assert server.post("/v1/chat/completions", body)[0] == 200


def two_adapters(folder: Path) -> None:
    shutil.copytree(folder / "run" / "adapter", folder / "both" / "a")
    shutil.copytree(folder / "run" / "adapter", folder / "both" / "b")


def other_base(folder: Path) -> None:
    save_tiny_model(folder / "other", seed=1)


TAKEN = socket.socket()
TAKEN.bind(("127.0.0.1", 0))
TAKEN.listen()
PORT = str(TAKEN.getsockname()[1])
FREE = ("--port", "0")

MISTAKES = [
    Try("no model", ["serve", "nothing/here", *FREE], ["nothing/here"]),
    Try("a port that is taken", ["serve", "tiny", "--port", PORT], [f"--port {PORT}", "in use"]),
    Try("no port", ["serve", "tiny", "--port", "70000"], ["--port", "65535"]),
    Try("an adapter without a name", ["serve", "tiny", *FREE, "--adapter", "run"],
        ["--adapter run", "NAME=FOLDER"]),
    Try("an adapter that is not there", ["serve", "tiny", *FREE, "--adapter", "x=gone"], ["gone"]),
    Try("a model as adapter", ["serve", "tiny", *FREE, "--adapter", "x=tiny"], ["a whole model"]),
    Try("two in one folder", ["serve", "tiny", *FREE, "--adapter", "x=both"], ["several adapters"],
        prepare=two_adapters),
    Try("one name twice", ["serve", "run", *FREE, "--adapter", "run=run"],
        ["two adapters are called run"]),
    Try("another base", ["serve", "other", *FREE, "--adapter", "x=run"],
        ["is not the base of the adapter"], prepare=other_base),
    Try("no tokens", ["serve", "tiny", *FREE, "--max-new-tokens", "0"], ["--max-new-tokens"]),
    Try("nobody may wait", ["serve", "tiny", *FREE, "--waiting", "0"], ["waiting"]),
]  # fmt: skip


@tries(MISTAKES)
def test_mistakes(finished, capfd, entry):
    check(capfd, finished, entry)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_once_what_is_written_is_whole(finished, number):
    process = subprocess.Popen(
        [Path(sys.executable).with_name("lora-engine"), "serve", "run", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("run, tiny at http://127.0.0.1:"), line
        body = {"model": "run", "prompt": "x", "max_tokens": 400, "stream": True}
        asked = urllib.request.Request(
            line.split()[-1] + "/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            first = answer.readline()
            process.send_signal(number)
            assert first.startswith(b"data:") and answer.read().endswith(b"data: [DONE]\n\n")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
    finally:
        process.kill()
        process.wait()
