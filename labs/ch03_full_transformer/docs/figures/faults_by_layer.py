"""Figure of lecture 4: two planted faults, seen along the stream and layer by layer."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, INK, VERMILION, panels, publish

E, TOKENS, BLOCKS = 32, 20, 12
TRANSPOSED, EPSILON = 3, 8  # the blocks at fault
AGREE = 1e-9  # drawn for what is equal


def block(x: np.ndarray, weights: tuple[np.ndarray, np.ndarray], eps: float) -> np.ndarray:
    """A pre-norm block: x + tanh(norm(x) A) B, rows are tokens."""
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return x + np.tanh(normed @ weights[0]) @ weights[1]


def errors() -> tuple[list[float], list[float]]:
    """Return by how much the output of each block differs: along the stream, and on the reference's input."""
    rng = np.random.default_rng(0)
    theirs = [tuple(rng.standard_normal((2, E, E)) / np.sqrt(E)) for _ in range(BLOCKS)]
    ours = list(theirs)
    ours[TRANSPOSED] = (theirs[TRANSPOSED][0].T, theirs[TRANSPOSED][1])
    epsilons = [1e-2 if n == EPSILON else 1e-5 for n in range(BLOCKS)]
    right = wrong = rng.standard_normal((TOKENS, E))
    stream, local = [], []
    for n in range(BLOCKS):
        given = right
        right, wrong = block(right, theirs[n], 1e-5), block(wrong, ours[n], epsilons[n])
        alone = block(given, ours[n], epsilons[n])
        stream.append(np.abs(wrong - right).max())
        local.append(np.abs(alone - right).max())
    return stream, local


def draw() -> Figure:
    figure, axes = panels(2, height=3.2)
    stream, local = errors()
    titles = "each block gets ours", "each block gets the reference's"
    for panel, values, title in zip(axes, (stream, local), titles, strict=True):
        for n, value in enumerate(values):
            faulty = n in (TRANSPOSED, EPSILON)
            height = max(value, AGREE)
            colour = VERMILION if faulty else BLUE if value > AGREE else INK
            panel.plot([n, n], [AGREE, height], color=colour, linewidth=2.5)
            panel.plot([n], [height], "o", color=colour, markersize=6)
        panel.set(yscale="log", ylim=(AGREE / 3, 300), xticks=range(0, BLOCKS, 2), xlabel="block")
        panel.set(yticks=[1e-9, 1e-6, 1e-3, 1], yticklabels=["equal", "$10^{-6}$", "$10^{-3}$", "1"])
        panel.minorticks_off()
        panel.set_title(title)
    axes[0].set_ylabel("largest difference")
    axes[1].text(TRANSPOSED, 12, "transposed", color=VERMILION, ha="center")
    axes[1].text(EPSILON, 0.05, "epsilon", color=VERMILION, ha="center")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
