"""Numbers as people read them: digits that line up in a column, a real minus sign, units."""

import math
from collections.abc import Iterable

_MINUS = "\N{MINUS SIGN}"
_MOST_PLACES = 6


def decimal_places(values: Iterable[float], significant: int = 4) -> int:
    """Returns how many decimals a column needs for its smallest number but 0 to have so many significant digits.

    Not its largest: one row that is far off must not take the digits from all others.
    """
    smallest = min((abs(value) for value in values if value and math.isfinite(value)), default=None)
    if smallest is None:
        return 1
    return min(max(significant - 1 - math.floor(math.log10(smallest)), 0), _MOST_PLACES)


def number(value: float, places: int) -> str:
    """Returns a number with fixed decimals; one that these would make 0 keeps its first digit."""
    return _fixed(value, places, "")


def signed(value: float, places: int) -> str:
    """Returns a number as `number` does, with its sign."""
    return _fixed(value, places, "+")


def _fixed(value: float, places: int, sign: str) -> str:
    # A difference shown as -0.0 would be neither below zero nor zero.
    digits = ".1g" if value and round(value, places) == 0 else f",.{places}f"
    return _printed(value, f"{sign}{digits}")


def _printed(value: float, how: str) -> str:
    # 0 is added, since -0 prints as no other 0 does.
    return f"{value + 0.0:{how}}".replace("-", _MINUS)


def weight(value: float) -> str:
    """Returns a merge weight."""
    return _printed(value, ".3g")


def percent(value: float) -> str:
    """Returns a relative change: 0.0123 is +1.23 %."""
    return f"{signed(100 * value, 2)} %"


def duration(seconds: float) -> str:
    """Returns seconds as a person says them."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
