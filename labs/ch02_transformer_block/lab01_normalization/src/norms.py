"""LayerNorm and RMSNorm: forward, a backward derived by hand, and the modules built on both.

Sources: Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv:1607.06450;
Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.

Shapes: every tensor x is (..., D), with any number of leading sizes, none included. A *row* is one
slice x[i, j, ...] of length D. `weight` and `bias` are (D,) and have the dtype of x.
"""

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 tensors in float32, others as they are. Given: use it where you compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- Part 1: LayerNorm as functions --------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, row by row, and the statistics.

    The variance is the biased one, the mean of the squared distances from the mean. All arithmetic for
    float16 and bfloat16 inputs is done in float32; y is rounded once, at the end.

    Args:
        x: (..., D), of any memory layout.
        weight: (D,).
        bias: (D,).
        eps: added to the variance, inside the root.

    Returns:
        y, (..., D), in the dtype of x; mean, (..., 1); rstd = 1 / sqrt(var + eps), (..., 1). mean and
        rstd keep the precision they were computed in. The inputs are not modified.
    """
    # YOUR CODE HERE
    # 1. Widen x, then its mean along the last axis; keepdim=True lets it broadcast against x.
    # 2. The variance: subtract the mean first, then square. What does E[x^2] - E[x]^2 become in float32
    #    when x is near 10,000? And do you divide by D or by D - 1?
    # 3. rstd with eps inside the root, y with weight and bias, and only y back to the dtype of x.
    raise NotImplementedError("LayerNorm, forward")


def layer_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of sum(grad_output * y) with respect to x, weight and bias, without autograd.

    mean and rstd are functions of x: their share is part of the gradient with respect to x. All
    arithmetic for float16 and bfloat16 is done in float32; each result is rounded once, at the end.

    Args:
        grad_output: (..., D), the gradient with respect to y, in the dtype of x.
        x: (..., D), the input of `layer_norm`.
        weight: (D,).
        mean: (..., 1), from `layer_norm`.
        rstd: (..., 1), from `layer_norm`: eps is in it.

    Returns:
        grad_x, (..., D), grad_weight, (D,), and grad_bias, (D,), in the dtype of x. The inputs are not
        modified.
    """
    # YOUR CODE HERE
    # 1. x_hat = (x - mean) * rstd again, in wide precision. weight and bias served every row: their
    #    gradients add up over all leading axes, of which there may be none.
    # 2. The gradient with respect to x_hat. weight comes in here.
    # 3. On to x, by three ways: directly, through mean, through rstd. The README has the derivatives.
    raise NotImplementedError("LayerNorm, backward by hand")


# --- Part 2: RMSNorm as functions ----------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + eps) * weight, row by row, and the statistic. No mean is subtracted.

    All arithmetic for float16 and bfloat16 inputs is done in float32; y is rounded once, at the end.

    Args:
        x: (..., D), of any memory layout.
        weight: (D,).
        eps: added to the mean square, inside the root.

    Returns:
        y, (..., D), in the dtype of x; rrms = 1 / sqrt(mean(x^2) + eps), (..., 1), in the precision it
        was computed in. The inputs are not modified.
    """
    # YOUR CODE HERE
    # As layer_norm, with one statistic less. A square in float16 overflows from 256 on: widen first.
    # eps goes under the root again, and only y is rounded to the dtype of x.
    raise NotImplementedError("RMSNorm, forward")


def rms_norm_backward(grad_output: Tensor, x: Tensor, weight: Tensor, rrms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of sum(grad_output * y) with respect to x and weight, without autograd.

    All arithmetic for float16 and bfloat16 is done in float32; each result is rounded once, at the end.

    Args:
        grad_output: (..., D), the gradient with respect to y, in the dtype of x.
        x: (..., D), the input of `rms_norm`.
        weight: (D,).
        rrms: (..., 1), from `rms_norm`: eps is in it.

    Returns:
        grad_x, (..., D), and grad_weight, (D,), in the dtype of x. The inputs are not modified.
    """
    # YOUR CODE HERE
    # As layer_norm_backward. Which of the three ways from x_hat to x is gone?
    # x_hat is x * rrms here; the rest keeps its form.
    raise NotImplementedError("RMSNorm, backward by hand")


# --- Part 3: both for autograd -------------------------------------------------------------


class LayerNormFunction(torch.autograd.Function):
    """`layer_norm` for autograd: `LayerNormFunction.apply(x, weight, bias, eps)` returns y alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Return y and keep in `ctx` what `backward` needs.

        Args:
            ctx: autograd's; its `save_for_backward` keeps tensors and notices if one is changed later.
            x: (..., D).
            weight: (D,).
            bias: (D,).
            eps: inside the root.
        """
        # YOUR CODE HERE
        # Call your layer_norm. Keep the tensors that layer_norm_backward wants with ctx.save_for_backward:
        # a tensor stored as ctx.x = x would not notice an optimizer step in between.
        raise NotImplementedError("forward of LayerNormFunction")

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return one gradient for every argument of `forward`: x, weight, bias, and None for eps."""
        # YOUR CODE HERE
        # Call your layer_norm_backward with ctx.saved_tensors.
        # One result per argument of forward, in the same order; eps has no gradient.
        raise NotImplementedError("backward of LayerNormFunction")


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` for autograd: `RMSNormFunction.apply(x, weight, eps)` returns y alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return y and keep in `ctx` what `backward` needs.

        Args:
            ctx: autograd's.
            x: (..., D).
            weight: (D,).
            eps: inside the root.
        """
        # YOUR CODE HERE
        # The same as in LayerNormFunction, with the tensors that rms_norm_backward wants.
        # Return y alone: rms_norm gives you two results.
        raise NotImplementedError("forward of RMSNormFunction")

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return one gradient for every argument of `forward`: x, weight, and None for eps."""
        # YOUR CODE HERE
        # Call your rms_norm_backward with ctx.saved_tensors.
        # How many arguments did forward take, without ctx? One result for each.
        raise NotImplementedError("backward of RMSNormFunction")


class LayerNorm(nn.Module):
    """LayerNorm over the last D features, computed by `LayerNormFunction`.

    Args:
        dim: D.
        eps: added to the variance, inside the root; kept as the attribute `eps`.

    Attributes:
        weight: parameter, (D,), ones at first.
        bias: parameter, (D,), zeros at first.
        eps: float.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        # YOUR CODE HERE
        # Two parameters with the names, shapes and first values of the docstring, and eps.
        # nn.Parameter around a tensor makes it one.
        raise NotImplementedError("the parameters of LayerNorm")

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (..., D)."""
        # YOUR CODE HERE
        # Through LayerNormFunction.apply, which takes positional arguments only.
        # Calling layer_norm would be differentiated by autograd, and your backward never used.
        raise NotImplementedError("LayerNorm by LayerNormFunction")


class RMSNorm(nn.Module):
    """RMSNorm over the last D features, computed by `RMSNormFunction`.

    Args:
        dim: D.
        eps: added to the mean square, inside the root; kept as the attribute `eps`.

    Attributes:
        weight: parameter, (D,), ones at first. There is no bias.
        eps: float.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        # YOUR CODE HERE
        # One parameter, and eps.
        # What must it be at first, so that x_hat comes out as it is?
        raise NotImplementedError("the parameter of RMSNorm")

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (..., D)."""
        # YOUR CODE HERE
        # Through RMSNormFunction.apply.
        # In which order did its forward take the arguments?
        raise NotImplementedError("RMSNorm by RMSNormFunction")
