"""Many clients at once, clients that leave, a queue that is full, and what is left afterwards."""

import asyncio
import gc
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, request_bytes, running

from lora_engine.generation.engine import Generator, Written
from lora_engine.serving.requests import Limits
from lora_engine.serving.worker import Job

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 500, "seed": 1}


def asked(number: int) -> dict[str, object]:
    name = ("tiny", "one", "two")[number % 3]
    prompt = "x" * (1 + number % 7)
    return {"model": name, "prompt": prompt, "max_tokens": 5 + number % 5, "seed": number}


def text(answer: tuple[int, Any]) -> str:
    status, body = answer
    assert status == 200, body
    return body["choices"][0]["text"]


def begun(server: Running, body: dict[str, object], pieces: int = 1) -> socket.socket:
    """A connection that has seen so much of its stream."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(request_bytes("POST", COMPLETIONS, {**body, "stream": True}))
    seen = b""
    while seen.count(b"data:") < pieces:
        part = connection.recv(4096)
        assert part, seen
        seen += part
    return connection


def test_sixty_four_at_once_get_what_each_would_get_alone(server: Running) -> None:
    alone = [text(server.post(COMPLETIONS, asked(number))) for number in range(64)]
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda n: text(server.post(COMPLETIONS, asked(n))), range(64)))
    assert together == alone
    assert len(set(alone)) > 32
    server.wait_until_idle()


@pytest.fixture
def steps(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step of a model that takes as long for one as larger ones do.

    No token ends an answer: LONG takes 500 of them if nobody stops it.
    """
    for served in server.served:
        monkeypatch.setattr(served, "stop_tokens", ())
    made: list[int] = []
    step = Generator.step

    def counted(self: Generator) -> list[Written]:
        made.append(1)
        time.sleep(0.005)
        return step(self)

    monkeypatch.setattr(Generator, "step", counted)
    return made


def test_who_leaves_a_stream_stops_it(server: Running, steps: list[int]) -> None:
    begun(server, LONG).close()
    server.wait_until_idle()
    assert len(steps) < 400, "it was written to the end"


def test_who_leaves_before_the_answer_stops_it(server: Running, steps: list[int]) -> None:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(request_bytes("POST", COMPLETIONS, {**LONG, "n": 3}))
    while not steps:
        time.sleep(0.005)
    connection.close()
    server.wait_until_idle()
    assert len(steps) < 400


def test_who_leaves_takes_nothing_from_others(server: Running) -> None:
    stay = {"model": "tiny", "prompt": "stay", "max_tokens": 200, "seed": 2}
    alone = text(server.post(COMPLETIONS, stay))
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(server.post, COMPLETIONS, stay)
        for _ in range(5):
            begun(server, LONG, pieces=3).close()
        assert text(beside.result()) == alone
    server.wait_until_idle()


def test_many_for_one_model_do_not_keep_another_waiting(models: Path) -> None:
    """One that came second waits for a batch of those behind it, not for all of them."""
    held, ended = threading.Event(), []
    with running(models / "tiny", f"one={models / 'one'}", f"two={models / 'two'}") as server:
        step = server.worker._generator.step

        def slow() -> list[Written]:
            held.wait()
            return step()

        def ask(name: str) -> None:
            body = {"model": name, "prompt": "x", "max_tokens": 4, "seed": 1}
            assert text(server.post(COMPLETIONS, body)) is not None
            ended.append(name)

        server.worker._generator.step = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(64) as pool:
            for number, name in enumerate(["tiny", "one", "two", *["one"] * 60], start=1):
                pool.submit(ask, name)
                while server.worker.unbegun < number:
                    time.sleep(0.001)
            held.set()
        assert ended[0] == "tiny" and len(ended) == 63
        batch = server.worker._generator.max_batch
        assert ended.index("two") <= 1 + batch
        server.wait_until_idle()


