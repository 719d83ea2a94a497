"""See what attention does: a heatmap, a grid of heads, and numbers that tell kinds of heads apart.

Everywhere, row i of `weights` is a query and column j a key: `weights[..., i, j]` is how much query i
takes from key j. With T_q queries and T_k >= T_q keys, the queries are the *last* T_q positions of the
text, as in a model that generates: query i stands at position p_i = T_k - T_q + i. If T_q = T_k, p_i = i.

Sources: entropy and distance of attention, Vig and Belinkov 2019, arXiv:1906.04284; induction heads,
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", and Olsson et al. 2022,
arXiv:2209.11895.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Array = npt.NDArray[np.floating[Any]]

# --- Part 1: pictures ---------------------------------------------------------------------


def plot_attention(
    weights: Array,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the weights of one head as a heatmap.

    - Row i is query i, the first query at the top; column j is key j, the first key on the left.
    - One tick in the middle of each row and column, labelled with its token. A token that occurs
      twice has two ticks.
    - The colour scale is linear and always runs from 0 to 1, so that two heatmaps can be compared.
      Each weight is one cell of one flat colour (`imshow` or `pcolormesh`; no smoothing), zeros too.
    - The x axis is labelled "key" and the y axis "query".
    - Nothing is added to the figure but the heatmap: a colour bar is up to the caller.

    Pyplot is left alone: no figure stays open there (`plt.get_fignums()` does not change), nothing is
    shown, and matplotlib's settings (`rcParams`) keep their values.

    Args:
        weights: (T_q, T_k), numbers from 0 to 1. Not modified.
        query_tokens: T_q labels.
        key_tokens: T_k labels; None means the same as `query_tokens`.
        ax: where to draw; None means on a new Figure of its own.

    Returns:
        The Axes drawn on: `ax` itself, if it was given.

    Raises:
        ValueError: the shape of `weights` is not (len(query_tokens), len(key_tokens)).
    """
    # YOUR CODE HERE
    # 1. key_tokens is None: the keys are the queries. Then check the shape.
    # 2. ax is None: a matplotlib.figure.Figure can be made and filled without pyplot (`.subplots()`).
    # 3. Draw. Which colours would a matrix get whose largest weight is 0.1? Fix both ends of the scale.
    # 4. Ticks with labels, by position (0, 1, 2, ...) and not by name; then the two axis labels.
    raise NotImplementedError("the heatmap of one head")


def plot_heads(weights: Array, tokens: Sequence[str], ncols: int = 4) -> Figure:
    """Draw all heads of a layer, one panel per head, on a new Figure.

    Panels are filled in reading order, left to right and then down, `ncols` to a row; the last row may
    be shorter. Each panel follows the rules of `plot_attention`, its own tick and axis labels and the
    scale from 0 to 1 included, and has the title "head 0", "head 1", ... Cells of the grid without a
    head show nothing. There is one colour bar for the whole figure, from 0 to 1, in the colours of the
    panels. Pyplot and `rcParams` are left alone.

    Args:
        weights: (H, T, T), one matrix per head. Not modified.
        tokens: T labels, for queries and keys alike.
        ncols: how many panels a full row has.

    Returns:
        The Figure.

    Raises:
        ValueError: there are not T tokens.
    """
    # YOUR CODE HERE
    # 1. How many rows hold H panels? The last one may not be full. `squeeze=False` keeps the array of
    #    Axes two-dimensional even for one head.
    # 2. plot_attention on each panel, and a title. Switch off the panels that are left over.
    # 3. One colour bar: fig.colorbar(the heatmap of any panel, ax=all panels).
    raise NotImplementedError("the grid of heads")


# --- Part 2: numbers ----------------------------------------------------------------------


def attention_entropy(weights: Array) -> Array:
    """Return the entropy of each query's weights in nats: H_i = -sum_j w_ij ln w_ij, with 0 ln 0 = 0.

    0 means that one key gets everything, ln(n) that n keys get equal shares. A query that sees no key
    (a row of zeros) has entropy 0.

    Args:
        weights: (..., T_q, T_k); each row sums to 1 or is all zero. Not modified.

    Returns:
        (..., T_q).
    """
    # YOUR CODE HERE
    # ln 0 is -inf and 0 * -inf is NaN. Which number can stand in for a weight of 0 inside the logarithm,
    # so that its term is exactly 0? (Adding a small epsilon to every weight changes all terms.)
    raise NotImplementedError("the entropy of each query")


