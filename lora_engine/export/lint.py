"""Why vLLM and SGLang would refuse a PEFT adapter, or compute something else with it."""

from typing import Any

from lora_engine.export.adapter import Adapter

# The ranks that vLLM makes room for, --max-lora-rank.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def room_for(adapter: Adapter) -> int:
    """The --max-lora-rank that the adapter needs; the largest there is if none is enough."""
    rank = _rank(adapter)
    return next((known for known in RANKS if known >= rank), RANKS[-1])


def lint(adapter: Adapter) -> list[str]:
    """What a server with adapters does not take, each as a line; none if it takes the adapter."""
    settings: dict[str, Any] = adapter.settings
    problems = []
    if _rank(adapter) > RANKS[-1]:
        problems.append(f"rank {_rank(adapter)} is more than {RANKS[-1]}")
    if adapter.is_dora:
        problems.append("it is DoRA (use_dora)")
    if settings.get("modules_to_save"):
        problems.append(f"modules_to_save is {', '.join(settings['modules_to_save'])}")
    elif adapter.whole:
        problems.append(f"it replaces whole weights, such as {next(iter(adapter.whole))}")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        problems.append("it trains biases")
    for field in ("rank_pattern", "alpha_pattern"):
        if settings.get(field):
            problems.append(
                f"{field} is set, which servers do not read: the scale would be another"
            )
    transposed = [name for name, layer in adapter.low_rank.items() if layer.transposed]
    if transposed:
        problems.append(f"it has an adapter on {transposed[0]}, no plain linear")
    if any(name.endswith("lm_head") for name in adapter.low_rank):
        problems.append("it has an adapter on lm_head, which servers leave out")
    return problems


def _rank(adapter: Adapter) -> int:
    ranks = [len(layer.a) for layer in adapter.low_rank.values()]
    return max(ranks, default=int(adapter.settings.get("r", 0)))
