"""A vLLM server as its OpenAI-compatible HTTP interface shows it.

/v1/models, /v1/load_lora_adapter and /v1/unload_lora_adapter (a server with
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora has these two), and /v1/completions with
`return_token_ids`; see docs.vllm.ai, "OpenAI-Compatible Server" and "LoRA Adapters".
"""

import http.client
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_engine.errors import UserError, reason
from lora_engine.generation.engine import Finish, Request

_AT_ONCE = 64  # requests
_SECONDS_BETWEEN_CHECKS = 0.2
_SEEDS = 2**62  # vLLM adds a continuation's number to its request's seed, and takes int64


@dataclass(frozen=True)
class Choice:
    """A continuation. token_ids: the one that ended it included. logprobs: as the server's
    --logprobs-mode has them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


class VllmServer:
    """url: as in http://127.0.0.1:8000. timeout: seconds that an answer may take.

    What it answers is checked; whatever is wrong is a UserError of one line. VLLM_API_KEY is sent
    where it is set.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"rollout.server: {url!r} is no address; give http://HOST:PORT")
        self.url, self.timeout = url.rstrip("/"), timeout
        secure = parts.scheme == "https"
        self._connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/")

    def models(self) -> list[dict[str, Any]]:
        """What it serves: `id`, and of a base `max_model_len`."""
        found = self._json("GET", "/v1/models").get("data")
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._strange("/v1/models", found)
        return found

    def load(self, name: str, folder: Path) -> None:
        """Has it read an adapter's folder, which has to be at the same place there."""
        body = {"lora_name": name, "lora_path": str(folder)}
        status, text = self._ask("POST", "/v1/load_lora_adapter", body)
        if status == 404 and "detail" in text:  # there is no such path, or else no such folder
            raise UserError(
                f"{self.url}: takes no adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        self._check(status, text, f"does not take the adapter in {folder}")

    def unload(self, name: str) -> None:
        status, text = self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        self._check(status, text, f"does not give the adapter {name} up")

    def complete(
        self,
        model: str,
        requests: Sequence[Request],
        stop_tokens: Sequence[int],
        check: Callable[[], None],
    ) -> list[list[Choice]]:
        """The continuations of each request, in order, written side by side.

        check: called while they are being written; what it raises ends them.
        """
        bodies = [_body(model, one, stop_tokens) for one in requests]
        calls = _Calls(self, bodies)
        try:
            answers = calls.answers(check)
        finally:
            calls.close()
        return [
            self._choices(answer, request)
            for answer, request in zip(answers, requests, strict=True)
        ]

    def _choices(self, answer: dict[str, Any], request: Request) -> list[Choice]:
        found: dict[int, Choice] = {}
        try:
            for choice in answer["choices"]:
                ids, asked = choice.get("token_ids"), choice.get("prompt_token_ids")
                if ids is None or asked is None:
                    raise UserError(f"{self.url}: tells no token ids; vLLM does from 0.10.2 on")
                if tuple(asked) != request.prompt_ids:
                    raise UserError(
                        f"{self.url}: read other tokens than it was given, {list(asked)[:8]} in "
                        f"place of {list(request.prompt_ids)[:8]}; it has to serve the base of the "
                        "run"
                    )
                logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
                finish, most = choice["finish_reason"], request.sampling.max_new_tokens
                fits = len(logprobs) == len(ids) and 1 <= len(ids) <= most
                if not fits or finish not in ("stop", "length"):
                    raise self._strange("/v1/completions", choice)
                token_ids = tuple(int(token) for token in ids)
                found[int(choice["index"])] = Choice(token_ids, logprobs, finish)
            return [found[number] for number in range(request.count)]
        except (KeyError, TypeError, ValueError) as error:
            raise self._strange("/v1/completions", answer) from error

    def _json(self, method: str, path: str) -> dict[str, Any]:
        status, text = self._ask(method, path)
        self._check(status, text, f"refuses {path}")
        return self.parsed(path, text)

    def parsed(self, path: str, text: str) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._strange(path, text)
        return answer

    def _ask(self, method: str, path: str, body: object = None) -> tuple[int, str]:
        connection = self.connection()
        try:
            return self.send(connection, method, path, body)
        finally:
            connection.close()

    def connection(self) -> http.client.HTTPConnection:
        return self._connection(self._host, self._port, timeout=self.timeout)

    def send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: object = None
    ) -> tuple[int, str]:
        """Status and text of the answer. UserError where none comes."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except TimeoutError as error:
            raise UserError(
                f"{self.url}: no answer to {path} within {self.timeout:g} s; see the server, or "
                "raise rollout.server_timeout"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"{self.url}: no vLLM server answers ({reason(error)}); start one with: vllm serve "
                "BASE --enable-lora, or set rollout.server"
            ) from error

    def _check(self, status: int, text: str, what: str) -> None:
        if status != 200:
            raise UserError(f"{self.url}: {what}: {_message(text) or f'status {status}'}")

    def check_completion(self, status: int, text: str) -> None:
        self._check(status, text, "refuses to write")

    def _strange(self, path: str, answer: object) -> UserError:
        told = " ".join(str(answer).split())
        return UserError(f"{self.url}: answers {path} as no vLLM server does: {told:.200}")


def _body(model: str, request: Request, stop_tokens: Sequence[int]) -> dict[str, object]:
    sampling = request.sampling
    return {
        "model": model,
        "prompt": list(request.prompt_ids),
        "n": request.count,
        "max_tokens": sampling.max_new_tokens,
        "seed": sampling.seed % _SEEDS,
        "stop": list(sampling.stop),
        # None but these, whatever the model's own files say.
        "stop_token_ids": list(stop_tokens),
        "ignore_eos": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # of the tokens that are drawn alone
        "return_token_ids": True,
    }


def _message(text: str) -> str:
    """What a server says is wrong: {"error": {"message": …}}, {"message": …}, or a text."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        told = text
    if isinstance(told, dict):
        inner = told.get("error", told)
        told = inner.get("message", inner) if isinstance(inner, dict) else inner
    return f"{' '.join(str(told).split()):.300}"


