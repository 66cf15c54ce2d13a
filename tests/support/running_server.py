"""A server in a thread of its own, on a port that is free."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.app.serve import HOST, make_server, open_models
from lora_engine.serving.http import make_app
from lora_engine.serving.models import Served
from lora_engine.serving.requests import Limits
from lora_engine.serving.worker import Worker


@dataclass
class Running:
    """stop: asks it to end, as a signal does."""

    port: int
    served: list[Served]
    worker: Worker
    thread: threading.Thread
    stop: Callable[[], None]

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def send(self, request: bytes) -> bytes:
        """All that comes back on a connection that sends `request`."""
        with socket.create_connection((HOST, self.port), timeout=30) as connection:
            with suppress(ConnectionError):
                connection.sendall(request)
            parts = []
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    parts.append(part)
        return b"".join(parts)

    def post(
        self, path: str, body: object, *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of the answer. body: bytes as they are, else what JSON spells."""
        return self.ask("POST", path, body, headers=headers)

    def ask(
        self, method: str, path: str, body: object = b"", *, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        answer = self.send(request_bytes(method, path, body, headers))
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), json.loads(content)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """Until nothing is written or waited for, and all rows of the cache are free."""
        until = time.monotonic() + seconds
        while not self.is_idle():
            assert time.monotonic() < until, "something is still being written"
            time.sleep(0.01)

    def is_idle(self) -> bool:
        free = self.worker._generator._decoder.cache.free
        busy = self.worker._active or self.worker._waiting or self.worker.unbegun
        return not busy and free.free in ([], [(0, free.size)])


def request_bytes(
    method: str, path: str, body: object, headers: dict[str, str] | None = None
) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {
        "Host": HOST,
        "Content-Type": "application/json",
        "Content-Length": str(len(content)),
        "Connection": "close",
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


@contextmanager
def running(model: Path, *adapters: str, limits: Limits | None = None) -> Iterator[Running]:
    """The models of `open_models`, served."""
    limits = limits or Limits()
    served, worker = open_models(
        str(model), adapters=adapters, limits=limits, dtype="float32", device="cpu"
    )
    server = make_server(make_app(served, worker, limits))
    listener = socket.socket()
    listener.bind((HOST, 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = True

    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield Running(port, served, worker, thread, stop)
    finally:
        stop()
        thread.join()
