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
    W_q = W_k = W_v = b_q = b_k = b_v = None
    if in_proj_weight is not None:
        W_q, W_k, W_v = in_proj_weight.split(embed_dim)
    if in_proj_bias is not None:
        b_q, b_k, b_v = in_proj_bias.split(embed_dim)
    return (W_q, W_k, W_v), (b_q, b_k, b_v)


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
    merged = None
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, num_heads))  # (B, H, T_q, T_k)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]  # (B, 1, 1, T_k)
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
        elif not mask.is_floating_point():
            raise ValueError(f"a mask is boolean or floating, not {mask.dtype}")
        merged = mask.to(dtype) if merged is None else merged + mask.to(dtype)
    return merged


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
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T_q, T_k)
    if mask is None:
        return scores.softmax(dim=-1)
    scores = scores + mask
    blind = scores.isneginf().all(dim=-1, keepdim=True)  # (B, H, T_q, 1), no key left to look at
    # softmax of nothing but -inf is 0/0, in the gradient too: give blind rows finite scores first.
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


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
        weight = module.out_proj.weight
        ours = cls(
            module.embed_dim,
            module.num_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        ours.load_state_dict(module.state_dict())
        return ours.train(module.training)

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
        weights, biases = split_packed(self.in_proj_weight, self.in_proj_bias, self.embed_dim)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        q, k, v = (
            F.linear(x, W, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x, W, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

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
        if is_causal and attn_mask is None:
            raise ValueError("is_causal describes attn_mask: pass the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # (B, T, ...)

        q, k, v = self.project(query, key, value)  # (B, H, T, D)
        mask = merge_masks(attn_mask, key_padding_mask, q.shape[0], self.num_heads, q.dtype)
        weights = attention_weights(q, k, mask)  # (B, H, T_q, T_k)
        weights = F.dropout(weights, self.dropout, self.training)
        heads = weights @ v  # (B, H, T_q, D)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))  # (B, T_q, E)

        if average_attn_weights:
            weights = weights.mean(dim=1)  # (B, T_q, T_k)
        if not batched:
            output, weights = output[0], weights[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return output, weights if need_weights else None
