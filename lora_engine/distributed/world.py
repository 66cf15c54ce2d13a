"""The processes that train one model together, and what they tell each other.

They are started by torchrun or by `lora-engine train --nproc N`, which set RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Tensors on the CPU go through gloo, those on a GPU through
NCCL. A process that ends with an error ends the others: its connections close, and whoever waits
for it gets a `PeerLost`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from lora_engine import backends
from lora_engine.distributed import is_started
from lora_engine.errors import PeerLost, UserError, reason

# Later versions of torch have it under another name.
if hasattr(dist, "all_gather_single"):
    _gather_tensors = dist.all_gather_single
else:
    _gather_tensors = dist.all_gather_into_tensor

# The first process may take long alone: it writes samples, and measures before the first step.
_PATIENCE = timedelta(hours=24)
_GONE = "another process of the run is gone without a word; see whether the system killed it"
_TELLING = 3.0  # seconds that the first process has to say why the run ended


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    rank: its number, from 0. size: how many there are. in_step: they share the model's weights, so
    that all of them make the same passes, also those whose results only one needs. shares_tokens:
    each runs a part of the tokens of every micro-batch; they are in step then.

    All of them call the methods below, in the
    same order; what they do is nothing where there is one process. Raise PeerLost.
    """

    rank: int = 0
    size: int = 1
    in_step: bool = False
    shares_tokens: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and speaks to people."""
        return self.rank == 0

    def add_(self, tensor: Tensor) -> None:
        """The sum of all processes' tensors, in place in each of them."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(tensor)

    def begin_add_(self, tensor: Tensor) -> "dist.Work | None":
        """`add_` that goes on while other work is done; to be given to `end`."""
        with _peers():
            return dist.all_reduce(tensor, async_op=True)

    def begin_gather_(self, out: Tensor, own: Tensor) -> "dist.Work | None":
        """Begins to put all processes' `own` [n], by rank, into `out` [size n]."""
        with _peers():
            return _gather_tensors(out, own, async_op=True)

    def exchanged(self, own: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """What the processes sent to this one, by rank, flat: received[r] elements of process r.

        own: contiguous; of its elements, in order, sent[r] go to process r.
        """
        item = own.dtype.itemsize
        out = torch.empty(sum(received) * item, dtype=torch.uint8, device=own.device)
        with _peers():
            dist.all_to_all_single(
                out,
                own.view(-1).view(torch.uint8),
                [count * item for count in received],
                [count * item for count in sent],
            )
        return out.view(own.dtype)

    def end(self, work: "dist.Work | None") -> None:
        """Wait for what was begun; on a GPU the CUDA stream waits, not the host."""
        if work is not None:
            with _peers():
                work.wait()

    def send_(self, tensor: Tensor) -> None:
        """The first process's tensor, in place in each of them."""
        if self.size > 1:
            with _peers():
                dist.broadcast(tensor, 0)

    def gather(self, value: object) -> list[object]:
        """Each process's value, a JSON value (NaN and infinities, too), by rank."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _peers():
            sizes = torch.zeros(self.size, dtype=torch.int64)
            _gather_tensors(sizes, torch.tensor([own.numel()]))
            longest = int(sizes.max())
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: own.numel()] = own
            texts = torch.zeros(self.size * longest, dtype=torch.uint8)
            _gather_tensors(texts, padded)
        rows = texts.view(self.size, longest).numpy()
        return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes.tolist(), strict=True)]

    def of_first(self, value: object) -> object:
        """The first process's value, a JSON value."""
        return self.gather(value if self.is_first else None)[0]


ALONE = World()

_joined = ALONE
_store: "dist.Store | None" = None


def current() -> World:
    """The processes that this one trains with; it alone outside `joined`."""
    return _joined


@contextmanager
def joined(words: Callable[[BaseException], str] = reason) -> Iterator[World]:
    """Within, `current` are all processes that torchrun started; this one alone without torchrun.

    Takes GPU LOCAL_RANK where there are GPUs. What fails within is told by one process: the first
    raises its own error, or PeerLost with the words of the process that failed; the others raise
    SystemExit, or PeerLost where the first is gone without a word.

    words: what is said of an error.
    """
    global _joined, _store
    if not is_started():
        yield ALONE
        return
    backend = "gloo"
    if backends.gpu_count():
        torch.cuda.set_device(_local_rank())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # one store serves them all
        store = dist.PrefixStore(f"lora-engine-{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except RuntimeError as error:
        raise PeerLost(
            f"the processes of the run do not reach each other: {reason(error)}"
        ) from error
    _joined, _store = World(rank, size), store
    try:
        _joined.gather(None)  # none fails before all are here, or they could not be told
        yield _joined
    except BaseException as error:
        if _is_told_here(store, _joined, error, words):
            raise
        raise SystemExit(1) from error
    finally:
        _joined, _store = ALONE, None
        with suppress(RuntimeError):
            dist.destroy_process_group()


def sharing_memory(world: World, device: torch.device) -> int:
    """How many processes of the run share the device's memory: of a GPU one, of a CPU those on this
    machine."""
    if world.size == 1 or backends.has_own_memory(device):
        return 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", world.size))


def check_same(world: World, what: Mapping[str, str]) -> None:
    """Raises UserError, in each process, where a value differs from the first process's.

    what: fingerprints, by the name of what they are of.
    """
    first, *others = world.gather(dict(what))
    for rank, own in enumerate(others, 1):
        assert isinstance(own, dict) and isinstance(first, dict)
        if differing := [name for name in first | own if first.get(name) != own.get(name)]:
            raise UserError(
                f"process {rank} has other {', '.join(differing)} than process 0; give all "
                "processes the same files and settings"
            )


def _local_rank() -> int:
    """The number of this process's GPU. Raises UserError if there is none for it."""
    local, count = int(os.environ.get("LOCAL_RANK", "0")), backends.gpu_count()
    if local >= count:
        raise UserError(
            f"process {os.environ['RANK']}: has no GPU of its own, torch sees {count}; start at "
            f"most {count} processes on a machine"
        )
    return local


@contextmanager
def _peers() -> Iterator[None]:
    """What goes wrong between processes, as PeerLost."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(_said() or _GONE) from error


def _said() -> str:
    """What the processes that failed said, or nothing."""
    if _joined.is_first and _store is not None:
        with suppress(RuntimeError):
            for rank in range(1, _joined.size):
                if _store.check([f"failed/{rank}"]):
                    return f"process {rank}: {_store.get(f'failed/{rank}').decode()}"
    return ""


def _is_told_here(
    store: "dist.Store", world: World, error: BaseException, words: Callable[[BaseException], str]
) -> bool:
    """Whether this process tells what ended the run; one of them does."""
    lost = isinstance(error, PeerLost) or isinstance(error.__cause__, PeerLost)
    try:
        if world.is_first:
            store.set("failed/0", "")
        elif not lost:
            store.set(f"failed/{world.rank}", words(error))
        else:
            return not _first_told(store) and store.add("told", 1) == 1
    except RuntimeError:  # the first process has ended, and its store with it
        pass
    return world.is_first


def _first_told(store: "dist.Store") -> bool:
    """Whether the first process says why the run ended, soon at least."""
    until = time.monotonic() + _TELLING
    while time.monotonic() < until:
        if store.check(["failed/0"]):
            return True
        time.sleep(0.1)
    return False
