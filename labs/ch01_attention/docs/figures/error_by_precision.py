"""Figure of lecture 4: the error of a correct and of three wrong attentions in four number formats.

Real kernels differ from machine to machine in their last bits. Here every operation is done in
float64 and rounded to the format's significant bits, in a fixed order, and compared with
40-digit decimals, so that the figure is the same everywhere.
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, PINK, VERMILION, panels, publish

FORMATS = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # significant bits
T, D = 24, 16


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """The nearest numbers with `bits` significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def total(terms: Sequence[np.ndarray], bits: int) -> np.ndarray:
    """The sum from left to right, rounded after each step."""
    result = terms[0]
    for term in terms[1:]:
        result = rounded(result + term, bits)
    return result


def exp(x: np.ndarray, bits: int) -> np.ndarray:
    """The exponential, correctly rounded (NumPy's own may differ in the last bit between processors)."""
    return rounded(np.vectorize(lambda value: float(Decimal(value).exp()))(x), bits)


def attention(
    Q: np.ndarray, K: np.ndarray, V: np.ndarray, bits: int, hidden: float = -np.inf, epsilon: float = 0.0
) -> np.ndarray:
    """Causal attention of (T, D) queries, keys and values."""
    products = [rounded(Q[:, None, d] * K[None, :, d], bits) for d in range(D)]  # D of (T, T)
    scores = total(products, bits) / np.sqrt(D)  # D = 16: an exact division
    scores = np.where(np.tri(T, dtype=bool), scores, hidden)
    exps = exp(rounded(scores - scores.max(axis=-1, keepdims=True), bits), bits)
    sums = rounded(total(list(exps.T), bits) + epsilon, bits)  # (T,)
    weights = rounded(exps / sums[:, None], bits)
    return total([rounded(weights[:, t, None] * V[t], bits) for t in range(T)], bits)


def exact(Q: np.ndarray, K: np.ndarray, V: np.ndarray) -> np.ndarray:
    """The same in 40-digit decimals: (T, D) of Decimal."""
    q, k, v = (np.vectorize(Decimal, otypes=[object])(x) for x in (Q, K, V))
    output = np.empty((T, D), dtype=object)
    for i in range(T):
        exps = np.array([(q[i] @ k[j] / 4).exp() for j in range(i + 1)])
        output[i] = (exps / exps.sum()) @ v[: i + 1]
    return output


def draw() -> Figure:
    rng = np.random.default_rng(0)
    Q, K, V = (rounded(rng.standard_normal((T, D)), 8) for _ in range(3))  # the same in every format
    implementations = {
        "mask writes −10, not −∞": (VERMILION, {"hidden": -10.0}),
        "1e-6 added to the sum": (GREEN, {"epsilon": 1e-6}),
        "1e-9 added to the sum": (PINK, {"epsilon": 1e-9}),
        "correct": (BLUE, {}),
    }
    with localcontext(prec=40):
        reference = exact(Q, K, V)
        errors = {
            name: [
                float(
                    abs(
                        np.vectorize(Decimal, otypes=[object])(attention(Q, K, V, bits, **change)) - reference
                    ).max()
                )
                for bits in FORMATS.values()
            ]
            for name, (_, change) in implementations.items()
        }

    figure, [axes] = panels(height=3.8)
    places = range(len(FORMATS))
    for name, (colour, _) in implementations.items():
        axes.plot(places, errors[name], "o-", color=colour, markersize=6)
        axes.text(3.1, errors[name][-1], name, color=colour, va="center")
    for place, bound, name, side, at in (
        (2, 1e-6, "bound 1e-6", "right", (1.8, 2.5e-7)),
        (3, 1e-12, "bound 1e-12", "left", (3.2, 1e-12)),
    ):
        axes.plot([place - 0.14, place + 0.14], [bound, bound], color=INK, linewidth=1.5)
        axes.text(*at, name, color=INK, ha=side, va="center", fontsize=9.5)
    axes.set(
        yscale="log",
        xlim=(-0.2, 4.5),
        ylim=(1e-16, 1),
        xticks=places,
        xticklabels=FORMATS,
        ylabel="largest error of the output",
    )
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
