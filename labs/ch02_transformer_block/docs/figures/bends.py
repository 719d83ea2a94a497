"""Figure of lecture 3: activation functions, and how far the GELU by tanh is from the one by erf."""

import math

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, INK, PINK, VERMILION, panels, publish


def draw() -> Figure:
    figure, [curves, difference] = panels(2, height=3.3)
    u = np.linspace(-4, 3, 281)
    phi = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in u])
    by_tanh = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    curves.plot(u, np.maximum(u, 0), color=INK, linewidth=1.5)
    curves.plot(u, u / (1 + np.exp(-u)), color=VERMILION)
    curves.plot(u, u * phi, color=BLUE)
    curves.set(title="three bends", xlabel="u", xlim=(-4, 2), ylim=(-0.4, 1.6))
    curves.text(-3.9, 1.35, "GELU: u Φ(u)", color=BLUE)
    curves.text(-3.9, 1.12, "SiLU: u σ(u)", color=VERMILION)
    curves.text(-3.9, 0.89, "ReLU: max(u, 0)", color=INK)

    difference.axhline(0, color=INK, linewidth=0.8)
    difference.plot(u, 1e4 * (by_tanh - u * phi), color=PINK)
    difference.set(title="GELU: by tanh minus by erf, × 10⁴", xlabel="u", xlim=(-4, 3))
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
