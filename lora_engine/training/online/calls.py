"""Calls of functions of somebody's own, async ones too, for as long as they may take."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, wait


class TookTooLong(Exception):
    """A call did not end in time."""


def called(
    function: Callable[..., object], arguments: Mapping[str, object], timeout: float | None
) -> object:
    """The function's answer; whatever it raises, SystemExit too, is raised here.

    All coroutines run in one event loop, so that a connection which one of them opens serves those
    that follow. timeout: in seconds. A call that takes longer raises TookTooLong; a coroutine is
    cancelled then, and another function is left behind in a thread of its own.
    """
    if timeout is not None:
        timeout = min(timeout, threading.TIMEOUT_MAX)
    if timeout is None or inspect.iscoroutinefunction(function):
        answer = function(**arguments)
    else:
        answer = _in_time(_in_thread(function, arguments), timeout)
    return _awaited(answer, timeout) if inspect.isawaitable(answer) else answer


def _in_time(future: "Future[object]", timeout: float | None) -> object:
    if not wait([future], timeout).done:
        raise TookTooLong
    return future.result()


def _in_thread(
    function: Callable[..., object], arguments: Mapping[str, object]
) -> "Future[object]":
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(function(**arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


class _Loop:
    """The event loop of all coroutines, in a thread that ends with the process."""

    current: asyncio.AbstractEventLoop | None = None

    @classmethod
    def running(cls) -> asyncio.AbstractEventLoop:
        if cls.current is None:
            cls.current = asyncio.new_event_loop()
            threading.Thread(target=cls.current.run_forever, daemon=True).start()
        return cls.current


def _awaited(answer: Awaitable[object], timeout: float | None) -> object:
    future: Future[object] = Future()
    task = asyncio.run_coroutine_threadsafe(_handed(answer, future), _Loop.running())
    try:
        return _in_time(future, timeout)
    except TookTooLong:
        task.cancel()
        _Loop.current = None  # what does not await may hold it up
        raise


async def _handed(answer: Awaitable[object], future: "Future[object]") -> None:
    """Hands the result on. What leaves a task, such as SystemExit, would end the loop."""
    try:
        future.set_result(await answer)
    except BaseException as error:
        future.set_exception(error)
