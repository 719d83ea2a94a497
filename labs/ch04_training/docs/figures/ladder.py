"""Figure of lecture 4: the validation loss of each recipe, from nanoGPT's to the lab's.

Measured by scripts/ablate_tiny_shakespeare.py; ladder.jsonl beside this file is what that wrote.
"""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from shared.figures import BLUE, INK, VERMILION, panels, publish

# The rungs, in order, and what changes.
WORDS = {
    "nanogpt": "nanoGPT's recipe",
    "rate": "+ learning rate 3e-3",
    "linear": "+ which falls to 0",
    "rotary": "+ rotary positions",
    "norms": "+ RMSNorm, norm of q and k",
    "swiglu": "+ SwiGLU",
    "quiet": "+ quiet start",
    "muon": "+ Muon",
    "context": "+ windows of 128",
}


def draw() -> Figure:
    lines = [json.loads(line) for line in Path(__file__).with_name("ladder.jsonl").read_text().splitlines()]
    losses = {rung: [line["loss"] for line in lines if line.get("rung") == rung] for rung in WORDS}
    counting = min(line["loss"] for line in lines if "ngram" in line)
    figure, [axes] = panels(height=3.9)
    before = None
    for row, rung in enumerate(WORDS):
        mean = statistics.mean(losses[rung])
        axes.plot(losses[rung], [row] * len(losses[rung]), "o", color=BLUE, markersize=4)
        if before is not None:
            axes.plot([before, before, mean], [row - 1, row, row], color=BLUE, linewidth=1.2)
            gain = before - mean
            left = min(losses[rung])
            axes.text(left - 0.012, row, f"{-gain:+.3f}".replace("-", "−"), ha="right", va="center", color=BLUE)
        before = mean
    axes.axvline(counting, color=VERMILION, linestyle="--", linewidth=1.2)
    axes.text(counting + 0.006, -0.15, "counting five\ncharacters", color=VERMILION, va="center")
    axes.set(
        yticks=range(len(WORDS)),
        yticklabels=WORDS.values(),
        ylim=(len(WORDS) - 0.5, -0.7),
        xlim=(1.44, 1.94),
        xlabel="validation loss, nats per character",
    )
    axes.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
