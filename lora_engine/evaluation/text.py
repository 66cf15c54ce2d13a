"""Sizes and times as short text for people."""


def bytes_text(size: float | None) -> str:
    """1_536_000_000 -> "1.54 GB" (decimal units)."""
    if size is None:
        return "\u2013"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"


def duration_text(seconds: float) -> str:
    """252.3 -> "4 min 12 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
