"""Figure of lecture 2: what each scheme gives a token as a function of its distance, content aside."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish

D = 64
OMEGA = 10000.0 ** (-np.arange(0, D, 2) / D)  # (D / 2,)


def draw() -> Figure:
    figure, [rotary, alibi] = panels(2, height=3.3)
    distance = np.arange(0, 257)
    cosines = np.cos(distance[:, None] * OMEGA)  # (distances, D / 2)
    rotary.plot(distance, cosines[:, 4], color=INK, linewidth=1)
    rotary.plot(distance, cosines[:, 16], color=VERMILION, linewidth=1.5)
    rotary.plot(distance, cosines.mean(axis=1), color=BLUE)
    rotary.set(title="RoPE: q·k / D of two equal vectors", xlabel="distance", ylim=(-1.1, 1.75))
    rotary.set_yticks([-1, 0, 1])
    rotary.text(0, 1.5, "mean of 32 pairs", color=BLUE)
    rotary.text(0, 1.18, "one fast pair", color=INK)
    rotary.text(256, 1.18, "one slow pair", color=VERMILION, ha="right")

    for slope, colour, name in ((2**-1, BLUE, "1/2"), (2**-4, GREEN, "1/16"), (2**-8, VERMILION, "1/256")):
        alibi.plot(distance, np.exp(-slope * distance), color=colour)
        alibi.text(*{"1/2": (8, 0.05), "1/16": (26, 0.28), "1/256": (130, 0.68)}[name], name, color=colour)
    alibi.set(title="ALiBi: factor on the weight, by slope", xlabel="distance", ylim=(0, 1.05))
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
