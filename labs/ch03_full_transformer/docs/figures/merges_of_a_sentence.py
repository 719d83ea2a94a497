"""Figure of lecture 2: one sentence after more and more merges, and how much shorter it gets."""

from collections import Counter
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shared.figures import BLUE, GREEN, INK, PINK, VERMILION, panels, publish, text_on

SENTENCE = "the dog bites the man"
STORY = (
    "the dog sees the man and the man sees the dog . the man has a bone . the dog bites the bone and the man "
    "bites the bread . then the other dog comes and the dogs fight for the bone . the men laugh at the dogs ."
)
SHOWN = (0, 2, 6, 12, 24)  # merges


def merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for token in word:
        # A token that was just made is longer than pair[0], so it cannot be the left part again.
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return tuple(merged)


def words_of(text: str) -> list[tuple[str, ...]]:
    """Return the words as single characters, each but the first with its space in front."""
    first, *others = text.split(" ")
    return [tuple(first), *(tuple("Ġ" + word) for word in others)]


def train(text: str, count: int) -> list[tuple[str, str]]:
    words, merges = Counter(words_of(text)), []
    while len(merges) < count:
        totals: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                totals[pair] += times
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        merges.append(best)
        words = Counter({merge(word, best): times for word, times in words.items()})
    return merges


def tokens_of(text: str, merges: list[tuple[str, str]]) -> list[str]:
    words = words_of(text)
    for pair in merges:
        words = [merge(word, pair) for word in words]
    return [token for word in words for token in word]


def row(axes: Axes, y: int, tokens: list[str]) -> None:
    x = 0
    for i, token in enumerate(tokens):
        colour = (BLUE, VERMILION, GREEN, PINK)[i % 4]
        axes.add_patch(Rectangle((x + 0.05, y - 0.4), len(token) - 0.1, 0.8, facecolor=colour))
        for j, char in enumerate(token):
            axes.text(x + j + 0.5, y, char, ha="center", va="center", color=text_on(colour))
        x += len(token)


def draw() -> Figure:
    figure, [sentence, curve] = panels(2, height=2.9, ratios=[2.4, 1])
    merges = train(STORY, max(SHOWN))
    for y, count in enumerate(SHOWN):
        row(sentence, y, tokens_of(SENTENCE, merges[:count]))
    sentence.set(xlim=(0, len(SENTENCE)), ylim=(len(SHOWN) - 0.5, -0.5), xticks=[])
    sentence.set(title="the tokens of one sentence", ylabel="merges")
    sentence.set_yticks(range(len(SHOWN)), [str(count) for count in SHOWN])
    sentence.spines[:].set_visible(False)
    sentence.tick_params(length=0)

    counts = range(max(SHOWN) + 1)
    curve.plot(
        counts, [len(tokens_of(SENTENCE, merges[:k])) for k in counts], color=BLUE, drawstyle="steps-post"
    )
    curve.axhline(len(SENTENCE.split()), color=INK, linewidth=1, linestyle="--")
    curve.text(0, len(SENTENCE.split()) - 0.5, "words", color=INK, va="top")
    curve.set(title="how many tokens", xlabel="merges", ylim=(0, len(SENTENCE) + 1))
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
