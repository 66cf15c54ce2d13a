"""The commands after training: read arguments, call `deploy`, print."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lora_engine.app.terminal import SafeConsole

Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Folder of a run, or of an adapter that PEFT saved."),
]
To = Annotated[str, typer.Option("--to", metavar="FOLDER", help="Folder to write.")]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The base model, where it is not found."),
]
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME[=WEIGHT]",
        help="Of several adapters; once for each to add up.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result in the folder.")
]


def merge(
    run: Run,
    to: To,
    base: Base = None,
    adapter: AdapterNames = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float32, bfloat16 or float16.",
            show_default="the base's",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Rows to verify on.", show_default="what the run held out"
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with the adapter on.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Merge RUN's adapter into its base, and verify the result."""
    from lora_engine.app import deploy

    console = _console()
    report = deploy.merge(
        run,
        to,
        base=base,
        adapters=adapter or [],
        dtype=dtype,
        data=data,
        verify=verify,
        overwrite=overwrite,
        tell=console.print,
    )
    console.print(_outcome(report, to))


def _outcome(report: dict[str, Any], to: str) -> str:
    merged, verified = report["merged"], report["verified"]
    lines = [f"{len(merged['changed']):,} tensors merged, {', '.join(merged['dtypes'])}"]
    if merged["untied"]:
        lines.append("head and embedding were one in the base and are two here")
    if verified is None:
        lines.append("not verified (--no-verify)")
    else:
        lines.append(
            f"verified on {verified['positions']:,} tokens of {verified['rows']}: "
            f"KL {verified['kl']:.2g} nats (without the adapter {verified['kl_without']:.2g}), "
            f"the likeliest token agrees at {verified['top1']:.1%}, "
            f"loss {verified['loss_merged']:.4f} (adapter {verified['loss_adapter']:.4f})"
        )
    return "\n".join([*lines, f"{to}"])


def _console() -> "SafeConsole":
    from lora_engine.app.terminal import SafeConsole

    return SafeConsole()
