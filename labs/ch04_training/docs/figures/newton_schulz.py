"""Figure of lecture 3: what five steps of two polynomials do to a singular value."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, INK, VERMILION, panels, publish


def draw() -> Figure:
    figure, [axes] = panels(1, height=3.3)
    start = np.logspace(-4, 0, 2000)
    muon, classic = start.copy(), start.copy()
    for _ in range(5):
        muon = 3.4445 * muon - 4.7750 * muon**3 + 2.0315 * muon**5
        classic = 1.5 * classic - 0.5 * classic**3
    axes.axhspan(0.68, 1.21, color=INK, alpha=0.18, linewidth=0)
    axes.plot(start, muon, color=BLUE)
    axes.plot(start, classic, color=VERMILION)
    axes.plot(start, start, color=INK, linewidth=1, linestyle="--")
    axes.set(
        xscale="log",
        xlim=(1e-4, 1),
        ylim=(0, 1.3),
        yticks=[0, 0.68, 1, 1.21],
        xlabel="singular value before, as a share of norm(G)",
        title="singular value after five steps",
    )
    axes.text(8e-4, 0.55, "Muon's quintic", color=BLUE, ha="right")
    axes.text(0.028, 0.3, "the classical cubic", color=VERMILION, ha="right")
    axes.text(0.95, 0.1, "no step at all", color=INK, ha="right")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
