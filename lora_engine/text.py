"""Sizes, times and other people's text as short text for people."""

import re

# Control characters but tab and line feed, line separators, and what reverses the direction.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def bytes_text(size: float | None) -> str:
    """1_536_000_000 -> "1.54 GB" (decimal units)."""
    if size is None:
        return "\u2013"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]i?B)\s*")
_UNITS = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parsed_bytes(text: str) -> int:
    """ "24GB" -> 24_000_000_000, "24 GiB" -> 25_769_803_776. ValueError for what is no size."""
    found = _SIZE.fullmatch(text)
    size = 0
    if found is not None:
        number, unit = found.groups()
        size = int(float(number) * (1024 if unit[1] == "i" else 1000) ** _UNITS[unit[0]])
    if not size:
        raise ValueError(f"{text!r} is no size of memory; write 24GB, 1.5GB, 800MB or 16GiB")
    return size


def duration_text(seconds: float) -> str:
    """252.3 -> "4 min 12 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def visible(text: str) -> str:
    """`text` with what would move a terminal's cursor or reverse its line as escapes: "\\x1b"."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`visible`, with the line breaks as "\\n"; those of a list, indented by two, remain."""
    return visible(re.sub(r"\n(?!  )", r"\\n", text))
