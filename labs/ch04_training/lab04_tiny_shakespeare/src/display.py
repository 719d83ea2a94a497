"""What one sees of a run, and how one stops it: the loss curve, the progress bar, Ctrl-C.

All of this file is given: nothing in it is about language models.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, BLUE, VERMILION = "#747a82", "#1b7cc4", "#d55e00"  # as in `shared.figures`: for light and dark pages
WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 50, WIDTH - 10, 10, HEIGHT - 30  # of the part in which the curve is


def draw_losses(
    path: Path, losses: Sequence[float], validation_losses: Sequence[tuple[int, float]], *, steps: int
) -> None:
    """Write the figure of a run, as SVG: a pale line of all losses, a strong one of their mean, dots.

    The strong line is a running mean over about 50 steps; the dots are validation losses. It is written
    by hand, so that it takes no library and a few milliseconds; and whole or not at all, so that a
    viewer that reads it again and again never sees half of it.

    Args:
        path: of the file.
        losses: of each step so far.
        validation_losses: (after how many steps, loss).
        steps: how many there will be: the end of the horizontal axis.
    """
    values = [*losses, *(loss for _, loss in validation_losses)] or [0.0]
    margin = 0.05 * (max(values) - min(values)) + 0.01
    low, high = min(values) - margin, max(values) + margin

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (RIGHT - LEFT) * step / max(1, steps)
        return round(x, 1), round(TOP + (BOTTOM - TOP) * (high - loss) / (high - low), 1)

    def line(heights: Sequence[float], style: str) -> str:
        points = " ".join("{},{}".format(*at(n, loss)) for n, loss in enumerate(heights, start=1))
        return f'<polyline points="{points}" fill="none" stroke="{BLUE}" {style}/>'

    mean, means = 0.0, []
    for n, loss in enumerate(losses, start=1):
        mean += (loss - mean) * max(1 / n, 0.02)
        means.append(mean)
    caption = f"{len(losses)} of {steps} steps"
    caption += f", loss {losses[-1]:.4f}" if losses else ""
    caption += f", validation loss {validation_losses[-1][1]:.4f}" if validation_losses else ""
    shapes = [
        line(losses, 'stroke-opacity="0.35"'),
        line(means, 'stroke-width="2"'),
        *(
            '<circle cx="{}" cy="{}" r="4" fill="{c}"/>'.format(*at(*v), c=VERMILION)
            for v in validation_losses
        ),
        f'<text x="{LEFT + 10}" y="24" font-size="14">nats per character; {caption}</text>',
    ]
    for quarter in range(5):
        step, loss = steps * quarter / 4, low + (high - low) * quarter / 4
        x, y = at(step, loss)
        shapes.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{step:.0f}</text>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{loss:.2f}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head += f' font-family="sans-serif" font-size="12" fill="{INK}">'
    partial = path.with_name(path.name + ".partial")
    partial.write_text("\n".join([head, *shapes, "</svg>", ""]), encoding="utf-8")
    partial.replace(path)


@contextmanager
def progress_shown(steps: int, wanted: bool) -> Iterator[Callable[[int, float], None]]:
    """Yield `show(done, loss)`: a bar on a terminal if rich is installed, else a line every 50 steps."""
    if not wanted:
        yield lambda done, loss: None
        return
    try:
        from rich import progress as rich  # a bare checkout may not have it
    except ModuleNotFoundError:
        rich = None
    if rich is None or not sys.stdout.isatty():
        yield _Lines(steps)
        return
    columns = (
        rich.TextColumn("step {task.completed:,.0f} of {task.total:,.0f}"),
        rich.BarColumn(bar_width=None),
        rich.TextColumn("loss {task.fields[loss]:.3f}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns) as bar:
        task = bar.add_task("", total=steps, loss=float("nan"))
        yield lambda done, loss: bar.update(task, completed=done, loss=loss)


class _Lines:
    """Prints a line every 50 steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.start, self.shown = steps, time.monotonic(), 0

    def __call__(self, done: int, loss: float) -> None:
        self.shown += 1
        if done % 50 == 0 or done == self.steps:
            left = (time.monotonic() - self.start) / self.shown * (self.steps - done)
            print(f"step {done:5,} of {self.steps:,}   loss {loss:.3f}   {left:4.0f} s left", flush=True)


@contextmanager
def interrupt_noted() -> Iterator[threading.Event]:
    """While it is open, the first Ctrl-C only sets the event that it yields; a second one ends the program.

    Signals reach the main thread only; in another thread this does nothing.
    """
    noted = threading.Event()

    def note(number: int, frame: Any) -> None:
        if noted.is_set():
            raise KeyboardInterrupt
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
