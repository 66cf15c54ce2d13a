"""The report's pages, from the templates beside this file, and which files they may replace."""

import tempfile
from pathlib import Path

from lora_engine.errors import UserError
from lora_engine.files import naming, user_path
from lora_engine.text import visible

# Marks by which a page is known again.
COMPARISON, EVALUATION = (
    f'<meta name="generator" content="lora-engine {name}">' for name in ("compare", "evaluate")
)


def rendered(template: str, **values: object) -> str:
    """The page of a file in templates/, whose values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lora_engine.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = visible
    return environment.get_template(template).render(**values)


def page_path(name: str, mark: str) -> Path:
    """The file `name`, which holds nothing, or a page with that mark. Raises UserError."""
    try:
        path = user_path(name)
    except ValueError as error:
        raise UserError(f"--html: {error}") from error
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a file's name with --html")
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path}: holds something else; give another name with --html")
    with naming(path):  # what cannot be written is told before anything is measured
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    return path