def attention_distance(weights: Array) -> Array:
    """Return how far each query looks on average, in positions: D_i = sum_j w_ij |p_i - j|.

    p_i = T_k - T_q + i is the position of query i. Keys before and after the query both count as
    positive distances. A query that sees no key has distance 0.

    Args:
        weights: (..., T_q, T_k), T_q <= T_k; each row sums to 1 or is all zero. Not modified.

    Returns:
        (..., T_q).
    """
    # YOUR CODE HERE
    # 1. The position of each query: the queries are the last T_q of T_k positions.
    # 2. The distance of each query to each key, (T_q, T_k).
    # 3. Its mean under the weights.
    raise NotImplementedError("the mean distance of each query")


# --- Part 3: kinds of heads ---------------------------------------------------------------


def previous_token_score(weights: Array) -> Array:
    """Return the mean weight that a query puts on the position just before its own.

    The mean of w[i, p_i - 1] over the queries that have a previous position: all with p_i >= 1. The
    first token of the text has none and does not count. If no query has one, the score is 0.

    Args:
        weights: (..., T_q, T_k), T_q <= T_k. Not modified.

    Returns:
        (...): one score per head; a single number for one (T_q, T_k) matrix.
    """
    # YOUR CODE HERE
    # 1. For each query: its position p, and its weight on p - 1, for all heads at once (weights[..., i, j]).
    # 2. Leave out the query at position 0. What would index -1 read there?
    # 3. The mean over the queries that are left; 0 if none is.
    raise NotImplementedError("the weight on the previous token")


def induction_score(weights: Array, tokens: Sequence[str]) -> Array:
    """Return the mean weight that a query puts right after earlier occurrences of its own token.

    The token of query i is tokens[p_i]. Its earlier occurrences are all m < p_i with tokens[m] ==
    tokens[p_i], also those before the first query; the positions m + 1 are where an induction head
    looks. The query's score is the *sum* of w[i, m + 1] over all of them. The result is the mean over
    the queries whose token has occurred before; the others do not count. If there is none, it is 0.

    In "the cat the cat", the query at position 2 ("the") is scored by its weight on position 1, the
    query at position 3 ("cat") by its weight on position 2. In "no no", position 1 is scored by its
    weight on itself. Later occurrences of a token never count, even where the weights are not causal.

    Args:
        weights: (..., T_q, T_k), T_q <= T_k. Not modified.
        tokens: the T_k tokens of the text.

    Returns:
        (...): one score per head; a single number for one (T_q, T_k) matrix.

    Raises:
        ValueError: there are not T_k tokens.
    """
    # YOUR CODE HERE
    # 1. Check the number of tokens.
    # 2. For each query: its position p, and the earlier positions m < p that hold the same token.
    # 3. If there are any, add up the weights on the positions *after* them.
    # 4. The mean over the queries that had any; 0 if none had.
    raise NotImplementedError("the weight after earlier occurrences")


def classify_head(weights: Array, tokens: Sequence[str]) -> str:
    """Say what kind of head made these causal weights.

    The first line that holds is the answer:

    - "previous-token": previous_token_score is at least 0.5.
    - "induction": induction_score is at least 0.5.
    - "diffuse": the entropies of all queries add up to at least 0.9 of the most they can be. The query
      at position p sees p + 1 keys, so its entropy is at most ln(p + 1): sum_i H_i >= 0.9 sum_i ln(p_i + 1).
    - "other".

    Args:
        weights: (T_q, T_k), 2 <= T_k, T_q <= T_k, of one head in which no query looks at later positions.
            Not modified.
        tokens: the T_k tokens of the text.

    Returns:
        "previous-token", "induction", "diffuse" or "other".
    """
    # YOUR CODE HERE
    # Go through the four lines of the docstring in order; the first three need one function each that
    # you have already written.
    raise NotImplementedError("the kind of a head")