def test_a_full_queue_refuses_and_goes_on(models: Path) -> None:
    held = threading.Event()
    with running(models / "tiny", limits=Limits(waiting=2)) as server:
        step = server.worker._generator.step

        def slow() -> list[Written]:
            held.wait()
            return step()

        server.worker._generator.step = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(server.post, COMPLETIONS, asked(3 * n)) for n in range(2)]
            while server.worker.unbegun < 2:
                time.sleep(0.005)
            threading.Timer(5, held.set).start()  # where a third one is let in, it ends
            raw = server.send(request_bytes("POST", COMPLETIONS, asked(0)))
            assert raw.startswith(b"HTTP/1.1 429") and b"retry-after: 1" in raw.lower()
            error = json.loads(raw.partition(b"\r\n\r\n")[2])["error"]
            assert error["code"] == "rate_limit_exceeded"
            held.set()
            assert all(text(one.result()) for one in waiting)
        assert text(server.post(COMPLETIONS, asked(0)))
        server.wait_until_idle()


def test_a_failure_is_told_to_those_it_hit_and_the_next_are_served(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(models / "tiny") as server:
        expected = text(server.post(COMPLETIONS, asked(0)))

        def broken() -> list[Written]:
            raise RuntimeError("a secret of the machine")

        server.worker._generator.step = broken  # type: ignore[method-assign]
        status, body = server.post(COMPLETIONS, asked(0))
        assert status == 500 and body["error"]["type"] == "server_error"
        assert "secret" not in body["error"]["message"] and "secret" in caplog.text
        assert text(server.post(COMPLETIONS, asked(0))) == expected
        server.worker._generator.step = broken  # type: ignore[method-assign]
        raw = server.send(request_bytes("POST", COMPLETIONS, {**asked(0), "stream": True}))
        assert b'data: {"error"' in raw and b"[DONE]" not in raw
        server.wait_until_idle()


def test_a_server_that_ends_finishes_what_it_writes(models: Path) -> None:
    with running(models / "tiny") as server:
        connection = begun(server, {**LONG, "max_tokens": 100})
        server.stop()
        rest = b""
        while part := connection.recv(65536):
            rest += part
        assert b"[DONE]" in rest
        server.thread.join(30)
        assert not server.thread.is_alive() and not server.worker._thread.is_alive()


def test_a_worker_that_is_closed_tells_those_who_wait(models: Path) -> None:
    with running(models / "tiny") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, COMPLETIONS, {**LONG, "n": 100})
        while server.is_idle():
            time.sleep(0.002)
        server.worker.close()
        status, body = answer.result()
        assert status == 503 and "shutting down" in body["error"]["message"]
        assert server.post(COMPLETIONS, LONG)[0] == 503


@pytest.mark.slow
def test_nothing_is_left_of_five_hundred_requests(server: Running) -> None:
    def once(number: int) -> None:
        body = {**asked(number), "max_tokens": 2}
        if number % 5 == 0:
            begun(server, {**body, "max_tokens": 50}).close()
        elif number % 5 == 1:
            assert server.post(COMPLETIONS, {**body, "top_p": 7})[0] == 400
        else:
            more = {"echo": True, "logprobs": 3} if number % 5 == 2 else {}
            assert text(server.post(COMPLETIONS, {**body, **more})) is not None

    def left() -> dict[str, int]:
        """What a request could leave behind, once all have ended."""
        server.wait_until_idle()
        until = time.monotonic() + 10
        while len(asyncio_tasks()) > tasks and time.monotonic() < until:
            time.sleep(0.01)
        gc.collect()
        return {
            "jobs": sum(isinstance(x, Job) for x in gc.get_objects()),
            "tasks": len(asyncio_tasks()),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "rows of the cache": server.worker._generator._decoder.cache.free.size,
        }

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    tasks = len(asyncio_tasks())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(once, range(100)))
        before, memory = left(), resident()
        list(pool.map(once, range(500)))
        after, grown = left(), resident() - memory
    assert before["jobs"] == 0 and before["tasks"] == tasks
    assert after.pop("rows of the cache") <= max(before.pop("rows of the cache"), 8 * 64)
    assert all(after[what] <= before[what] for what in before), (before, after)
    assert grown < 16e6, f"{grown / 500:.0f} bytes a request"


def asyncio_tasks() -> list[object]:
    """Of every event loop, those that are not done."""
    return [x for x in gc.get_objects() if isinstance(x, asyncio.Task) and not x.done()]
