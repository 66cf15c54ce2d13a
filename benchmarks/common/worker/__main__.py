"""A process that runs one contender of a job, or measures the machine for it.

python benchmarks/common/worker JOB CONTENDER FOLDER [POINT]

It is run by its folder, which is then where Python looks first: a working directory with a package
`benchmarks` of its own, as many checkouts have, does not stand before ours.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.jobs import CEILING, job_of
from lora_engine.text import one_line

LONGEST_MESSAGE = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Writes FOLDER/result.json; options are in FOLDER/options.json. 1 after an error, which is
    then `failed` in the result."""
    name, contender, place, *rest = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("ignore")
    folder, point = Path(place), rest[0] if rest else ""
    try:
        result, status = measure(name, contender, folder, point), 0
    except Exception as error:
        traceback.print_exc()
        said = f"{type(error).__name__}: {one_line(str(error))}"
        result, status = {"failed": said[:LONGEST_MESSAGE]}, 1
    (folder / "result.json").write_text(json.dumps(result))
    return status


def measure(name: str, contender: str, folder: Path, point: str) -> object:
    """What the contender's steps, or the machine's products, came to."""
    job = job_of(name)
    options = json.loads((folder / "options.json").read_text())
    if job.points and point:
        options["point"] = int(point)
    if contender == CEILING:
        assert job.rate is not None
        return job.rate(folder, options)
    return asdict(job.run(folder, options, contender))


if __name__ == "__main__":
    sys.exit(main())
