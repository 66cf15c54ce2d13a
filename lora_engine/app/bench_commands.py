"""The commands that measure: read arguments, find the benchmarks of this checkout, call them."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lora_engine.errors import UserError

CLAIM_MINUTES = 10.0
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings, e.g. rounds=3 dtype=float32.", show_default=False
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        metavar="NAME",
        help="Write NAME.json, .md, .html and charts.",
        show_default="runs/bench/AREA",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option(metavar="M", help="Begin nothing more after M minutes.", show_default=False),
]

app = typer.Typer(
    help="Measure this machine: speed and memory beside other trainers and the machine's limits. "
    "Without a command, `train`: the README's claim.",
    rich_markup_mode=None,
    invoke_without_command=True,
)


@app.callback()
def bench(context: typer.Context) -> None:
    """Without a command: the README's claim."""
    if context.invoked_subcommand is None:
        _bench("train", None, None, None)


def _area(name: str, about: str) -> Callable[..., None]:
    def command(settings: Settings = None, out: Out = None, minutes: Minutes = None) -> None:
        _bench(name, settings, out, minutes)

    command.__doc__ = about
    command.__name__ = name
    return command


COMMON = "model, dtype, device, steps, warmup, rounds, seed, contenders"


def compare(
    first: Annotated[str, typer.Argument(metavar="A.json", help="What bench wrote before.")],
    second: Annotated[str, typer.Argument(metavar="B.json", help="What it wrote after.")],
) -> None:
    """Show what became slower or larger beyond noise.

    Exits with 1 if something of ours did.
    """
    find_benchmarks()
    from benchmarks.common.compare import compare as compare_results

    if status := compare_results(first, second, _show):
        raise typer.Exit(status)


COMMANDS: tuple[Callable[..., None], ...] = (
    _area(
        "kernels",
        "Operations beside PyTorch, other kernels, and this machine's limits.\n\n"
        "Settings: cases, sizes, sweep, dtype, device, samples, compile.",
    ),
    _area(
        "train",
        "A training step beside TRL, padded and not: the README's claim.\n\n"
        f"Settings: {COMMON}, batch_size, checkpointing.",
    ),
    _area("generate", f"Writing beside transformers.\n\nSettings: {COMMON}, prompts, tokens."),
    _area(
        "rl",
        "DPO and GRPO beside TRL's trainers.\n\n"
        f"Settings: jobs, {COMMON}, pairs, prompts, generations, tokens.",
    ),
    _area(
        "memory",
        f"Memory of a step against its length.\n\nSettings: {COMMON}, lengths.",
    ),
    compare,
)


def find_benchmarks() -> None:
    """Lets the package `benchmarks` be imported: it is part of a checkout, not of a wheel.

    It is looked for beside lora_engine, and in the working directory. UserError where it is not.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / "benchmarks" / "bench.py").is_file():
            if sys.path[:1] != [str(root)]:
                sys.path.insert(0, str(root))
            return
    raise UserError(
        "bench: the benchmarks come with the source, not with the installed package; "
        "run it in the folder of a checkout of lora_engine"
    )


def _bench(area: str, settings: list[str] | None, out: str | None, minutes: float | None) -> None:
    if minutes is not None and not 0 <= minutes < math.inf:
        raise UserError(f"--minutes {minutes}: expected a number of minutes, at least 0")
    find_benchmarks()
    from benchmarks.bench import bench as run_benchmark

    usual = CLAIM_MINUTES if area == "train" else math.inf
    limit = usual if minutes is None else minutes
    status = run_benchmark(area, settings or [], out=out, minutes=limit, show=_show)
    if status:
        raise typer.Exit(status)


def _show(text: str) -> None:
    from lora_engine.app.terminal import SafeConsole

    SafeConsole().print(text, soft_wrap=True)
