"""Figure of lecture 1: the six masks of lab 3.1, each a rule about a query's and a key's position."""

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, PINK, VERMILION, publish, tiles

T = 6
QUERY, KEY = np.arange(T)[:, None], np.arange(T)[None, :]


def coloured(may_see: np.ndarray, colours: np.ndarray | str = BLUE) -> list[list[str]]:
    """Return the colour of each square: empty where a query may not attend."""
    return np.where(may_see, colours, "none").tolist()


def draw() -> Figure:
    documents = np.array([0, 0, 0, 1, 2, 2])
    shades = np.array([BLUE, VERMILION, GREEN])[documents][:, None]
    masks = {
        "causal": coloured(KEY <= QUERY),
        "causal, the last 2 queries": coloured((KEY <= QUERY)[-2:]),
        "sliding window of 3": coloured((KEY <= QUERY) & (QUERY - KEY < 3)),
        "causal, 2 padded on the left": coloured((KEY <= QUERY) & (KEY >= 2)),
        "prefix of 3": coloured((KEY <= QUERY) | (KEY < 3), np.where(KEY <= QUERY, BLUE, PINK)),
        "3 documents packed": coloured(
            (documents[:, None] == documents) & (KEY <= QUERY), np.broadcast_to(shades, (T, T))
        ),
    }
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    panels = figure.subplots(2, 3)
    for panel, (name, colours) in zip(panels.flat, masks.items(), strict=True):
        tiles(panel, colours)
        panel.set(ylim=(T - 0.4, -0.6))
        panel.set_title(name, fontsize=10.5)
        first = T - len(colours)
        panel.set(
            xticks=range(T),
            yticks=range(len(colours)),
            yticklabels=[str(first + n) for n in range(len(colours))],
        )
        panel.tick_params(length=0, labelsize=8.5)
    for panel in panels[1]:
        panel.set_xlabel("key at j")
    for panel in panels[:, 0]:
        panel.set_ylabel("query at i")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