class _Calls:
    """Completions that are asked for side by side, each over a connection of its own.

    The threads are daemons: an answer that nobody waits for any more holds nothing up.
    """

    def __init__(self, server: VllmServer, bodies: Sequence[dict[str, object]]) -> None:
        self._server = server
        self._count = len(bodies)
        self._todo: queue.SimpleQueue[tuple[int, dict[str, object]]] = queue.SimpleQueue()
        for numbered in enumerate(bodies):
            self._todo.put(numbered)
        self._done: queue.SimpleQueue[tuple[int, dict[str, Any] | UserError]]
        self._done = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._connections: set[http.client.HTTPConnection] = set()
        for _ in range(min(_AT_ONCE, self._count)):
            threading.Thread(target=self._work, name="vllm-rollout", daemon=True).start()

    def answers(self, check: Callable[[], None]) -> list[dict[str, Any]]:
        """In the order of the bodies. UserError for the first that fails."""
        found: dict[int, dict[str, Any]] = {}
        while len(found) < self._count:
            check()
            try:
                number, answer = self._done.get(timeout=_SECONDS_BETWEEN_CHECKS)
            except queue.Empty:
                continue
            if isinstance(answer, UserError):
                raise answer
            found[number] = answer
        return [found[number] for number in range(self._count)]

    def close(self) -> None:
        """Hangs up, which ends what the server still writes."""
        with self._lock:
            self._closed = True
            for connection in self._connections:
                if connection.sock is not None:
                    with suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def _work(self) -> None:
        while True:
            try:
                number, body = self._todo.get_nowait()
            except queue.Empty:
                return
            connection = self._server.connection()
            with self._lock:
                if self._closed:
                    return
                self._connections.add(connection)
            try:
                status, text = self._server.send(connection, "POST", "/v1/completions", body)
                self._server.check_completion(status, text)
                self._done.put((number, self._server.parsed("/v1/completions", text)))
            except UserError as error:
                self._done.put((number, error))
            finally:
                with self._lock:
                    self._connections.discard(connection)
                connection.close()
