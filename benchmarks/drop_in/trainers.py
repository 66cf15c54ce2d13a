"""Other people's trainers with an accelerated model.

    python -m benchmarks.drop_in.trainers --parity --out benchmarks/results/trainers_parity
    python -m benchmarks.drop_in.trainers --page benchmarks/results/trainers_parity.json

--parity: does each log and learn what it does without lora_engine? Exit status 1 if not.
--page: write a result's table into docs/drop-in.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import output
from benchmarks.common.generated import GeneratedPart
from benchmarks.drop_in.trainer_cases import (
    STEPS,
    TOLERANCE,
    WHEN,
    Case,
    log_difference,
    run,
    weight_difference,
)
from benchmarks.drop_in.trainer_setups import HUGGING_FACE, TRL

PAGE = Path(__file__).parents[2] / "docs/drop-in.md"
PART = GeneratedPart("python -m benchmarks.drop_in.trainers --page", "the trainers' table")
CASES = {
    **{f"TRL {name}": case for name, case in TRL.items()},
    **{f"transformers Trainer, {name}": case for name, case in HUGGING_FACE.items()},
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--parity", action="store_true", help="run every trainer with and without")
    what.add_argument("--page", type=Path, metavar="RESULT.json", help="write its table")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def compare(case: Case) -> dict[str, dict[str, Any]]:
    """By when the model is accelerated: the largest differences, and where; or the error."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="trainers-") as name:
        theirs = run(case, None, Path(name, "plain"))
        for when in WHEN:
            try:
                ours = run(case, when, Path(name, when))
            except Exception as error:  # whatever a trainer does not survive is a result
                found[when] = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
                continue
            logged, what = log_difference(ours, theirs, case.but)
            weights, which = weight_difference(ours, theirs)
            found[when] = {"logged": logged, "what": what, "weights": weights, "which": which}
    return found


def is_same(difference: dict[str, Any]) -> bool:
    """Whether all that was logged and learned is within the tolerance."""
    return "error" not in difference and max(of_both(difference)) <= TOLERANCE


def of_both(difference: dict[str, Any]) -> tuple[float, float]:
    """The largest differences of what was logged and of weights."""
    return difference["logged"], difference["weights"]


def parity_table(result: dict[str, Any]) -> str:
    """A row for each trainer, as Markdown."""
    rows = [
        [name, *(verdict(differences[when]) for when in WHEN)]
        for name, differences in result["trainers"].items()
    ]
    return output.table(["trainer", *(f"accelerated {when}" for when in WHEN)], rows, left=3)


def verdict(difference: dict[str, Any]) -> str:
    """What one cell of the table says."""
    if "error" in difference:
        return f"stops: {difference['error']}"
    word = "same" if is_same(difference) else "**differs**"
    return "{}, {:.0e} and {:.0e}".format(word, *of_both(difference))


def with_table(page: str, result: Path) -> str:
    """The page with the result's table where its markers are; ValueError if they are not there."""
    return PART.put(page, result, parity_table(json.loads(result.read_text())))


def render(result: dict[str, Any]) -> str:
    """The whole result as Markdown that also reads well in a terminal."""
    return "\n\n".join(
        [
            "# Other people's trainers, float32",
            output.header(result),
            parity_table(result),
            "Accelerated before or after the trainer was built. Largest differences of what is "
            f"logged in {STEPS} steps and of the weights after them; tolerance {TOLERANCE:.0e}.",
        ]
    )


def main() -> None:
    args = parse_arguments()
    if args.page:
        PAGE.write_text(with_table(PAGE.read_text(), args.page))
        return
    import datasets

    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    result = {**output.context(), "trainers": {}}
    for name, case in CASES.items():
        result["trainers"][name] = compare(case)
        print(name, *(f"{w}: {verdict(d)}" for w, d in result["trainers"][name].items()), sep=" | ")
    text = render(result)
    print(text)
    if args.out:
        for path in output.write(args.out, result, text):
            print(f"wrote {path}", file=sys.stderr)
    if not all(is_same(d) for each in result["trainers"].values() for d in each.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
