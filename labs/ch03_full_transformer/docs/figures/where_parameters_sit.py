"""Figure of lecture 3: what the parameters of the four GPT-2 are for, as shares of the whole."""

from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, PINK, VERMILION, panels, publish, text_on

V, C = 50257, 1024
SIZES = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "xl": (48, 1600)}
COLOURS = {"token embedding": VERMILION, "positions": PINK, "attention": GREEN, "feed-forward": BLUE}


def parts(layers: int, E: int) -> dict[str, int]:
    """Return the parameters of each part; norms, 0.03 % and less, are counted with what reads them."""
    return {
        "token embedding": V * E,
        "positions": C * E,
        "attention": layers * (4 * E * E + 4 * E + 2 * E),
        "feed-forward": layers * (8 * E * E + 5 * E + 2 * E) + 2 * E,
    }


def draw() -> Figure:
    figure, [axes] = panels(height=2.7)
    for row, size in enumerate(SIZES.values()):
        counts = parts(*size)
        total, left = sum(counts.values()), 0.0
        for part, count in counts.items():
            share = 100 * count / total
            axes.barh(
                row, share, left=left, height=0.66, color=COLOURS[part], label=part if row == 0 else None
            )
            if share > 4:
                axes.text(
                    left + share / 2,
                    row,
                    f"{share:.0f}",
                    ha="center",
                    va="center",
                    color=text_on(COLOURS[part]),
                )
            left += share
        axes.text(101, row, f"{total / 1e6:,.0f} M", va="center", color=INK)
    axes.set_yticks(range(len(SIZES)), SIZES)
    axes.set(xlim=(0, 112), ylim=(3.5, -0.5), xticks=range(0, 101, 25), xlabel="% of all parameters")
    axes.spines.left.set_visible(False)
    axes.tick_params(left=False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=9.5)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
