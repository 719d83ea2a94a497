"""Cross-entropy, its gradient, its units, and a version that never holds all logits.

Sources: Bridle 1990, "Probabilistic Interpretation of Feedforward Classification Network Outputs" (softmax and its
gradient); Szegedy et al. 2015, section 7, arXiv:1512.00567 (label smoothing); Hsu et al. 2024, section 3.2,
arXiv:2410.10989, and Wijmans et al. 2024, arXiv:2411.09009 (losses that never hold all logits).

Letters in shapes: V tokens in the vocabulary, N tokens to predict, E features, C = chunk_size rows. `...` are any
axes, also none. All losses are in nats.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""The target of positions that count for nothing, as in PyTorch: padding, prompts, the last token of a text."""


def require_inputs(
    shape: torch.Size, targets: Tensor, *, ignore_index: int = IGNORE, label_smoothing: float = 0.0
) -> None:
    """Check what every loss of this file takes. Call it before anything else.

    Args:
        shape: of the logits, (..., V).
        targets: (...), int64.
        ignore_index: the target that counts for nothing, inside the vocabulary or outside.
        label_smoothing: in [0, 1].

    Raises:
        ValueError: the targets have not the shape of the logits without their last axis, a target that is not
            ignore_index is outside 0 .. V - 1 (an index of -1 would quietly take the last entry), or
            label_smoothing is outside [0, 1].
    """
    if targets.shape != shape[:-1]:
        raise ValueError(
            f"logits {tuple(shape)} need targets {tuple(shape[:-1])}, not {tuple(targets.shape)}"
        )
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= shape[-1]))
    if outside.any():
        raise ValueError(f"target {targets[outside][0].item()} is not in a vocabulary of {shape[-1]}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is in [0, 1], not {label_smoothing}")


