"""A plan as text and as JSON: `lora-engine plan`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_engine.app.plan import Plan, keys_of, settings, way_of
from lora_engine.memory.plan import ROWS, worth_showing
from lora_engine.memory.timeline import Moment, peak, timeline, with_rows
from lora_engine.text import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_PARTS = 5


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    chosen = made.chosen
    return {
        "device": made.wanted.device.type,
        "machine": made.machine.name,
        "modelled": made.modelled,
        "budget_bytes": made.budget.nbytes,
        "reserved_bytes": made.budget.reserved,
        "tokens_per_batch": made.wanted.rows,
        "moments": [
            {"moment": m.name, "bytes": m.total, "parts": dict(m.parts)} for m in made.moments
        ],
        "policies": [
            {
                "checkpointing": each.policy,
                "offload_activations": each.load.offload,
                "offload_optimizer": "host" if each.load.host_states else None,
                "peak_bytes": each.highest.total,
                "at": each.highest.name,
                "fits": each.fits,
                "largest_tokens_per_batch": each.most_rows,
                "tokens_per_second": round(each.tokens_per_second, 1),
            }
            for each in made.found
        ],
        "chosen": None if chosen is None else way_of(chosen),
        "settings": settings(made),
    }


def render(made: Plan, name: str) -> "RenderableType":
    """The plan for people."""
    from rich.console import Group
    from rich.text import Text

    budget, wanted = made.budget, made.wanted
    where = f"{made.machine.name}, modelled" if made.modelled else made.machine.name
    head = (
        f"{name}: {wanted.rows:,} tokens a micro-batch, {wanted.optimizer}, on {where}; "
        f"{bytes_text(budget.nbytes)} of memory, {bytes_text(budget.reserved)} of it "
        + (
            "for the driver and what the allocator loses"
            if made.modelled
            else "for this program and its libraries"
        )
    )
    return Group(
        Text(head),
        Text(""),
        _moments_table(made),
        Text(""),
        _policies_table(made),
        Text(""),
        *map(Text, conclusion(made)),
    )


def _moments_table(made: Plan) -> "RenderableType":
    """When how many bytes are alive, of the run as it is configured, and what most of them are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("when", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("of which")
    highest = peak(made.moments)
    for moment in _shown_moments(made.moments):
        parts = sorted(moment.parts.items(), key=lambda part: -part[1])
        shown = ", ".join(f"{name} {bytes_text(size)}" for name, size in parts[:_MOST_PARTS])
        style = "bold" if moment == highest else ""
        table.add_row(moment.name, bytes_text(moment.total), shown, style=style)
    return table


def _shown_moments(moments: Sequence[Moment]) -> list[Moment]:
    """Of the layers' backward passes the highest alone."""
    layers = [moment for moment in moments if moment.name.startswith("layer ")]
    highest = peak(layers)
    return [moment for moment in moments if moment not in layers or moment is highest]


def _policies_table(made: Plan) -> "RenderableType":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("checkpointing")
    for title in ("peak", "fits", "longest batch", "tokens/s"):
        table.add_column(title, justify="right")
    plain = sum(not (e.load.offload or e.load.host_states) for e in made.found)
    for each in worth_showing(made.found, plain):
        mark = " ←" if each is made.chosen else ""
        rate = f"{each.tokens_per_second:,.0f}" if each.most_rows else ""
        if each.most_rows and not each.fits:
            rate += f" at {each.most_rows:,}"
        table.add_row(
            way_of(each),
            bytes_text(each.highest.total),
            "yes" if each.fits else "no",
            f"{each.most_rows:,} tokens" if each.most_rows else "none",
            rate + mark,
            style="bold" if each is made.chosen else "",
        )
    return table


def conclusion(made: Plan) -> list[str]:
    """What to do, a line each."""
    chosen = made.chosen
    lines = []
    if chosen is None:
        lines.append(least(made))
    elif chosen.fits:
        lines.append(f"Best: {_assigned(settings(made))}")
    else:
        lines.append(
            f"{made.wanted.rows:,} tokens a micro-batch fit under no policy. "
            f"Best: {_assigned(settings(made))} (and more train.gradient_accumulation_steps)"
        )
    for changes, each in made.savings:
        keys = {
            ("model.quantize" if k == "quantize" else f"train.{k}"): v for k, v in changes.items()
        }
        keys |= keys_of(each)
        lines.append(f"{made.wanted.rows:,} tokens fit with other numbers: {_assigned(keys)}")
    lines.append(
        "A batch's longest sequence may be all of it. Tokens/s are predicted, not measured."
    )
    if made.modelled:
        lines.append("All figures are modelled: no such GPU was asked.")
    return lines


def least(made: Plan) -> str:
    """Where not even the fewest tokens fit: what the weights, and these with them, take."""
    weights = made.moments[0].parts["weights"]
    least = min(peak(timeline(made.sizes, with_rows(each.load, ROWS))).total for each in made.found)
    return (
        f"Nothing fits: {ROWS} tokens take {bytes_text(least)}, {bytes_text(weights)} of it "
        f"weights, and {bytes_text(made.budget.usable)} are left for them."
    )


def _assigned(keys: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in keys.items())
