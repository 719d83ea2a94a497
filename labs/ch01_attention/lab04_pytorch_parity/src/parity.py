"""Multi-head attention with the parameters, the arguments and the results of torch.nn.MultiheadAttention.

Sources: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.2, arXiv:1706.03762;
the documentation of torch.nn.MultiheadAttention.

Letters in shapes: B batch, H heads, T_q queries, T_k keys, E embed_dim, D = E / H head_dim.
"""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


def split_packed(
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, embed_dim: int
) -> tuple[Parts, Parts]:
    """Return ((W_q, W_k, W_v), (b_q, b_k, b_v)), cut from the packed parameters of nn.MultiheadAttention.

    Args:
        in_proj_weight: (3 * E, E), the query's rows first, then the key's, then the value's;
            None gives (None, None, None).
        in_proj_bias: (3 * E,), in the same order; None gives (None, None, None).
        embed_dim: E.

    Returns:
        Weights of shape (E, E), to be used as `x @ W.T + b`, and biases of shape (E,). Gradients
        flow from the parts to the packed parameters.
    """
    # YOUR CODE HERE
    # The packed weight is three (E, E) matrices on top of each other, the packed bias three vectors.
    # Cut each into three along its first axis. Slices are views: gradients flow back by themselves.
    # Treat weight and bias separately: each may be None on its own.
    raise NotImplementedError("the packed parameters cut into three")


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    num_heads: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Return one additive mask that does what the two masks do together.

    Each mask is boolean or floating, independently of the other. Boolean: True *hides* a key (the
    opposite of lab 1.1). Floating: the numbers are added to the scaled scores, whatever they are;
    -inf hides a key, a finite number never does.

    Args:
        attn_mask: (T_q, T_k), the same for all, or (B * H, T_q, T_k), where row b * H + h belongs
            to head h of sample b.
        key_padding_mask: (B, T_k), the same for all queries and heads of a sample.
        batch: B.
        num_heads: H.
        dtype: the dtype of the result.

    Returns:
        A tensor that broadcasts to (B, H, T_q, T_k), to be added to the scaled scores, or None if
        both masks are None. Keys that either mask hides have -inf; where both masks are
        floating, the numbers add up. The masks are not modified. Gradients flow to floating masks.

    Raises:
        ValueError: a mask is neither boolean nor floating. (A mask of integers 0 and 1 would be
            ambiguous: is 1 to be added, or does it hide?)
    """
    # YOUR CODE HERE
    # 1. Make each mask that is there floating, of dtype `dtype`: True becomes -inf, False becomes 0,
    #    floats stay as they are, and anything else raises ValueError.
    # 2. Give each a shape that broadcasts to (B, H, T_q, T_k). Which axes does key_padding_mask lack?
    #    In a 3-D attn_mask the axes B and H are one axis, B the slower one.
    # 3. Add them up, into a new tensor.
    raise NotImplementedError("one additive mask from two masks")


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Return softmax(q k^T / sqrt(D) + mask), over the keys.

    Args:
        q: (B, H, T_q, D).
        k: (B, H, T_k, D).
        mask: additive, broadcasts to (B, H, T_q, T_k); None adds nothing.

    Returns:
        Weights, (B, H, T_q, T_k). A query all of whose keys have -inf gets weights of exactly 0,
        and no NaN in its gradient either.
    """
    # YOUR CODE HERE
    # 1. Scores (B, H, T_q, T_k), scaled; then the mask, as it is.
    # 2. Softmax over the keys. F.softmax and Tensor.softmax subtract the maximum for you.
    # 3. A row of nothing but -inf gives NaN, and so does its gradient, even if you replace the NaN
    #    afterwards. Find such rows first and give softmax something finite in their place.
    raise NotImplementedError("softmax of scaled, masked scores")


