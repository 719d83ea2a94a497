"""Multi-head attention: split the features into heads, attend in each, merge, project.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2, arXiv:1706.03762.

Shapes: B sequences, T tokens (T_q that ask, T_k that are read), H heads, D = d_model / H features per head.
"""

import math

import torch
from torch import Tensor, nn


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return every head's slice of the features: out[b, h, t, d] = x[b, t, h * D + d].

    Args:
        x: (B, T, H * D), of any memory layout.
        num_heads: H, a divisor of the last size of `x`.

    Returns:
        (B, H, T, D).
    """
    B, T, width = x.shape
    x = x.reshape(B, T, num_heads, width // num_heads)  # (B, T, H, D): cuts the features, not time
    return x.transpose(1, 2)  # (B, H, T, D)


def merge_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`: out[b, t, h * D + d] = x[b, h, t, d].

    Args:
        x: (B, H, T, D), of any memory layout.

    Returns:
        (B, T, H * D).
    """
    return x.transpose(1, 2).flatten(2)  # (B, T, H, D) -> (B, T, H * D)


def attention_weights(Q: Tensor, K: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)), in every head of every sequence.

    Args:
        Q: queries, (B, H, T_q, D).
        K: keys, (B, H, T_k, D).
        mask: boolean, of any shape that broadcasts to (B, H, T_q, T_k); True where a query may
            look at a key. None means every query sees every key.

    Returns:
        (B, H, T_q, T_k). Hidden keys get exactly 0 and the visible ones sum to 1. A query that may
        look at no key at all gets weights of exactly 0 and passes back gradients of exactly 0.
        The inputs are not modified.
    """
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (B, H, T_q, T_k)
    if mask is None:
        return scores.softmax(dim=-1)
    blind = ~mask.any(dim=-1, keepdim=True)  # queries with no key left to look at
    # softmax of nothing but -inf is NaN: leave blind rows as they are, zero them after.
    weights = scores.masked_fill(~(mask | blind), -torch.inf).softmax(dim=-1)
    return weights.masked_fill(blind, 0.0)


class MultiHeadAttention(nn.Module):
    """Multi-head attention, self or cross: out_proj(concat_h(softmax(Q_h K_h^T / sqrt(D)) V_h)).

    Head h works on features h * D to (h + 1) * D of the projected queries, keys and values, and
    fills the same features of what `out_proj` reads. A `dropout` above 0 acts on the attention
    weights, in training mode only.

    Attributes:
        q_proj: nn.Linear, d_model -> d_model.
        k_proj: nn.Linear, kv_dim -> d_model.
        v_proj: nn.Linear, kv_dim -> d_model.
        out_proj: nn.Linear, d_model -> d_model.

    These four hold all parameters: the state dict has their weights and, with `bias=True`, their
    biases, and nothing else.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        kv_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """Make the four projections. How they are initialised is up to you.

        Args:
            d_model: width of the queries, of all heads together, and of the output.
            num_heads: H; each head gets D = d_model / H features.
            kv_dim: width of the sequence that is read; None means d_model.
            bias: whether the projections have biases: all four or none.
            dropout: probability, in [0, 1), that an attention weight is dropped in training.

        Raises:
            ValueError: d_model is not a multiple of num_heads.
        """
        super().__init__()
        if d_model % num_heads != 0:
            raise ValueError(f"d_model {d_model} cannot be shared out equally among {num_heads} heads")
        kv_dim = d_model if kv_dim is None else kv_dim
        self.num_heads = num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(kv_dim, d_model, bias=bias)
        self.v_proj = nn.Linear(kv_dim, d_model, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)  # knows whether we train: model.train(), model.eval()

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what each token of `x` reads, and the weights with which it read.

        Args:
            x: the tokens that ask, (B, T_q, d_model).
            context: the tokens that are read, (B, T_k, kv_dim): keys and values are made from it.
                None means self-attention: `x` reads itself (then kv_dim must be d_model).
            mask: boolean, of any shape that broadcasts to (B, H, T_q, T_k); True where a query may
                look at a key. None means every query sees every key.

        Returns:
            output, (B, T_q, d_model), of the dtype of `x`, and weights, (B, H, T_q, T_k): the very
            weights that multiplied the values, so in training they are the ones after dropout.
            Gradients flow through both.

            A query that sees no key in a head reads zeros there; one that sees no key in any head
            gets the bias of `out_proj` as its output, or zero without biases.

            In training mode each weight is set to 0 with probability `dropout`, independently of
            all others, and otherwise divided by (1 - dropout); torch.manual_seed makes that
            repeatable. In evaluation mode nothing is dropped. The inputs are not modified.
        """
        source = x if context is None else context
        Q = split_heads(self.q_proj(x), self.num_heads)  # (B, H, T_q, D)
        K = split_heads(self.k_proj(source), self.num_heads)  # (B, H, T_k, D)
        V = split_heads(self.v_proj(source), self.num_heads)  # (B, H, T_k, D)
        weights = self.dropout(attention_weights(Q, K, mask))  # (B, H, T_q, T_k)
        heads = weights @ V  # (B, H, T_q, D)
        return self.out_proj(merge_heads(heads)), weights
