"""Figure of lecture 1: what a dictionary, a nearest-key look-up and attention answer between the keys."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish

VALUES = np.array([9.0, 14.0, 21.0, 12.0])  # degrees at north, east, south, west
KEY_ANGLES = np.radians([0, 90, 180, 270])


def answers(angles: np.ndarray, length: float) -> np.ndarray:
    """Attention's answer to queries of the given length that point in the given directions."""
    scores = length * np.cos(angles[:, None] - KEY_ANGLES) / np.sqrt(2)  # (queries, keys)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ VALUES


def draw() -> Figure:
    figure, [axes] = panels(height=3.6)
    degrees = np.linspace(0, 360, 361)
    angles = np.radians(degrees)
    nearest = VALUES[np.argmax(np.cos(angles[:, None] - KEY_ANGLES), axis=-1)]

    axes.plot(degrees, nearest, color=INK, linewidth=1.2, linestyle="--")
    axes.plot(degrees, answers(angles, 12.0), color=VERMILION)
    axes.plot(degrees, answers(angles, 3.0), color=BLUE)
    axes.plot([0, 90, 180, 270, 360], [*VALUES, VALUES[0]], "o", color=GREEN, markersize=9)

    axes.text(97, 12.3, "dictionary:\nfour answers", color=GREEN)
    axes.text(229, 20.4, "nearest key", color=INK)
    axes.text(231, 18.3, "attention, long query", color=VERMILION)
    axes.text(285, 13.7, "attention,\nshort query", color=BLUE)
    axes.set(
        xlim=(-6, 366),
        ylim=(8, 22.4),
        xticks=[0, 90, 180, 270, 360],
        xticklabels=["north", "east", "south", "west", "north"],
        xlabel="direction of the query",
        ylabel="answer (°C)",
    )
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
