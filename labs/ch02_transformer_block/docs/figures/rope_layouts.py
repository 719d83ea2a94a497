"""Figure of lecture 2: which features RoPE rotates together, in both layouts."""

from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, PINK, VERMILION, panels, publish, tiles

D = 8
PAIR_COLOURS = (BLUE, VERMILION, GREEN, PINK)  # pair 0, the fastest, first


def draw() -> Figure:
    figure, axes = panels(2, height=1.35)
    layouts = {
        "interleaved: pair i is (2i, 2i + 1)": [i // 2 for i in range(D)],
        "half: pair i is (i, i + D/2)": [i % (D // 2) for i in range(D)],
    }
    for panel, (name, pairs) in zip(axes, layouts.items(), strict=True):
        tiles(panel, [[PAIR_COLOURS[pair] for pair in pairs]], [[str(i) for i in range(D)]])
        panel.set(title=name, xlabel="feature of one head; one colour is one pair")
        panel.xaxis.label.set_fontsize(9.5)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
