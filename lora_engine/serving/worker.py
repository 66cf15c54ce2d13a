"""The one thread that writes for all who ask, many at a time."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import nn

from lora_engine.errors import UserError, reason
from lora_engine.evaluation.modes import inference
from lora_engine.generation.engine import Generator, Request, Written
from lora_engine.generation.prompt import Read, read_prompt
from lora_engine.serving.errors import ApiError
from lora_engine.serving.models import Served

_LOG = logging.getLogger(__name__)


class Listener(Protocol):
    """Who asked. Its methods are called in the worker's thread and must not wait."""

    def read(self, place: int, prompt: Sequence[Read]) -> None:
        """The tokens of the request's prompt, or none where they are not to be told."""

    def written(self, place: int, event: Written) -> None:
        """A token of the request at `place` of the job's."""

    def ended(self, error: ApiError | None) -> None:
        """Nothing more comes."""


@dataclass(eq=False)
class Job:
    """Requests that belong together.

    echo: whether their prompts are told first, `logprobs`: with those of their tokens. writes:
    whether anything comes after. open: their numbers at the generator, and their places.
    """

    served: Served
    requests: Sequence[Request]
    listener: Listener
    echo: bool = False
    logprobs: bool = False
    writes: bool = True
    open: dict[int, int] = field(default_factory=dict)
    left: int = 0
    begun: bool = False
    cancelled: bool = False


class Worker:
    """Writes for the jobs that are handed in, beside each other where they ask the same model.

    The models are one with its adapters exchanged, which has to stay as it is while texts are being
    written. So they take turns, the next one for the job that has waited longest. A turn begins
    with the jobs that wait for its model; of those that came after one for another model it takes
    only as many as fill a batch. Others join as long as no other model is waited for. So a job
    waits for those before it, and for about a batch of each other model.

    new_generator: over the model. waiting: the most jobs of which nothing is written yet.
    """

    def __init__(
        self, model: nn.Module, new_generator: Callable[[], Generator], *, waiting: int
    ) -> None:
        self.model, self.most_waiting = model, waiting
        self._new_generator = new_generator
        self._generator = new_generator()
        self._changed = threading.Condition()
        self._waiting: list[Job] = []  # this and the next two are guarded by the condition
        self._unbegun = 0
        self._closed = False
        self._active: list[Job] = []  # those that the generator has
        self._thread = threading.Thread(target=self._run, name="lora-engine-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends what is being written, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def unbegun(self) -> int:
        """Jobs of which nothing is written yet."""
        return self._unbegun

    def check_room(self) -> None:
        """Raises ApiError where a job would be refused."""
        with self._changed:
            self._refuse_if_full()

    def submit(self, job: Job) -> None:
        """Raises ApiError where too many wait, or nothing is written any more."""
        with self._changed:
            self._refuse_if_full()
            self._waiting.append(job)
            self._unbegun += 1
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nothing more of it is written. It may have ended already."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def _refuse_if_full(self) -> None:
        if self._closed:
            raise ApiError(503, "the server is shutting down")
        if self._unbegun >= self.most_waiting:
            raise ApiError(
                429, f"{self._unbegun} requests wait already; try again", code="rate_limit_exceeded"
            )

    def _run(self) -> None:
        with inference(self.model):
            while (served := self._next_model()) is not None:
                try:
                    with served.using():
                        self._turn(served)
                except Exception as error:
                    self._give_up(served, error)
        closing = ApiError(503, "the server is shutting down")
        for job in [*self._active, *self._taken(lambda job: True)]:
            self._end(job, closing)

    def _next_model(self) -> Served | None:
        """That of the job which has waited longest; None once the worker is closed."""
        with self._changed:
            while True:
                if self._closed:
                    return None
                self._drop_cancelled()
                if self._waiting:
                    return self._waiting[0].served
                self._changed.wait()

    def _turn(self, served: Served) -> None:
        """Writes for that model until nothing is left to be written."""
        self._admit(served)
        while self._active and not self._closed:
            for event in self._generator.step():
                self._tell(event)
            self._drop_cancelled()
            with self._changed:
                joins = all(job.served is served for job in self._waiting)
            if joins:
                self._admit(served)

    def _drop_cancelled(self) -> None:
        active = [job for job in self._active if job.cancelled]
        for job in [*active, *self._taken(lambda job: job.cancelled)]:
            self._end(job, None)

    def _taken(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Those of the waiting jobs, which wait no more."""
        with self._changed:
            found = [job for job in self._waiting if wanted(job)]
            self._waiting = [job for job in self._waiting if not wanted(job)]
        return found

    def _next_of(self, served: Served) -> list[Job]:
        """Those of the waiting jobs that are begun now, which wait no more."""
        with self._changed:
            found: list[Job] = []
            texts, overtakes = 0, False
            for job in self._waiting:
                if job.served is not served:
                    overtakes = True
                elif not overtakes or texts < self._generator.max_batch:
                    found.append(job)
                    texts += sum(one.count for one in job.requests)
            self._waiting = [job for job in self._waiting if job not in found]
        return found

    def _admit(self, served: Served) -> None:
        for job in self._next_of(served):
            self._active.append(job)
            if job.echo:
                self._read(job)
            if job.writes:
                job.open = {self._generator.add(one): i for i, one in enumerate(job.requests)}
                job.left = sum(one.count for one in job.requests)
            elif not self._closed:
                self._end(job, None)

    def _read(self, job: Job) -> None:
        for place, one in enumerate(job.requests):
            if job.cancelled or self._closed:
                return
            read: list[Read] = []
            if job.logprobs:
                count, temperature = one.sampling.top_logprobs, one.sampling.temperature or 1.0
                read = read_prompt(self.model, one.prompt_ids, count=count, temperature=temperature)
            job.listener.read(place, read)

    def _tell(self, event: Written) -> None:
        job = next(job for job in self._active if event.request in job.open)
        if not job.begun:
            self._begin(job)
        job.listener.written(job.open[event.request], event)
        if event.completion is not None:
            job.left -= 1
            if job.left == 0:
                self._end(job, None)

    def _begin(self, job: Job) -> None:
        job.begun = True
        with self._changed:
            self._unbegun -= 1

    def _end(self, job: Job, error: ApiError | None) -> None:
        for number in job.open:
            self._generator.cancel(number)
        if job in self._active:
            self._active.remove(job)
        if not job.begun:
            self._begin(job)
        job.listener.ended(error)

    def _give_up(self, served: Served, error: Exception) -> None:
        """Tells all who wait for the model. What the generator holds may be half done."""
        if isinstance(error, UserError):
            told = ApiError(500, str(error))
        else:
            _LOG.error("a request failed: %s: %s", type(error).__name__, reason(error))
            told = ApiError(500, "the server failed; its standard error says more")
        ended = [*self._active, *self._taken(lambda job: job.served is served)]
        self._generator = self._new_generator()
        self._active = []
        for job in ended:
            job.open = {}
            self._end(job, told)
