"""A record's text in pieces that are learned or not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A piece of text, which may hold stand-ins (see `control`), and whether it is learned.

    weight: what multiplies the loss of its tokens.
    target: a control token that is learned in place of the one that the text is; "": none.
    """

    text: str
    supervised: bool
    weight: float = 1.0
    target: str = ""


@dataclass(frozen=True)
class Text:
    """A record's text in segments, and what `Example` tells of it."""

    segments: list[Segment]
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
