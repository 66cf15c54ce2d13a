"""`lora-engine merge`, and the held-out rows that merged and exported models are compared on."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_engine.app.config import RunConfig
from lora_engine.app.datasets import prepare_data, prepare_prompt_data
from lora_engine.app.merge_aware import ServedAs
from lora_engine.app.trained import Tell, Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.data import prepare
from lora_engine.data.docstrings import docstring_records
from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter
from lora_engine.export.folder import check_space, result_folder, write_report
from lora_engine.export.merge import copy_beside, merge_folder
from lora_engine.export.packed import Packed, Packing, dense_folder, load_packed, pack_folder
from lora_engine.export.verify import TOLERANCES, compare, packed_tolerance
from lora_engine.export.weights import read_config
from lora_engine.models.load.load import DTYPES
from lora_engine.models.load.origin import base_of_folder
from lora_engine.quantization.formats import writable_format
from lora_engine.training.run.card import MergedForm, merged_card

MERGE_REPORT = "merge_report.json"
_ROWS = 64
_READ_BY_TRANSFORMERS = ("nf4", "fp4")  # of what is packed, with bitsandbytes


def merge(
    run: str,
    to: str,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    quantize: str | None = None,
    double_quant: bool = False,
    data: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Merge a run's adapter into its base, verify it, and put it in the folder `to`.

    quantize, double_quant: the format of the merged linears' weights, see `load_model`; of a
    merge-aware adapter the one that it was trained for if None, and "none" for weights of 16 bits.
    Returns what merge_report.json holds. Raises UserError for what cannot be merged, and if the
    merged weights do not compute what the adapter did; `to` is then as it was.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    trained = find_trained(run, base)
    trained, chosen = trained.choose(adapters)
    served = trained.served_as
    packing = _packing(quantize, double_quant, served)
    if served is not None and packing != served.packing:
        tell(
            f"note: the adapter learned over weights that it was merged into, in {served}; what is "
            f"written now, {'16 bits' if packing is None else packing.format}, is something else"
        )
        served = None
    if served is not None and dtype is None:
        dtype = served.dtype_name
    folder = trained.base_folder
    check_base(folder, chosen)
    names = [adapter.name for adapter, _ in chosen]
    name, rows = heldout_rows(trained, folder, names, data) if verify else ("", [])
    sources, over = [trained.folder, folder], trained.packing
    with result_folder(to, MERGE_REPORT, overwrite=overwrite, sources=sources) as target:
        form = None if packing is None else packing.format
        check_space(target, bytes_to_write(folder, over=over, quantize=form))
        tell(f"merging {', '.join(names)} into {trained.base}{told_of(over)}")
        rounded = None if served is None else served.dtype
        with dense_folder(folder, target, over, rounded) as dense:
            report = {
                **about(trained, folder, chosen),
                **put_merged(
                    *(folder, dense, chosen, target, dtype, name, rows, to, packing, served)
                ),
            }
        write_report(target, MERGE_REPORT, report)
    return report


def _packing(format: str | None, double_quant: bool, served: ServedAs | None) -> Packing | None:
    if format is None and not double_quant and served is not None:
        return served.packing
    if format is None or (format == "none" and served is not None):
        if double_quant:
            raise UserError("--double-quant needs packed weights; add --quantize nf4 or fp4")
        return None
    try:
        writable_format(format, None, double_quant)
    except ValueError as error:
        raise UserError(f"--quantize: {error}") from error
    if served is not None and served.packing.is_in(format, double_quant):
        return served.packing
    return Packing(format, double_quant)


def about(trained: Trained, base: Path, chosen: Sequence[tuple[Adapter, float]]) -> dict[str, Any]:
    """What a report says of what is merged. trained_over: the packed bits that the run put the
    base's linears into, whose values the adapters are merged into; None where it did not.
    trained_for: the packed bits that a merge-aware adapter was trained in; None for another."""
    return {
        "base": asdict(base_of_folder(base)),
        "trained_over": as_json(trained.packing),
        "trained_for": None if trained.served_as is None else as_json(trained.served_as.packing),
        "adapters": {adapter.name: weight for adapter, weight in chosen},
    }


def as_json(packing: Packing | None) -> dict[str, Any] | None:
    """The packed bits that a run had its base in."""
    return None if packing is None else asdict(packing)


def told_of(packing: Packing | None, served: ServedAs | None = None) -> str:
    """Of the base: that it has the values of the run's packed bits, or has the adapter in them."""
    if served is not None:
        return f", its linears merged into {served.packing.format} as the run had them"
    return "" if packing is None else f", its linears in {packing.format} as the run had them"


