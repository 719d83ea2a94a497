"""Scaled dot-product attention, twice: on Python lists, then batched in NumPy.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1, arXiv:1706.03762.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

# --- Part 1: one query, Python lists ------------------------------------------------------


def dot(a: list[float], b: list[float]) -> float:
    """Return the dot product of two vectors, sum_i a_i * b_i.

    Args:
        a: vector of length d.
        b: vector of length d.

    Raises:
        ValueError: the lengths differ.
    """
    # YOUR CODE HERE
    # 1. Raise ValueError if the lengths differ (a bare zip would drop the tail in silence).
    # 2. Multiply pairs and add them up.
    raise NotImplementedError("the dot product of two lists")


def softmax_list(scores: list[float]) -> list[float]:
    """Return softmax(scores), exp(s_i) / sum_j exp(s_j), without overflow for any finite scores.

    Args:
        scores: T numbers, T >= 1.

    Returns:
        T positive weights that sum to 1 (a weight may round to 0.0).
    """
    # YOUR CODE HERE
    # math.exp(710) overflows. Which number can you subtract from every score
    # without changing the result, so that no exponent is above 0?
    raise NotImplementedError("softmax of a list of scores")


def attend(query: list[float], keys: list[list[float]], values: list[list[float]]) -> list[float]:
    """Return what one query reads from T keys and values: sum_t w_t * v_t, w = softmax(q·k_t / sqrt(d_k)).

    Args:
        query: vector of length d_k.
        keys: T vectors of length d_k.
        values: T vectors of length d_v.

    Returns:
        Vector of length d_v.
    """
    # YOUR CODE HERE
    # 1. One score per key: the dot product with the query, scaled by 1/sqrt(d_k).
    # 2. Scores to weights, with softmax_list.
    # 3. The weighted sum of the value vectors, one coordinate at a time.
    raise NotImplementedError("attention of one query over lists of keys and values")


# --- Part 2: batches of queries, NumPy ----------------------------------------------------


def softmax(x: Array, axis: int = -1) -> Array:
    """Return softmax of `x` along `axis`, without overflow for any finite input.

    Args:
        x: array of any shape. Entries may be -inf (their weight is exactly 0) as long as
            each slice along `axis` has a finite entry.
        axis: the axis along which the result sums to 1.

    Returns:
        Array of the shape of `x`. `x` is not modified.
    """
    # YOUR CODE HERE
    # The same three steps as softmax_list, for every slice along `axis` at once.
    # keepdims=True keeps the reduced axis, so that the result broadcasts against x.
    raise NotImplementedError("softmax along an axis")


def scaled_dot_product_attention(
    Q: Array, K: Array, V: Array, mask: npt.NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """Return softmax(Q K^T / sqrt(d_k)) V and the attention weights.

    Args:
        Q: queries, (..., T_q, d_k).
        K: keys, (..., T_k, d_k).
        V: values, (..., T_k, d_v).
        mask: boolean, broadcastable to (..., T_q, T_k); True where a query may look at a key.
            None means every query sees every key.

    Returns:
        output, (..., T_q, d_v), and weights, (..., T_q, T_k). A query that may look at no key
        at all gets weights and output of exactly 0. The inputs are not modified.
    """
    # YOUR CODE HERE
    # 1. Scores (..., T_q, T_k): every query against every key, scaled by 1/sqrt(d_k).
    #    Swap only the last two axes of K: the leading ones are batches.
    # 2. Hide what the mask forbids *before* the softmax, so the rest still sums to 1.
    # 3. Weights, then output. What does your softmax make of a row that is hidden completely?
    raise NotImplementedError("scaled dot-product attention on batches")
