"""`lora-engine export`: a run in the form that another program takes."""

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lora_engine.app.deploy import about, bytes_to_write, heldout_rows, put_merged, told_of
from lora_engine.app.trained import Tell, Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.errors import UserError, nearest
from lora_engine.export import gguf, llama_cpp
from lora_engine.export.adapter import Adapter
from lora_engine.export.folder import check_space, result_folder, write_report
from lora_engine.export.lint import lint, room_for
from lora_engine.export.ollama import modelfile
from lora_engine.export.packed import dense_folder
from lora_engine.export.verify import load_plain, with_adapters
from lora_engine.export.weights import MergedWeights
from lora_engine.models.load.load import DTYPES
from lora_engine.models.load.origin import base_of_folder, read_base
from lora_engine.training.run.card import MergedForm, merged_card

EXPORT_REPORT = "export_report.json"
ADAPTER_FILE = "adapter.gguf"
_USUAL_TYPE = "q8_0"
FORMATS = ("hf", "peft", "gguf", "gguf-lora", "vllm")


def export(
    run: str,
    to: str,
    *,
    format: str,
    kind: str | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    data: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Write what `run` trained to the folder `to`, in one of FORMATS.

    kind: of "gguf", one of `gguf.TYPES`, q8_0 if None. dtype: of "hf". The rest as for
    `deploy.merge`. Returns what export_report.json holds. Raises UserError for what the format
    cannot hold, and for a result that computes something else.
    """
    _check(format, FORMATS, "--format")
    _check_option("--type", kind, gguf.TYPES, format, "gguf")
    _check_option("--dtype", dtype, DTYPES, format, "hf")
    kind = kind or _USUAL_TYPE
    trained = find_trained(run, base)
    if not trained.adapters and (base or adapters):
        option = f"--base {base}" if base else f"--adapter {adapters[0]}"
        raise UserError(f"{option}: {trained.folder} is a whole model; leave it out")
    trained, chosen = trained.choose(adapters) if trained.adapters else (trained, [])
    if not chosen and format not in ("hf", "gguf"):
        raise UserError(
            f"{trained.folder}: is a whole model, it has no adapter; use --format hf or gguf"
        )
    if format in ("peft", "vllm"):
        return _export_adapter(trained, chosen, to, format, overwrite)
    if chosen and trained.served_as is not None:
        raise UserError(
            f"{trained.folder}: the adapter learned over weights that it was merged into, in "
            f"{trained.served_as}; first: lora-engine merge, then export the merged folder"
        )
    folder = trained.base_folder if chosen else trained.folder
    check_base(folder, chosen)
    names = [adapter.name for adapter, _ in chosen]
    wanted = verify and bool(chosen or format == "gguf")
    exact = wanted and format == "gguf" and kind != "f32" and llama_cpp.is_installed()
    name, rows = heldout_rows(trained, folder, names, data) if wanted else ("", [])
    sources = [trained.folder, folder]
    with result_folder(to, EXPORT_REPORT, overwrite=overwrite, sources=sources) as target:
        over = trained.packing
        check_space(target, bytes_to_write(folder, over=over) * (3 if exact else 1))
        report = {"format": format, **about(trained, folder, chosen), "verified": None}
        what = to if format == "hf" else "a GGUF adapter"
        what = f"a GGUF file of type {kind}" if format == "gguf" else what
        tell(f"writing {what}{told_of(over)}")
        with dense_folder(folder, target, over) as dense:
            if format == "hf":
                report |= put_merged(folder, dense, chosen, target, dtype, name, rows, to)
            elif format == "gguf-lora":
                report |= _gguf_lora(trained, dense, chosen, target, name, rows, tell)
                _write_card(target, folder, chosen, "gguf-lora", ADAPTER_FILE)
            else:
                called = base_of_folder(folder).name or folder.name
                report |= _gguf(trained, dense, called, chosen, target, kind, name, rows, tell)
                _write_card(target, folder, chosen, "gguf", f"model-{kind}.gguf")
        write_report(target, EXPORT_REPORT, report)
    return report


def _export_adapter(
    trained: Trained,
    chosen: Sequence[tuple[Adapter, float]],
    to: str,
    format: str,
    overwrite: bool,
) -> dict[str, Any]:
    """The adapter's own folder, looked through for what servers refuse."""
    if len(chosen) > 1 or chosen[0][1] != 1:
        raise UserError(
            f"--format {format} takes one adapter without a weight; use --format hf to add them up"
        )
    adapter = chosen[0][0]
    problems = lint(adapter)
    if trained.served_as is not None and format == "vllm":
        raise UserError(
            f"{adapter.folder}: is merge-aware, and vLLM would have the adapter beside its base; "
            "merge it with lora-engine merge"
        )
    if problems and format == "vllm":
        raise UserError(
            f"{adapter.folder}: vLLM and SGLang do not take this adapter: {'; '.join(problems)}; "
            "use --format hf, which merges it"
        )
    sources = [trained.folder]
    with result_folder(to, EXPORT_REPORT, overwrite=overwrite, sources=sources) as target:
        for path in sorted(adapter.folder.iterdir()):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
        report: dict[str, Any] = {
            "format": format,
            "adapters": {adapter.name: 1.0},
            "lint": problems,
        }
        if format == "vllm":
            named = f"{Path(to).absolute().name}={to}"
            report["command"] = (
                f"vllm serve {shlex.quote(_base_for_servers(trained, adapter))} --enable-lora "
                f"--max-lora-rank {room_for(adapter)} --lora-modules {shlex.quote(named)}"
            )
        write_report(target, EXPORT_REPORT, report)
    return report


def _base_for_servers(trained: Trained, adapter: Adapter) -> str:
    """The base as other programs find it: our short names are the hub's to them."""
    known = read_base(adapter.folder)
    is_here = Path(trained.base).exists()
    return known.hub_id if known and known.hub_id and not is_here else trained.base


def _write_card(
    target: Path,
    base: Path,
    chosen: Sequence[tuple[Adapter, float]],
    form: MergedForm,
    file: str,
) -> None:
    folders = [adapter.folder for adapter, _ in chosen]
    card = merged_card(base_of_folder(base), folders, form, file)
    (target / "README.md").write_text(card, encoding="utf-8")


def _gguf(
    trained: Trained,
    folder: Path,
    called: str,
    chosen: Sequence[tuple[Adapter, float]],
    target: Path,
    kind: str,
    name: str,
    rows: Sequence[Sequence[int]],
    tell: Tell,
) -> dict[str, Any]:
    config, tokenizer, stops = _config(folder), load_tokenizer_of(trained, folder), _stops(folder)
    write = partial(
        gguf.write_gguf,
        MergedWeights(folder, chosen),
        config,
        tokenizer,
        name=f"{called}, fine-tuned",
        stops=stops,
    )
    path = target / f"model-{kind}.gguf"
    written = write(path, kind)
    text = modelfile(path.name, tokenizer, stops)
    (target / "Modelfile").write_text(text, encoding="utf-8")
    report: dict[str, Any] = {"type": kind, "types": written.types}
    if rows:
        tensor, lost = gguf.check_values(path, MergedWeights(folder, chosen), config)
        report["farthest"] = {"tensor": tensor, "lost": lost}
    if rows and llama_cpp.is_installed():
        exact = None
        if kind != "f32":
            exact = target / "exact.gguf"
            write(exact, "f32", values_of=path)
        report["verified"] = _verified(
            path, folder, chosen, tokenizer, kind, name, rows, tell, exact=exact
        )
        if exact is not None:
            exact.unlink()
    return report


def _gguf_lora(
    trained: Trained,
    folder: Path,
    chosen: Sequence[tuple[Adapter, float]],
    target: Path,
    name: str,
    rows: Sequence[Sequence[int]],
    tell: Tell,
) -> dict[str, Any]:
    """The adapter's file, compared over the base's, which is written for that and removed."""
    if len(chosen) > 1 or chosen[0][1] != 1:
        raise UserError("--format gguf-lora takes one adapter without a weight; use --format gguf")
    called = base_of_folder(folder).name or folder.name
    path, config = target / ADAPTER_FILE, _config(folder)
    gguf.write_gguf_adapter(chosen[0][0], config, path, name=f"adapter of {called}")
    report: dict[str, Any] = {"type": "f32"}
    if rows and llama_cpp.is_installed():
        base, tokenizer = target / "base.gguf", load_tokenizer_of(trained, folder)
        gguf.write_gguf(MergedWeights(folder), config, tokenizer, base, "f16", name=called)
        report["verified"] = _verified(
            base, folder, chosen, tokenizer, "f16", name, rows, tell, adapter=path
        )
        base.unlink()
    return report


def _verified(
    path: Path,
    folder: Path,
    chosen: Sequence[tuple[Adapter, float]],
    tokenizer: Any,
    kind: str,
    name: str,
    rows: Sequence[Sequence[int]],
    tell: Tell,
    *,
    adapter: Path | None = None,
    exact: Path | None = None,
) -> dict[str, Any]:
    """What llama.cpp computes with the file, and an adapter's, beside the adapters on.

    exact: the file's weights in float32, with which llama.cpp has to compute what transformers
    does. Raises UserError where something else is computed.
    """
    tell(f"comparing llama.cpp with the adapter on, on {name}")
    model = load_plain(folder)
    model = with_adapters(model, chosen) if chosen else model
    found = llama_cpp.compare(path, model, tokenizer, rows, adapter=adapter)
    verified: dict[str, Any] = {"rows": name, **asdict(found)}
    if exact is not None:
        own = llama_cpp.next_tokens(model, rows)
        del model
        kept = load_plain(folder)
        gguf.put_values(path, kept)
        of_file = llama_cpp.next_tokens(kept, rows)
        verified["weights"] = asdict(llama_cpp.compare_tokens(own, of_file))
        beside = llama_cpp.compare_file(exact, of_file, rows)
        verified["exact"] = asdict(beside)
        _check_share(beside.top1, llama_cpp.TOP1_EXACT, "the file's weights in float32")
        _check_exact(beside)
    elif kind == "f32":
        _check_exact(found)
    _check_share(found.top1, llama_cpp.TOP1[kind], kind)
    decided = llama_cpp.TOP1_DECIDED.get(kind, 0.0)
    _check_share(found.top1_decided, decided, f"{kind} where it is no near tie")
    return verified


def _check_exact(beside: llama_cpp.Likeliest) -> None:
    """Of weights in float32: what is left is the order of sums, which moves no likeliest token but
    of near ties."""
    if beside.top1_decided < 1 or beside.logprob > llama_cpp.LOGPROB_EXACT:
        raise UserError(
            "llama.cpp computes something else with the file's weights in float32: "
            f"log-probabilities are {beside.logprob:.2g} nats off, at most "
            f"{llama_cpp.LOGPROB_EXACT:g} are usual, and the likeliest token agrees at "
            f"{beside.top1_decided:.1%} where it is no near tie; use --format hf"
        )


def _check_share(found: float, usual: float, what: str) -> None:
    if found < usual:
        raise UserError(
            f"llama.cpp computes something else with the file: the likeliest token agrees at "
            f"{found:.1%}, {usual:.0%} are usual for {what}; use another --type, or --format hf"
        )


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _stops(folder: Path) -> list[int]:
    """The tokens that end an answer, by the model's generation settings."""
    try:
        settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    ends = settings.get("eos_token_id")
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]


def _check_option(option: str, value: str | None, known: Any, format: str, its: str) -> None:
    """An option of the format `its` alone."""
    if value is None:
        return
    _check(value, known, option)
    if format != its:
        raise UserError(f"{option} {value}: is of --format {its}, not of {format}; leave it out")


def _check(value: str, known: Any, option: str) -> None:
    if value not in known:
        close = nearest(value, known)
        hint = f"did you mean {close}?" if close else f"use {', '.join(known)}"
        raise UserError(f"{option} {value!r} is unknown; {hint}")