class ParityAttention(nn.Module):
    """A re-implementation of nn.MultiheadAttention: same constructor, same state, same forward.

    Attributes:
        in_proj_weight: (3 * E, E), packed, if kdim and vdim equal E, else None.
        q_proj_weight, k_proj_weight, v_proj_weight: (E, E), (E, kdim) and (E, vdim), separate, if kdim
            or vdim differs from E, else None.
        in_proj_bias: (3 * E,), always packed, or None.
        out_proj: nn.Linear(E, E), with a bias if `bias`.
        embed_dim, num_heads, head_dim, kdim, vdim, dropout, batch_first: as in nn.MultiheadAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if add_bias_kv or add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn are not supported")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}")
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        packed = self.kdim == embed_dim and self.vdim == embed_dim
        # A parameter registered as None is no part of the state, but the attribute exists.
        for name, shape, wanted in (
            ("in_proj_weight", (3 * embed_dim, embed_dim), packed),
            ("q_proj_weight", (embed_dim, embed_dim), not packed),
            ("k_proj_weight", (embed_dim, self.kdim), not packed),
            ("v_proj_weight", (embed_dim, self.vdim), not packed),
            ("in_proj_bias", (3 * embed_dim,), bias),
        ):
            self.register_parameter(name, parameter(*shape) if wanted else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name != "out_proj.weight":
                nn.init.xavier_uniform_(p)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> Self:
        """Return a ParityAttention that computes what `module` computes.

        It has the configuration of `module` (heads, dropout, bias, kdim, vdim, batch_first), its dtype
        and device, its training or evaluation mode, and *copies* of its parameters: a later change
        of one of the two modules leaves the other alone. `module` itself is not changed.

        Raises:
            ValueError: `module` was made with add_bias_kv or add_zero_attn.
        """
        # YOUR CODE HERE
        # 1. Read the configuration off `module` (its attributes have the names used here; `bias`,
        #    `add_bias_kv` and `add_zero_attn` show in in_proj_bias, bias_k and add_zero_attn) and call cls.
        # 2. Copy the parameters. The state of both modules has the same names.
        # 3. The mode: module.training.
        raise NotImplementedError("a ParityAttention made from an nn.MultiheadAttention")

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projections q, k, v, cut into heads.

        Head h owns the features h * D up to (h + 1) * D of each projection.

        Args:
            query: (B, T_q, E).
            key: (B, T_k, kdim).
            value: (B, T_k, vdim).

        Returns:
            q, (B, H, T_q, D), k, (B, H, T_k, D), and v, (B, H, T_k, D).
        """
        # YOUR CODE HERE
        # 1. Three weights: cut from in_proj_weight, or the separate ones if that is None.
        #    Three biases: always cut from in_proj_bias.
        # 2. F.linear(x, W, b) is x @ W.T + b.
        # 3. Cut the last axis E into (H, D), in this order, and move H in front of T.
        raise NotImplementedError("the projections q, k and v, cut into heads")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what nn.MultiheadAttention.forward returns for the same arguments.

        Args:
            query: (B, T_q, E) if batch_first, else (T_q, B, E); or unbatched, (T_q, E), and then
                batch_first does not matter.
            key: the same with T_k and kdim.
            value: the same with T_k and vdim.
            key_padding_mask: (B, T_k), or (T_k,) if unbatched; see `merge_masks`.
            need_weights: whether to return the weights.
            attn_mask: (T_q, T_k) or (B * H, T_q, T_k), with B = 1 if unbatched; see `merge_masks`.
            average_attn_weights: whether the weights returned are the mean over heads.
            is_causal: the caller's promise that attn_mask is the causal mask. It changes nothing: the
                mask given counts. (What happens when the promise is false is not specified.)

        Returns:
            output, laid out like query with E features, and weights: None without need_weights, else
            (B, T_q, T_k) averaged or (B, H, T_q, T_k) per head, without the B if unbatched. In training
            mode each weight, by itself, is dropped (set to 0) with probability `dropout`, the others are
            divided by 1 - dropout, and both output and returned weights are made from these. A query whose
            keys are all hidden has weights of exactly 0, so its output is the bias of out_proj (0 without).
            Gradients flow through both results. The arguments are not modified.

        Raises:
            ValueError: is_causal without attn_mask.
        """
        # YOUR CODE HERE
        # 1. Refuse is_causal without attn_mask. Bring the inputs to (B, T, features), batched or not,
        #    batch first or not; an unbatched key_padding_mask needs the batch axis too.
        # 2. project, merge_masks, attention_weights, F.dropout (look up its argument `training`).
        # 3. Read the values, put the heads side by side again, (B, T_q, H * D), then out_proj.
        # 4. Undo step 1 for the output, and for the weights what of it applies to them.
        raise NotImplementedError("attention with the arguments and results of nn.MultiheadAttention")
