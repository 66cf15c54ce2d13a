"""The web application: routes, what a request may be, and answers as they are written."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lora_engine.errors import reason
from lora_engine.generation.engine import Written
from lora_engine.generation.prompt import Read
from lora_engine.serving.errors import ApiError
from lora_engine.serving.models import Served
from lora_engine.serving.replies import Piece, Pieces, Reply
from lora_engine.serving.requests import Asked, Limits, read_chat, read_completion, read_json
from lora_engine.serving.worker import Job, Worker

Result = TypeVar("Result")
Endpoint = Callable[[Request], Coroutine[None, None, Response]]

_LOG = logging.getLogger(__name__)
# A page of the web whose name is made to lead here has its own name in `Host`.
_HOSTS = ("127.0.0.1", "localhost", "[::1]")


def make_app(models: Sequence[Served], worker: Worker, limits: Limits) -> ASGIApp:
    """The application over a worker that it starts, and closes at its end."""
    server = _Server(models, worker, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, worker.close)
            server.readers.shutdown()

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _refusal(ApiError(error.status_code, f"{request.scope['path']}: {error.detail}"))

    routes = [
        Route("/health", _guarded(server.health)),
        Route("/v1/models", _guarded(server.models)),
        Route("/v1/models/{name:path}", _guarded(server.model)),
        Route("/v1/chat/completions", _guarded(server.chat), methods=["POST"]),
        Route("/v1/completions", _guarded(server.completions), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: refused})
    app.router.redirect_slashes = False
    return app


def _guarded(endpoint: Endpoint) -> Endpoint:
    """The endpoint, with what it raises as an answer."""

    async def answered(request: Request) -> Response:
        try:
            _check_host(request)
            return await endpoint(request)
        except ApiError as error:
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        except Exception as error:
            _LOG.error("a request failed: %s: %s", type(error).__name__, reason(error))
            return _refusal(ApiError(500, "the server failed; its standard error says more"))

    return answered


def _check_host(request: Request) -> None:
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name not in _HOSTS:
        raise ApiError(403, f"Host {name!r}: this server is for {', '.join(_HOSTS)}")


def _refusal(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)


class _Server:
    def __init__(self, models: Sequence[Served], worker: Worker, limits: Limits) -> None:
        self.served = {one.name: one for one in models}
        self.worker, self.limits = worker, limits
        self.readers = ThreadPoolExecutor(1, "lora-engine-prompts")
        self.since = int(time.time())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [self._about(one) for one in self.served.values()]}
        )

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._about(self._named(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat(await self._body(request), self.limits))

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion(await self._body(request), self.limits))

    def _about(self, served: Served) -> dict[str, object]:
        about = {"id": served.name, "object": "model", "created": self.since}
        return {**about, "owned_by": "lora_engine", "max_model_len": served.positions}

    def _named(self, name: str) -> Served:
        if name not in self.served:
            there = ", ".join(self.served)
            raise ApiError(
                404, f"model {name!r}: there is {there}", param="model", code="model_not_found"
            )
        return self.served[name]

    async def _body(self, request: Request) -> dict[str, object]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page elsewhere may send without being asked
            raise ApiError(415, f"Content-Type {kind!r}: expected application/json")
        try:
            read = _read(request, self.limits.body_bytes)
            return read_json(await asyncio.wait_for(read, self.limits.body_seconds))
        except asyncio.TimeoutError as error:
            raise ApiError(408, "the request did not arrive in time") from error

    async def _answer(self, request: Request, asked: Asked) -> Response:
        served = self._named(asked.model)
        self.worker.check_room()
        loop = asyncio.get_running_loop()
        requests = await loop.run_in_executor(self.readers, served.requests, asked, self.limits)
        pieces = Pieces(served, asked, requests)
        inbox = _Inbox(loop, pieces)
        told, writes = asked.logprobs is not None, not asked.only_read
        job = Job(served, requests, inbox, echo=asked.echo, logprobs=told, writes=writes)
        reply = Reply(asked, requests)
        self.worker.submit(job)
        if asked.stream:
            return _EventStream(_events(reply, inbox), lambda: self.worker.cancel(job))
        try:
            await _while_connected(request.receive, _gathered(reply, inbox))
        finally:
            self.worker.cancel(job)
        return JSONResponse(reply.whole())


class _Inbox:
    """What the worker tells of a job, in the event loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pieces: Pieces) -> None:
        self._loop, self._pieces = loop, pieces
        self._queue: asyncio.Queue[Piece | ApiError | None] = asyncio.Queue()

    def read(self, place: int, prompt: Sequence[Read]) -> None:
        for piece in self._pieces.prompt(place, prompt):
            self._put(piece)

    def written(self, place: int, event: Written) -> None:
        self._put(self._pieces.piece(place, event))

    def ended(self, error: ApiError | None) -> None:
        self._put(error)

    def _put(self, item: Piece | ApiError | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises the ApiError that the job ended with."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item


async def _read(request: Request, most: int) -> bytes:
    too_long = ApiError(413, f"the body has more than the {most:,} bytes that it may have")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_long
    return bytes(body)


async def _gathered(reply: Reply, inbox: _Inbox) -> None:
    async for piece in inbox.pieces():
        reply.add(piece)


async def _events(reply: Reply, inbox: _Inbox) -> AsyncIterator[bytes]:
    for chunk in reply.opening():
        yield _event(chunk)
    try:
        async for piece in inbox.pieces():
            for chunk in reply.chunks(piece):
                yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
        return
    for chunk in reply.closing():
        yield _event(chunk)
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, object]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


class _EventStream(Response):
    """Server-sent events as they come. release: called at the end, however it comes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], release: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientDisconnect):
                await _while_connected(receive, self._sent(send))
        finally:
            self._release()

    async def _sent(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[None, None, Result]) -> Result:
    """The work's result. Raises ClientDisconnect where the client goes first."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
