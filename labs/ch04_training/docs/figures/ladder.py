"""Figure of lecture 1: what a character of Shakespeare costs, for predictors that know more and more.

`measured` counts on the training split of tiny Shakespeare and predicts the validation split; its results are
written down here, so that the figure can be made without the text.
"""

import bz2
import lzma
import math
import zlib
from collections import Counter, defaultdict

from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish

COUNTS, COMPRESSOR, NETWORK = BLUE, VERMILION, GREEN
LADDER = [
    ("all 65 characters alike", 4.174, COUNTS),
    ("counts of characters", 3.347, COUNTS),
    ("after 1 character", 2.486, COUNTS),
    ("zlib", 2.154, COMPRESSOR),
    ("after 2 characters", 2.049, COUNTS),
    ("after 3 characters", 1.774, COUNTS),
    ("xz", 1.744, COMPRESSOR),
    ("after 4 characters", 1.669, COUNTS),
    ("bzip2", 1.662, COMPRESSOR),
    ("lab 4.4's transformer", 1.60, NETWORK),
]


def measured(train: str, validation: str, longest: int = 4) -> dict[str, float]:
    """Return nats per character of `validation`: counts after 0 to `longest` characters, and compressors.

    Counts of n characters are mixed with those of n - 1 after Witten and Bell 1991. A compressor costs what
    the validation split adds to the compressed training split.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for n in range(longest + 1):
        for i in range(n, len(train)):
            counts[train[i - n : i]][train[i]] += 1
    seen = {context: (c.total(), len(c)) for context, c in counts.items()}
    nats, kinds_of_all = [0.0] * (longest + 1), len(set(train))
    for i, character in enumerate(validation):
        p = 1 / kinds_of_all
        for n in range(longest + 1):
            context = validation[max(i - n, 0) : i]
            if i >= n and context in seen:
                total, kinds = seen[context]
                p = (counts[context][character] + kinds * p) / (total + kinds)
            nats[n] -= math.log(p)
    result = {f"after {n}": value / len(validation) for n, value in enumerate(nats)}
    for name, squeeze in (("zlib", zlib), ("bzip2", bz2), ("xz", lzma)):
        short, long = (len(squeeze.compress(text.encode())) for text in (train, train + validation))
        result[name] = (long - short) * 8 * math.log(2) / len(validation)
    return result


def draw() -> Figure:
    figure, (axes,) = panels(height=3.9)
    for y, (_, nats, colour) in enumerate(LADDER):
        axes.barh(y, nats, height=0.72, color=colour)
        words = f"{nats:.2f} nats = {nats / math.log(2):.2f} bits, perplexity {math.exp(nats):.1f}"
        axes.text(nats + 0.05, y, words, va="center", fontsize=9, color=INK)
    axes.set(
        yticks=range(len(LADDER)),
        yticklabels=[name for name, _, _ in LADDER],
        xlabel="nats per character of the validation split",
        xlim=(0, 7.0),
        xticks=range(5),
    )
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
