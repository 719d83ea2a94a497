"""Figure of lecture 3: one gradient of a small matrix, and the step that SGD, Adam and Muon make of it."""

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from shared.figures import BLUE, INK, VERMILION, publish, tiles

M, N = 6, 8


def gradient() -> np.ndarray:
    """One strong direction, four weaker ones: (M, N), as gradients of weights often are."""
    rng = np.random.default_rng(5)
    U, _ = np.linalg.qr(rng.standard_normal((M, M)))
    V, _ = np.linalg.qr(rng.standard_normal((N, M)))
    return (U * [10, 2, 1.5, 1, 0.7, 0.5]) @ V.T


def colours(step: np.ndarray) -> list[list[str]]:
    """Blue for a step down, vermilion for one up, more transparent near 0; relative to the largest entry."""
    shares = step / np.abs(step).max()
    return [[to_hex((VERMILION if x > 0 else BLUE, abs(x)), keep_alpha=True) for x in row] for row in shares]


def draw() -> Figure:
    G = gradient()
    U, _, Vt = np.linalg.svd(G, full_matrices=False)
    steps = {"SGD:  −G": -G, "Adam, first step:  −sign(G)": -np.sign(G), "Muon:  −U Vᵀ": -U @ Vt}
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots(2, 3, height_ratios=[1.25, 1])
    for (name, step), top, bottom in zip(steps.items(), axes[0], axes[1], strict=True):
        tiles(top, colours(step))
        top.set_title(name)
        S = np.linalg.svd(step, compute_uv=False)
        bottom.bar(range(1, M + 1), S / S[0], color=INK, width=0.6)
        bottom.set(xticks=range(1, M + 1), ylim=(0, 1.08), yticks=[0, 1])
    axes[1, 0].set_ylabel("singular values,\nlargest = 1")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
