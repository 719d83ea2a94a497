"""Four ways to tell a transformer where a token stands: sinusoidal, learned, rotary (RoPE), ALiBi.

Sources: Vaswani et al. 2017, section 3.5, arXiv:1706.03762 (sinusoidal); Su et al. 2021, section 3.2,
arXiv:2104.09864 (RoPE); Press et al. 2021, section 3, arXiv:2108.12409 (ALiBi).

Shapes: B sequences, H heads, T tokens (T_q that ask, T_k that are read), D = head_dim features per head.
"""

import math

import torch
from torch import Tensor, nn

# --- Part 1: positions that are added to the embeddings -------------------------------------


def sinusoidal(
    num_positions: int, d_model: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the table PE[p, 2i] = sin(p * base^(-2i / d_model)), PE[p, 2i + 1] = cos(the same angle).

    Angles, sines and cosines are computed in float64 and rounded to `dtype` at the end.

    Args:
        num_positions: T; the rows stand for the positions 0 to T - 1.
        d_model: an even number of features; pair i fills the columns 2i and 2i + 1.
        base: what the slowest frequency tends to, as 1 / base.
        dtype: float32 or float64, of the result.

    Returns:
        (T, d_model).

    Raises:
        ValueError: d_model is odd.
    """
    # YOUR CODE HERE
    # 1. Refuse an odd d_model.
    # 2. Angles (T, d_model / 2): positions down, frequencies base^(-2i / d_model) across, all in float64.
    #    torch.arange makes integers unless you ask for a dtype.
    # 3. sin, cos, sin, cos ... in each row; only now round to `dtype`.
    raise NotImplementedError("the table of sines and cosines")


class LearnedPositions(nn.Module):
    """A trained vector for each position, added to the embeddings, as in GPT-2.

    Attributes:
        weight: nn.Parameter, (max_positions, d_model); row p belongs to position p. It is all
            the state dict holds.
    """

    def __init__(self, max_positions: int, d_model: int) -> None:
        """Draw `weight` from a normal distribution with mean 0 and standard deviation 0.02.

        Args:
            max_positions: how many positions there are.
            d_model: features of a token.
        """
        super().__init__()
        # YOUR CODE HERE
        # A tensor becomes a parameter (trained, saved in the state dict) by nn.Parameter.
        # torch.randn has standard deviation 1.
        raise NotImplementedError("the table of position vectors")

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Return x[b, t] + weight[offset + t].

        Args:
            x: embeddings, (B, T, d_model).
            offset: the position of the first token of `x`, such as the length of a cache.

        Returns:
            (B, T, d_model). `x` is not modified; gradients reach `x` and `weight`.

        Raises:
            ValueError: a token would stand at max_positions or later, or at a negative position.
        """
        # YOUR CODE HERE
        # 1. Which rows do tokens 0 .. T - 1 of `x` need? Refuse if the table does not have them all:
        #    slices beyond the end, and negative ones, give other rows or fewer, in silence.
        # 2. Return a sum that broadcasts over the batch; x += ... would change the caller's tensor.
        raise NotImplementedError("add the rows of the table")


# --- Part 2: rotary positions, applied to queries and keys -----------------------------------


def rope_tables(
    positions: Tensor, head_dim: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles positions[t] * base^(-2i / head_dim), i = 0 .. head_dim / 2 - 1.

    Angles, cosines and sines are computed in float64 and rounded to `dtype` at the end.

    Args:
        positions: T integers in any order, (T,), of dtype int32 or int64: where each token stands. In
            decoding with a cache they do not begin at 0.
        head_dim: D, an even number.
        base: what the slowest frequency tends to, as 1 / base.
        dtype: float32 or float64, of the results.

    Returns:
        cos and sin, each (T, D / 2), on the device of `positions`.

    Raises:
        ValueError: head_dim is odd.
    """
    # YOUR CODE HERE
    # 1. Refuse an odd head_dim.
    # 2. Angles (T, D / 2), from the positions you are given, all in float64: at position 100,000
    #    a float32 angle is off by thousandths of a radian.
    #    A tensor you make yourself belongs on the device of the positions.
    # 3. cos and sin, rounded to `dtype` at the end.
    raise NotImplementedError("cosines and sines of the rotation angles")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str = "half") -> Tensor:
    """Rotate pair i of the features of token t by the angle whose cosine is cos[t, i].

    The pair (a, b) becomes (a cos - b sin, a sin + b cos) and goes back to where it came from. Pair i is

        layout "half":         a = x[..., i],  b = x[..., i + D / 2]   (Llama, GPT-NeoX)
        layout "interleaved":  a = x[..., 2i], b = x[..., 2i + 1]      (the RoPE paper, GPT-J)

    Args:
        x: queries or keys, (B, H, T, D), D even, of any floating dtype and any memory layout.
        cos: (T, D / 2), float32 or float64, as `rope_tables` returns it; the same for all B and H.
        sin: (T, D / 2), likewise.
        layout: "half" or "interleaved".

    Returns:
        (B, H, T, D) of the dtype of `x`. The arithmetic is done in the dtype of `x` or that of the tables,
        whichever is wider; so for bfloat16 and float16 only the result is rounded to the dtype of `x`.
        `x` is not modified; gradients reach it.

    Raises:
        ValueError: `layout` is neither of the two.
    """
    # YOUR CODE HERE
    # 1. Cut x into the first members a and the second members b of all pairs: (B, H, T, D / 2) each.
    # 2. Rotate. The tables (T, D / 2) broadcast over B and H. Do not round them to x.dtype.
    # 3. Put a and b back where they came from: one after the other, or a0 b0 a1 b1 ...
    # 4. Round to x.dtype. An unknown layout is a ValueError.
    raise NotImplementedError("rotate the pairs of features")


def half_to_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a projection made for layout "half", so that it serves layout "interleaved".

    In each head, row i of the old becomes row 2i of the new, and row i + D / 2 becomes row 2i + 1, for
    i = 0 .. D / 2 - 1. With `q_proj` and `k_proj` both reordered, all scores q·k stay the same.

    Args:
        weight: (H * D, d_in), the weight of an nn.Linear whose outputs h * D to (h + 1) * D make head h;
            or its bias, (H * D,).
        num_heads: H.

    Returns:
        The reordered tensor, of the shape and dtype of `weight`, which is not modified.
    """
    # YOUR CODE HERE
    # View the first axis as (H, 2, D / 2): head, first or second member, pair.
    # In which order do you need these three? The other axes, if any, stay as they are.
    raise NotImplementedError("reorder the rows of each head")


def interleaved_to_half(weight: Tensor, num_heads: int) -> Tensor:
    """Undo `half_to_interleaved`: reorder a projection for layout "interleaved" to serve layout "half".

    Args:
        weight: (H * D, d_in) or (H * D,).
        num_heads: H.

    Returns:
        The reordered tensor, of the shape and dtype of `weight`, which is not modified.
    """
    # YOUR CODE HERE
    # Now the first axis is (H, D / 2, 2): head, pair, first or second member.
    # If you undo it by calling half_to_interleaved again, try D = 6 by hand first.
    raise NotImplementedError("undo half_to_interleaved")


# --- Part 3: ALiBi, added to the scores --------------------------------------------------------


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return how steeply each head's scores fall with the distance.

    For n heads, n a power of two, head h = 0 .. n - 1 has the slope 2^(-8 (h + 1) / n). For any other
    number, let n be the largest power of two below it: the first n heads have the n slopes for n heads,
    the others have the first, third, fifth, ... slope for 2n heads. (The rule of the paper's code and of BLOOM.)

    Args:
        num_heads: H, at least 1.
        dtype: float32 or float64.

    Returns:
        (H,), all positive.
    """
    # YOUR CODE HERE
    # 1. n: the largest power of two that is not above num_heads.
    # 2. The n slopes for n heads.
    # 3. If heads are left over: every second slope, from the first, of those for 2n heads.
    raise NotImplementedError("one slope per head")


def alibi_bias(num_heads: int, T_q: int, T_k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what ALiBi adds to the scaled scores of causal attention, before the softmax.

    Key j stands at position j. The queries are the last T_q of the T_k positions: query i stands at
    p = T_k - T_q + i. The bias is -slope * (p - j) for keys j <= p, so 0 for the token itself, and -inf
    for keys j > p: the causal mask is included.

    Args:
        num_heads: H, at least 1; slopes as in `alibi_slopes`.
        T_q: number of queries.
        T_k: number of keys, at least T_q.
        dtype: float32 or float64.

    Returns:
        (H, T_q, T_k).

    Raises:
        ValueError: T_q > T_k (the first queries would stand before the first key).
    """
    # YOUR CODE HERE
    # 1. Refuse T_q > T_k.
    # 2. The distance (T_q, T_k) from each query to each key. At which position does query 0 stand?
    # 3. One slope per head turns it into (H, T_q, T_k).
    # 4. -inf where the key comes after the query.
    raise NotImplementedError("the bias on the scores")
