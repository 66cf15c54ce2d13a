"""Whether two revisions train to the same bits: losses and final weights, one value by the other.

    python benchmarks/train/same_bits.py main HEAD
    python benchmarks/train/same_bits.py HEAD~3 HEAD dora dropout

Runs short_trainings.py with lora_engine as it is at each revision. Exit status 1 if any bit differs
or a training fails at either. An extension of the same sources is built once and kept in
build/extensions; the checkout's own is taken where it is of these sources.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # started by its path, which puts its own folder on the import path, not ROOT
    sys.path[0] = str(ROOT)

from benchmarks.common.text_table import table  # noqa: E402
from benchmarks.train.short_trainings import CASES  # noqa: E402

EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
EXTENSION_SOURCES = ("csrc", "setup.py")
SHOWN = 3  # differing tensors that a line names


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same at both revisions.

    count: how many of its `total` values differ; largest: by how much at most, NaN where one is.
    first: the index of the first, in a flat tensor.
    """

    name: str
    count: int
    total: int
    largest: float
    first: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.count} of {self.total} values, from [{self.first}] on, "
            f"by at most {self.largest:.1e}"
        )


@dataclass(frozen=True)
class Verdict:
    """What the comparison of one training said; `problems` is empty for the same bits."""

    case: str
    steps: int = 0
    values: int = 0
    last_loss: float = float("nan")
    problems: tuple[str, ...] = ()


def compare_tensors(name: str, a: Tensor, b: Tensor) -> Difference | str | None:
    """Where two tensors' bits differ, or in words why they cannot be compared; None: the same.

    NaNs of the same bits are the same, 0 and -0 are not.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name}: {list(a.shape)} {a.dtype}, then {list(b.shape)} {b.dtype}"
    size = a.element_size()
    bits = [x.contiguous().view(-1).view(torch.uint8).view(-1, size) for x in (a, b)]
    differs = (bits[0] != bits[1]).any(dim=1)
    if not differs.any():
        return None
    where = differs.nonzero().flatten()
    distance = (a.reshape(-1)[where].double() - b.reshape(-1)[where].double()).abs()
    return Difference(name, len(where), a.numel(), distance.max().item(), int(where[0]))


def compare(case: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Verdict:
    """Two results of one training, as short_trainings.py writes them."""
    problems = [f"{name}: only at the first" for name in a if name not in b]
    problems += [f"{name}: only at the second" for name in b if name not in a]
    found = [compare_tensors(name, a[name], b[name]) for name in a if name in b]
    problems += [str(difference) for difference in found if difference is not None]
    loss = a["loss"]
    return Verdict(
        case,
        steps=len(loss),
        values=sum(tensor.numel() for tensor in a.values()),
        last_loss=loss[-1].item() if len(loss) else float("nan"),
        problems=tuple(problems),
    )


def compare_folders(case: str, folders: Sequence[Path]) -> Verdict:
    """The results of a training in two folders; a training that failed is a problem."""
    paths = [folder / f"{case}.safetensors" for folder in folders]
    failed = []
    for which, path in zip(("first", "second"), paths, strict=True):
        if not path.exists():
            error = path.with_suffix(".error")
            said = error.read_text().strip().splitlines() if error.exists() else []
            failed.append(f"failed at the {which}: {said[-1] if said else 'no result'}")
    if failed:
        return Verdict(case, problems=tuple(failed))
    return compare(case, *(load_file(path) for path in paths))


def render(verdicts: Sequence[Verdict]) -> str:
    """A line for each training, and what differs below."""
    rows = [
        [
            verdict.case,
            str(verdict.steps),
            f"{verdict.values:,}",
            f"{verdict.last_loss:.6f}",
            f"{len(verdict.problems)} differ" if verdict.problems else "same bits",
        ]
        for verdict in verdicts
    ]
    lines = [table(["training", "steps", "values", "last loss", "verdict"], rows), ""]
    for verdict in verdicts:
        more = len(verdict.problems) - SHOWN
        lines += [f"{verdict.case}: {problem}" for problem in verdict.problems[:SHOWN]]
        lines += [f"{verdict.case}: and {more} more"] if more > 0 else []
    different = sum(bool(verdict.problems) for verdict in verdicts)
    lines.append(f"{len(verdicts) - different} of {len(verdicts)} trainings have the same bits.")
    return "\n".join(lines)


def git(*args: str) -> str:
    """What git says about this checkout."""
    done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def install(revision: str, folder: Path) -> Path:
    """lora_engine as it is at `revision`, extension included, as a folder for PYTHONPATH."""
    sources, packages = folder / "sources", folder / "packages"
    sources.mkdir(parents=True)
    archive = subprocess.Popen(["git", "-C", ROOT, "archive", revision], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", sources], stdin=archive.stdout, check=True)
    if archive.wait():
        sys.exit(f"git archive {revision} failed")
    run_setup(sources, "build_py", packages)
    shutil.copy2(extension_of(revision, sources), packages / "lora_engine" / EXTENSION)
    return packages


def extension_of(revision: str, sources: Path) -> Path:
    """The extension of a revision's sources: one built before, the checkout's, or a new one."""
    trees = [git("rev-parse", "--short=12", f"{revision}:{name}") for name in EXTENSION_SOURCES]
    kept = ROOT / "build" / "extensions" / "-".join(trees) / EXTENSION
    if kept.exists():
        return kept
    built = ROOT / "lora_engine" / EXTENSION
    if not is_built_of(built, revision):
        print(f"building the extension of {revision}", file=sys.stderr)
        run_setup(sources, "build_ext", sources / "built")
        built = sources / "built" / "lora_engine" / EXTENSION
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    shutil.copy2(built, partial)
    partial.replace(kept)
    return kept


def is_built_of(extension: Path, revision: str) -> bool:
    """Whether the checkout's `extension` is newer than its sources and those are the revision's."""
    same = ["git", "-C", ROOT, "diff", "--quiet", revision, "--", *EXTENSION_SOURCES]
    if not extension.exists() or subprocess.run(same).returncode:
        return False
    paths = [
        path for name in EXTENSION_SOURCES for path in (ROOT / name, *(ROOT / name).rglob("*"))
    ]
    return all(path.stat().st_mtime < extension.stat().st_mtime for path in paths)


def run_setup(sources: Path, command: str, out: Path) -> None:
    """`setup.py build_py` or `build_ext` of the tree `sources`, into `out`."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command, "--build-lib", out],
        cwd=sources,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"setup.py {command} failed:\n{done.stdout}{done.stderr}")


