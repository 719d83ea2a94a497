"""Figure of lecture 2: softmax weights of the same 8 random keys as d_k grows, without a scale."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, VERMILION, panels, publish

WIDTHS = (4, 64, 1024)
KEYS = 8


def weights_of(d_k: int, scale: float) -> np.ndarray:
    """Weights of random keys for one random query, the largest first."""
    rng = np.random.default_rng(0)
    query, keys = rng.standard_normal(d_k), rng.standard_normal((KEYS, d_k))
    scores = (keys * query).sum(axis=-1) * scale
    weights = np.exp(scores - scores.max())
    return np.sort(weights / weights.sum())[::-1]


def draw() -> Figure:
    figure, axes = panels(len(WIDTHS), height=2.7)
    at = np.arange(KEYS)
    for panel, d_k in zip(axes, WIDTHS, strict=True):
        panel.bar(at - 0.2, weights_of(d_k, 1.0), 0.4, color=VERMILION)
        panel.bar(at + 0.2, weights_of(d_k, d_k**-0.5), 0.4, color=BLUE)
        panel.set(ylim=(0, 1.05), xticks=[], xlabel="8 keys, sorted", title=f"$d_k$ = {d_k}")
    for panel in axes[1:]:
        panel.set_yticklabels([])
    axes[0].set_ylabel("weight")
    axes[1].text(7.5, 0.86, r"$q\cdot k$", color=VERMILION, ha="right", fontsize=12)
    axes[1].text(7.5, 0.68, r"$q\cdot k\,/\,\sqrt{d_k}$", color=BLUE, ha="right", fontsize=12)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
