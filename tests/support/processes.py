"""Several processes that train together, forked from one server that has imported what is slow."""

import contextlib
import multiprocessing
import os
import socket

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["peft", "transformers.models.llama.modeling_llama", "lora_engine.training.trainer"]
)


class Together:
    """`count` processes that run function(*args), each after joining the others.

    They have started on return; `results` waits for what the function returned in each.
    """

    def __init__(self, count, function, *args):
        port = free_port()
        self.processes, self.pipes = [], []
        for rank in range(count):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            place = (rank, count, port)
            process = CONTEXT.Process(target=_run, args=(place, theirs, function, args))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def result(self, rank, timeout=250):
        """What the process returned, or the exception that it raised; None: it was killed."""
        assert self.pipes[rank].poll(timeout), f"process {rank} says nothing"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return None
        finally:
            self.processes[rank].join(timeout)

    def results(self, timeout=250):
        results = [self.result(rank, timeout) for rank in range(len(self.processes))]
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def run_together(count, function, *args):
    """What function(*args) returned in each of `count` processes."""
    return Together(count, function, *args).results()


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def _run(place, pipe, function, args):
    rank, count, port = place
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(count))
    from lora_engine.distributed.world import joined

    try:
        with joined():
            result = function(*args)
    except BaseException as error:
        result = error
    with contextlib.suppress(BrokenPipeError):  # the test has seen enough
        pipe.send(result)
