"""Where a milestone's marks stand on its scale."""

import math
from dataclasses import dataclass
from typing import Literal

WIDTH = 100.0


@dataclass(frozen=True)
class Gauge:
    """Positions are from 0 to `WIDTH`.

    Attributes:
        value: where the measurement stands.
        target: where the target stands.
        reached_from: left end of the part of the scale that reaches the target.
        reached_to: its right end.
        low: what the left end of the scale stands for.
        high: what its right end stands for.
        scale: `linear`, or `logarithmic` where value and target differ by more than a factor of 10.
    """

    value: float
    target: float
    reached_from: float
    reached_to: float
    low: float
    high: float
    scale: Literal["linear", "logarithmic"]


def gauge(value: float, target: float, better: str) -> Gauge | None:
    """Return the scale for a measurement; None if there is none, since a number is negative, infinite or no number."""
    if not (math.isfinite(value) and math.isfinite(target)) or value < 0 or target <= 0:
        return None
    if value == 0 or 0.1 <= value / target <= 10:
        low, high = 0.0, _round_up(max(value, target) * 1.15)
        at = [x / high * WIDTH for x in (value, target)]
        scale: Literal["linear", "logarithmic"] = "linear"
    else:
        first = math.floor(math.log10(min(value, target))) - 1
        last = math.ceil(math.log10(max(value, target)) + 0.5)
        low, high = 10.0**first, 10.0**last
        at = [(math.log10(x) - first) / (last - first) * WIDTH for x in (value, target)]
        scale = "logarithmic"
    reached = (0.0, at[1]) if better == "lower" else (at[1], WIDTH)
    return Gauge(at[0], at[1], *reached, low, high, scale)


def _round_up(x: float) -> float:
    """Round up to two figures, so that the end of the scale can be read."""
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit
