"""What pages of the repository name exists: links, anchors, pictures, files, commands, symbols."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kernels").rglob("*.md")),
    *sorted((ROOT / "tests").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PICTURE = re.compile(r"\b(?:src|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"`([^`\n]+)`")
# Names of sources; data and results of a run are not in the repository.
SOURCE = re.compile(r"^[\w./-]+\.(?:py|cpp|hpp|cu|cuh|j2)$")
FOLDER = re.compile(r"^(?:lora_engine|csrc|kernels|tests|benchmarks|docs)(?:/[\w-]+)*/?$")
# Of other projects.
FOREIGN = {"tests/test_decoder_models.py"}
MODULE = re.compile(r"python -m ((?:lora_engine|benchmarks)[\w.]*)")
TARGET = re.compile(r"(?:^|`)make ([a-z][a-z-]*)", re.M)
# `name`, `part.name`, `name(…)` or `name=…`, and where names stand that are the tree's own or known
# to it. Instructions and other projects' names are listed.
SYMBOL = re.compile(r"([A-Za-z_][\w.]*)(?:\(.*\)|=.*)?")
SOURCES = re.compile(r"\.(?:py|cpp|hpp|cu|cuh|j2|toml|yaml)$|^Makefile$")
FOREIGN_SYMBOLS = {
    "AutoPeftModelForCausalLM",
    "BitsAndBytesConfig",
    "bnb_4bit_compute_dtype",
    "init_continuous_batching",
    "maxnreg",
    "prefetcht1",
    "tf32x3",
    "vdpbf16ps",
    "vmap",
}


@cache
def files() -> list[str]:
    """What git tracks or would, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # an unpacked source distribution
        return [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    return [name for name in done.stdout.splitlines() if (ROOT / name).exists()]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in [*LINK.findall(prose(page)), *PICTURE.findall(page.read_text())]:
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


def missing_names(page: Path) -> list[str]:
    """Names of files and folders in backticks that no file or folder of the tree ends with."""
    known = files()
    missing = []
    for name in CODE.findall(prose(page)):
        if name in FOREIGN:
            continue
        if SOURCE.match(name):
            tail = name.removeprefix("./").removeprefix("../")
            if not any(path == tail or path.endswith(f"/{tail}") for path in known):
                missing.append(name)
        elif FOLDER.match(name) and not any(
            path == name or path.startswith(f"{name.rstrip('/')}/") for path in known
        ):
            missing.append(name)
    return missing


def missing_modules(page: Path) -> list[str]:
    """Modules of ours that a command runs and that are no file."""
    known = files()
    modules = MODULE.findall(page.read_text())
    return [m for m in modules if f"{m.rstrip('.').replace('.', '/')}.py" not in known]


def missing_targets(page: Path) -> list[str]:
    """Targets of make that the Makefile does not have."""
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    return [target for target in TARGET.findall(page.read_text()) if target not in known]


@cache
def words() -> set[str]:
    """The identifiers in all sources but this file, and the parts of the files' names."""
    known = {part for name in files() for part in re.split(r"[/.]", name)}
    for name in files():
        if SOURCES.search(name) and ROOT / name != Path(__file__).resolve():
            known |= set(re.findall(r"[A-Za-z_]\w*", (ROOT / name).read_text(encoding="utf-8")))
    return known | FOREIGN_SYMBOLS


def missing_symbols(page: Path) -> list[str]:
    """Code in backticks that looks like a name, with a part that stands in no source."""
    symbols = (code for code in CODE.findall(prose(page)) if code not in FOREIGN)
    named = ((code, match[1]) for code in symbols if (match := SYMBOL.fullmatch(code)))
    return [code for code, name in named if not set(filter(None, name.split("."))) <= words()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_names(page) == []
    assert missing_modules(page) == []
    assert missing_targets(page) == []
    assert missing_symbols(page) == []


def test_what_does_not_exist_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        '# One\n[a](gone.md) [b](#one) [c](#two) <img src="no.svg">\n'
        "`setup.py` `lora_engine/ops` `ops/lost.py` `lora_engine/lost/`\n"
        "`python -m benchmarks.lost.name`\n"
        "`make test` `make lostcause`\n"
        "`ops.rms_norm` `ops.lost_norm(x)` `lost_option=3`\n"
    )
    assert broken_links(page) == ["gone.md", "#two", "no.svg"]
    assert missing_names(page) == ["ops/lost.py", "lora_engine/lost/"]
    assert missing_modules(page) == ["benchmarks.lost.name"]
    assert missing_targets(page) == ["lostcause"]
    assert missing_symbols(page) == ["ops.lost_norm(x)", "lost_option=3"]
