"""Figure of lecture 4: one mask (causal, last key is padding) in three conventions."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, panels, publish, tiles

T = 5


def draw() -> Figure:
    may_look = np.tril(np.ones((T, T), dtype=bool))
    may_look[:, -1] = False  # the last key is padding
    conventions = {
        "True = may look": np.where(may_look, "1", "0"),
        "True = hidden": np.where(may_look, "0", "1"),
        "added to the scores": np.where(may_look, "0", "−∞"),
    }
    figure, axes = panels(3, height=2.7)
    for panel, (name, entries) in zip(axes, conventions.items(), strict=True):
        tiles(panel, np.where(may_look, BLUE, "none").tolist(), entries.tolist())
        panel.set(title=name, xlabel="key")
    axes[0].set_ylabel("query")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
