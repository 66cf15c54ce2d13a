"""One contender of one job; jobs.py starts a process for each.

python -m benchmarks.common.worker JOB CONTENDER FOLDER [POINT]
"""

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.jobs import CEILING, job_of


def main(argv: Sequence[str] | None = None) -> None:
    """Writes FOLDER/result.json; options are in FOLDER/options.json."""
    name, contender, place, *rest = sys.argv[1:] if argv is None else argv
    warnings.simplefilter("ignore")
    folder, job = Path(place), job_of(name)
    options = json.loads((folder / "options.json").read_text())
    if job.points and rest and rest[0]:
        options["point"] = int(rest[0])
    if contender == CEILING:
        assert job.rate is not None
        result: object = job.rate(folder, options)
    else:
        result = asdict(job.run(folder, options, contender))
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
