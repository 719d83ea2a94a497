"""Figure of lecture 4: size of the stream, and what a small change of all weights does, by depth."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from shared.figures import BLUE, VERMILION, panels, publish

E, F, TOKENS = 64, 128, 32
DEPTHS = (1, 2, 4, 8, 16, 32)
CHANGE, SEEDS = 0.01, 8


def norm(x: np.ndarray) -> np.ndarray:
    """LayerNorm of every row."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True))


def run(depth: int, change: float, seed: int, *, pre: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the last stream, and the normalised output, of `depth` random blocks: (tokens, E) both.

    Both sub-layers of a block are random feed-forward layers: how norm and sum are joined matters
    here, not what is in between. `change` times a random matrix of the same size is added to each weight.
    """
    rng, other = np.random.default_rng(seed), np.random.default_rng(1000 + seed)

    def weight(rows: int, columns: int) -> np.ndarray:
        W, dW = (g.standard_normal((rows, columns)) / math.sqrt(rows) for g in (rng, other))
        return W + change * dW

    x = rng.standard_normal((TOKENS, E))
    for _ in range(2 * depth):  # two sub-layers in a block
        read = norm(x) if pre else x
        x = x + np.maximum(read @ weight(E, F), 0) @ weight(F, E)
        x = x if pre else norm(x)
    return x, norm(x) if pre else x


def draw() -> Figure:
    figure, [size, difference] = panels(2, height=3.3)
    for pre, colour in ((True, BLUE), (False, VERMILION)):
        sizes, moved = [], []
        for depth in DEPTHS:
            before = [run(depth, 0.0, seed, pre=pre) for seed in range(SEEDS)]
            after = [run(depth, CHANGE, seed, pre=pre) for seed in range(SEEDS)]
            sizes.append(np.sqrt(np.mean([x**2 for x, _ in before])))
            shifts = [np.mean((b - a) ** 2) for (_, a), (_, b) in zip(before, after, strict=True)]
            moved.append(100 * np.sqrt(np.mean(shifts)))  # the output itself has size 1
        size.plot(DEPTHS, sizes, "o-", color=colour, markersize=5)
        difference.plot(DEPTHS, moved, "o-", color=colour, markersize=5)
    for panel in (size, difference):
        panel.set(xscale="log", xticks=DEPTHS, xticklabels=DEPTHS, xlabel="blocks", ylim=(0, None))
        panel.xaxis.set_minor_locator(NullLocator())
    size.set_title("size of the stream")
    size.text(11, 4.0, "pre-norm", color=BLUE, ha="right")
    size.text(8, 1.35, "post-norm", color=VERMILION)
    difference.set_title("change of the output, in %")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
