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
    if len(a) != len(b):
        raise ValueError(f"vectors of lengths {len(a)} and {len(b)} have no dot product")
    return float(sum(x * y for x, y in zip(a, b, strict=True)))


def softmax_list(scores: list[float]) -> list[float]:
    """Return softmax(scores), exp(s_i) / sum_j exp(s_j), without overflow for any finite scores.

    Args:
        scores: T numbers, T >= 1.

    Returns:
        T positive weights that sum to 1 (a weight may round to 0.0).
    """
    peak = max(scores)  # exp(s - peak) is at most 1; the shift cancels in the ratio
    exps = [math.exp(s - peak) for s in scores]
    total = sum(exps)
    return [e / total for e in exps]


def attend(query: list[float], keys: list[list[float]], values: list[list[float]]) -> list[float]:
    """Return what one query reads from T keys and values: sum_t w_t * v_t, w = softmax(q·k_t / sqrt(d_k)).

    Args:
        query: vector of length d_k.
        keys: T vectors of length d_k.
        values: T vectors of length d_v.

    Returns:
        Vector of length d_v.
    """
    scale = 1 / math.sqrt(len(query))
    weights = softmax_list([dot(query, key) * scale for key in keys])
    return [
        sum(w * value[j] for w, value in zip(weights, values, strict=True)) for j in range(len(values[0]))
    ]


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
    exps = np.exp(x - x.max(axis=axis, keepdims=True))
    return exps / exps.sum(axis=axis, keepdims=True)


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
    d_k = Q.shape[-1]
    scores = Q @ K.swapaxes(-1, -2) / math.sqrt(d_k)  # (..., T_q, T_k)
    if mask is None:
        weights = softmax(scores)
    else:
        blind = ~mask.any(axis=-1, keepdims=True)  # queries with no key left to look at
        # softmax of nothing but -inf is 0/0: give blind rows any finite scores, zero them after.
        weights = softmax(np.where(mask | blind, scores, -np.inf))
        weights = np.where(blind, 0.0, weights)
    return weights @ V, weights  # (..., T_q, T_k) @ (..., T_k, d_v) -> (..., T_q, d_v)
