"""Numbers as a person reads them, the same in the terminal and in the report."""

import math

MISSING = "–"


def decimals(value: float, digits: int) -> str:
    """``1234.5`` as ``1,234.50``; a dash where there is no finite value."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else MISSING


def percent(share: float, digits: int = 1) -> str:
    """``0.412`` as ``41.2 %``."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else MISSING


def compact(count: float) -> str:
    """``12345678`` as ``12.3M``."""
    if not math.isfinite(count):
        return MISSING
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,950 rounds to 1000.0k, so it is already a million to the reader.
        if abs(count) >= 0.99995 * scale:
            return f"{count / scale:.1f}{suffix}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """``200`` as ``3 min 20 s``; tenths below ten seconds."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def clock(seconds: float) -> str:
    """``200`` as ``3:20``, for a place where width must not jump about."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """``text`` without characters that would steer a terminal or break a page."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
