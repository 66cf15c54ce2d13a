import signal
import threading

import pytest

from lora_engine.training.signals import Interrupted, InterruptGuard

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _python_handlers():
    """Known handlers, whatever the test runner was started with."""
    before = {n: signal.getsignal(n) for n in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_first_signal_is_a_request(number):
    with InterruptGuard() as guard:
        guard.check()
        signal.raise_signal(number)
        assert guard.requested == number
        with pytest.raises(Interrupted, match=number.name):
            guard.check()


def test_second_ctrl_c_aborts_at_once():
    with InterruptGuard() as guard:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert guard.requested == signal.SIGINT


def test_handlers_are_restored():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    with InterruptGuard():
        pass
    with InterruptGuard():
        signal.raise_signal(signal.SIGTERM)
        assert seen == []
    signal.raise_signal(signal.SIGTERM)
    assert seen == ["mine"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_ignored_signals_stay_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with InterruptGuard() as guard:
        signal.raise_signal(number)
        assert guard.requested is None


def test_does_nothing_outside_the_main_thread():
    errors = []

    def run():
        try:
            with InterruptGuard() as guard:
                guard.check()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []
