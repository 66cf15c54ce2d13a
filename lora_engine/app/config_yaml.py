"""The YAML of a configuration as nested mappings, with the line of every key."""

import stat
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from lora_engine.config_schema import FieldPath, dotted
from lora_engine.errors import UserError, nearest
from lora_engine.files import user_path

YAML_SUFFIXES = (".yaml", ".yml")

# Beyond these it is no configuration; PyYAML would take minutes, or the memory of the machine.
_MOST_BYTES = 1_000_000
_MOST_VALUES = 10_000
_MOST_LEVELS = 20

_YAML_READS = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "null": "nothing",
    "timestamp": "a date",
}
# What PyYAML, Python or this module says, and how it is mended.
_MENDS = {
    "'\\t'": "indent with spaces",
    "expected": "",
    "undefined alias": "give its anchor before it, or quote the text",
    "constructor for the tag": "take the tag out",
    "unhashable key": "give a text as key",
    "another document": "give one in a file",
    "must be in": "quote it if it is text",
    "out of range": "quote it if it is text",
    "digits": "give a smaller one",
    "more than": "make it flatter or shorter",
    "contains itself": "write the value out",
}
_LOOK = "check the quotes, brackets and indentation there"


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package."""
    folder = resources.files("lora_engine.app.configs")
    return sorted(
        Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(YAML_SUFFIXES)
    )


def read_config(source: str | Path) -> tuple[str, str]:
    """Name (for messages) and text of a config file or a shipped config."""
    shipped = shipped_configs()
    try:
        path = user_path(source)
        is_name = not path.suffix and path.name == str(source)
        if is_name and not path.is_file() and path.name in shipped:
            entry = resources.files("lora_engine.app.configs") / f"{path.name}.yaml"
            return f"{path.name}.yaml", entry.read_text(encoding="utf-8")
        return str(source), _text(path)
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such config file; {_alternatives(path, shipped)}") from error
    except IsADirectoryError as error:
        raise UserError(f"{source}: is a folder, expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text, expected a YAML file") from error
    except OSError as error:
        hint = "give the path of a YAML file that can be read"
        raise UserError(f"{source}: cannot be read: {error.strerror}; {hint}") from error
    except ValueError as error:
        raise UserError(f"CONFIG {str(source)!r}: {error}") from error


def parse_mapping(name: str, text: str) -> tuple[dict[str, Any], dict[FieldPath, int]]:
    """The YAML mapping in `text`, and the 1-based line of every key path."""
    lines: dict[FieldPath, int] = {}
    try:
        node, values = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise UserError(f"{place}: is not valid YAML: {_problem(error)}") from error
    except yaml.reader.ReaderError as error:
        place = f"{name}:{text.count(chr(10), 0, error.position) + 1}"
        character = f"character {chr(error.character)!r}" if error.character else "NUL character"
        raise UserError(
            f"{place}: is not valid YAML: takes no {character}; give plain text"
        ) from error
    if values is None:
        raise UserError(f"{name}: is empty; it needs at least model.path and data.train")
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected sections such as 'model:' and 'data:' at the top")
    _key_lines(name, node, (), lines)
    _check_keys_are_text(node, lambda line: f"{name}:{line}")
    return values, lines


def parse_value(text: str, path: FieldPath) -> Any:
    """The YAML value in `text`, given for the key at `path`. Raises yaml.YAMLError."""
    node, value = _load(text)
    _check_keys_are_text(node, lambda line: "command line", path)
    return value


class _Loader(yaml.SafeLoader):
    """Names the place of a number or date that cannot be made, which PyYAML leaves out."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:
            reason = str(error).partition(";")[0]
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error


def _load(text: str) -> tuple[yaml.Node | None, Any]:
    """The node and the value of the one document in `text`, of bounded size and depth."""
    level = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        level += isinstance(event, yaml.CollectionStartEvent)
        level -= isinstance(event, yaml.CollectionEndEvent)
        if level > _MOST_LEVELS:
            problem = f"is nested more than {_MOST_LEVELS} levels deep"
            raise _refused(problem, event)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _count_values(node, set(), {})
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, above: set[int], known: dict[int, int]) -> int:
    """Values in `node` with its aliases written out. Raises MarkedYAMLError for more than enough,
    and for an alias of what it stands in."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        problem = "what has this anchor contains itself"
        raise _refused(problem, node)
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    count = 1 + sum(_count_values(part, above | {id(node)}, known) for part in inner)
    if count > _MOST_VALUES:
        problem = f"holds more than {_MOST_VALUES:,} values, its aliases written out"
        raise _refused(problem, node)
    known[id(node)] = count
    return count


def _refused(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=cast(Any, at.start_mark))


def _key_lines(
    name: str, node: yaml.Node | None, path: FieldPath, lines: dict[FieldPath, int]
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        here, line = (*path, key.value), key.start_mark.line + 1
        if here in lines:
            raise UserError(
                f"{name}:{line}: {dotted(here)}: given twice, first in line {lines[here]}"
            )
        lines[here] = line
        _key_lines(name, value, here, lines)


def _check_keys_are_text(
    node: yaml.Node | None, place: Callable[[int], str], path: FieldPath = ()
) -> None:
    """Raises UserError for a key in the YAML `node` that is not text to YAML: no, on, 1, 1.5, ~.

    place: of a line (from 1) in the message. path: that of `node`.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        here = (*path, key.value)
        if kind := _YAML_READS.get(key.tag.rpartition(":")[2]):
            raise UserError(
                f"{place(key.start_mark.line + 1)}: {dotted(here)}: YAML reads {key.value} as "
                f"{kind}; as a name it needs quotes: '{key.value}'"
            )
        _check_keys_are_text(value, place, here)


def _text(path: Path) -> str:
    status = path.stat()  # before it is opened: a pipe that nobody writes to would wait for ever
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError("is not a file, expected a YAML file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(f"is larger than {_MOST_BYTES:,} bytes, expected a YAML file")
    return path.read_text(encoding="utf-8")


def _alternatives(path: Path, shipped: list[str]) -> str:
    folder = path.parent
    beside = [entry.name for suffix in YAML_SUFFIXES for entry in folder.glob(f"*{suffix}")]
    if close := nearest(path.name, beside):
        return f"did you mean {folder / close}?"
    if close := nearest(path.name, shipped):
        return f"did you mean {close}, which is shipped?"
    return f"shipped configs: {', '.join(shipped)}"


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "it cannot be read"
    hint = next((hint for said, hint in _MENDS.items() if said in problem), _LOOK)
    return f"{problem}; {hint}" if hint else problem
