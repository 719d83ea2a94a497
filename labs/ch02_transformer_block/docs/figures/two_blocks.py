"""Figure of lecture 4: the pre-norm and the post-norm block, drawn as a stream from bottom to top."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish, text_on

ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0}


def box(axes: Axes, x: float, y: float, name: str, colour: str) -> None:
    """Draw a box of width 1.5 and height 0.5 around (x, y)."""
    shape = FancyBboxPatch(
        (x - 0.75, y - 0.22),
        1.5,
        0.44,
        boxstyle="round,pad=0.03",
        facecolor=colour,
        edgecolor="none",
        zorder=3,
    )
    axes.add_patch(shape)
    axes.text(x, y, name, ha="center", va="center", color=text_on(colour), fontsize=9.5, zorder=4)


def plus(axes: Axes, y: float) -> None:
    """Draw the addition on the stream."""
    axes.add_patch(Circle((0, y), 0.17, facecolor="none", edgecolor=INK, linewidth=1.3, zorder=3))
    axes.plot([-0.1, 0.1], [y, y], color=INK, linewidth=1.3)
    axes.plot([0, 0], [y - 0.1, y + 0.1], color=INK, linewidth=1.3)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """Draw a line through the points, with an arrowhead at the last."""
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.3, solid_capstyle="butt")
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=ARROW)


def half(axes: Axes, bottom: float, name: str, number: int, *, pre: bool) -> float:
    """Draw one sub-layer around the stream that starts at `bottom`; return where it ends."""
    right, foot = 1.35, bottom + 0.2
    if pre:
        box(axes, right, bottom + 0.65, f"norm {number}", VERMILION)
        box(axes, right, bottom + 1.45, name, BLUE)
        top = bottom + 2.0
        arrow(axes, (0, foot), (right, foot), (right, bottom + 0.4))
        arrow(axes, (right, bottom + 0.9), (right, bottom + 0.9), (right, bottom + 1.2))
        arrow(axes, (right, bottom + 1.7), (right, top), (0.17, top))
        end = top + 0.4
        axes.plot([0, 0], [bottom, top - 0.17], color=GREEN, linewidth=3)
        axes.plot([0, 0], [top + 0.17, end], color=GREEN, linewidth=3)
    else:
        box(axes, right, bottom + 0.7, name, BLUE)
        top = bottom + 1.25
        arrow(axes, (0, foot), (right, foot), (right, bottom + 0.45))
        arrow(axes, (right, bottom + 0.95), (right, top), (0.17, top))
        box(axes, 0, top + 0.65, f"norm {number}", VERMILION)
        end = top + 1.15
        for low, high in ((bottom, top - 0.17), (top + 0.17, top + 0.4), (top + 0.9, end)):
            axes.plot([0, 0], [low, high], color=INK, linewidth=1.3)
    plus(axes, top)
    return end


def draw() -> Figure:
    figure, axes = panels(2, height=4.4)
    for panel, (title, pre) in zip(axes, (("pre-norm", True), ("post-norm", False)), strict=True):
        end = half(panel, half(panel, 0.2, "attention", 1, pre=pre), "feed-forward", 2, pre=pre)
        panel.annotate(
            "",
            xy=(0, end + 0.35),
            xytext=(0, end - 0.05),
            arrowprops=ARROW | ({"color": GREEN, "linewidth": 3} if pre else {}),
        )
        panel.text(0, 0.1, "x", ha="center", va="top", color=INK)
        panel.text(0, end + 0.4, "y", ha="center", va="bottom", color=INK)
        panel.set(title=title, xlim=(-1.3, 2.4), ylim=(-0.3, end + 0.8), xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    axes[0].text(
        -0.15, 2.6, "the stream:\nadditions only", color=GREEN, ha="right", va="center", fontsize=9.5
    )
    axes[1].text(-0.85, 2.1, "on the\nstream", color=VERMILION, ha="right", va="center", fontsize=9.5)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
