"""The command line's entry: runs a command, and turns whatever ends it into a line and a status."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

from lora_engine.app.failures import FAILED, USER_MISTAKE, Failure, describe, system_refusal
from lora_engine.text import one_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands, not only before the command
    words = [argument for argument in words if argument != "--debug"]
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open to the end of the process)
    status = _run(words or ["--help"], debug)
    if arguments is None:  # a Ctrl-C while Python shuts down would end in a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _run(arguments: Sequence[str], debug: bool) -> int:
    """Exit status of the command; what went wrong is told on standard error."""
    if sys.stdout is None:
        return _tell("standard output is closed; send it to /dev/null to see nothing", FAILED)
    if not debug:  # what libraries tell their developers
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from lora_engine.app.terminal import guarded_output, shown_warnings

        with guarded_output() as output, nullcontext() if debug else shown_warnings():
            status, failure = 0, None
            try:
                status = _command(arguments)
            except BaseException as error:
                failure = _failure(error)
                if debug:
                    traceback.print_exc()
            output.flush()
    except KeyboardInterrupt as error:
        failure = describe(error)
    else:
        if output.failure is not None:
            _give_up_standard_output()
            line = system_refusal(output.failure.errno or 0, "standard output")
            failure = failure or Failure(line, FAILED)
    return status if failure is None else _tell(failure.line, failure.status)


def _command(arguments: Sequence[str]) -> int:
    from lora_engine.app.commands import app

    try:
        return app(arguments, prog_name="lora-engine", standalone_mode=False) or 0
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else FAILED


def _failure(error: BaseException) -> Failure:
    import typer

    if isinstance(error, typer.Abort):
        return describe(KeyboardInterrupt())
    # click's UsageError, which typer's versions keep in different places.
    usage_error: type[Any] = typer.BadParameter.__bases__[0]
    if isinstance(error, usage_error):
        return Failure(error.format_message(), USER_MISTAKE)
    return describe(error)


def _tell(line: str, status: int) -> int:
    with suppress(OSError):  # standard error is closed: the exit status still tells
        print(f"lora-engine: {one_line(line)}", file=sys.stderr, flush=True)
    return status


def _give_up_standard_output() -> None:
    """Points it at the null device, so that flushing its buffer does not fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
