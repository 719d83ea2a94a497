"""Figure of lecture 3: splitting (T, d_model) into heads, and the reshape that only looks like it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, PINK, VERMILION, panels, publish, tiles

T, H, D = 4, 2, 3
TOKEN_COLOURS = (BLUE, VERMILION, GREEN, PINK)


def show(axes: Axes, matrix: np.ndarray, name: str) -> None:
    """Draw a matrix of entries of x, each in its token's colour."""
    colours = [[TOKEN_COLOURS[entry // (H * D)] for entry in row] for row in matrix]
    tiles(axes, colours, [[str(entry) for entry in row] for row in matrix])
    axes.set_xlabel(name)


def draw() -> Figure:
    x = np.arange(T * H * D).reshape(T, H * D)  # the entries are their own addresses
    split = x.reshape(T, H, D).swapaxes(0, 1)  # (H, T, D)
    wrong = x.reshape(H, T, D)

    figure, axes = panels(5, height=2.2, ratios=(H * D, D, D, D, D))
    show(axes[0], x, "x")
    axes[0].set_yticks(range(T), [f"token {t}" for t in range(T)])
    axes[0].tick_params(length=0)
    axes[0].set_title("$(T, H D)$")
    for head in range(H):
        show(axes[1 + head], split[head], f"head {head}")
        show(axes[3 + head], wrong[head], f"“head {head}”")
    for panel, title in ((axes[1], "view, transpose"), (axes[3], "view only: wrong")):
        # Across two panels: centred on the gap to the right of the first.
        label = panel.text(1.1, 1.06, title, transform=panel.transAxes, ha="center", fontsize=11.5)
        label.set_in_layout(False)  # or the layout would widen the first panel to hold it
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
