"""The commands after training: read arguments, call `deploy`, print."""

from importlib.util import find_spec
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
Dtype = Annotated[
    str | None,
    typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.", show_default="the base's"),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Rows to verify on.", show_default="what the run held out"),
]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with the adapter on.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier result in the folder.")
]


def merge(
    run: Run,
    to: To,
    base: Base = None,
    adapter: AdapterNames = None,
    dtype: Dtype = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Put the merged linears into packed bits: nf4, fp8, int8, mxfp4, q4_0, ...",
            show_default=False,
        ),
    ] = None,
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Of nf4 and fp4: scales are quantised too.")
    ] = False,
    data: Data = None,
    verify: Verify = True,
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
        quantize=quantize,
        double_quant=double_quant,
        data=data,
        verify=verify,
        overwrite=overwrite,
        tell=console.print,
    )
    console.print(_outcome(report, to), soft_wrap=True)


def export(
    run: Run,
    to: To,
    format: Annotated[
        str,
        typer.Option(
            "--format", metavar="FORMAT", help="hf, peft, gguf, gguf-lora or vllm; see the docs."
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="Of a GGUF file: f32, f16, bf16, q8_0, q6_k, q5_k, q4_k, q5_1, q5_0, q4_1, q4_0, "
            "mxfp4.",
            show_default="q8_0",
        ),
    ] = None,
    base: Base = None,
    adapter: AdapterNames = None,
    dtype: Dtype = None,
    data: Data = None,
    verify: Verify = True,
    overwrite: Overwrite = False,
) -> None:
    """Write what RUN trained in the form that another program takes."""
    from lora_engine.app import export as exporting

    console = _console()
    report = exporting.export(
        run,
        to,
        format=format,
        kind=kind,
        base=base,
        adapters=adapter or [],
        dtype=dtype,
        data=data,
        verify=verify,
        overwrite=overwrite,
        tell=console.print,
    )
    console.print(_exported(report, to), soft_wrap=True)


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model, or a run: its base and its adapter.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            help="Held-out data.",
            show_default="what the run held out",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="FOLDER", help="Measured beside MODEL without it."),
    ] = None,
    base: Base = None,
    choices: Annotated[
        bool, typer.Option("--choices", help="The rows are questions with choices.")
    ] = False,
    group: Annotated[
        str | None, typer.Option("--group", metavar="COLUMN", help="Also by this column.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Of what is written: exact_match, f1, bleu, rouge1, rouge2, rougeL, or "
            "module:function; repeatable.",
            show_default=False,
        ),
    ] = None,
    answers: Annotated[
        int, typer.Option(metavar="N", help="Prompts answered for metrics.", min=1)
    ] = 100,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Use the first N records.", min=1)
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page for a browser.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure MODEL on held-out data, without and with an adapter."""
    import json

    from lora_engine.app import evaluate as evaluation

    console = _console()
    report = evaluation.evaluate(
        model,
        data=data,
        adapter=adapter,
        base=base,
        choices=choices,
        group=group,
        metrics=metric or [],
        answers=answers,
        limit=limit,
        html=html,
        tell=(lambda text: None) if as_json else console.print,
    )
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        console.print(evaluation.render(report), soft_wrap=True)


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN…", help="Folders of runs, finished or not.")
    ],
    html: Annotated[
        str | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="The page.",
            show_default="compare.html; none with --json",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put runs side by side: settings that differ, figures, curves and samples."""
    import json

    from lora_engine.app import compare as comparing

    compared = comparing.compare(runs, html or (None if as_json else "compare.html"))
    if as_json:
        print(json.dumps(comparing.as_json(compared.runs), indent=2))
    else:
        _console().print(comparing.render(compared))


def _exported(report: dict[str, Any], to: str) -> str:
    if report["format"] == "hf":
        return _outcome(report, to)
    if report["format"] in ("peft", "vllm"):
        lines = [f"servers do not take it: {problem}" for problem in report["lint"]]
        return "\n".join([*lines, *filter(None, [report.get("command")]), to])
    lines = []
    if types := report.get("types"):
        lines += [", ".join(f"{count} tensors {kind}" for kind, count in types.items())]
    if verified := report["verified"]:
        lines.append(
            f"llama.cpp on {verified['positions']:,} tokens of {verified['rows']}: the likeliest "
            f"token agrees at {verified['top1']:.1%} ({verified['top1_decided']:.1%} of "
            f"{verified['decided']:,} where it is no near tie), its log-probability within "
            f"{verified['logprob']:.2g} nats; {verified['texts']} texts tokenized and "
            f"{verified['conversations']} chats written alike; of {verified['written']} tokens of "
            f"a greedy text {verified['written_alike']} are the likeliest, the others within "
            f"{verified['parted']:.2g} nats of it"
        )
        if "weights" in verified:
            weights, exact = verified["weights"], verified["exact"]
            lines.append(
                f"the file's weights in float32: transformers agrees at {weights['top1']:.1%} "
                f"({weights['top1_decided']:.1%}) with the adapter on, llama.cpp at "
                f"{exact['top1']:.1%} ({exact['top1_decided']:.1%}) with transformers"
            )
    elif find_spec("xllamacpp"):
        lines.append("not verified (--no-verify)")
    else:
        lines.append("not verified; pip install xllamacpp has llama.cpp compare it")
    return "\n".join([*lines, to])


def _outcome(report: dict[str, Any], to: str) -> str:
    merged, verified = report["merged"], report["verified"]
    lines = [f"{len(merged['changed']):,} tensors merged, {', '.join(merged['dtypes'])}"]
    if packed := report["packed"]:
        lines.append(
            f"{packed['linears']:,} linears in {packed['format']}, {packed['bits']:.3g} bits a "
            f"parameter, {packed['error']:.1%} off the merged weights (the worst "
            f"{packed['error_max']:.1%})"
        )
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
