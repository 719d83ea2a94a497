"""Transformer blocks: pre-norm, post-norm, and GPT-2's, which takes Hugging Face's weights.

Sources: Vaswani et al. 2017, "Attention Is All You Need", section 3.1, arXiv:1706.03762 (post-norm);
Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", figure 1, arXiv:2002.04745;
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (GPT-2).

Shapes: B sequences, T tokens, E = d_model features, H heads of D = E / H features, F = d_ff features.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- Part 1: the two sub-layers ---------------------------------------------------------------


def causal_weights(Q: Tensor, K: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(D)) over the keys at or before each query, in every head.

    Args:
        Q: queries, (B, H, T, D), of any memory layout.
        K: keys, (B, H, T, D), of the same tokens.

    Returns:
        (B, H, T, T). Entry [b, h, i, j] says how much token i reads from token j. It is exactly 0
        for j > i, whatever the scores; the others of a row sum to 1. The inputs are not modified.
    """
    T = Q.shape[-2]
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=Q.device).triu(diagonal=1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which no token reads a later one.

    Attributes:
        qkv_proj: nn.Linear, E -> 3 * E. Of its output the first E features are the queries, the next
            E the keys, the last E the values; in each, head h owns features h * D to (h + 1) * D.
        out_proj: nn.Linear, E -> E. It reads the heads side by side, head 0 first.
        num_heads: H.
        dropout: probability, in [0, 1), that an attention weight is dropped in training mode.
    """

    def __init__(self, d_model: int, num_heads: int, *, dropout: float = 0.0) -> None:
        if d_model % num_heads:
            raise ValueError(f"d_model {d_model} cannot be shared out equally among {num_heads} heads")
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each token reads from itself and the tokens before it.

        In training mode every attention weight is set to 0 with probability `dropout`, each on its
        own, and otherwise divided by (1 - dropout). In evaluation mode nothing is dropped.

        Args:
            x: (B, T, E), of any memory layout. It is not modified.

        Returns:
            (B, T, E), of the dtype of `x`.
        """
        Q, K, V = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv_proj(x).split(x.shape[-1], dim=-1)
        )
        weights = F.dropout(causal_weights(Q, K), self.dropout, self.training)  # (B, H, T, T)
        heads = weights @ V  # (B, H, T, D)
        return self.out_proj(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """The feed-forward layer of GPT-2: each token on its own, E -> F -> E.

    Attributes:
        up_proj: nn.Linear, E -> F.
        down_proj: nn.Linear, F -> E.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(d_model, d_ff)
        self.down_proj = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return down_proj(gelu(up_proj(x))).

        The GELU is the one by tanh: 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))).

        Args:
            x: (B, T, E), of any memory layout. It is not modified.

        Returns:
            (B, T, E), of the dtype of `x`.
        """
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


# --- Part 2: two ways to put them together ----------------------------------------------------


class PreNormBlock(nn.Module):
    """A block that normalises what each sub-layer reads. The sum itself is never normalised.

    Attributes:
        attention: the first sub-layer, any module that takes and returns (B, T, E).
        feed_forward: the second sub-layer, likewise.
        norm1: nn.LayerNorm that goes with `attention`.
        norm2: nn.LayerNorm that goes with `feed_forward`.
        dropout: nn.Dropout for the output of both sub-layers.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        d_model: int,
        *,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps=eps), nn.LayerNorm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return h + feed_forward(norm2(h)), where h = x + attention(norm1(x)).

        In training mode dropout acts on the output of each sub-layer, before it is added.

        Args:
            x: (B, T, E), of any memory layout. It is not modified.

        Returns:
            (B, T, E), of the dtype of `x`.
        """
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class PostNormBlock(nn.Module):
    """A block that normalises each sum, as in the first transformer.

    Attributes:
        attention, feed_forward, norm1, norm2, dropout: as in `PreNormBlock`.
    """

    def __init__(
        self,
        attention: nn.Module,
        feed_forward: nn.Module,
        d_model: int,
        *,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.norm1, self.norm2 = nn.LayerNorm(d_model, eps=eps), nn.LayerNorm(d_model, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return norm2(h + feed_forward(h)), where h = norm1(x + attention(x)).

        In training mode dropout acts on the output of each sub-layer, before it is added.

        Args:
            x: (B, T, E), of any memory layout. It is not modified.

        Returns:
            (B, T, E), of the dtype of `x`.
        """
        x = self.norm1(x + self.dropout(self.attention(x)))
        return self.norm2(x + self.dropout(self.feed_forward(x)))


# --- Part 3: GPT-2 ----------------------------------------------------------------------------

# Hugging Face's name of each module of its GPT2Block, and ours.
GPT2_NAMES = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv_proj",
    "attn.c_proj": "attention.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "feed_forward.up_proj",
    "mlp.c_proj": "feed_forward.down_proj",
}

# Old checkpoints also hold the causal mask and the number that hides: constants, no parameters.
GPT2_CONSTANTS = ("attn.bias", "attn.masked_bias")


def conv1d_to_linear(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a `GPT2Block` made from the state of Hugging Face's GPT2Block.

    Hugging Face's projections are Conv1D modules: x @ weight + bias, with a weight of shape
    (in, out). nn.Linear has (out, in) and computes x @ weight.T + bias.

    Args:
        state: the tensors by Hugging Face's names, such as "attn.c_attn.weight": for each module of
            GPT2_NAMES its "weight" and its "bias". Those in GPT2_CONSTANTS may be there too.
            Neither the mapping nor a tensor is modified.

    Returns:
        The twelve tensors by our names, such as "attention.qkv_proj.weight", in their dtypes. They
        may share memory with those of `state`.

    Raises:
        ValueError: a parameter is missing from `state`, or it holds a name that is neither a parameter
            nor in GPT2_CONSTANTS.
    """
    renamed, known = {}, set(GPT2_CONSTANTS)
    for theirs, ours in GPT2_NAMES.items():
        for kind in ("weight", "bias"):
            name = f"{theirs}.{kind}"
            if name not in state:
                raise ValueError(f"the state has no {name}")
            tensor = state[name]
            # A LayerNorm's weight is a vector, like every bias: nothing to transpose.
            renamed[f"{ours}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
            known.add(name)
    if unknown := sorted(set(state) - known):
        raise ValueError(f"no GPT-2 block has parameters named {', '.join(unknown)}")
    return renamed


class GPT2Block(PreNormBlock):
    """GPT-2's block: pre-norm, causal attention, the GELU by tanh, biases everywhere.

    Attributes:
        attention: CausalSelfAttention.
        feed_forward: FeedForward.
        norm1, norm2, dropout: as in `PreNormBlock`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        eps: float = 1e-5,
        dropout: float = 0.0,
    ) -> None:
        """Make the sub-layers and the block around them.

        Args:
            d_model: E.
            num_heads: H, a divisor of E.
            d_ff: F; None means 4 * E.
            eps: of both norms.
            dropout: for the attention weights and for the output of both sub-layers.

        Raises:
            ValueError: d_model is not a multiple of num_heads.
        """
        super().__init__(
            CausalSelfAttention(d_model, num_heads, dropout=dropout),
            FeedForward(d_model, 4 * d_model if d_ff is None else d_ff),
            d_model,
            eps=eps,
            dropout=dropout,
        )

    def load_conv1d(self, state: Mapping[str, Tensor]) -> None:
        """Copy the parameters of Hugging Face's GPT2Block, given by its state dict, into this block."""
        self.load_state_dict(conv1d_to_linear(state))
