"""Does `accelerate` leave small models of transformers' classes right? Exit status 1 if not.

`python -m benchmarks.drop_in.drop_in_grid --write` runs it, in a few minutes, and writes
benchmarks/results/drop_in_grid.json and the table in docs/drop-in.md that is made of it.
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import lora_engine
from benchmarks.common import output
from benchmarks.drop_in.drop_in_cells import CELLS, TOLERANCE, distance, of_kind
from benchmarks.drop_in.drop_in_models import Configuration, configurations
from benchmarks.drop_in.drop_in_table import write_results

ADAPTATIONS = ("LoRA", "experts", "full")
RIGHT, WRONG, CRASH, OWN = "right", "wrong", "crash", "transformers' own raises"


def adapted(model: Any, adaptation: str, kind: str) -> Any:
    """The model with adapters of random A and B; None where PEFT has nothing to adapt."""
    if adaptation == "full":
        return model
    import peft

    tasks = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": tasks.get(kind)}
    if "mamba" in model.config.model_type or model.config.model_type in ("falcon_h1", "nemotron_h"):
        options["exclude_modules"] = ["out_proj", "conv1d"]  # which PEFT refuses there
    else:
        options["exclude_modules"] = ["router"]  # some are linears that return two tensors
    options["target_modules"] = "all-linear" if adaptation == "LoRA" else ["q_proj", "v_proj"]
    if adaptation == "experts":
        experts = [n for n, p in model.named_parameters() if p.dim() == 3 and "experts" in n]
        if not experts:
            return None
        options["target_parameters"] = experts
    made = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    return made


def row(configuration: Configuration, adaptation: str) -> dict[str, Any] | None:
    """One row of the grid; None where there is nothing to adapt."""
    found: dict[str, Any] = {"name": configuration.name, "adaptation": adaptation}
    found["class"] = configuration.model_class
    try:
        plain = configuration.build()
    except Exception as error:
        return found | {"skipped": _said(error)}
    plain = adapted(plain, adaptation, configuration.kind)
    if plain is None:
        return None
    model = copy.deepcopy(plain)
    try:
        report = lora_engine.accelerate(model)
    except Exception as error:
        return found | {"cells": {"accelerate": {"outcome": CRASH, "detail": _said(error)}}}
    found["left"] = list(dict.fromkeys(f"{e.operation}: {e.detail}" for e in report.left))
    found["weights"] = report.served / max(1, report.weights)
    found["flops"] = report.served_flops / max(1.0, report.flops)
    asked = [name for name in CELLS if of_kind(name, configuration.kind)]
    found["cells"] = {name: _cell(name, plain, model, configuration.kind) for name in asked}
    return found


def _cell(name: str, plain: Any, model: Any, kind: str) -> dict[str, Any]:
    torch.manual_seed(2)
    try:
        theirs = CELLS[name](plain, kind)
    except Exception as error:
        return {"outcome": OWN, "detail": _said(error)}
    torch.manual_seed(2)
    try:
        ours = CELLS[name](model, kind)
    except Exception as error:
        return {"outcome": CRASH, "detail": _said(error)}
    error, where = distance(ours, theirs)
    if error > TOLERANCE:  # near a kink float32 alone decides: whose side is the truth on?
        exact = CELLS[name](copy.deepcopy(plain).double(), kind)
        error, where = distance(ours, exact)
    if error <= TOLERANCE:
        return {"outcome": RIGHT, "error": float(f"{error:.1e}")}
    return {"outcome": WRONG, "error": float(f"{error:.1e}"), "detail": where}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def rows(only: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the grid, or those of the configurations named."""
    for configuration in configurations():
        if only and configuration.name not in only:
            continue
        for adaptation in ADAPTATIONS:
            found = row(configuration, adaptation)
            if found is not None:
                yield found
                if "skipped" in found:
                    break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of configurations")
    parser.add_argument("--write", action="store_true", help="write the results and their table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    run = output.context()
    found = []
    for each in rows(options.only):
        found.append(each)
        bad = {n: c for n, c in each.get("cells", {}).items() if c["outcome"] in (WRONG, CRASH)}
        said = each.get("skipped") or (json.dumps(bad) if bad else "right")
        own = {c["detail"] for c in each.get("cells", {}).values() if c["outcome"] == OWN}
        print(each["name"], each["adaptation"], said, *own, sep=" | ", flush=True)
    if options.write:
        write_results({"run": run, "rows": found})
    cells = [c["outcome"] for each in found for c in each.get("cells", {}).values()]
    print({name: cells.count(name) for name in (RIGHT, WRONG, CRASH, OWN)})
    return 1 if WRONG in cells or CRASH in cells else 0


if __name__ == "__main__":
    sys.exit(main())
