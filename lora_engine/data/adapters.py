"""Which adapter learns from which example, where several are trained over one base."""

from collections.abc import Sequence

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.errors import UserError, nearest


def check_adapters(dataset: TokenizedDataset, names: Sequence[str]) -> None:
    """Checks the adapters that the examples name against those that are trained, `names`.

    With one adapter, or none, examples need not name it; with several each has to. Raises
    UserError for the first that does not fit, with its place and how many more there are.
    """
    problems = [
        f"{example.origin}: {problem}"
        for example in dataset
        if (problem := _problem(example.adapter, names)) is not None
    ]
    if problems:
        more = f" ({len(problems) - 1} more after this one)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


def _problem(adapter: str, names: Sequence[str]) -> str | None:
    if not adapter:
        if len(names) < 2:
            return None
        return f"names no adapter; give every record 'adapter': {' or '.join(names)}"
    if adapter in names:
        return None
    if not names:
        return f"names the adapter {adapter!r}, but no adapter is trained"
    close = nearest(adapter, names)
    hint = f"did you mean {close}?" if close else f"there is {', '.join(names)}"
    return f"no adapter {adapter!r} is trained; {hint}"
