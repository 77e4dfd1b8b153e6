"""Numbers as people read them: digits that line up in a column, a real minus sign, units."""

import math
from collections.abc import Iterable

_MINUS = "\N{MINUS SIGN}"
_MOST_PLACES = 6


def decimal_places(values: Iterable[float], significant: int = 4) -> int:
    """Returns how many decimals a column needs for its largest number to have so many significant digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if largest == 0.0:
        return 1
    return min(max(significant - 1 - math.floor(math.log10(largest)), 0), _MOST_PLACES)


def number(value: float, places: int) -> str:
    """Returns a number with fixed decimals."""
    return f"{value:,.{places}f}".replace("-", _MINUS)


def signed(value: float, places: int) -> str:
    """Returns a number with its sign."""
    return f"{value:+,.{places}f}".replace("-", _MINUS)


def weight(value: float) -> str:
    """Returns a merge weight."""
    return f"{value:.3g}".replace("-", _MINUS)


def percent(value: float) -> str:
    """Returns a relative change: 0.0123 is +1.23 %."""
    return f"{signed(100 * value, 2)} %"


def duration(seconds: float) -> str:
    """Returns seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
