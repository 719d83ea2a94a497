"""Figure of lecture 4: the validation loss of each recipe, from nanoGPT's to lab 4.4's.

Measured by scripts/ablate_tiny_shakespeare.py on CPUs, with the seeds 0, 1 and 2.
"""

import statistics

from matplotlib.figure import Figure
from shared.figures import BLUE, INK, panels, publish

# What changes, and the loss of each seed.
LOSSES = {
    "nanoGPT's recipe": (1.8993, 1.9082, 1.9076),
    "+ learning rate 3e-3": (1.7771, 1.7778, 1.7822),
    "+ straight down to 0": (1.7711, 1.7837, 1.7709),
    "+ rotary positions": (1.7255, 1.7363, 1.7223),
    "+ RMSNorm, norm of q and k": (1.7257, 1.7440, 1.7386),
    "+ SwiGLU": (1.6949, 1.7003, 1.6961),
    "+ quiet start": (1.6674, 1.6626, 1.6584),
    "+ Muon": (1.5734, 1.5649, 1.5716),
    "+ windows of 128": (1.5517, 1.5525, 1.5478),
}


def draw() -> Figure:
    figure, [axes] = panels(height=3.9)
    before = None
    for row, losses in enumerate(LOSSES.values()):
        mean = statistics.mean(losses)
        axes.plot(losses, [row] * len(losses), "o", color=BLUE, markersize=4)
        if before is not None:
            axes.plot([before, before, mean], [row - 1, row, row], color=BLUE, linewidth=1.2)
            gain = f"{mean - before:+.3f}".replace("-", "−")
            axes.text(min(losses) - 0.012, row, gain, ha="right", va="center", color=BLUE)
        before = mean
    axes.set(
        yticks=range(len(LOSSES)),
        yticklabels=LOSSES.keys(),
        ylim=(len(LOSSES) - 0.5, -0.5),
        xlim=(1.46, 1.94),
        xlabel="validation loss, nats per character",
    )
    axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
