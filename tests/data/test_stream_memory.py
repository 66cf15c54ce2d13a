"""A file of 2 GB is streamed in memory that does not grow with it."""

import json
import subprocess
import sys

import pytest

SIZE, MOST = 2_000_000_000, 600_000_000

WORKER = """
import resource, sys, time
from pathlib import Path
from small_tokenizers import make_byte_level
from lora_engine.data.recipe import Recipe
from lora_engine.data.stream import ExampleStream, Place, StreamPart
from lora_engine.data.tracks import Reached, Track

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

path = Path(sys.argv[1])
tokenizer = make_byte_level()
before, started = peak(), time.monotonic()
stream = ExampleStream("data", [StreamPart((path,), Recipe())], tokenizer)
examples = len(stream.buffer(stream.begin).dataset)
first = time.monotonic() - started
track, reached, places = Track((path,), 0, 0), Reached(), []
while reached.passes == 0:  # every byte is read
    _, reached = track.take(reached, 20_000, 1 << 30)
    places.append(reached)
track.close()
for deep in (places[len(places) // 2], places[-3]):  # the last whole buffers
    buffer = stream.buffer(Place(9, (deep,)))
    examples += len(buffer.dataset)
    assert buffer.after.tracks[0].taken > deep.taken
print(peak() - before, first, examples, reached.taken)
"""


@pytest.mark.slow
def test_a_large_file_is_streamed_in_little_memory(tmp_path):
    rows = [
        {"prompt": f"What is {i}? ", "completion": "words of all kinds " * 40} for i in range(1500)
    ]
    block = "".join(json.dumps(row) + "\n" for row in rows).encode()
    times = SIZE // len(block) + 1
    with (tmp_path / "large.jsonl").open("wb") as file:
        for _ in range(times):
            file.write(block)
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path / "large.jsonl")],
        env={"PYTHONPATH": "tests/support:.", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0 and not worker.stderr, worker.stderr
    memory, first, examples, taken = map(float, worker.stdout.split())
    assert memory < MOST, f"{memory / 1e6:.0f} MB"
    assert first < 60  # until the first buffer can be trained on
    assert examples == 3 * 2048 and taken >= times * 1500
