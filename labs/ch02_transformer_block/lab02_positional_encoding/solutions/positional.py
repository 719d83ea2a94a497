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
    if d_model % 2 != 0:
        raise ValueError(f"sine and cosine come in pairs: d_model must be even, not {d_model}")
    positions = torch.arange(num_positions, dtype=torch.float64)
    exponents = torch.arange(0, d_model, 2, dtype=torch.float64) / d_model  # 2i / d_model
    angles = positions[:, None] * base**-exponents  # (T, d_model / 2)
    pairs = torch.stack((angles.sin(), angles.cos()), dim=-1)  # (T, d_model / 2, 2)
    return pairs.flatten(1).to(dtype)


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
        self.weight = nn.Parameter(0.02 * torch.randn(max_positions, d_model))

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
        T, max_positions = x.shape[1], self.weight.shape[0]
        if offset < 0 or offset + T > max_positions:
            raise ValueError(f"positions {offset} to {offset + T - 1} are not among 0 to {max_positions - 1}")
        return x + self.weight[offset : offset + T]


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
    if head_dim % 2 != 0:
        raise ValueError(f"features are rotated in pairs: head_dim must be even, not {head_dim}")
    pairs = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None].double() * base ** (-2 * pairs / head_dim)  # (T, D / 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    D = x.shape[-1]
    if layout == "half":
        a, b = x[..., : D // 2], x[..., D // 2 :]  # each (B, H, T, D / 2)
    elif layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]  # each (B, H, T, D / 2)
    else:
        raise ValueError(f'layout must be "half" or "interleaved", not {layout!r}')
    turned_a = a * cos - b * sin  # bfloat16 times float32 is float32: nothing is rounded yet
    turned_b = a * sin + b * cos
    if layout == "half":
        turned = torch.cat((turned_a, turned_b), dim=-1)
    else:
        turned = torch.stack((turned_a, turned_b), dim=-1).flatten(-2)  # a0 b0 a1 b1 ...
    return turned.to(x.dtype)


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
    D = weight.shape[0] // num_heads
    rows = weight.reshape(num_heads, 2, D // 2, *weight.shape[1:])  # (H, a or b, i, ...)
    return rows.transpose(1, 2).reshape(weight.shape)  # (H, i, a or b, ...)


def interleaved_to_half(weight: Tensor, num_heads: int) -> Tensor:
    """Undo `half_to_interleaved`: reorder a projection for layout "interleaved" to serve layout "half".

    Args:
        weight: (H * D, d_in) or (H * D,).
        num_heads: H.

    Returns:
        The reordered tensor, of the shape and dtype of `weight`, which is not modified.
    """
    D = weight.shape[0] // num_heads
    rows = weight.reshape(num_heads, D // 2, 2, *weight.shape[1:])  # (H, i, a or b, ...)
    return rows.transpose(1, 2).reshape(weight.shape)  # (H, a or b, i, ...)


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
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / n) for h in range(n)]
    finer = [2 ** (-8 * (h + 1) / (2 * n)) for h in range(2 * n)]
    slopes += finer[0::2][: num_heads - n]
    return torch.tensor(slopes, dtype=dtype)


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
    if T_q > T_k:
        raise ValueError(f"{T_q} queries cannot be the last of {T_k} positions")
    distance = torch.arange(T_k - T_q, T_k)[:, None] - torch.arange(T_k)  # (T_q, T_k), p - j
    bias = -alibi_slopes(num_heads, dtype)[:, None, None] * distance  # (H, T_q, T_k)
    return bias.masked_fill(distance < 0, -torch.inf)
