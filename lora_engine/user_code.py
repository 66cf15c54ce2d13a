"""Functions of somebody's own, by the names that configurations and commands give them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_engine.errors import UserError, nearest


def function_of(name: str) -> Callable[..., object]:
    """The function "module:function", or "file.py:function"; both are looked for from the working
    folder too. Raises UserError for what is not there.
    """
    module_name, _, function_name = name.rpartition(":")
    try:
        with _working_folder():
            if module_name.endswith(".py"):
                path = Path(module_name).expanduser()
                spec = importlib.util.spec_from_file_location(path.stem, path)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            else:
                module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{name}: the module cannot be imported ({type(error).__name__}: {error}); it is "
            f"looked for from {Path.cwd()} and where Python looks, give module:function"
        ) from error
    function = vars(module).get(function_name)
    if not callable(function):
        close = nearest(function_name, vars(module))
        hint = f"did you mean {close}?" if close else "give a function that it has"
        raise UserError(f"{name}: the module has no function {function_name!r}; {hint}")
    return function


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules are found in the working folder too."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
