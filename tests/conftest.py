"""Fixtures for all tests."""

import importlib.util
import os
import signal
from collections import Counter
from collections.abc import Iterator

import other_products
import pytest
import torch
from operand_guard import OperandGuard

# Without a GPU the Triton kernels run in Triton's interpreter, which is settled when triton is
# imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        from triton_interpreter import repair_bfloat16, replace_functions_once

        repair_bfloat16()
        replace_functions_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--products",
        choices=("own", "other"),
        default="own",
        help="other: torch's matrix products add up in an order that no vendor's library has",
    )
    parser.addoption(
        "--one-of-each",
        action="store_true",
        help="of each parametrised test the first case alone, with each backend",
    )
    parser.addoption("--shard", metavar="I/N", help="every Nth test from the Ith on, from 0")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--products") == "other":
        other_products.install()


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_interpreted(items)
    if config.getoption("--one-of-each"):
        items[:] = one_of_each(items)
    if shard := config.getoption("--shard"):
        index, _, count = shard.partition("/")
        items[:] = items[int(index) :: int(count)]


# Of a test's cases in Triton's interpreter one in so many runs without asking for slow ones: it
# takes up to a hundred times a kernel's time, and the cases differ in sizes and options.
INTERPRETED_OF = 3


def mark_interpreted(items: list[pytest.Item]) -> None:
    seen: Counter[str] = Counter()
    for item in items:
        name, _, case = item.nodeid.partition("[")
        if "triton-interpreter" in case:
            if seen[name] % INTERPRETED_OF:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


def one_of_each(items: list[pytest.Item]) -> list[pytest.Item]:
    firsts: dict[tuple[str, str], pytest.Item] = {}
    for item in items:
        if item.get_closest_marker("gpu"):
            firsts.setdefault((item.nodeid.partition("[")[0], str(backend_of(item))), item)
    return list(firsts.values())


def backend_of(item: pytest.Item) -> object:
    """The implementation that a test runs on, if it is parametrised by one."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return getattr(params.get("backend"), "impl", None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no GPU")


GPU_LOST = 3


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A process whose GPU answers with errors only is ended, and xdist starts another.

    An access outside a tensor's memory takes the GPU from the whole process: every later test of
    it would fail.
    """
    found = yield
    if item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ and gpu_lost():
        os._exit(GPU_LOST)
    return found


def gpu_lost() -> bool:
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


SIGNALS = {
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """Also under nohup, or in the background of a script, where some of them are ignored."""
    ignored = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, SIGNALS[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Small tensors are slower on many threads; two show what one would hide."""
    before = torch.get_num_threads()
    # Test processes side by side have a core each: two OpenMP teams on it would spin.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New uninitialised memory holds NaN, and no product may find it beside its operands.

    What a kernel forgets to write shows, and so does what only a matrix unit would read.
    """
    with OperandGuard():
        yield
