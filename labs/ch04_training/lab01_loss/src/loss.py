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
    # YOUR CODE HERE
    # The identity in the docstring holds for every m. Which m keeps exp from overflowing, and at least one
    # of the terms from vanishing? It differs from row to row; `keepdim=True` helps with broadcasting.
    # Then ask what x - m is in a row that is all -inf, or has a +inf, and which m would do there.
    # `x -= m` would change the caller's tensor.
    raise NotImplementedError("log(sum(exp(x))), for numbers of any size")


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
    # YOUR CODE HERE
    # 1. Refuse what makes no sense, convert narrow dtypes (`at_least_float32`).
    # 2. Write log p_v with your log_sum_exp, put it into the sum and simplify: q sums to 1. What is left
    #    needs one logit per token (`gather` reads it) and, for s > 0, the mean of the row.
    # 3. Ignored targets are no valid index: read anywhere instead, and set the loss to 0 afterwards.
    # 4. Reduce. What is divided by what, if no token is kept?
    raise NotImplementedError("the loss per token, then the reduction")


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
    # YOUR CODE HERE
    # The same checks first. p comes from log_sum_exp again; q is s / V everywhere and 1 - s more at the
    # target. Rows of ignored tokens become 0. The mean has one more factor. Convert back at the end.
    raise NotImplementedError("p - q, by the formula")


# --- Part 2: what the number means ------------------------------------------------------------


def perplexity(nats: float) -> float:
    """Return exp(nats): among how many equally likely tokens a model with this mean loss hesitates.

    Args:
        nats: mean loss per token.

    Returns:
        At least 1 for a loss of at least 0; inf where it is too large for a float (above about 709 nats).
    """
    # YOUR CODE HERE
    # One function of the module `math` for a loss in nats.
    # What does it do for a loss of 1000, which a model that has diverged may well have?
    raise NotImplementedError("the perplexity")


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
    # YOUR CODE HERE
    # How many nats does the whole text cost? How many bits are that, and how many characters share them?
    # Refuse an empty text.
    raise NotImplementedError("bits per character")


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
    # YOUR CODE HERE
    # Turn each mean back into a sum, and add up sums and tokens. A generator can be read only once.
    # What is NaN * 0? Refuse negative numbers, and a result that would be 0 / 0.
    raise NotImplementedError("the mean over all tokens")


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
        # YOUR CODE HERE
        # 1. For each chunk of rows: its logits (C, V), the sum of its losses, and the gradient of that sum by
        #    the logits: your two functions. What are then the gradients by its rows of hidden, (C, E), and by
        #    weight, (V, E)? Check the shapes; the second one is summed over chunks, in which dtype?
        # 2. When the last chunk is done you know how many tokens were kept. Divide loss and gradients once.
        # 3. `ctx.save_for_backward` both. When `ctx.needs_input_grad` asks for neither, as in evaluation, spare them.
        raise NotImplementedError("loss and gradients, chunk by chunk")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by the arguments of `forward`; grad_loss is the gradient by the loss, a scalar."""
        # YOUR CODE HERE
        # Whoever uses the loss may scale it or add it to others: grad_loss says by how much it counts. One
        # gradient per argument of forward, None for those that have none. What is saved may be needed again.
        raise NotImplementedError("the saved gradients, times grad_loss")


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
