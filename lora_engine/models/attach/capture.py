"""transformers' hooks that record `hidden_states`, `attentions` and the like.

The first call that asks for any of them puts hooks on the layers, which stay. In other calls they
do nothing.
"""

import sys
from collections.abc import Callable

_MODULE = "transformers.utils.output_capturing"


def is_idle(hook: Callable[..., object]) -> bool:
    """Whether a forward hook is transformers' and has nothing to record in the call at hand."""
    if getattr(hook, "__module__", None) != _MODULE:
        return False
    collector = getattr(sys.modules[_MODULE], "_active_collector", None)
    if collector is None or not hasattr(hook, "__closure__"):
        return False
    asked = collector.get()
    held = dict(zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True))
    return "key" in held and (not asked or held["key"].cell_contents not in asked)
