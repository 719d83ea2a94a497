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
    wide = widen(x)
    return (wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))): GPT-2's approximation of `gelu`.

    Args:
        x: any shape and memory layout, of a floating dtype.

    Returns:
        A tensor of the shape and dtype of x, with the same promises as in `gelu`.
    """
    wide = widen(x)
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), sigmoid(x) = 1 / (1 + exp(-x)): also known as Swish.

    Args:
        x: any shape and memory layout, of a floating dtype.

    Returns:
        A tensor of the shape and dtype of x, with the same promises as in `gelu`.
    """
    wide = widen(x)
    return (wide * torch.sigmoid(wide)).to(x.dtype)


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
    activations = {"glu": torch.sigmoid, "reglu": torch.relu, "geglu": gelu, "swiglu": silu}
    if kind not in activations:
        raise ValueError(f"kind must be one of {', '.join(activations)}, not {kind!r}")
    return (activations[kind](widen(gate)) * widen(up)).to(gate.dtype)


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
    if plain_width < 1 or multiple_of < 1:
        raise ValueError(f"widths are at least 1, not {plain_width} and {multiple_of}")
    # ceil(2 * plain_width / 3), then up to a multiple. Integers only: -(-a // b) is the ceiling of a / b.
    return -(-2 * plain_width // (3 * multiple_of)) * multiple_of


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
        activations = {"relu": torch.relu, "gelu": gelu, "gelu_tanh": gelu_tanh}
        if activation not in activations:
            raise ValueError(f"activation must be one of {', '.join(activations)}, not {activation!r}")
        self.activation = activations[activation]
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer for every token, each on its own.

        Args:
            x: (..., d_model), in the dtype of the parameters.

        Returns:
            (..., d_model), in the dtype of x. x is not modified.
        """
        return self.down_proj(self.activation(self.up_proj(x)))


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
        if kind not in ("glu", "reglu", "geglu", "swiglu"):
            raise ValueError(f"no gated layer is of kind {kind!r}")
        self.kind = kind
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's answer for every token, each on its own.

        Args:
            x: (..., d_model), in the dtype of the parameters.

        Returns:
            (..., d_model), in the dtype of x. x is not modified.
        """
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.kind))
