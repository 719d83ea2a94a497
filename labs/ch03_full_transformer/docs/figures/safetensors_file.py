"""Figure of lecture 4: the three parts of a safetensors file, and what the header says about the third."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shared.figures import BLUE, GREEN, INK, PINK, VERMILION, panels, publish, text_on


def part(axes: Axes, left: float, right: float, bottom: float, text: str, colour: str) -> None:
    """Draw a piece of the file from `left` to `right`."""
    axes.add_patch(Rectangle((left, bottom), right - left, 0.8, facecolor=colour, edgecolor="none"))
    axes.text(
        (left + right) / 2, bottom + 0.4, text, ha="center", va="center", color=text_on(colour), fontsize=9.5
    )


def draw() -> Figure:
    figure, [axes] = panels(1, height=2.9)
    gap = 0.03
    part(axes, 0, 1.1 - gap, 2, "N", PINK)
    part(axes, 1.1, 6.2 - gap, 2, "header: N bytes of JSON", VERMILION)
    part(axes, 6.2, 8.4 - gap, 2, "ln_f.bias", GREEN)
    part(axes, 8.4, 12.0, 2, "wte.weight", BLUE)
    for x, label in ((0, "0"), (1.1, "8"), (6.2, "8 + N"), (12.0, "end of file")):
        axes.plot([x, x], [2.8, 3.0], color=INK, linewidth=0.8)
        axes.text(x, 3.1, label, ha="center", va="bottom", fontsize=9)
    entries = (
        ('"ln_f.bias":  {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}', 6.2, 8.4 - gap, GREEN),
        ('"wte.weight": {"dtype": "BF16", "shape": [5, 6], "data_offsets": [24, 84]}', 8.4, 12.0, BLUE),
    )
    for n, (text, left, right, colour) in enumerate(entries):
        height = 1.0 - 0.75 * n
        axes.text(0, height, text, family="DejaVu Sans Mono", fontsize=8.6, color=colour, va="center")
        axes.plot([left, right], [1.85, 1.85], color=colour, linewidth=2)
        foot = (left + right) / 2
        axes.plot([foot, foot], [1.85, height + (0.2 if n == 0 else 0)], color=colour, linewidth=1.2)
    axes.set(xlim=(-0.2, 13.0), ylim=(-0.2, 3.6), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