def start_trainings(packages: Path, out: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process that runs the wanted trainings with the lora_engine in `packages`."""
    script = Path(__file__).with_name("short_trainings.py")
    options = ["--out", out, "--device", args.device, "--threads", str(args.threads)]
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    return subprocess.Popen(
        [sys.executable, script, *options, "--expect", packages, *args.cases], env=environment
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "revisions", nargs=2, metavar="REVISION", help="what git knows by this name"
    )
    parser.add_argument("words", nargs="*", help="only trainings whose names hold one of these")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="of torch, for each revision")
    args = parser.parse_args(argv)
    words = args.words or [""]
    args.cases = [case for case in CASES if any(word in case for word in words)]
    if not args.cases:
        parser.error(f"no training is called so; there are: {'; '.join(CASES)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in args.revisions]
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folders = [Path(name) / side for side in ("first", "second")]
        processes = [
            start_trainings(install(commit, folder), folder / "results", args)
            for commit, folder in zip(commits, folders, strict=True)
        ]
        statuses = [process.wait() for process in processes]
        results = [folder / "results" for folder in folders]
        verdicts = [compare_folders(case, results) for case in args.cases]
    for which, name, commit in zip(("first", "second"), args.revisions, commits, strict=True):
        print(f"{which}: {name}, {git('log', '-1', '--format=%h %s', commit)}")
    print(render(verdicts))
    if any(statuses) or any(verdict.problems for verdict in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
