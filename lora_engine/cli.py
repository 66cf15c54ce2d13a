"""The command line: reads arguments, calls the library, prints. No logic of its own.

Heavy modules are imported by the command that needs them, so that --help answers at once.
"""

import functools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, cast

import typer

from lora_engine.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lora_engine.config import RunConfig

# click's UsageError, which typer's versions keep in different places.
UsageError: type[Any] = typer.BadParameter.__bases__[0]

Command = TypeVar("Command", bound=Callable[..., None])

USER_MISTAKE = 2
INTERRUPTED = 130

app = typer.Typer(
    name="lora-engine",
    help="Fine-tune language models fast: LoRA kernels, packed batches, a loop that resumes.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings on top of the config, e.g. train.max_steps=20.",
        show_default=False,
    ),
]
ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")
]


class Interrupted(Exception):
    """Ctrl-C, or a signal the training loop ended for; the message says how to go on."""


def _interruptible(command: Command) -> Command:
    """Ctrl-C as Interrupted: typer's versions treat a KeyboardInterrupt each in its own way."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error

    return cast(Command, wrapped)


def _show_version(wanted: bool) -> None:
    if wanted:
        from lora_engine import __version__

        print(f"lora-engine {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Both are done elsewhere: the version at once, --debug in main()."""


@app.command()
@_interruptible
def demo(
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run.", show_default="runs/demo")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of steps.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo.")] = False,
) -> None:
    """Fine-tune a small model and show what it learned."""
    settings = [f"train.output_dir={json.dumps(str(out))}"] if out is not None else []
    settings += [f"train.max_steps={steps}"] if steps is not None else []
    _train("demo", [*settings, *(overrides or [])], resume)


@app.command()
@_interruptible
def train(
    config: ConfigName,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint.")
    ] = False,
) -> None:
    """Fine-tune as CONFIG says."""
    _train(config, overrides or [], resume)


@app.command()
@_interruptible
def data(config: ConfigName, overrides: Overrides = None) -> None:
    """Show what is in CONFIG's data, and what is dropped."""
    from lora_engine.config import load_config

    settings = load_config(config, overrides or [])
    from lora_engine.data.inspect import render
    from lora_engine.finetune import examine_data

    _console().print(render(examine_data(settings)))


@app.command()
@_interruptible
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what can run on this machine, and what is missing."""
    from lora_engine import doctor as examination

    sections = examination.examine()
    if as_json:
        print(json.dumps(examination.as_json(sections), indent=2, ensure_ascii=False))
    else:
        _console().print(examination.render(sections))
    if examination.has_problem(sections):
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the user's mistake, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # wherever it stands, not only before the command
    given = [argument for argument in given if argument != "--debug"]
    if not debug:  # what libraries announce to their developers
        warnings.simplefilter("ignore", FutureWarning)
    try:
        sys.exit(app(given or ["--help"], prog_name="lora-engine", standalone_mode=False) or 0)
    except (UserError, UsageError) as error:
        if debug:
            traceback.print_exc()
        print(f"lora-engine: {_message(error)}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except (Interrupted, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        print(f"lora-engine: {str(error) or 'interrupted'}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _train(source: str, overrides: Sequence[str], resume: bool) -> None:
    from lora_engine.config import load_config

    config = load_config(source, overrides)
    from lora_engine.finetune import finetune
    from lora_engine.progress import ConsoleProgress, render_outcome

    console = _console()
    progress = ConsoleProgress(console)
    try:
        outcome = finetune(config, resume=resume, observer=progress)
    except KeyboardInterrupt as error:
        _stop(config, error)
    finally:
        progress.close()
    if outcome.summary is None:
        _stop(config)
    console.print(render_outcome(outcome))


def _stop(config: "RunConfig", cause: BaseException | None = None) -> NoReturn:
    from lora_engine.finetune import how_to_resume

    raise Interrupted(f"interrupted; {how_to_resume(config.train.output_dir)}") from cause


def _message(error: Any) -> str:
    return error.format_message() if isinstance(error, UsageError) else str(error)


def _console() -> "Console":
    from rich.console import Console

    return Console()
