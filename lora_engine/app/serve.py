"""`lora-engine serve`: a model and its adapters behind OpenAI's interface, for this machine."""

import copy
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_engine.app.merge_aware import served_as
from lora_engine.app.trained import Tell, Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.app.writing import trained_or_model
from lora_engine.data.encode import Encoder
from lora_engine.errors import UserError, reason
from lora_engine.evaluation.modes import with_adapter, without_adapters
from lora_engine.evaluation.samples import stop_tokens
from lora_engine.export.adapter import Adapter, read_adapter
from lora_engine.export.packed import Packing
from lora_engine.export.verify import with_adapters
from lora_engine.files import user_path
from lora_engine.generation.engine import Generator
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.models.load.load import load_model
from lora_engine.models.load.trained_over import read_trained_over
from lora_engine.serving.models import Served
from lora_engine.serving.requests import Limits
from lora_engine.serving.worker import Worker

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HOST = "127.0.0.1"
CACHE_TOKENS = 65536
_SECONDS_TO_END = 10  # for answers that are being written when the server is stopped


@dataclass(frozen=True)
class _Named:
    """An adapter under the name that requests give it."""

    name: str
    adapter: Adapter
    tokenizer: Any


def serve(
    model: str,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    port: int = 8000,
    limits: Limits | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tell: Tell = lambda text: None,
) -> None:
    """Answers requests until SIGTERM, SIGINT or Ctrl-C. model, adapters: as of `open_models`.

    Raises UserError for what is not there, and a port that is taken.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "serve needs starlette and uvicorn; run: pip install 'lora_engine[serve]'"
        ) from error
    from lora_engine.serving.http import make_app

    limits = limits or Limits()
    with _listening(port) as listener:
        served, worker = open_models(
            model, base=base, adapters=adapters, limits=limits, dtype=dtype, device=device
        )
        address = f"http://{HOST}:{listener.getsockname()[1]}/v1"
        listener.listen()  # who asks from here on waits for the first answer
        tell(f"{', '.join(one.name for one in served)} at {address}")
        run_server(make_app(served, worker, limits), listener)
    tell("stopped")


def open_models(
    model: str,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    limits: Limits,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[list[Served], Worker]:
    """The base and every adapter under a name of its own, and what writes for them.

    model: a run, an adapter's folder, or a model. adapters: more of them, "NAME=FOLDER". Raises
    UserError for what is not there, another base's adapter, and two of one name.
    """
    trained = trained_or_model(model, base)
    source, name = model, model
    if trained is not None:
        source = trained.base if trained.adapters else str(trained.folder)
        name = trained.base if trained.adapters else model
    named = _adapters(model, source, trained, adapters)
    aware = {one.name: served_as(read_trained_over(one.adapter.folder)) for one in named}
    merge_aware = next((name for name, form in aware.items() if form), None)
    if merge_aware and len(named) > 1:
        raise UserError(
            f"--adapter: {merge_aware} is merge-aware, which is served alone; give each adapter a "
            "server, or merge it with lora-engine merge"
        )
    if trained is not None and trained.adapters:
        loaded, tokenizer = trained.load_base(dtype=dtype, device=device)
    else:
        loaded, tokenizer = load_model(source, dtype=dtype, device=device)
    if named:
        loaded = with_adapters(loaded, [(one.adapter, 1.0) for one in named])
        loaded.base_model.set_adapter(named[0].adapter.name)
        if form := aware[named[0].name]:
            form.apply(loaded)
    loaded.eval().requires_grad_(False)
    accelerate(loaded)
    if tokenizer.chat_template is None and named:
        tokenizer.chat_template = named[0].tokenizer.chat_template
    config = loaded.config.get_text_config()
    positions = min(getattr(config, "max_position_embeddings", CACHE_TOKENS), CACHE_TOKENS)

    def served(name: str, tokenizer: Any, using: Any) -> Served:
        return Served(
            name,
            Encoder(copy.deepcopy(tokenizer)),
            tokenizer,
            using,
            stop_tokens=stop_tokens(loaded, tokenizer),
            positions=positions,
            vocabulary=config.vocab_size,
        )

    names = [one.name for one in named]
    base_name = _last_part(name)
    found = [
        served(one.name, one.tokenizer, partial(with_adapter, loaded, one.adapter.name))
        for one in named
    ]
    plain = partial(without_adapters, loaded) if named else _as_it_is
    found.append(served("base" if base_name in names else base_name, tokenizer, plain))
    # An adapter may have added tokens.
    texts = max([tokenizer, *(one.tokenizer for one in named)], key=len)
    generator = partial(Generator, loaded, texts, cache_tokens=CACHE_TOKENS)
    return found, Worker(loaded, generator, waiting=limits.waiting)


def _adapters(
    model: str, source: str, trained: Trained | None, more: Sequence[str]
) -> list[_Named]:
    """Those of the model's own name, and those that are asked for beside them."""
    found: list[_Named] = []
    folder: Path | None = None

    def add(name: str, trained: Trained, path: Path) -> None:
        nonlocal folder
        if name in [one.name for one in found]:
            raise UserError(f"two adapters are called {name}; give --adapter OTHER=FOLDER")
        adapter = read_adapter(path, f"served_{len(found)}")
        folder = folder or trained.base_folder
        check_base(folder, [(adapter, 1.0)])
        found.append(_Named(name, adapter, load_tokenizer_of(trained, folder)))

    if trained is not None:
        own = user_path(model).resolve()
        own = own.parent if own.name == "adapter" else own
        for name, path in trained.adapters.items():
            add(own.name if name == "default" else name, trained, path)
    for text in more:
        name, equals, place = text.partition("=")
        if not (name and equals and place):
            raise UserError(f"--adapter {text}: expected NAME=FOLDER")
        other = find_trained(place, source)
        if len(other.adapters) != 1:
            what = "several adapters" if other.adapters else "a whole model"
            raise UserError(f"--adapter {text}: holds {what}; give the folder of one adapter")
        folder_of = next(iter(other.adapters.values()))
        here = None if trained is None else trained.packing
        if other.packing != here:
            raise UserError(
                f"--adapter {text}: was trained over the base {_form(other.packing)}, it is "
                f"{_form(here)} here; give {folder_of} to have it over this one"
            )
        add(name, other, folder_of)
    return found


def _form(packing: Packing | None) -> str:
    return "as its files have it" if packing is None else f"in {packing.format}"


def _last_part(name: str) -> str:
    """What a model is called: of a folder or a file its own name, else all of it."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


@contextmanager
def _listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"--port {port}: {HOST} does not give it: {reason(error)}; give another, or 0 for "
                "any that is free"
            ) from error
        yield listener


def run_server(app: "ASGIApp", listener: socket.socket) -> None:
    """Until a signal; answers that are being written then have some seconds to end."""
    server = make_server(app)
    # uvicorn takes both signals, ends, and raises them once more for whoever had them before.
    before = {number: signal.signal(number, _nothing) for number in _SIGNALS}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_server(app: "ASGIApp") -> Any:
    """The uvicorn.Server of an application, which prints nothing."""
    import uvicorn

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_SECONDS_TO_END,
        )
    )


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _nothing(number: int, frame: object) -> None:
    pass
