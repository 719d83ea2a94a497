"""Figures of the lectures: readable on light and dark pages, the same bytes on every run.

A figure script draws in one function and ends with `publish`:

    def draw() -> Figure: ...

    if __name__ == "__main__":
        publish(draw, __file__)

The page's background shows through, so every colour here must work on white and on near-black.
"""

import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.typing import RcKeyType

WHITE, NIGHT = "#ffffff", "#0d1117"
"""The two pages a figure must be readable on."""

INK = "#747a82"
"""Text and lines: the grey that stands out from WHITE and from NIGHT equally, 4.3 : 1."""

BLUE, VERMILION, GREEN, PINK = "#1b7cc4", "#d55e00", "#00916c", "#be6196"
"""Hues that colour-blind readers tell apart (after Okabe and Ito 2008), in shades that stand out from
both pages by at least 3.8 : 1."""

_STYLE: dict[RcKeyType, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=[BLUE, VERMILION, GREEN, PINK]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 11.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2.0,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",  # letters as outlines: the page needs no font and nothing moves
    "svg.hashsalt": "topeka",  # or the names of shapes would be random
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def style() -> AbstractContextManager[None]:
    """Return a context in which matplotlib draws in the lectures' style."""
    return matplotlib.rc_context(_STYLE)


def panels(
    columns: int = 1, *, width: float = 7.2, height: float = 3.4, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a new figure and its axes, side by side.

    Args:
        columns: how many axes.
        width: of the figure, in inches. A page shows 7.2 inches at about its full width.
        height: of the figure, in inches.
        ratios: widths of the axes relative to each other; equal unless given.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, width_ratios=ratios).flat)


def tiles(
    axes: Axes, colours: Sequence[Sequence[str]], labels: Sequence[Sequence[str]] | None = None
) -> None:
    """Draw a matrix as squares, the first row on top, without ticks.

    Args:
        axes: where to draw. Square (i, j) has its centre at x = j, y = i.
        colours: the colour of each square, row by row; "none" leaves it empty.
        labels: the text of each square, written in black or white, whichever reads better.
    """
    for i, row in enumerate(colours):
        for j, colour in enumerate(row):
            empty = colour == "none"
            axes.add_patch(
                Rectangle(
                    (j - 0.46, i - 0.46),
                    0.92,
                    0.92,
                    facecolor=colour,
                    edgecolor=INK if empty else "none",
                    linewidth=0.8,
                )
            )
            if labels is not None:
                ink = INK if empty else text_on(colour)
                axes.text(j, i, labels[i][j], ha="center", va="center", color=ink)
    axes.set(xlim=(-0.6, len(colours[0]) - 0.4), ylim=(len(colours) - 0.4, -0.6), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)


def text_on(colour: str) -> str:
    """Return the colour, of WHITE and NIGHT, in which text reads better on `colour`."""
    return max(WHITE, NIGHT, key=lambda ink: contrast(ink, colour))


def contrast(a: str, b: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21.

    Source: Web Content Accessibility Guidelines 2.1, W3C 2018, "contrast ratio". The guidelines
    ask for 3 between a graphic and its background, and 3 or 4.5 for large or small text.
    """

    def luminance(colour: str) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def save(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as SVG: no date, no random names, so equal figures give equal bytes.

    Other releases of matplotlib may place things a little differently; `made_with` tells
    which one wrote a file.
    """
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in buffer.getvalue().decode().splitlines()) + "\n"
    # matplotlib names shapes by a hash of all digits of their coordinates, and the last digit
    # differs between processors. Coordinates are written with six decimals, which agree.
    for number, name in enumerate(dict.fromkeys(re.findall(r'id="(\w*[0-9a-f]{10})"', text))):
        text = text.replace(name, f"shape{number}")
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(text.encode())
    partial.replace(path)


def made_with(path: Path) -> str | None:
    """Return the version of matplotlib that wrote the SVG at `path`, or None if it does not say."""
    found = re.search(r"Matplotlib v([\w.+-]+),", path.read_text(encoding="utf-8"))
    return found[1] if found else None


def publish(draw: Callable[[], Figure], script: str) -> None:
    """Save the figure that `draw` returns beside the script that asks, under the script's name.

    `python figure.py FOLDER` writes it to FOLDER instead.

    Args:
        draw: draws the figure; it runs in the lectures' style.
        script: the script's `__file__`.
    """
    source = Path(script).resolve()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else source.parent
    with style():
        figure = draw()
    save(figure, folder / f"{source.stem}.svg")
