"""The commands: read arguments, call the library, print. No logic of their own.

Heavy modules are imported by the command that needs them, so that --help answers at once.
"""

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from lora_engine.app import bench_commands, deploy_commands, write_commands
from lora_engine.app.failures import Interrupted, RunFailed

if TYPE_CHECKING:
    from lora_engine.app.config import RunConfig
    from lora_engine.app.terminal import SafeConsole

Command = TypeVar("Command", bound=Callable[..., None])

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
    """Both are done elsewhere: the version at once, --debug in cli.main."""


@app.command()
@_interruptible
def demo(
    overrides: Overrides = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the run.", show_default="runs/demo"),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Number of steps.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo.")] = False,
) -> None:
    """Fine-tune a small model and show what it learned."""
    settings = [f"train.output_dir={json.dumps(out)}"] if out is not None else []
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
    preflight: Annotated[
        bool | None,
        typer.Option(
            "--preflight/--no-preflight",
            help="Try a step on the first batch, and stop where nothing would be learned.",
            show_default="preflight",
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option("--nproc", metavar="N", help="Processes on this machine.", min=1)
    ] = 1,
) -> None:
    """Fine-tune as CONFIG says."""
    settings = [] if preflight is None else [f"train.preflight={json.dumps(preflight)}"]
    settings = [*(overrides or []), *settings]
    if nproc > 1:
        _launch(nproc, ["train", config, *settings, *(["--resume"] if resume else [])])
    else:
        _train(config, settings, resume)


@app.command()
@_interruptible
def data(
    config: ConfigName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where something should be mended.")
    ] = False,
) -> None:
    """Show what is in CONFIG's data, what of it is learned, and what is wrong with it."""
    from lora_engine.app.config import load_config

    settings = load_config(config, overrides or [])
    from lora_engine.app.finetune import examine_data
    from lora_engine.app.progress import ConsoleProgress
    from lora_engine.data.show import render

    progress = ConsoleProgress(_console(stderr=True))
    try:
        reports = examine_data(settings, progress.on_reading)
    finally:
        progress.close()
    if html is not None:
        from lora_engine.report.data_page import write_data_page

        write_data_page(html, settings.data.name(), reports)
    if as_json:
        print(json.dumps([report.as_json() for report in reports], indent=2))
    else:
        _console().print(render(reports))
    wrong = [f"{report.name}: {what}" for report in reports for what in report.wrong()]
    if strict and wrong:
        for line in wrong:
            print(line, file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@_interruptible
def plan(
    config: ConfigName,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="24GB|NAME", help="Plan for a GPU of that memory, here or not."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="16GB", help="Memory that may be used; else all.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what CONFIG takes of memory, and the settings that train fastest within it."""
    from lora_engine.app.config import load_config

    settings = load_config(config, overrides or [])
    from lora_engine.app import plan_text
    from lora_engine.app.finetune import model_name
    from lora_engine.app.plan import plan as planned

    made = planned(settings, gpu=gpu, budget=budget)
    if as_json:
        print(json.dumps(plan_text.as_json(made), indent=2))
    else:
        _console().print(plan_text.render(made, model_name(settings)))


@app.command()
@_interruptible
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what can run on this machine, and what is missing."""
    from lora_engine.app import doctor as examination

    sections = examination.examine()
    if as_json:
        print(json.dumps(examination.as_json(sections), indent=2))
    else:
        _console().print(examination.render(sections))
    if examination.has_problem(sections):
        raise typer.Exit(1)


AFTER_TRAINING: tuple[Callable[..., None], ...] = (
    deploy_commands.evaluate,
    deploy_commands.merge,
    deploy_commands.export,
    deploy_commands.compare,
    *write_commands.COMMANDS,
)
for after_training in AFTER_TRAINING:
    app.command()(_interruptible(after_training))
for measuring in bench_commands.COMMANDS:
    bench_commands.app.command()(_interruptible(measuring))
app.add_typer(bench_commands.app, name="bench")


def _launch(count: int, words: Sequence[str]) -> None:
    from lora_engine.app.launch import launch
    from lora_engine.distributed import is_started
    from lora_engine.errors import UserError

    if is_started():
        raise UserError("--nproc: torchrun has started the processes already; leave it out")
    debug = ["--debug"] if "--debug" in sys.argv else []  # which cli.main takes from the words
    status, line = launch(count, [*words, *debug])
    if line:
        print(f"lora-engine: {line}", file=sys.stderr)
    raise typer.Exit(status)


@contextmanager
def _together() -> Iterator[None]:
    """Within, this process is one of those that torchrun started, if it did."""
    from lora_engine.distributed import is_started

    if not is_started():
        yield
        return
    from lora_engine.app.failures import describe
    from lora_engine.distributed.world import joined

    with joined(lambda error: describe(error).line) as world:
        if not world.is_first:  # the first process warns for all
            logging.getLogger("lora_engine").setLevel(logging.ERROR)
            warnings.simplefilter("ignore")
        yield


def _train(source: str, overrides: Sequence[str], resume: bool) -> None:
    with _together():
        _train_together(source, overrides, resume)


def _train_together(source: str, overrides: Sequence[str], resume: bool) -> None:
    from lora_engine.app.config import load_config

    config = load_config(source, overrides)
    from lora_engine.app.finetune import finetune
    from lora_engine.app.progress import ConsoleProgress, render_outcome
    from lora_engine.errors import UserError

    console = _console()
    progress = ConsoleProgress(console)
    try:
        outcome = finetune(config, resume=resume, observer=progress)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {_how_to_go_on(config)}") from error
    except UserError:
        raise
    except Exception as error:
        raise RunFailed(config.train.output_dir, _how_to_go_on(config)) from error
    finally:
        progress.close()
    if not outcome.is_told:
        return
    if outcome.summary is None:
        raise Interrupted(f"interrupted; {_how_to_go_on(config)}")
    console.print(render_outcome(outcome))


def _how_to_go_on(config: "RunConfig") -> str:
    from lora_engine.app.finetune import how_to_resume

    try:
        return how_to_resume(config.train.output_dir)
    except OSError:  # the folder cannot be looked into, so nothing can be promised of it
        return ""


def _console(*, stderr: bool = False) -> "SafeConsole":
    from lora_engine.app.terminal import SafeConsole

    return SafeConsole(stderr=stderr)
