"""Attention masks: who may attend to whom, how to combine them, and how to prove that nothing leaks.

One convention in the whole file: a mask is boolean, and True means "this query may attend to this key".
The last two axes are queries and keys. A mask is (T_q, T_k), the same for all samples and heads, or it has
four axes and broadcasts to (B, H, T_q, T_k).

Sources: Vaswani et al. 2017, section 3.2.3, arXiv:1706.03762 (causal); Raffel et al. 2019, section 3.2.1,
arXiv:1910.10683 (prefix-LM); Beltagy et al. 2020, section 3.1, arXiv:2004.05150 (sliding window); Krell et
al. 2021, arXiv:2107.02027 (packed documents).

Letters in shapes: B samples, H heads, T_q queries, T_k keys, T where both are the same tokens.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

PADDING = -1
"""The document id of tokens that belong to no document."""


def require_mask(mask: Tensor) -> Tensor:
    """Return `mask` if it follows the convention of this file.

    Raises:
        ValueError: it is not boolean (in a mask of numbers, does 1 show or hide, or is it to be added?),
            or it has neither two nor four axes (is (B, T_q, T_k) one mask per sample, or per head?).
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is boolean, True where a query may attend; this one is {mask.dtype}")
    if mask.dim() not in (2, 4):
        raise ValueError(f"a mask is (T_q, T_k) or has four axes; this one is {tuple(mask.shape)}")
    return mask


# --- Part 1: masks from positions -------------------------------------------------------------


