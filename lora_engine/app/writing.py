"""What a run, an adapter or a model writes: answers to a file of prompts, a conversation."""

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from lora_engine.app.trained import Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.data.encode import Encoder
from lora_engine.data.prompts import asked_messages, prompt_ids
from lora_engine.data.records import Record, read_records
from lora_engine.data.template import Message
from lora_engine.errors import UserError, reason
from lora_engine.evaluation.modes import inference as inference
from lora_engine.evaluation.modes import without_adapters
from lora_engine.evaluation.samples import CACHE_TOKENS, stop_tokens
from lora_engine.export.verify import with_adapters
from lora_engine.files import naming, user_path
from lora_engine.generation.engine import Completion, Generator, Request
from lora_engine.generation.sampling import Sampling
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.models.load.load import load_model
from lora_engine.training.run.atomic import remove_leftovers
from lora_engine.training.run.lock import locked


@dataclass(frozen=True)
class Writer:
    """A model that writes.

    adapted: whether it has an adapter that can be switched off. positions: the most tokens that
    the model was made for; None: it does not say.
    """

    model: Any
    tokenizer: Any
    adapted: bool
    positions: int | None

    def generator(self, requests: Sequence[Request]) -> Generator:
        """Writes with the adapters as they are, and for as long as they stay so; has room for each
        of the requests."""
        ends = stop_tokens(self.model, self.tokenizer)
        longest = max(len(one.prompt_ids) + one.sampling.max_new_tokens for one in requests)
        room = max(CACHE_TOKENS, longest)
        return Generator(self.model, self.tokenizer, stop_tokens=ends, cache_tokens=room)

    def writing(self, *, adapter: bool = True) -> AbstractContextManager[None]:
        """A context in which the model writes with its adapter, or without it."""
        return nullcontext() if adapter or not self.adapted else without_adapters(self.model)

    def request(
        self, record: Record, sampling: Sampling, count: int = 1, *, as_fits: bool = False
    ) -> Request:
        """A record's prompt, gone on with. Raises UserError where it has none, or a too long one.

        An answer that the record has already, as a training record does, is no part of it. as_fits:
        the answer has as many tokens at most as the model has left for it.
        """
        ids = prompt_ids(record, Encoder(self.tokenizer))
        if as_fits and self.positions is not None:
            left = max(self.positions - len(ids), 1)
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, left))
        new = sampling.max_new_tokens
        if not ids:
            raise UserError(f"{record.origin}: the prompt is empty; give some text")
        if self.positions is not None and len(ids) + new > self.positions:
            raise UserError(
                f"{record.origin}: a prompt of {len(ids):,} tokens and {new:,} new ones are more "
                f"than the {self.positions:,} that the model was made for; give a shorter prompt "
                "or a smaller --max-new-tokens"
            )
        return Request(tuple(ids), sampling, count)


def open_writer(
    name: str,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    dtype: str = "auto",
    device: str = "auto",
) -> Writer:
    """What `name` names: a run, the folder of an adapter, or a model as `load_model` takes it.

    adapters: of several, those that write, as "name" or "name=weight". Raises UserError for what
    is not there.
    """
    trained = trained_or_model(name, base)
    if trained is None or not trained.adapters:
        if adapters:
            raise UserError(
                f"--adapter {adapters[0]}: {name} is a whole model; leave --adapter out"
            )
        source = name if trained is None else str(trained.folder)
        model, tokenizer = load_model(source, dtype=dtype, device=device)
    else:
        trained, chosen = trained.choose(adapters)
        folder = trained.base_folder
        check_base(folder, chosen)
        model, _ = trained.load_base(dtype=dtype, device=device)
        model = with_adapters(model, chosen)
        if trained.served_as is not None:
            trained.served_as.apply(model)
        tokenizer = load_tokenizer_of(trained, folder)
    model.eval().requires_grad_(False)
    accelerate(model)
    config = model.config.get_text_config()
    adapted = trained is not None and bool(trained.adapters)
    return Writer(
        model=model,
        tokenizer=tokenizer,
        adapted=adapted,
        positions=getattr(config, "max_position_embeddings", None),
    )


