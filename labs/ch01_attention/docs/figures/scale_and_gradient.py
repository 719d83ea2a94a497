"""Figure of lecture 2: spread of the scores and size of softmax's gradient against d_k, measured."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from shared.figures import BLUE, INK, VERMILION, panels, publish

WIDTHS = (1, 4, 16, 64, 256, 1024)
ROWS, KEYS = 500, 16


def random_scores(d_k: int) -> np.ndarray:
    """Dot products of random queries with 16 random keys each: (rows, keys)."""
    rng = np.random.default_rng(d_k)
    query = rng.standard_normal((ROWS, d_k))
    return np.stack([(query * rng.standard_normal((ROWS, d_k))).sum(axis=-1) for _ in range(KEYS)], axis=-1)


def gradient_size(scores: np.ndarray) -> np.ndarray:
    """Frobenius norm of softmax's Jacobian, diag(w) - w wᵀ, of each row: (rows,)."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    jacobian = -weights[:, :, None] * weights[:, None, :]  # (rows, keys, keys)
    jacobian[:, range(KEYS), range(KEYS)] += weights
    # Far below the axis only rounding is left, and that differs from machine to machine.
    return np.maximum(np.sqrt((jacobian**2).sum(axis=(1, 2))), 1e-8)


def draw() -> Figure:
    figure, [spread, gradient] = panels(2, height=3.3)
    scores = {d_k: random_scores(d_k) for d_k in WIDTHS}
    for scaled, colour in ((False, VERMILION), (True, BLUE)):
        each = [scores[d_k] * (d_k**-0.5 if scaled else 1.0) for d_k in WIDTHS]
        spread.plot(WIDTHS, [s.std() for s in each], "o-", color=colour, markersize=5)
        low, middle, high = np.transpose([np.quantile(gradient_size(s), [0.1, 0.5, 0.9]) for s in each])
        gradient.fill_between(WIDTHS, low, high, color=colour, alpha=0.25, linewidth=0)
        gradient.plot(WIDTHS, middle, "o-", color=colour, markersize=5)

    for panel in (spread, gradient):
        panel.set(xscale="log", yscale="log", xticks=WIDTHS, xticklabels=WIDTHS, xlabel="$d_k$")
        panel.xaxis.set_minor_locator(NullLocator())
    spread.set(
        title="standard deviation of a score", ylim=(0.5, 60), yticks=[1, 4, 16], yticklabels=[1, 4, 16]
    )
    spread.yaxis.set_minor_locator(NullLocator())
    spread.text(13, 9.5, "no scale", color=VERMILION, ha="right")
    spread.text(16, 1.3, r"divided by $\sqrt{d_k}$", color=BLUE)
    gradient.set(title="gradient through softmax", ylim=(1e-6, 3))
    gradient.text(230, 1.5e-3, "no scale", color=VERMILION, ha="right")
    gradient.text(9, 0.75, r"divided by $\sqrt{d_k}$", color=BLUE)
    gradient.text(1, 2e-6, "line: median of 500 rows\nband: 10 % to 90 %", color=INK, fontsize=9.5)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
