"""Time ratios that hold while the machine's speed drifts: pairs, interleaved, the median."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass

# Bound here, before any code under test could replace it in the module `time`.
from time import perf_counter
from typing import Any

# A reading below the clock's resolution counts as one tick, so that a ratio always exists.
_TICK = 1e-9


@dataclass(frozen=True)
class PairedTiming:
    """Seconds of two functions run in turn.

    Attributes:
        slow: seconds of each call of the first function.
        fast: seconds of each call of the second function, the pairs in the same order.
    """

    slow: tuple[float, ...]
    fast: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times faster the second is: the median of the pairs' ratios."""
        return statistics.median(s / max(f, _TICK) for s, f in zip(self.slow, self.fast, strict=True))


def time_pairs(
    slow: Callable[[], Any],
    fast: Callable[[], Any],
    *,
    pairs: int = 7,
    warmup: int = 1,
    synchronize: Callable[[], Any] | None = None,
    clock: Callable[[], float] = perf_counter,
) -> PairedTiming:
    """Run `slow` and `fast` in turn, A B B A A B ..., and return the seconds of each call.

    Args:
        slow: the baseline.
        fast: what should be faster.
        pairs: how many times each runs and counts, at least 1.
        warmup: how many times each runs first without counting.
        synchronize: called before each reading of the clock (`torch.cuda.synchronize` on a GPU).
        clock: returns the time in seconds.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")

    def seconds(function: Callable[[], Any]) -> float:
        if synchronize:
            synchronize()
        start = clock()
        function()
        if synchronize:
            synchronize()
        return clock() - start

    for _ in range(warmup):
        slow(), fast()
    times: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(pairs):
            for which in (0, 1) if i % 2 == 0 else (1, 0):
                times[which].append(seconds((slow, fast)[which]))
    finally:
        if collecting:
            gc.enable()
    return PairedTiming(tuple(times[0]), tuple(times[1]))