def positions(
    T_q: int, T_k: int | None = None, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return where the queries and the keys stand, ready to be compared with each other.

    Keys stand at 0 .. T_k - 1. The queries are the *last* T_q of these tokens, as when a cache holds the keys
    of the earlier ones: the last query stands where the last key stands.

    Args:
        T_q: number of queries, at least 0.
        T_k: number of keys; None means T_q.
        device: where the tensors are made; None means torch's default.

    Returns:
        Positions of the queries, (T_q, 1), and of the keys, (1, T_k), both int64.

    Raises:
        ValueError: T_q is negative or larger than T_k.
    """
    # YOUR CODE HERE
    # 1. None for T_k means T_q (0 is a number like any other). Refuse impossible sizes.
    # 2. torch.arange makes the positions of all keys. Which part of it belongs to the queries?
    # 3. A column and a row: every comparison of the two then has the shape (T_q, T_k).
    raise NotImplementedError("the positions of queries and keys")


def causal_mask(T_q: int, T_k: int | None = None, *, device: torch.device | str | None = None) -> Tensor:
    """Return the mask in which a query sees its own token and all earlier ones.

    Args:
        T_q: number of queries.
        T_k: number of keys, at least T_q; None means T_q. The queries are the last T_q tokens (see `positions`).
        device: where the mask is made.

    Returns:
        (T_q, T_k), boolean.

    Raises:
        ValueError: T_q is negative or larger than T_k.
    """
    # YOUR CODE HERE
    # One comparison of the two results of `positions`. In words: which keys may a query see?
    # Its own token is one of them.
    raise NotImplementedError("the causal mask")


def sliding_window_mask(
    window: int, T_q: int, T_k: int | None = None, *, device: torch.device | str | None = None
) -> Tensor:
    """Return the mask in which a query sees the last `window` tokens up to its own, which counts.

    Args:
        window: how many keys a query sees, at least 1. With 1 it sees only its own token; with T_k or more
            the mask is causal.
        T_q: number of queries.
        T_k: number of keys, at least T_q; None means T_q. The queries are the last T_q tokens.
        device: where the mask is made.

    Returns:
        (T_q, T_k), boolean.

    Raises:
        ValueError: window is below 1, or T_q is negative or larger than T_k.
    """
    # YOUR CODE HERE
    # 1. Refuse a window that shows nothing.
    # 2. The causal rule, and a second one on the distance of query and key. Write down the distances
    #    that window = 1 and window = 2 allow before you choose between < and <=.
    raise NotImplementedError("the sliding window")


# --- Part 2: masks that differ from sample to sample ------------------------------------------


def padding_mask(lengths: Tensor, T: int, *, side: str = "right") -> Tensor:
    """Return the mask that hides padding: keys that are no tokens, only there to fill up a batch.

    Args:
        lengths: (B,), integers from 0 to T: how many real tokens each sample has. Any memory layout.
        T: number of keys.
        side: where the padding is. "right": the first `lengths[b]` keys are real. "left": the last ones are.

    Returns:
        (B, 1, 1, T), boolean, on the device of `lengths`: the same for all heads and queries. Queries that are
        padding themselves are not treated in any special way.

    Raises:
        ValueError: side is neither "right" nor "left".
    """
    # YOUR CODE HERE
    # 1. Refuse any other side. (A misspelt "Left" must not silently mean "right".)
    # 2. Compare key positions, (T,), with lengths, (B,), so that the result is (B, T): which axis is missing
    #    where? On the left, how many keys come before the first real one?
    # 3. Insert the axes of heads and queries. In a mask the last axis is the keys.
    raise NotImplementedError("the padding mask")


def prefix_lm_mask(prefix_lengths: Tensor, T_q: int, T_k: int | None = None) -> Tensor:
    """Return the mask in which everyone sees the whole prefix, and the rest is causal.

    The tokens of the prefix see each other in both directions. Later tokens see the prefix, the tokens before
    them and themselves. No token of the prefix sees a later one.

    Args:
        prefix_lengths: (B,), integers, at least 0: each sample's prefix is its first `prefix_lengths[b]` keys.
            0 gives the causal mask, T_k or more shows everything. Any memory layout.
        T_q: number of queries.
        T_k: number of keys, at least T_q; None means T_q. The queries are the last T_q tokens.

    Returns:
        (B, 1, T_q, T_k), boolean, on the device of `prefix_lengths`.

    Raises:
        ValueError: T_q is negative or larger than T_k.
    """
    # YOUR CODE HERE
    # Two rules, and one of them suffices: the causal one, or "the key belongs to the prefix".
    # The prefix is counted from the first key, however few queries there are.
    # prefix_lengths needs three more axes to meet the positions in (B, 1, T_q, T_k).
    raise NotImplementedError("the prefix-LM mask")


def document_ids(lengths: Tensor, T: int) -> Tensor:
    """Return which document each token belongs to, where documents stand one after the other in a row.

    Args:
        lengths: (B, N), integers, at least 0: row b holds N documents of these lengths, from its first token
            on, without gaps. A document may be empty. Any memory layout.
        T: number of tokens in a row.

    Returns:
        (B, T), int64, on the device of `lengths`: n for the tokens of document n, counting from 0 and
        counting empty ones too, and PADDING for those after the last document.

    Raises:
        ValueError: the documents of a row have more than T tokens together.
    """
    # YOUR CODE HERE
    # 1. Where does each document end? (cumsum) Refuse rows that are too long.
    # 2. The id of token t is the number of documents that have ended before it. Count comparisons of
    #    (T, 1) with (B, 1, N) over N. A document that ends at t = 3 does not contain token 3.
    # 3. Tokens for which all N documents have ended are padding.
    raise NotImplementedError("the document of each token")


def document_mask(ids: Tensor) -> Tensor:
    """Return the mask of packed documents: causal, and nobody sees a token of another document.

    Args:
        ids: (B, T), integers: the document of each token, any number from 0 on, or PADDING. Equal ids mean the
            same document, wherever the tokens stand. Any memory layout.

    Returns:
        (B, 1, T, T), boolean, on the device of `ids`. Tokens with the id PADDING see nothing, themselves
        included, and nobody sees them.
    """
    # YOUR CODE HERE
    # Three rules that must all hold: equal ids, not in the future, and not padding.
    # Compare ids with themselves: a column against a row in each sample, (B, T, T).
    # PADDING equals PADDING, so equal ids are not enough.
    raise NotImplementedError("the mask of packed documents")


# --- Part 3: combining and using them ---------------------------------------------------------


def all_of(*masks: Tensor | None) -> Tensor | None:
    """Return the mask in which a query sees what *every* one of the masks lets it see.

    Args:
        *masks: one or more, each (T_q, T_k) or with four axes, all of shapes that broadcast together. None
            stands for the mask that shows everything.

    Returns:
        Four axes: the shape to which the masks broadcast, with 1 for missing axes. None if all are None.
        The masks are not modified.

    Raises:
        ValueError: a mask is not boolean, or has neither two nor four axes.
    """
    # YOUR CODE HERE
    # 1. Check each mask with `require_mask`. None shows everything: what does it change in an "and"?
    # 2. Combine the others. Broadcasting joins (T_q, T_k) and four axes by itself.
    # 3. Make sure that the result has four axes.
    raise NotImplementedError("what every mask shows")


def any_of(*masks: Tensor | None) -> Tensor | None:
    """Return the mask in which a query sees what *at least one* of the masks lets it see.

    Args:
        *masks: one or more, each (T_q, T_k) or with four axes, all of shapes that broadcast together. None
            stands for the mask that shows everything.

    Returns:
        Four axes: the shape to which the masks broadcast, with 1 for missing axes. None if one is None.
        The masks are not modified.

    Raises:
        ValueError: a mask is not boolean, or has neither two nor four axes.
    """
    # YOUR CODE HERE
    # As all_of, with "or". But what does a None, which shows everything, do to an "or"?
    # The other masks are checked all the same.
    raise NotImplementedError("what at least one mask shows")


def additive_mask(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers that hide keys when they are added to the scores, and that no softmax turns into NaN.

    Args:
        mask: boolean, (T_q, T_k) or with four axes. It is not modified.
        dtype: floating, the dtype of the result.

    Returns:
        The shape and device of `mask`. 0 where a query may attend and -inf where not, except in rows in which
        a query may attend to nothing: those are 0 throughout. (The softmax of nothing but -inf is NaN. What
        it makes of such a row now is finite and means nothing; whoever uses it must put zeros there.)

    Raises:
        ValueError: the mask is not boolean, or has neither two nor four axes.
    """
    # YOUR CODE HERE
    # 1. Check the mask, and find the rows in which every key is hidden (keepdim=True keeps them broadcastable).
    # 2. Start from zeros of the right shape, dtype and device. Where does -inf go?
    # Do not multiply: 0 * -inf is NaN.
    raise NotImplementedError("the mask as numbers to add")


def masked_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) V over the keys that each query may attend to.

    Args:
        Q: queries, (B, H, T_q, D).
        K: keys, (B, H, T_k, D), T_k at least 1.
        V: values, (B, H, T_k, D_v). All three finite, of one floating dtype and of any memory layout.
        mask: boolean, (T_q, T_k), or with four axes that broadcast to (B, H, T_q, T_k). None shows everything.

    Returns:
        (B, H, T_q, D_v), of the dtype of V. Hidden keys have no share in it at all: the gradients from
        a query's output to a key that it may not attend to, and to its value, are exactly 0, whatever
        the finite scores. A query that may attend to nothing gets zeros and passes back zeros. The inputs are
        not modified.

    Raises:
        ValueError: the mask is not boolean, or has neither two nor four axes.
    """
    # YOUR CODE HERE
    # 1. Scores, scaled by the square root of the size of one head.
    # 2. With a mask: add its additive form, then the softmax. Without one: the softmax alone.
    # 3. In rows that see nothing, the softmax has spread its weight over hidden keys. Set these weights to 0.
    #    Repair weights, not NaN: a NaN that is replaced later still ruins the gradient.
    raise NotImplementedError("attention with a mask")


# --- Part 4: does anything leak? --------------------------------------------------------------


def dependencies(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return which outputs of `f` depend on which tokens, found from gradients at `x`.

    Args:
        f: differentiable, from (B, T, D) to (B, T, E). It may ignore its input, in part or altogether.
        x: (B, T, D), floating, any memory layout. It is not modified, and no gradient is left on it or on
            anything that `f` uses.

    Returns:
        (B, T, B, T), boolean. [b, i, c, j] is True if at least one of the E * D derivatives of f(x)[b, i] with
        respect to x[c, j] is anything but exactly 0. NaN is not 0.
    """
    # YOUR CODE HERE
    # You need all derivatives: one backward pass per output number, or torch.autograd.functional.jacobian.
    # 1. Sum nothing before you have looked: +1 and -1 make 0, and a leak is gone.
    # 2. Compare with 0 exactly. How is NaN compared?
    # 3. Join the E features of an output and the D features of a token: is any of the E * D not zero?
    raise NotImplementedError("which outputs depend on which tokens")


def find_leaks(f: Callable[[Tensor], Tensor], x: Tensor, mask: Tensor) -> list[tuple[int, int, int, int]]:
    """Return every dependence that `mask` does not allow, found from gradients at `x`.

    Args:
        f: as for `dependencies`.
        x: as for `dependencies`.
        mask: boolean, (T, T), or with four axes that broadcast to (B, 1, T, T): [b, 0, i, j] is True if
            f(x)[b, i] may depend on x[b, j]. Nothing may depend on another sample.

    Returns:
        Sorted tuples (b, i, c, j) of ints: f(x)[b, i] depends on x[c, j], and must not. Empty if all is well.
        (A token with a residual connection depends on itself. Allow it: `any_of(mask, torch.eye(T).bool())`.)

    Raises:
        ValueError: the mask is not boolean, or has neither two nor four axes.
    """
    # YOUR CODE HERE
    # 1. Spread the mask out to what is allowed, (B, T, B, T): [b, i, c, j] only where b = c.
    #    A mask with two axes, or with 1 for the samples, must be expanded first.
    # 2. What depends and is not allowed, as sorted tuples of Python ints.
    raise NotImplementedError("the dependences that the mask forbids")
