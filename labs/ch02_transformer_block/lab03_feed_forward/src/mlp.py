"""Feed-forward layers: GELU exact and by tanh, gated linear units, and both kinds of layer as modules.

Sources: Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415; Dauphin et al. 2016,
"Language Modeling with Gated Convolutional Networks", arXiv:1612.08083 (GLU); Shazeer 2020, "GLU Variants
Improve Transformer", arXiv:2002.05202.

Shapes: x is (..., d_model), with any number of leading sizes, none included. Inside a layer every token
has d_ff features.
"""

import math

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 tensors in float32, others as they are. Given: use it where you compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- Part 1: activations -----------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """Return x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2: the normal distribution's share below x.

    Args:
        x: any shape and memory layout, of a floating dtype.

    Returns:
        A tensor of the shape and dtype of x. The arithmetic for float16 and bfloat16 is done in float32
        and rounded once, at the end. x is not modified; gradients reach it. Values and gradients
        are finite and right for all |x| up to 10,000.
    """
    # YOUR CODE HERE
    # 1. Widen x. torch.erf is yours to use; what does it want, x or x / sqrt(2)?
    # 2. Round to the dtype of x once, as the last thing.
    raise NotImplementedError("GELU by erf")


def gelu_tanh(x: Tensor) -> Tensor:
    """Return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))): GPT-2's approximation of `gelu`.

    Args:
        x: any shape and memory layout, of a floating dtype.

    Returns:
        A tensor of the shape and dtype of x, with the same promises as in `gelu`.
    """
    # YOUR CODE HERE
    # As gelu, with the formula above. torch.tanh knows what to do far from 0;
    # (e^z - e^-z) / (e^z + e^-z) becomes inf / inf there.
    raise NotImplementedError("GELU by tanh")


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), sigmoid(x) = 1 / (1 + exp(-x)): also known as Swish.

    Args:
        x: any shape and memory layout, of a floating dtype.

    Returns:
        A tensor of the shape and dtype of x, with the same promises as in `gelu`.
    """
    # YOUR CODE HERE
    # torch.sigmoid is yours to use. x / (1 + exp(-x)) has the right values everywhere,
    # but look at its gradient at x = -1000: exp(1000) is inf.
    raise NotImplementedError("SiLU")


# --- Part 2: gates -------------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Return activation(gate) * up, element by element: the gate alone is activated.

    The activation is

        kind "glu":     sigmoid
        kind "reglu":   ReLU
        kind "geglu":   the exact `gelu`
        kind "swiglu":  `silu`

    Args:
        gate: any shape and memory layout, of a floating dtype.
        up: of the shape and dtype of `gate`.
        kind: "glu", "reglu", "geglu" or "swiglu".

    Returns:
        A tensor of the shape and dtype of `gate`. For float16 and bfloat16 activation and product are
        computed in float32, and only the product is rounded. Neither input is modified; gradients reach
        both, and are finite and right for all entries up to 10,000 in size.

    Raises:
        ValueError: `kind` is none of the four.
    """
    # YOUR CODE HERE
    # 1. The activation that belongs to `kind`; torch.sigmoid and torch.relu are yours to use.
    # 2. On the gate, not on up; your gelu and silu give back what dtype they get, so widen before them.
    # 3. Round the product.
    raise NotImplementedError("a gated linear unit")


def gated_width(plain_width: int, multiple_of: int = 1) -> int:
    """Return how wide a gated layer must be to have as many weights as a plain one of `plain_width`.

    A plain layer has two matrices of d_model * plain_width weights, a gated one three of d_model * width.
    The answer is the smallest multiple of `multiple_of` with which the gated layer has at least as many
    weights as the plain one (biases are not counted).

    Args:
        plain_width: d_ff of the plain layer, at least 1.
        multiple_of: what the width must be divisible by, at least 1. Hardware likes 64 or 256.

    Returns:
        The width, exact for numbers of any size.

    Raises:
        ValueError: plain_width or multiple_of is below 1.
    """
    # YOUR CODE HERE
    # 1. Refuse what is below 1.
    # 2. For which width do three matrices have the weights of two? Up from there to a multiple.
    # 3. Stay with integers: floats make 8 / 3 * d a little more, or less, than it is.
    raise NotImplementedError("the width of a gated layer")


# --- Part 3: the layers ----------------------------------------------------------------------------


class MLP(nn.Module):
    """The plain feed-forward layer: down_proj(activation(up_proj(x))).

    Attributes:
        up_proj: nn.Linear, d_model -> d_ff.
        down_proj: nn.Linear, d_ff -> d_model.

    These two hold all parameters: the state dict has their weights and, with `bias=True`, their
    biases, and nothing else.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "gelu_tanh", bias: bool = True) -> None:
        """Make the two projections. How they are initialised is up to you.

        Args:
            d_model: width of the input and of the output.
            d_ff: width in between.
            activation: "relu", "gelu" (exact) or "gelu_tanh".
            bias: whether the projections have biases: both or none.

        Raises:
            ValueError: `activation` is none of the three.
        """
        super().__init__()
        # YOUR CODE HERE
        # 1. Refuse an activation that is none of the three; keep the one that was asked for.
        # 2. Two nn.Linear with the names above.
        raise NotImplementedError("the two projections")

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer for every token, each on its own.

        Args:
            x: (..., d_model), in the dtype of the parameters.

        Returns:
            (..., d_model), in the dtype of x. x is not modified.
        """
        # YOUR CODE HERE
        # Up, activate, down. nn.Linear works on the last axis, whatever stands before it,
        # so no loop and no reshape is needed.
        raise NotImplementedError("the plain layer")


class GatedMLP(nn.Module):
    """The gated feed-forward layer of Llama: down_proj(activation(gate_proj(x)) * up_proj(x)).

    Attributes:
        gate_proj: nn.Linear, d_model -> d_ff; its output goes through the activation.
        up_proj: nn.Linear, d_model -> d_ff.
        down_proj: nn.Linear, d_ff -> d_model.

    These three hold all parameters: the state dict has their weights and, with `bias=True`, their
    biases, and nothing else.
    """

    def __init__(self, d_model: int, d_ff: int, *, kind: str = "swiglu", bias: bool = False) -> None:
        """Make the three projections. How they are initialised is up to you.

        Args:
            d_model: width of the input and of the output.
            d_ff: width in between, exactly as given (`gated_width` is the caller's affair).
            kind: "glu", "reglu", "geglu" or "swiglu", as in `gated`.
            bias: whether the projections have biases: all three or none.

        Raises:
            ValueError: `kind` is none of the four.
        """
        super().__init__()
        # YOUR CODE HERE
        # 1. Refuse a kind that is none of the four, here already and not in the first forward.
        # 2. Three nn.Linear with the names above, which are those of Llama's checkpoints.
        raise NotImplementedError("the three projections")

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer for every token, each on its own.

        Args:
            x: (..., d_model), in the dtype of the parameters.

        Returns:
            (..., d_model), in the dtype of x. x is not modified.
        """
        # YOUR CODE HERE
        # x goes two ways, through gate_proj and up_proj. Your `gated` joins them.
        # Which of the two is activated?
        raise NotImplementedError("the gated layer")