def trained_or_model(name: str, base: str | None) -> Trained | None:
    """The run, adapter or model folder of that name; None for what only `load_model` knows."""
    try:
        path = user_path(name)
    except ValueError as error:
        raise UserError(f"MODEL {name!r}: {error}") from error
    if path.is_dir():
        trained = find_trained(name, base)
        if trained.adapters or base is None:
            return trained
    elif base is None:
        return None
    raise UserError(f"--base {base}: {name} is a whole model, no adapter; leave --base out")


def read_prompts(source: str) -> list[Record]:
    """Prompts of a file: each line of a .txt, else its records. UserError where there are none."""
    try:
        path = user_path(source)
    except ValueError as error:
        raise UserError(f"PROMPTS {source!r}: {error}") from error
    if path.suffix.lower() != ".txt":
        return read_records(source)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {reason(error)}; give a text file") from error
    found = [
        Record("prompt", prompt=line, origin=f"{source}:{number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise UserError(f"{source}: holds no prompts; give one a line")
    return found


def as_chat(record: Record) -> Record:
    """A plain prompt as a user's message."""
    if record.kind not in ("prompt", "completion", "text") or not isinstance(record.prompt, str):
        return record
    said: Message = {"role": "user", "content": record.prompt or record.text}
    return Record("messages", messages=(said,), origin=record.origin, given=record.given)


def new_file(path: str) -> Path:
    """The file that `--out` names. Raises UserError for no name, and where something is already."""
    try:
        target = user_path(path)
    except ValueError as error:
        raise UserError(f"--out {path!r}: {error}") from error
    _check_new(target)
    with naming(target):  # what cannot be written is told before anything is answered
        tempfile.TemporaryFile(dir=target.parent).close()
    return target


def _check_new(target: Path) -> None:
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; give another --out, or remove it")


@contextmanager
def result_file(target: Path) -> Iterator[TextIO]:
    """A file that is there whole, under its name, or not at all.

    Removes what a process that was killed has left of it. Raises UserError if another process
    writes it, or has written it since `new_file`.
    """
    unfinished = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    with naming(target), locked(target.with_name(f".lora-engine-{target.name}.lock")):
        _check_new(target)
        remove_leftovers(target.parent, re.escape(target.name))
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def answers(
    generator: Generator, requests: Sequence[Request]
) -> Iterator[tuple[int, int, Completion]]:
    """Completions in the order of the requests, as they are done: (request, number, completion)."""
    places = {generator.add(request): i for i, request in enumerate(requests)}
    done: dict[tuple[int, int], Completion] = {}
    order = ((i, n) for i, request in enumerate(requests) for n in range(request.count))
    due = next(order, None)
    while events := generator.step():
        for event in events:
            if event.completion is not None:
                done[places[event.request], event.number] = event.completion
        while due is not None and due in done:
            yield *due, done.pop(due)
            due = next(order, None)


def answer_line(record: Record, number: int, completion: Completion) -> dict[str, object]:
    """A line of the file of answers."""
    asked = asked_messages(record)
    prompt: dict[str, object] = (
        {"prompt": record.text if record.kind == "text" else record.prompt}
        if asked is None
        else {"messages": [dict(message) for message in asked]}
    )
    return {
        **prompt,
        "completion": completion.text,
        "number": number,
        "finish": completion.finish,
        "tokens": len(completion.token_ids),
        "logprob": sum(completion.logprobs),
    }


class Conversation:
    """Messages so far, and the next answer as it is written."""

    def __init__(self, writer: Writer, sampling: Sampling, system: str | None = None) -> None:
        self.writer, self.sampling = writer, sampling
        self.opening = () if system is None else ({"role": "system", "content": system},)
        self.messages: list[Message] = list(self.opening)

    def restart(self) -> None:
        """Forgets all but the system's message."""
        self.messages = list(self.opening)

    def answer(self, *, adapter: bool = True) -> Iterator[str]:
        """The pieces of an answer to the messages so far, which stay as they are."""
        record = Record("messages", messages=tuple(self.messages), origin="chat")
        seed = self.sampling.seed + sum(m.get("role") == "user" for m in self.messages)
        request = self.writer.request(record, replace(self.sampling, seed=seed), as_fits=True)
        with self.writer.writing(adapter=adapter):
            for event in self.writer.generator([request]).stream(request):
                yield event.piece

    def say(self, text: str) -> None:
        """A message of the user."""
        self.messages.append({"role": "user", "content": text})

    def keep(self, answer: str) -> None:
        """An answer as part of the conversation."""
        self.messages.append({"role": "assistant", "content": answer})
