"""`lora-engine merge`, and the held-out rows that merged and exported models are compared on."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_engine.app.finetune import prepare_data
from lora_engine.app.trained import Tell, Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.data import prepare
from lora_engine.data.docstrings import docstring_records
from lora_engine.errors import UserError
from lora_engine.export.adapter import Adapter
from lora_engine.export.folder import check_space, result_folder, write_report
from lora_engine.export.merge import merge_folder
from lora_engine.export.verify import TOLERANCES, compare
from lora_engine.models.load.load import DTYPES
from lora_engine.models.load.origin import base_of_folder
from lora_engine.training.run.card import merged_card

MERGE_REPORT = "merge_report.json"
_ROWS = 64


def merge(
    run: str,
    to: str,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    dtype: str | None = None,
    data: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Merge a run's adapter into its base, verify it, and put it in the folder `to`.

    Returns what merge_report.json holds. Raises UserError for what cannot be merged, and if the
    merged weights do not compute what the adapter did; `to` is then as it was.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    trained = find_trained(run, base)
    chosen = trained.read(adapters)
    folder = trained.base_folder
    check_base(folder, chosen)
    names = [adapter.name for adapter, _ in chosen]
    name, rows = heldout_rows(trained, folder, names, data) if verify else ("", [])
    with result_folder(to, MERGE_REPORT, overwrite=overwrite) as target:
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        check_space(target, size)
        tell(f"merging {', '.join(names)} into {trained.base}")
        report = {
            "base": asdict(base_of_folder(folder)),
            "adapters": {adapter.name: weight for adapter, weight in chosen},
            **put_merged(folder, chosen, target, dtype, name, rows, to),
        }
        write_report(target, MERGE_REPORT, report)
    return report


def put_merged(
    base: Path,
    chosen: Sequence[tuple[Adapter, float]],
    target: Path,
    dtype: str | None,
    name: str,
    rows: Sequence[Sequence[int]],
    to: str,
) -> dict[str, Any]:
    """Write the merged model into the empty folder `target`, and compare it on `rows`, if any.

    name: of the rows. to: what the user calls the folder. Returns what a report says of it.
    """
    merged = merge_folder(base, chosen, target, DTYPES.get(dtype or ""))
    report: dict[str, Any] = {"merged": asdict(merged), "verified": None}
    if rows:
        found = compare(base, chosen, target, rows)
        tolerance = TOLERANCES[merged.dtypes[0] if merged.dtypes else "float32"]
        report["verified"] = {"rows": name, **asdict(found), "tolerance": asdict(tolerance)}
        if problem := found.problem(tolerance):
            raise UserError(
                f"the merged weights do not compute what the adapter does: {problem}; nothing was "
                f"written to {to}; try --dtype float32"
            )
    card = merged_card(base_of_folder(base), [a.folder for a, _ in chosen])
    (target / "README.md").write_text(card, encoding="utf-8")
    return report


def heldout_rows(
    trained: Trained, base: Path, adapters: Sequence[str], data: str | None
) -> tuple[str, list[list[int]]]:
    """Rows of token ids to compare on, and what they are called.

    From `data`, else from what the run held out, else the standard library's docstrings as text.
    """
    tokenizer = load_tokenizer_of(trained, base)
    if data is None and trained.config is not None:
        examples = prepare_data(trained.config.data, tokenizer)[1]
        own = [list(e.input_ids) for e in examples if e.adapter in ("", *adapters)]
        return f"{examples.name}", own[:_ROWS]
    if data is None or data == "docstrings":
        texts = [record.messages[0]["content"] for record in docstring_records()[:_ROWS]]
        return "docstrings", [tokenizer.encode(str(text)) for text in texts]
    return data, [list(e.input_ids) for e in prepare(data, tokenizer, limit=_ROWS)]
