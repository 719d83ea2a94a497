"""Figure of lecture 2: gradients of deep ReLU networks from three starting weights, measured and predicted."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, VERMILION, panels, publish

DEPTH, WIDTH, SAMPLES = 30, 256, 64
# The standard deviation of the weights times sqrt(WIDTH), and where to write its name.
STARTS = (
    ("too large: variance 4 / n", 2.0, VERMILION, 13, 1e4),
    ("He: variance 2 / n", np.sqrt(2), BLUE, 12, 4.0),
    ("Xavier: variance 1 / n", 1.0, GREEN, 12.5, 2e-4),
)


def gradients(gain: float) -> list[float]:
    """Return the rms of the gradient at the pre-activations of each layer, the first layer's first."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((WIDTH, WIDTH)) * gain / np.sqrt(WIDTH) for _ in range(DEPTH)]
    h, active = rng.standard_normal((SAMPLES, WIDTH)), []
    for W in weights:
        y = h @ W.T
        active.append(y > 0)
        h = np.where(y > 0, y, 0)
    g = rng.standard_normal((SAMPLES, WIDTH))  # at the last pre-activations
    found = [g]
    for layer in range(DEPTH - 1, 0, -1):
        g = (g @ weights[layer]) * active[layer - 1]
        found.append(g)
    return [float(np.sqrt((g**2).mean())) for g in reversed(found)]


def draw() -> Figure:
    figure, [axes] = panels(height=3.4)
    layers = np.arange(1, DEPTH + 1)
    for name, gain, colour, x, y in STARTS:
        axes.plot(layers, (gain**2 / 2) ** ((DEPTH - layers) / 2), color=colour, linewidth=1.2)
        axes.plot(layers, gradients(gain), "o", color=colour, markersize=4.5)
        axes.text(x, y, name, color=colour)
    axes.set(yscale="log", xlabel="layer", ylabel="gradient rms", xticks=(1, 10, 20, 30))
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
