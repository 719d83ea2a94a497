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
    wide = widen(x)
    mean = wide.mean(dim=-1, keepdim=True)
    centred = wide - mean
    # Squares of distances, not a difference of squares: E[x^2] - E[x]^2 loses everything far from 0.
    var = centred.square().mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(var + eps)
    y = centred * rstd * weight + bias
    return y.to(x.dtype), mean, rstd


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
    D = x.shape[-1]
    grad_y = widen(grad_output)
    x_hat = (widen(x) - mean) * rstd
    grad_weight = (grad_y * x_hat).reshape(-1, D).sum(dim=0)  # every row used the same weight
    grad_bias = grad_y.reshape(-1, D).sum(dim=0)

    grad_x_hat = grad_y * weight
    through_mean = grad_x_hat.mean(dim=-1, keepdim=True)
    through_rstd = x_hat * (grad_x_hat * x_hat).mean(dim=-1, keepdim=True)
    grad_x = rstd * (grad_x_hat - through_mean - through_rstd)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), grad_bias.to(x.dtype)


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
    wide = widen(x)
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    rrms = torch.rsqrt(mean_square + eps)
    y = wide * rrms * weight
    return y.to(x.dtype), rrms


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
    grad_y = widen(grad_output)
    x_hat = widen(x) * rrms
    grad_weight = (grad_y * x_hat).reshape(-1, x.shape[-1]).sum(dim=0)

    grad_x_hat = grad_y * weight
    through_rrms = x_hat * (grad_x_hat * x_hat).mean(dim=-1, keepdim=True)
    grad_x = rrms * (grad_x_hat - through_rrms)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype)


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
        y, mean, rstd = layer_norm(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return one gradient for every argument of `forward`: x, weight, bias, and None for eps."""
        return *layer_norm_backward(grad_output, *ctx.saved_tensors), None


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
        y, rrms = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rrms)
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return one gradient for every argument of `forward`: x, weight, and None for eps."""
        return *rms_norm_backward(grad_output, *ctx.saved_tensors), None


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
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (..., D)."""
        return LayerNormFunction.apply(x, self.weight, self.bias, self.eps)


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
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, (..., D)."""
        return RMSNormFunction.apply(x, self.weight, self.eps)
