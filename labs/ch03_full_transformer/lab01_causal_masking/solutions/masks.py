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
    T_k = T_q if T_k is None else T_k
    if not 0 <= T_q <= T_k:
        raise ValueError(f"{T_q} queries cannot be the last of {T_k} tokens")
    keys = torch.arange(T_k, device=device)
    return keys[T_k - T_q :, None], keys[None, :]


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
    i, j = positions(T_q, T_k, device=device)
    return j <= i


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
    if window < 1:
        raise ValueError(f"a window of {window} shows nothing; the smallest is 1")
    i, j = positions(T_q, T_k, device=device)
    return (j <= i) & (i - j < window)


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
    if side not in ("right", "left"):
        raise ValueError(f'side is "right" or "left", not {side!r}')
    j, lengths = torch.arange(T, device=lengths.device), lengths[:, None]
    real = j < lengths if side == "right" else j >= T - lengths  # (B, T)
    return real[:, None, None, :]


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
    i, j = positions(T_q, T_k, device=prefix_lengths.device)
    return (j <= i) | (j < prefix_lengths[:, None, None, None])


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
    ends = lengths.cumsum(dim=-1)[:, None, :]  # (B, 1, N)
    if (lengths.sum(dim=-1) > T).any():
        raise ValueError(f"the documents of a row have more than {T} tokens")
    t = torch.arange(T, device=lengths.device)[:, None]  # (T, 1)
    over = (t >= ends).sum(dim=-1)  # (B, T): how many documents end before token t
    return over.masked_fill(over == lengths.shape[-1], PADDING)


def document_mask(ids: Tensor) -> Tensor:
    """Return the mask of packed documents: causal, and nobody sees a token of another document.

    Args:
        ids: (B, T), integers: the document of each token, any number from 0 on, or PADDING. Equal ids mean the
            same document, wherever the tokens stand. Any memory layout.

    Returns:
        (B, 1, T, T), boolean, on the device of `ids`. Tokens with the id PADDING see nothing, themselves
        included, and nobody sees them.
    """
    same = ids[:, :, None] == ids[:, None, :]  # (B, T, T)
    real = (ids != PADDING)[:, :, None]
    return (same & real & causal_mask(ids.shape[-1], device=ids.device))[:, None]


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
    given = [require_mask(mask) for mask in masks if mask is not None]
    if not given:
        return None
    result = functools.reduce(torch.logical_and, given)
    return result if result.dim() == 4 else result[None, None]


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
    given = [require_mask(mask) for mask in masks if mask is not None]
    if len(given) < len(masks):  # something shows everything already
        return None
    result = functools.reduce(torch.logical_or, given)
    return result if result.dim() == 4 else result[None, None]


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
    hidden = ~require_mask(mask)
    blind = hidden.all(dim=-1, keepdim=True)  # (..., T_q, 1)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill(hidden & ~blind, -math.inf)


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
    scores = Q @ K.mT / math.sqrt(Q.shape[-1])  # (B, H, T_q, T_k)
    if mask is None:
        return scores.softmax(dim=-1) @ V
    weights = (scores + additive_mask(mask, scores.dtype)).softmax(dim=-1)
    # Hidden keys have a weight of 0 already, except in rows that see nothing.
    return weights.masked_fill(~mask, 0.0) @ V  # (B, H, T_q, D_v)


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
    jacobian = torch.autograd.functional.jacobian(f, x)  # (B, T, E, B, T, D)
    return (jacobian != 0).any(dim=5).any(dim=2)


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
    B, T, _ = x.shape
    allowed = torch.zeros(B, T, B, T, dtype=torch.bool, device=x.device)
    b = torch.arange(B, device=x.device)
    allowed[b, :, b] = require_mask(mask).expand(B, 1, T, T)[:, 0]
    leaks = dependencies(f, x) & ~allowed
    return [tuple(indices) for indices in leaks.nonzero().tolist()]
