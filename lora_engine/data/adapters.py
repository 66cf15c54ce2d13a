"""Which adapter learns from which example, where several are trained over one base."""

from collections.abc import Sequence

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.data.listing import raise_listed
from lora_engine.errors import nearest


def check_adapters(dataset: TokenizedDataset, names: Sequence[str]) -> None:
    """Checks the adapters that the examples name against those that are trained, `names`.

    With one adapter, or none, examples need not name it; with several each has to. Raises
    UserError for those that do not fit, with their places.
    """
    problems = [
        (example.origin, problem)
        for example in dataset
        if (problem := _problem(example.adapter, names)) is not None
    ]
    raise_listed(dataset.name, problems, dataset.num_records)


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