def bytes_to_write(base: Path, *, over: Packing | None, quantize: str | None = None) -> int:
    """About so many: what is packed, or was `over` packed bits, is written unpacked as well, and
    removed, and so is what will be packed."""
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    is_packed = bool(read_config(base).get("quantization_config"))
    copies = 1 + (is_packed or over is not None) + (quantize is not None)
    return size * (4 if is_packed else 1) * copies


def put_merged(
    base: Path,
    dense: Path,
    chosen: Sequence[tuple[Adapter, float]],
    target: Path,
    dtype: str | None,
    name: str,
    rows: Sequence[Sequence[int]],
    to: str,
    packing: Packing | None = None,
    served: ServedAs | None = None,
) -> dict[str, Any]:
    """Write the merged model into the empty folder `target`, and compare it on `rows`, if any.

    dense: the base unpacked, `dense_folder`'s. name: of the rows. to: what the user calls the
    folder. served: what the adapter learned over, where that is what is written: the result then
    has to be what the training computed with. Returns what a report says of it.
    """
    merged = target if packing is None else target / "merged"
    merged.mkdir(exist_ok=True)
    done = merge_folder(dense, chosen, merged, DTYPES.get(dtype or ""))
    report: dict[str, Any] = {"merged": asdict(done), "packed": None, "verified": None}
    tolerance = TOLERANCES[done.dtypes[0] if done.dtypes else "float32"]
    if packing is not None:
        packed = _packed(merged, target, packing)
        report["packed"] = asdict(packed)
        if served is None:
            tolerance = packed_tolerance(packed.bits)
    if rows:
        load = None if packing is None else load_packed
        prepare = None if served is None else served.apply
        found = compare(dense, chosen, target, rows, load=load, prepare=prepare)
        report["verified"] = {"rows": name, **asdict(found), "tolerance": asdict(tolerance)}
        if problem := found.problem(tolerance):
            raise UserError(
                f"the merged weights do not compute what the adapter does: {problem}; nothing "
                f"was written to {to}; use {_instead(packing, report['packed'])}"
            )
    of_transformers = packing is None or packing.format in _READ_BY_TRANSFORMERS
    form: MergedForm = "model" if of_transformers else "packed"
    card = merged_card(base_of_folder(base), [a.folder for a, _ in chosen], form)
    (target / "README.md").write_text(card, encoding="utf-8")
    return report


def _instead(packing: Packing | None, packed: dict[str, Any] | None) -> str:
    """What may keep what the adapter changes where this does not."""
    if packing is None or packed is None:
        return "--dtype float32"
    more = "--quantize int8, or " if packed["bits"] < 8 else ""
    return f"{more}no --quantize, or the adapter beside its base"


def _packed(merged: Path, target: Path, packing: Packing) -> Packed:
    """The model in `merged`, put into packed bits in `target` and removed where it was."""
    packed = pack_folder(merged, target, packing)
    copy_beside(merged, merged, target)
    shutil.rmtree(merged)
    return packed


def _held_out(
    config: RunConfig, tokenizer: Any, adapters: Sequence[str]
) -> tuple[str, list[list[int]]]:
    """What the run held out: its examples, or the prompts that it would answer."""
    read = prepare_prompt_data if config.writes else prepare_data
    examples = read(config.data, tokenizer)[1]
    own = [list(e.input_ids) for e in examples if e.adapter in ("", *adapters)]
    return examples.name, own[:_ROWS]


def heldout_rows(
    trained: Trained, base: Path, adapters: Sequence[str], data: str | None
) -> tuple[str, list[list[int]]]:
    """Rows of token ids to compare on, and what they are called.

    From `data`, else from what the run held out, else the standard library's docstrings as text.
    """
    tokenizer = load_tokenizer_of(trained, base)
    if data is None and trained.config is not None:
        try:
            return _held_out(trained.config, tokenizer, adapters)
        except UserError as error:
            raise UserError(
                f"the rows that the run held out: {error}; or give --data to compare on others"
            ) from error
    if data is None or data == "docstrings":
        texts = [record.messages[0]["content"] for record in docstring_records()[:_ROWS]]
        return "docstrings", [tokenizer.encode(str(text)) for text in texts]
    return data, [list(e.input_ids) for e in prepare(data, tokenizer, limit=_ROWS)]
