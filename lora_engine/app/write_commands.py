"""The commands that write text: read arguments, call `writing`, print."""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from lora_engine.app.deploy_commands import AdapterNames, Base

if TYPE_CHECKING:
    from lora_engine.app.writing import Conversation, Writer
    from lora_engine.generation.sampling import Sampling

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run's folder, an adapter's, or a model as in model.path."
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="At most so many tokens.", min=1)
]
Temperature = Annotated[float, typer.Option(metavar="T", help="0: always the most likely token.")]
TopK = Annotated[int, typer.Option(metavar="K", help="Only the K most likely tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(metavar="P", help="Only the most likely tokens up to that probability.")
]
MinP = Annotated[
    float, typer.Option(metavar="P", help="Only tokens with that share of the likeliest's.")
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", metavar="X", help="Over 1: less repetition.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Ends an answer; may be repeated.", show_default=False),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the random numbers.")]
DType = Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ….")]

HELP = "/adapter on or off   /both side by side   /new   /quit"


def generate(
    model: Model,
    prompts: Annotated[
        str | None,
        typer.Argument(
            metavar="[PROMPTS]",
            help="A file of prompts: records, or a .txt with one a line.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="One prompt instead of a file.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="JSON lines.", show_default="standard output"),
    ] = None,
    count: Annotated[
        int, typer.Option(metavar="N", help="Answers to each prompt.", min=1, max=10_000)
    ] = 1,
    chat: Annotated[
        bool, typer.Option("--chat/--plain", help="A prompt of plain text as a user's message.")
    ] = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    base: Base = None,
    adapter: AdapterNames = None,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Write answers to prompts, many at a time."""
    from lora_engine.app import writing
    from lora_engine.data.strings import check_string
    from lora_engine.errors import UserError

    if (prompts is None) == (prompt is None):
        raise UserError("generate: give a file of prompts, or --prompt TEXT")
    target = None if out is None else writing.new_file(out)
    sampling = _sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed
    )
    if prompt is not None:
        check_string(prompt, "--prompt")
        records = [writing.Record("prompt", prompt=prompt, origin="--prompt")]
    else:
        assert prompts is not None
        records = writing.read_prompts(prompts)
    if chat:
        records = [writing.as_chat(record) for record in records]
    writer = writing.open_writer(
        model, base=base, adapters=adapter or [], dtype=dtype, device=device
    )
    requests = [writer.request(record, sampling, count) for record in records]
    with ExitStack() as stack, writing.inference(writer.model):
        file = sys.stdout if target is None else stack.enter_context(writing.result_file(target))
        for place, number, done in writing.answers(writer.generator(requests), requests):
            line = writing.answer_line(records[place], number, done)
            _write(file, done.text if prompt is not None and out is None else json.dumps(line))


def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system's message.")
    ] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    base: Base = None,
    adapter: AdapterNames = None,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model: with its adapter, without it, or both side by side."""
    from lora_engine.app import writing

    sampling = _sampling(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop, seed
    )
    writer = writing.open_writer(
        model, base=base, adapters=adapter or [], dtype=dtype, device=device
    )
    with writing.inference(writer.model):
        _Talk(writer, writing.Conversation(writer, sampling, system)).run()


def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=FOLDER",
            help="One more adapter of the same base; may be repeated.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="N", help="Of 127.0.0.1; 0: any that is free.", min=0, max=65535)
    ] = 8000,
    max_new_tokens: NewTokens = 4096,
    waiting: Annotated[
        int, typer.Option(metavar="N", help="Requests that may wait; others are refused.", min=1)
    ] = 128,
    base: Base = None,
    dtype: DType = "auto",
    device: Device = "auto",
) -> None:
    """Answer OpenAI's clients on this machine, with the model and with its adapters."""
    from lora_engine.app import serve as serving
    from lora_engine.serving.requests import Limits

    serving.serve(
        model,
        base=base,
        adapters=adapter or [],
        port=port,
        limits=Limits(new_tokens=max_new_tokens, waiting=waiting),
        dtype=dtype,
        device=device,
        tell=lambda text: print(text, flush=True),
    )


class _Talk:
    """The conversation on a terminal."""

    def __init__(self, writer: "Writer", conversation: "Conversation") -> None:
        self.writer, self.conversation = writer, conversation
        self.adapter, self.both = writer.adapted, False

    def run(self) -> None:
        if isinstance(sys.stdin, TextIOWrapper):  # a message that is no UTF-8 is refused alone
            sys.stdin.reconfigure(errors="surrogateescape")
        print(HELP if self.writer.adapted else "/new   /quit", flush=True)
        while (said := _ask("> ")) is not None:
            if said.startswith("/"):
                if said == "/quit":
                    return
                self._command(said)
            elif said:
                self._answer(said)

    def _command(self, said: str) -> None:
        if said == "/new":
            self.conversation.restart()
            print("a new conversation", flush=True)
        elif said in ("/adapter", "/both") and not self.writer.adapted:
            print("this model has no adapter", flush=True)
        elif said == "/adapter":
            self.adapter, self.both = not self.adapter, False
            print(f"the adapter is {'on' if self.adapter else 'off'}", flush=True)
        elif said == "/both":
            self.both = not self.both
            print("both side by side" if self.both else "one at a time", flush=True)
        else:
            print(HELP if self.writer.adapted else "/new   /quit", flush=True)

    def _answer(self, said: str) -> None:
        from lora_engine.errors import UserError

        self.conversation.say(said)
        try:
            if self.both:
                print("[without the adapter]", flush=True)
                self._write(adapter=False)
                print("[with the adapter]", flush=True)
            self.conversation.keep(self._write(adapter=self.adapter or self.both))
        except KeyboardInterrupt:
            print("\n(stopped; your message is taken back)", flush=True)
            self.conversation.messages.pop()
        except UserError as error:
            print(f"{error}; /new begins anew", flush=True)
            self.conversation.messages.pop()

    def _write(self, *, adapter: bool) -> str:
        from lora_engine.text import visible

        pieces = []
        for piece in self.conversation.answer(adapter=adapter):
            pieces.append(piece)
            print(visible(piece), end="", flush=True)
        print(flush=True)
        return "".join(pieces)


def _ask(mark: str) -> str | None:
    """A line of standard input; None at its end."""
    with suppress(ImportError):
        import readline  # noqa: F401 (lines can then be edited)
    try:
        return input(mark).strip()
    except EOFError:
        print(flush=True)
        return None


def _sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    stop: list[str] | None,
    seed: int,
) -> "Sampling":
    from lora_engine.data.strings import check_string
    from lora_engine.generation.sampling import Sampling

    for text in stop or ():
        check_string(text, "--stop")
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )


def _write(file: TextIO, line: str) -> None:
    print(line, file=file, flush=True)


COMMANDS: tuple[Callable[..., None], ...] = (generate, chat, serve)
