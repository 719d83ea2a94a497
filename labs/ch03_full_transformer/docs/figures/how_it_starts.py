"""Figure of lecture 3: the stream of fresh models by depth, and the first loss by the size of the head."""

import math

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, INK, VERMILION, panels, publish

E, TOKENS = 192, 48
STD = 0.02 * math.sqrt(768 / E)  # narrower than GPT-2 small, with the same E * std^2
DEPTHS = (12, 48)
V, WIDE = 2000, 768  # of the right panel
STDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def norm(x: np.ndarray) -> np.ndarray:
    """LayerNorm of every row."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True))


def gelu(u: np.ndarray) -> np.ndarray:
    """GELU by tanh."""
    return 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def stream_sizes(depth: int, *, scaled: bool) -> list[float]:
    """Return the root mean square of the stream before the first block and after each of `depth`.

    Attention is taken as what it nearly is in a fresh model: every token weighs its past equally.
    """
    rng = np.random.default_rng(0)
    write = STD / math.sqrt(2 * depth) if scaled else STD
    mean = np.tril(np.ones((TOKENS, TOKENS))) / np.arange(1, TOKENS + 1)[:, None]
    x = rng.standard_normal((TOKENS, E)) * 0.02 * math.sqrt(2)  # tokens and positions
    sizes = [float(np.sqrt((x**2).mean()))]
    for _ in range(depth):
        value, out = STD * rng.standard_normal((E, E)), write * rng.standard_normal((E, E))
        x = x + mean @ norm(x) @ value @ out
        up, down = STD * rng.standard_normal((E, 4 * E)), write * rng.standard_normal((4 * E, E))
        x = x + gelu(norm(x) @ up) @ down
        sizes.append(float(np.sqrt((x**2).mean())))
    return sizes


def first_losses() -> list[float]:
    """Return the mean cross-entropy of a random head, for each of STDS, on normalised random streams."""
    rng = np.random.default_rng(0)
    x, head = norm(rng.standard_normal((64, WIDE))), rng.standard_normal((V, WIDE))
    targets, scores = rng.integers(0, V, size=64), x @ head.T
    losses = []
    for std in STDS:
        logits = std * scores
        top = logits.max(axis=1)
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append(float((total - logits[np.arange(64), targets]).mean()))
    return losses


def draw() -> Figure:
    figure, [stream, loss] = panels(2, height=3.4)
    for scaled, colour in ((True, BLUE), (False, VERMILION)):
        for depth in DEPTHS:
            sizes = stream_sizes(depth, scaled=scaled)
            stream.plot(sizes, color=colour)
            stream.plot(depth, sizes[-1], "o", color=colour, markersize=5)
    stream.set(
        title="size of the stream", xlabel="blocks", xlim=(0, 50), ylim=(0, None), xticks=range(0, 49, 12)
    )
    stream.text(47, 0.42, "divided by sqrt(2 L)", color=BLUE, ha="right")
    stream.text(21, 2.4, "all 0.02", color=VERMILION, ha="right")
    loss.plot(STDS, first_losses(), "o-", color=BLUE, markersize=5)
    loss.axhline(math.log(V), color=INK, linewidth=1, linestyle="--")
    loss.text(0.002, math.log(V) * 0.93, "guessing", color=INK, va="top")
    loss.axvline(0.02, color=INK, linewidth=1, linestyle=":")
    loss.text(0.0185, 70, "GPT-2", color=INK, ha="right")
    loss.text(0.6, 72, "PyTorch's\nembedding", color=INK, ha="right")
    loss.set(title="loss at the start", xlabel="standard deviation of the head", xscale="log", yscale="log")
    loss.set(yticks=[5, 10, 20, 50, 100], yticklabels=[5, 10, 20, 50, 100], ylim=(5, 150))
    loss.minorticks_off()
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
