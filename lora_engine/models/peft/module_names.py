"""Do the names in an adapter's settings match modules of the model?

The rules are PEFT's: a list's name is a module's whole dotted name or ends it after a dot; a text
is a regular expression for the whole name. PEFT itself is silent as long as one of them matches.
"""

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn

from lora_engine.errors import UserError, nearest

ALL_LINEAR = "all-linear"

_MOST_SHOWN = 8


def check_modules(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None,
    modules_to_save: Sequence[str] | None,
    key: Callable[[str], str],
) -> list[nn.Module]:
    """The modules that get an adapter.

    model: without adapters. key: the configuration's key for "target_modules", and so on.
    Raises UserError for a name or pattern that matches nothing, or nothing it can apply to.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    where = key("modules_to_save")
    saved: dict[str, str] = {}  # module -> the name that matches it
    for name in modules_to_save or ():
        matches = _matches_of_name(where, name, modules, _has_weights)
        for match in matches:
            _check_can_be_saved(where, name, match, modules[match])
            saved.setdefault(match, name)
    _refuse_nested(where, saved)
    where = key("exclude_modules")
    excluded: set[str] = set()
    for pattern in _as_patterns(exclude_modules):
        excluded.update(_matches(where, pattern, modules, lambda module: True))
    where = key("target_modules")
    adapted: dict[str, nn.Module] = {}
    for pattern in _as_patterns(target_modules):
        matches = (
            _all_linear(model, modules)
            if isinstance(pattern, Pattern) and pattern.lower() == ALL_LINEAR
            else _matches(where, pattern, modules, takes_adapter)
        )
        left = {m: modules[m] for m in matches if m not in excluded and not _is_inside(m, saved)}
        if not left:
            reason = (
                f"is left out by {key('exclude_modules')}"
                if any(m in excluded for m in matches)
                else f"is trained in full by {key('modules_to_save')}"
            )
            raise UserError(f"{where}: {_shown(pattern)} {reason}; name it in one of them")
        _check_takes_adapter(where, pattern, left)
        adapted.update(left)
    return list(adapted.values())


def takes_adapter(module: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for it: linear layers, embeddings, convolutions."""
    from transformers.pytorch_utils import Conv1D

    kinds = nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D
    return isinstance(module, kinds)


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    head_of: Callable[[], object] = getattr(model, "get_output_embeddings", lambda: None)
    head = head_of()
    return [n for n, m in modules.items() if isinstance(m, nn.Linear) and m is not head]


class Pattern(str):
    """A regular expression for whole names, where a plain text is a name."""


def _as_patterns(given: str | Sequence[str] | None) -> list[str]:
    if isinstance(given, str):
        return [Pattern(given)]
    return list(given or ())


def _matches(
    where: str, pattern: str, modules: dict[str, nn.Module], fits: Callable[[nn.Module], bool]
) -> list[str]:
    if not isinstance(pattern, Pattern):
        return _matches_of_name(where, pattern, modules, fits)
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(
            f"{where}: {_shown(pattern)} is not a regular expression: {error}; "
            "for a list of names, write [q_proj, v_proj]"
        ) from error
    matches = [name for name in modules if expression.fullmatch(name)]
    if matches:
        return matches
    names = _last_parts(modules, fits)
    hint = "a text is a regular expression for a module's whole name, such as .*\\.q_proj"
    parts = [part.strip() for part in pattern.split(",")]
    if len(parts) > 1 and set(parts) <= set(names):
        hint = f"did you mean the list [{', '.join(parts)}]?"
    elif close := nearest(pattern, [ALL_LINEAR]):
        hint = f"did you mean {close}?"
    elif close := nearest(pattern, names):
        hint = f"did you mean the name [{close}], in brackets?"
    raise UserError(f"{where}: {_shown(pattern)} matches no module of the model; {hint}")


def _matches_of_name(
    where: str, name: str, modules: dict[str, nn.Module], fits: Callable[[nn.Module], bool]
) -> list[str]:
    matches = [key for key in modules if key == name or key.endswith(f".{name}")]
    if matches:
        return matches
    names = _last_parts(modules, fits)
    whole = [key for key, module in modules.items() if fits(module)] if "." in name else []
    close = nearest(name, whole) or nearest(name, names) or nearest(name, _last_parts(modules))
    hint = f"did you mean {close}?" if close else f"it has {_list(names)}"
    raise UserError(f"{where}: {_shown(name)} matches no module of the model; {hint}")


def _last_parts(
    modules: dict[str, nn.Module], fits: Callable[[nn.Module], bool] = lambda module: True
) -> list[str]:
    """The last parts of names, each once, numbers left out."""
    parts = (name.rpartition(".")[2] for name, module in modules.items() if fits(module))
    return [part for part in dict.fromkeys(parts) if not part.isdigit()]


def _has_weights(module: nn.Module) -> bool:
    containers = nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict
    trainable = any(p.is_floating_point() for p in module.parameters())
    return trainable and not isinstance(module, containers)


def _check_can_be_saved(where: str, name: str, match: str, module: nn.Module) -> None:
    if _has_weights(module):
        return
    kind = type(module).__name__
    empty = next(module.parameters(), None) is None
    problem = "has no weights to train" if empty else "cannot be trained as one"
    raise UserError(f"{where}: {_shown(name)} is {match}, a {kind}, which {problem}; leave it out")


def _check_takes_adapter(where: str, pattern: str, matched: dict[str, nn.Module]) -> None:
    for match, module in matched.items():
        if takes_adapter(module):
            continue
        inside = [n for n, child in module.named_modules() if takes_adapter(child)]
        hint = f"name what is in it: {_list(inside)}" if inside else "leave it out"
        raise UserError(
            f"{where}: {_shown(pattern)} matches {match}, a {type(module).__name__}, which takes "
            f"no adapter; {hint}"
        )


def _refuse_nested(where: str, saved: dict[str, str]) -> None:
    for match, name in saved.items():
        around = [other for other in saved if match.startswith(f"{other}.")]
        if around:
            raise UserError(
                f"{where}: {_shown(name)} is inside {_shown(saved[around[0]])}, which is trained "
                "in full already; leave one out"
            )


def _is_inside(name: str, saved: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in saved)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def _shown(name: str) -> str:
    return repr(str(name)) if len(name) <= 60 else repr(name[:57] + "…")
