"""Figure of lecture 1: LayerNorm of rows of three features, and the gradient it lets through."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish

# An orthonormal basis of the plane of rows whose mean is 0.
PLANE = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2.0], [6.0]])  # (2, 3)
RADIUS = np.sqrt(3)


def draw() -> Figure:
    rng = np.random.default_rng(3)
    angle, length = 2 * np.pi * (np.arange(13) + 0.5 * rng.random(13)) / 13, rng.uniform(0.5, 3.2, 13)
    offset = rng.uniform(-5, 5, (13, 1))  # the mean of a row, which the norm removes
    x = offset + np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1) @ PLANE  # (rows, 3)
    centred = x - x.mean(axis=1, keepdims=True)  # (rows, 3)
    x_hat = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True))

    figure, [forward, backward] = panels(2, height=3.5)
    turn = np.linspace(0, 2 * np.pi, 200)
    for panel in (forward, backward):
        panel.plot(RADIUS * np.cos(turn), RADIUS * np.sin(turn), color=INK, linewidth=1)
        panel.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), xticks=[], yticks=[])
        panel.set_aspect("equal")
        panel.spines[:].set_visible(False)

    before, after = centred @ PLANE.T, x_hat @ PLANE.T  # (rows, 2)
    forward.plot([0], [0], "+", color=INK)
    for a, b in zip(before, after, strict=True):
        forward.plot(*zip(a, b, strict=True), color=INK, linewidth=0.8)
    forward.plot(*before.T, "o", color=BLUE, markersize=6)
    forward.plot(*after.T, "o", color=VERMILION, markersize=6)
    forward.set_title("forward: onto the circle")
    forward.text(-3.5, 3.1, "row, mean removed", color=BLUE)
    forward.text(3.5, -3.4, r"$\hat{x}$, length $\sqrt{D}$", color=VERMILION, ha="right")

    arrow = {"width": 0.07, "head_width": 0.26, "length_includes_head": True, "linewidth": 0}
    for angle, length in ((0.5, 0.75), (2.3, 1.6), (3.7, 2.5)):
        point = length * np.array([np.cos(angle), np.sin(angle)])
        radial, along = point / length, np.array([-np.sin(angle), np.cos(angle)])
        gradient = 0.9 * radial + 1.0 * along
        through = (gradient @ along) * along * RADIUS / length  # rstd is RADIUS / length
        backward.plot(*zip((0, 0), point, strict=True), color=INK, linewidth=0.8)
        backward.arrow(*point, *gradient, color=INK, **arrow)
        backward.arrow(*point, *through, color=GREEN, **arrow)
        backward.plot(*point, "o", color=BLUE, markersize=6)
    backward.set_title("backward: the tangent, times 1/std")
    backward.text(-3.5, 2.6, "gradient that\narrives", color=INK, ha="left")
    backward.text(3.5, -2.6, "what is\npassed on", color=GREEN, ha="right")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
