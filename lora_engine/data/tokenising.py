"""A source's outcomes: worked out here, by several processes, or read from the cache."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from lora_engine.data.chunks import Chunk
from lora_engine.data.recipe import Recipe, Result, Tokenising
from lora_engine.data.store import OutcomeStore, joined, store_of
from lora_engine.data.template import Tokenizer

# From this size on, several processes take less time than they need to start.
PARALLEL_BYTES = 4 << 20
# Told of progress: bytes done of the source, and records.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tokenised:
    """Outcomes of a source, and (origin, what is wrong) of its malformed records."""

    store: OutcomeStore
    problems: list[tuple[str, str]]


def tokenise(
    chunks: Iterator[Chunk],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> Tokenised:
    """What becomes of all chunks, in their order. processes: 1 works in this one."""
    stores, problems = [], []
    done = records = 0
    for result in results(chunks, recipe, tokenizer, processes):
        stores.append(result.store)
        problems += result.problems
        done, records = done + result.size, records + len(result.store)
        if progress is not None:
            progress(done, records)
    return Tokenised(joined(stores) if stores else store_of(()), problems)


def results(
    chunks: Iterator[Chunk], recipe: Recipe, tokenizer: Tokenizer, processes: int
) -> Iterator[Result]:
    """The result of each chunk, in their order; few chunks are held at a time."""
    if processes <= 1:
        here = Tokenising(recipe, tokenizer)
        yield from map(here.run, chunks)
        return
    with pool_of(processes, [recipe], tokenizer) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(work, chunk))
                if len(pending) >= 2 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise MemoryError(
                "a process that tokenises was ended, which the system does where memory runs out; "
                "set data.processes: 1, or data.stream: true"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def usable_processes() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pool_of(processes: int, recipes: Sequence[Recipe], tokenizer: Tokenizer) -> ProcessPoolExecutor:
    """Processes that do `work` by any of the recipes."""
    return ProcessPoolExecutor(processes, _context(), _begin, (recipes, tokenizer))


_workers: list[Tokenising] = []


def _begin(recipes: Sequence[Recipe], tokenizer: Tokenizer) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _workers[:] = [Tokenising(recipe, tokenizer) for recipe in recipes]


def work(chunk: Chunk, recipe: int = 0) -> Result:
    """What becomes of a chunk, in a process of a pool. recipe: its number."""
    return _workers[recipe].run(chunk)


def _context() -> multiprocessing.context.BaseContext:
    """Processes begin as copies on Linux, which takes no time; elsewhere they import anew."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