def at_least_float32(x: Tensor) -> Tensor:
    """Return `x`, in float32 if it is bfloat16 or float16. A loss of 10.8 has no second decimal in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


# --- Part 1: the loss -------------------------------------------------------------------------


def log_sum_exp(x: Tensor, dim: int = -1) -> Tensor:
    """Return log(sum(exp(x))) along `dim`, exact to rounding whatever the size of the numbers.

    The identity behind it: for any m, log(sum(exp(x))) = m + log(sum(exp(x - m))).

    Args:
        x: floating point, of any shape and memory layout. It is not modified. Entries may be -inf or +inf.
        dim: the axis that goes away; any axis, negative numbers count from the end.

    Returns:
        The shape of `x` without `dim`, in the dtype of `x`. -inf where all entries are -inf, +inf where one is
        +inf, never NaN. Its gradient is the softmax of `x` wherever the result is finite, exactly 0 at -inf.
    """
    m = x.amax(dim=dim, keepdim=True)
    # inf - inf is NaN: rows whose maximum is infinite are not shifted.
    m = m.masked_fill(m.isinf(), 0.0)
    return (x - m).exp().sum(dim=dim).log() + m.squeeze(dim)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return how surprised softmax(logits) is by the targets, in nats.

    The loss of a token is -sum_v q_v log p_v, with p = softmax(logits). q is 1 - s at the target plus s / V
    everywhere, the target included, where s is label_smoothing.

    Args:
        logits: (..., V), of any memory layout. Not modified. With s = 0 an entry may be -inf, a token that cannot
            come: it changes nothing where it is not the target, and the loss is inf where it is.
        targets: (...), int64, of any memory layout. Not modified.
        ignore_index: tokens with this target count for nothing.
        label_smoothing: s, in [0, 1].
        reduction: "mean" over the tokens that are kept (not over all); "sum"; "none", one loss per token, 0 for
            ignored ones.

    Returns:
        A scalar, or (...) for "none". float32 for logits in bfloat16 and float16, which are converted first;
        otherwise the dtype of the logits. If no token is kept, mean and sum are 0 and pass back gradients of 0.
        (F.cross_entropy's mean is NaN then, and one batch of nothing but padding spoils a run.)

    Raises:
        ValueError: see `require_inputs`; or the reduction is unknown.
    """
    require_inputs(logits.shape, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction is "mean", "sum" or "none", not {reduction!r}')
    logits = at_least_float32(logits)
    kept = targets != ignore_index  # (...)
    index = targets.masked_fill(~kept, 0)  # any valid index: what is read there is thrown away
    expected = logits.gather(-1, index[..., None])[..., 0]  # (...): sum_v q_v x_v
    if label_smoothing > 0:  # not for 0: the mean of a row with -inf, times 0, is NaN
        expected = (1 - label_smoothing) * expected + label_smoothing * logits.mean(dim=-1)
    # log p_v = x_v - log_sum_exp(x), and q sums to 1.
    losses = (log_sum_exp(logits) - expected).masked_fill(~kept, 0.0)  # (...)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum().clamp(min=1) if reduction == "mean" else losses.sum()


@torch.no_grad()
def cross_entropy_gradient(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the gradient of `cross_entropy` by its logits, from the formula, without autograd.

    For the sum it is p - q in every row that is kept, and 0 in ignored ones.

    Args:
        logits: (..., V), of any memory layout. Not modified. Entries may be -inf.
        targets: (...), int64, of any memory layout. Not modified.
        ignore_index: tokens with this target count for nothing.
        label_smoothing: s, in [0, 1].
        reduction: "mean" over the tokens that are kept, or "sum".

    Returns:
        (..., V), in the dtype of the logits; computed in float32 for bfloat16 and float16. All 0 if no token
        is kept.

    Raises:
        ValueError: see `require_inputs`; or the reduction is neither "mean" nor "sum".
    """
    require_inputs(logits.shape, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is "mean" or "sum", not {reduction!r}')
    x = at_least_float32(logits)
    kept = (targets != ignore_index)[..., None]  # (..., 1)
    index = targets[..., None].masked_fill(~kept, 0)  # (..., 1)
    p = (x - log_sum_exp(x)[..., None]).exp()  # (..., V)
    q = torch.full_like(p, label_smoothing / p.shape[-1])
    q.scatter_add_(-1, index, torch.full_like(q[..., :1], 1 - label_smoothing))
    gradient = (p - q).masked_fill(~kept, 0.0)
    if reduction == "mean":
        gradient /= kept.sum().clamp(min=1)
    return gradient.to(logits.dtype)


# --- Part 2: what the number means ------------------------------------------------------------


def perplexity(nats: float) -> float:
    """Return exp(nats): among how many equally likely tokens a model with this mean loss hesitates.

    Args:
        nats: mean loss per token.

    Returns:
        At least 1 for a loss of at least 0; inf where it is too large for a float (above about 709 nats).
    """
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def bits_per_character(nats_per_token: float, tokens: int, characters: int) -> float:
    """Return the loss in bits per character: comparable between tokenizers, unlike a loss per token.

    Args:
        nats_per_token: mean loss over the tokens of a text.
        tokens: how many tokens the text is, at least 1.
        characters: how many characters the same text is, at least 1. Bytes give bits per byte.

    Returns:
        All bits of the text, shared out among its characters. A bit is log(2) nats.

    Raises:
        ValueError: tokens or characters is below 1.
    """
    if tokens < 1 or characters < 1:
        raise ValueError(f"{tokens} tokens and {characters} characters are no text")
    return nats_per_token * tokens / math.log(2) / characters


def mean_over_batches(batches: Iterable[tuple[float, int]]) -> float:
    """Return the mean loss over all tokens of some batches, as if they had been one batch.

    Args:
        batches: for each batch its mean loss and how many tokens that is the mean of, at least 0. It may be a
            generator. A batch of 0 tokens counts for nothing, whatever its loss, NaN included.

    Returns:
        The mean over tokens. (Not over batches: a short last batch would weigh as much as a full one.)

    Raises:
        ValueError: a number of tokens is negative, or there is no token at all: a loss of 0 would look splendid.
    """
    total, tokens = 0.0, 0
    for mean, count in batches:
        if count < 0:
            raise ValueError(f"a batch cannot have {count} tokens")
        if count:
            total += mean * count
            tokens += count
    if tokens == 0:
        raise ValueError("no tokens: there is nothing to take the mean of")
    return total / tokens


# --- Part 3: the loss without the logits ------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden @ weight.T that computes its gradients on the way forward, chunk by chunk.

    `chunked_cross_entropy` says what goes in and out. A loss is a scalar, so the gradients are known up to one
    factor before anyone asks for them: the chunk's logits can go as soon as the chunk is done.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_size: int,
        ignore_index: int,
        label_smoothing: float,
    ) -> Tensor:
        """Return the mean loss; save its gradients by hidden (N, E) and weight (V, E), nothing with V x N."""
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
        grad_hidden = torch.zeros_like(hidden)  # (N, E)
        # Hundreds of small summands: in bfloat16 the sum would stop growing.
        grad_weight = torch.zeros_like(at_least_float32(weight))  # (V, E)
        total = grad_weight.new_zeros(())
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = hidden[rows] @ weight.T  # (C, V)
            total += cross_entropy(logits, targets[rows], **options)
            if any(ctx.needs_input_grad):
                grad_logits = cross_entropy_gradient(logits, targets[rows], **options)  # (C, V)
                grad_hidden[rows] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[rows]
        kept = (targets != ignore_index).sum().clamp(min=1)  # of all chunks
        ctx.save_for_backward(grad_hidden / kept, (grad_weight / kept).to(weight.dtype))
        return total / kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by the arguments of `forward`; grad_loss is the gradient by the loss, a scalar."""
        grad_hidden, grad_weight = ctx.saved_tensors
        # New tensors: what is saved must survive a second backward pass.
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean of `cross_entropy` for the logits hidden @ weight.T, without holding all of them.

    Memory: what is made on the way forward and back and alive at the same time is never more than 16 chunks of
    logits in float32 (16 * C * V * 4 bytes) and 8 times the bytes of hidden, weight and targets.

    Args:
        hidden: (N, E), what the last layer returns, of any memory layout. N may be 0. Not modified.
        weight: (V, E), of the output head, in the dtype of hidden, of any memory layout. Not modified.
        targets: (N,), int64. Not modified.
        chunk_size: C, how many rows of hidden become logits at a time, at least 1. It need not divide N, and may
            be larger. It changes memory and time, and the result only by rounding.
        ignore_index: tokens with this target count for nothing; the mean is over the others, of all chunks.
        label_smoothing: in [0, 1].

    Returns:
        A scalar. float32 for bfloat16 and float16, otherwise the dtype of hidden. 0 if no token is kept. Gradients
        flow to those of hidden and weight that require them, in their dtypes, for `backward()` as for
        `torch.autograd.grad`; that of weight is summed over chunks in float32 at least. As always in PyTorch
        they are multiplied by the gradient by the loss, are added to those from other uses of the same tensors,
        and with retain_graph=True may be asked for again.

    Raises:
        ValueError: see `require_inputs`; or chunk_size is below 1.
    """
    shape = torch.Size((len(hidden), len(weight)))
    require_inputs(shape, targets, ignore_index=ignore_index, label_smoothing=label_smoothing)
    if chunk_size < 1:
        raise ValueError(f"a chunk has at least one row, not {chunk_size}")
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk_size, ignore_index, label_smoothing)
