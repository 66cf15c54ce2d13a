"""Checkpointing policies: what layers keep for the backward pass, which computes the rest again.

none        everything that their backward pass reads
every_N     of each N-th layer its input alone, beginning with the first; of others everything
selective   a layer's input and attention's output: attention is not computed again
half        the inputs of a layer's two halves, which then run again one by one
tiled_N     as half, and the MLP half runs in tiles of N tokens, each again by itself
layer       a layer's input
"""

import re
from typing import Literal, NamedTuple, TypeAlias

from lora_engine.errors import nearest

# As `models.attach.decoder_layer.Keeps`.
Keeps: TypeAlias = Literal["input", "inputs_of_halves", "input_and_attention"]

# Where what checkpointed layers keep may wait.
Place: TypeAlias = Literal["disk", "host"]

POLICIES = ("none", "layer", "half", "selective", "every_2", "tiled_4096")

_KEEPS: dict[str, Keeps] = {
    "layer": "input",
    "half": "inputs_of_halves",
    "selective": "input_and_attention",
}


class Policy(NamedTuple):
    """name: as it is given. every: the N of the layers that run again; 0: none does. tile: tokens
    that an MLP half runs on at once; 0: all."""

    name: str
    keeps: Keeps
    every: int
    tile: int = 0

    def covers(self, layer: int) -> bool:
        """Whether the layer of that index, from 0, runs again."""
        return self.every > 0 and layer % self.every == 0

    @property
    def needs_fused_layers(self) -> bool:
        """Whether it takes layers apart, as only the engine's own can be."""
        return self.keeps != "input"


def policy_of(name: str) -> Policy:
    """The policy of that name; ValueError for another."""
    if name == "none":
        return Policy(name, "input", 0)
    if name in _KEEPS:
        return Policy(name, _KEEPS[name], 1)
    if tiled := re.fullmatch(r"tiled_([1-9][0-9]{0,6})", name):
        return Policy(name=name, keeps="inputs_of_halves", every=1, tile=int(tiled[1]))
    found = re.fullmatch(r"every_([1-9][0-9]{0,3})", name)
    if found is None:
        close = nearest(name, POLICIES)
        raise ValueError(
            "expected none, layer, half, selective, every_N (every_2: each second layer) or "
            "tiled_N (tiled_4096: 4,096 tokens), "
            f"got {name!r}" + (f"; did you mean {close}?" if close else "")
        )
    return Policy(name, "input", int(found[1]))
