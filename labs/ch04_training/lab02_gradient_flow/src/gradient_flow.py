"""Gradient flow: measure every layer with hooks, predict it in closed form, and tell sick networks from sound.

Sources: Glorot and Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks"
(Xavier); He et al. 2015, "Delving Deep into Rectifiers", section 2.2, arXiv:1502.01852 (ReLU); Radford et al.
2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (scaled residual weights).

The root mean square (rms) of n numbers is sqrt(sum of their squares / n); "mean square" is its square.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from matplotlib.figure import Figure
from shared.earlier import solution_of
from torch import Tensor, nn

# --- Part 1: measuring ------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorStats:
    """Statistics over all n elements of a tensor, as Python floats.

    Attributes:
        mean: their sum divided by n.
        std: the population's: the root of the mean squared distance from `mean`, divided by n, not n - 1.
        rms: root mean square; rms² = mean² + std².
        max_abs: the largest absolute value.
        zeros: the share of elements that are exactly 0, between 0 and 1.
    """

    mean: float
    std: float
    rms: float
    max_abs: float
    zeros: float


def summarize(tensor: Tensor) -> TensorStats:
    """Return the statistics of a tensor.

    Everything is computed in float64: the squares of 1e30 and 1e-30 are outside float32's range, and
    such numbers are what an exploding or vanishing network is made of. `std` is accurate, too, where the
    mean is a million times larger.

    Args:
        tensor: any shape with at least one element, any memory layout, any floating-point dtype. It may
            require a gradient. It is not modified.
    """
    # YOUR CODE HERE
    # Cut the tensor off from the graph and convert it to float64 first; then every line below is safe.
    # Tensor.std divides by n - 1 unless it is told otherwise: look up its argument `correction`.
    # `.item()` makes a Python float of a tensor with one element.
    raise NotImplementedError("the five statistics, in float64")


@dataclass
class Call:
    """One call of one module.

    Attributes:
        name: of the module, as in `model.named_modules()`.
        output: statistics of what the call returned.
        grad_rms: rms of the gradient of the loss with respect to that output; None until it is known.
    """

    name: str
    output: TensorStats
    grad_rms: float | None = None


class Recorder:
    """A context manager that watches modules of a model through hooks.

        with Recorder(model) as recorder:
            loss_of(model(x)).backward()
        for call in recorder.calls: ...

    Inside the `with` every call of a watched module adds one `Call` to `calls`, in the order in which the
    calls end. A module called twice, or a second forward pass, adds calls of its own; nothing is overwritten.
    A backward pass fills in `grad_rms` of the calls it reaches; after a second backward pass through the same
    call, `grad_rms` is that of the later pass alone.

    - If a module returns a tuple or a list, its first element counts. A call is not recorded if what counts is
      not a floating-point tensor.
    - Where no gradient is tracked, as in `torch.no_grad()`, calls are recorded and `grad_rms` stays None.
    - Statistics are those at the moment of the call, also if an in-place module such as nn.ReLU(inplace=True)
      overwrites the output afterwards. The gradient is that of the recorded output as well.
    - Outputs, gradients, training modes and other people's hooks are as they would be without the recorder.
    - Only numbers are kept: no tensor, and no graph, lives longer because of the recorder.

    Leaving the `with`, also by an exception, which is passed on, removes all hooks: later forward and backward
    passes change nothing in `calls`. Entering again starts with an empty list.

    Attributes:
        modules: the watched modules by name.
        calls: what was recorded.
    """

    def __init__(self, model: nn.Module, names: Iterable[str] | None = None) -> None:
        """Choose the modules; no hook is set yet.

        Args:
            model: any module.
            names: which modules to watch, by their names in `model.named_modules()` ("" is the model itself);
                None means all those that have no children.

        Raises:
            ValueError: the model has no module of such a name.
        """
        known = dict(model.named_modules())
        if names is None:
            names = [name for name, module in known.items() if not list(module.children())]
        names = list(names)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the model has no modules named {', '.join(unknown)}")
        self.modules = {name: known[name] for name in names}
        self.calls: list[Call] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        """Set the hooks, with an empty list of calls, and return the recorder."""
        # YOUR CODE HERE
        # 1. An empty list of calls. Then module.register_forward_hook(hook) for every watched module; PyTorch calls
        #    hook(module, args, output) after each call. It does not tell the name: how does your hook know it?
        # 2. The hook makes a Call. If the tensor requires a gradient, tensor.register_hook(function) has function(grad)
        #    called in the backward pass: it fills in grad_rms. What does it need to hold for that, and what not?
        # 3. A hook that returns something replaces the output, or the gradient. Keep every handle for __exit__.
        raise NotImplementedError("set the hooks and return the recorder")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove every hook this recorder has set, on modules and on tensors."""
        # YOUR CODE HERE
        # Each register_... returned a handle with a method `remove`. Call all of them, those of tensors too.
        # Returning a true value would swallow an exception.
        raise NotImplementedError("remove all hooks")


@dataclass(frozen=True)
class ParameterStats:
    """What an optimiser meets in one parameter.

    Attributes:
        weight_rms: rms of the parameter.
        grad_rms: rms of its `.grad`; None if it has none.
        ratio: grad_rms / weight_rms; infinite if weight_rms is 0, None if there is no gradient.
    """

    weight_rms: float
    grad_rms: float | None
    ratio: float | None


def parameter_stats(model: nn.Module) -> dict[str, ParameterStats]:
    """Return the statistics of every parameter and its gradient, by name, in the model's order.

    As in `summarize`, everything is computed in float64. Nothing is modified.

    Args:
        model: any module, usually after a backward pass. Names are those of `model.named_parameters()`.
    """
    # YOUR CODE HERE
    # For each named parameter: the rms of the parameter, that of its .grad if it has one, and their ratio.
    # `summarize` has the rms. A bias that starts at 0 must not end in a division by zero.
    raise NotImplementedError("rms of weights and gradients, and their ratio")


# --- Part 2: predicting -----------------------------------------------------------------------


def kept_share(activation: str) -> float:
    """Return E[f(y)²] / E[y²] for a y that is distributed symmetrically around 0, and never exactly 0.

    For both activations it is also E[f'(y)²]: the share of a mean square that survives, forward or backward.

    Args:
        activation: "linear" (no activation) or "relu".

    Raises:
        ValueError: any other activation.
    """
    # YOUR CODE HERE
    # The distribution is symmetric: which part of the mean square comes from positive y?
    # Refuse names you do not know.
    raise NotImplementedError("the share of the mean square that passes")


def forward_moments(widths: Sequence[int], stds: Sequence[float], activation: str = "relu") -> list[float]:
    """Return the expected mean square of each layer's pre-activations, the first layer's first.

    The network has L layers without biases: y_1 = W_1 x, and y_l = W_l f(y_{l-1}) for l = 2 .. L. The input
    has a mean square of 1; W_l has independent entries, symmetric around 0, of standard deviation stds[l - 1].

    Source: He et al. 2015, equations 5 to 9.

    Args:
        widths: n_0 .. n_L: features of the input, then of each layer.
        stds: L standard deviations.
        activation: f, "linear" or "relu".

    Returns:
        E[y_1²] .. E[y_L²].

    Raises:
        ValueError: there is not one standard deviation per layer, or the activation is another.
    """
    # YOUR CODE HERE
    # 1. Refuse lists that do not fit.
    # 2. An entry of W h is a sum of independent products with mean 0. How many are there, and what is the
    #    expected square of one of them?
    # 3. The next layer reads f of that. The input is read as it is.
    raise NotImplementedError("from the input forward, layer by layer")


def backward_moments(widths: Sequence[int], stds: Sequence[float], activation: str = "relu") -> list[float]:
    """Return the expected mean square of the loss's gradient at each layer's pre-activations.

    The network is that of `forward_moments`, with layers wide enough for no ReLU layer to be all zeros. At the
    output, y_L, the gradient has a mean square of 1.

    Source: He et al. 2015, equations 11 to 13.

    Args:
        widths: n_0 .. n_L: features of the input, then of each layer.
        stds: L standard deviations.
        activation: f, "linear" or "relu".

    Returns:
        E[(∂loss/∂y_1)²] .. E[(∂loss/∂y_L)²]: in the order of the layers; the last one is 1.

    Raises:
        ValueError: there is not one standard deviation per layer, or the activation is another.
    """
    # YOUR CODE HERE
    # 1. Start at the output with 1 and go back, layer by layer; hand the result over in the order of the layers.
    # 2. The gradient at a unit of layer l is f'(y_l) times a sum. Over which units does it go, those before or
    #    those behind it? Which matrix stands between, that of layer l or of layer l + 1?
    raise NotImplementedError("from the output back, layer by layer")


def stream_moments(num_blocks: int, written: float = 1.0, *, scaled: bool = False) -> list[float]:
    """Return the expected mean square of a pre-norm residual stream, before and after every sub-layer.

    The stream starts with a mean square of 1. Each block has two sub-layers. Each reads the normalised stream and
    adds something independent of the stream, with mean 0 and mean square `written`.

    Source: Radford et al. 2019, section 2.3, for the scaling.

    Args:
        num_blocks: L, at least 0.
        written: the mean square of what one sub-layer adds, without scaling.
        scaled: whether the weights that write to the stream were multiplied by 1 / sqrt(2L), as in GPT-2.

    Returns:
        2L + 1 numbers: at the start, and after each sub-layer.
    """
    # YOUR CODE HERE
    # Mean squares of independent terms with mean 0 add up. How many terms are there after n sub-layers?
    # With weights multiplied by c, what happens to the mean square of what they write?
    raise NotImplementedError("the mean square after 0, 1, ... 2L sub-layers")


# --- Part 3: initialising ---------------------------------------------------------------------

WRITERS = ("out_proj", "down_proj")
"""Names of the projections that write to the residual stream, in the blocks of lab 2.4."""


def weight_std(scheme: str, fan_in: int, fan_out: int) -> float:
    """Return the standard deviation with which a linear layer's weights start.

    Args:
        scheme: "xavier" keeps, as well as one number can, the mean squares of signals and gradients in a
            linear network: the variance is one over the mean of fan_in and fan_out. "he" keeps that of the
            signals in a ReLU network, whatever fan_out is. "gpt2" is 0.02, whatever the sizes.
        fan_in: features the layer reads.
        fan_out: features it returns.

    Raises:
        ValueError: any other scheme.
    """
    # YOUR CODE HERE
    # Three schemes, one line each. A variance is named in the docstring, a standard deviation is wanted.
    # For "he": which standard deviation makes forward_moments the same at every layer of a ReLU network?
    raise NotImplementedError("the standard deviation of the scheme")


def init_(model: nn.Module, scheme: str, *, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of every nn.Linear anew, in place: N(0, weight_std²), biases 0.

    In the scheme "gpt2" the standard deviation of the linear layers whose own name (behind the last dot) is one of
    `WRITERS` is divided by sqrt(N), with N the number of these layers in the model: 2L in a stack of L blocks.
    All other parameters stay as they are, and parameters still require a gradient if they did.

    Args:
        model: any module with nn.Linear in it (or classes derived from it), at any depth, with biases or without.
        scheme: as in `weight_std`.
        generator: the source of the random numbers; None means torch's global one.

    Returns:
        `model` itself.

    Raises:
        ValueError: the scheme is none of the three.
    """
    # YOUR CODE HERE
    # 1. Find the nn.Linear modules by name, and those among them that write to the stream.
    # 2. Each gets its own standard deviation: which of in_features and out_features is fan_in?
    # 3. Tensor.normal_ and zero_ work in place; torch.no_grad() lets them, on parameters. Some layers have no bias.
    raise NotImplementedError("new weights for every linear layer")


# --- Part 4: judging --------------------------------------------------------------------------


def decades_per_layer(grad_rms: Sequence[float]) -> float:
    """Return how many powers of ten the gradient gains with each layer on its way *back*.

    -1 means that every step towards the input divides it by 10; +1 that it multiplies it by 10.

    It is the negative of the median slope (Theil 1950, Sen 1968): the median, over all pairs of layers i < j,
    of (log10 g_j - log10 g_i) / (j - i). Of an even number of slopes it is the mean of the middle two. One odd
    layer does not move it, unlike the line of least squares. Layers whose gradient is exactly 0 have no logarithm:
    pairs with them are left out, and the others keep their positions.

    Args:
        grad_rms: g_0 .. g_{L-1}, finite and not negative, in the order of the forward pass: the layer next to
            the input first.

    Returns:
        The decades per layer; 0.0 if fewer than two layers have a gradient.
    """
    # YOUR CODE HERE
    # 1. The logarithms, to base 10, of those that are not 0, each with its position.
    # 2. A slope for each pair: itertools.combinations. Then statistics.median.
    # 3. The list runs from the input to the output, the gradient the other way.
    raise NotImplementedError("minus the median of all pairwise slopes")


def diagnose(grad_rms: Sequence[float]) -> str:
    """Say what the gradients of a network look like.

    The first line that holds is the answer. "The way back" is L - 1 steps of `decades_per_layer` each.

    - "exploding": some number is infinite or NaN.
    - "vanishing": on the way back the gradient loses 2 decades (a factor of 100) or more.
    - "exploding": on the way back it gains 2 decades or more.
    - "dead": some number is exactly 0: nothing reaches that layer.
    - "healthy".

    Args:
        grad_rms: rms of the gradient at L >= 1 layers, in the order of the forward pass.

    Raises:
        ValueError: the sequence is empty.
    """
    # YOUR CODE HERE
    # Follow the docstring from top to bottom; the order matters.
    # Compare decades, not factors: 10 to a large power overflows.
    raise NotImplementedError("the first line of the docstring that holds")


# --- Part 5: the study ------------------------------------------------------------------------


def transformer_stack(norm: str, depth: int, d_model: int, num_heads: int) -> nn.Sequential:
    """Return `depth` blocks of lab 2.4, causal attention and a feed-forward layer of 4 * d_model features.

    Args:
        norm: "pre" or "post".
        depth: how many blocks.
        d_model: features of the stream.
        num_heads: a divisor of d_model.
    """
    block = solution_of("ch02/lab04")
    cls = {"pre": block.PreNormBlock, "post": block.PostNormBlock}[norm]
    return nn.Sequential(
        *(
            cls(
                block.CausalSelfAttention(d_model, num_heads),
                block.FeedForward(d_model, 4 * d_model),
                d_model,
            )
            for _ in range(depth)
        )
    )


@dataclass(frozen=True)
class Row:
    """One network of a study.

    Attributes:
        label: which kind of network.
        depth: how many blocks.
        output_rms: rms of each block's output, the first block's first.
        grad_rms: rms of the gradient of the loss with respect to each block's output, in the same order.
        verdict: what `diagnose` says of `grad_rms`.
    """

    label: str
    depth: int
    output_rms: tuple[float, ...]
    grad_rms: tuple[float, ...]
    verdict: str


def study(
    builders: Mapping[str, Callable[[int], nn.Sequential]],
    depths: Sequence[int],
    x: Tensor,
    upstream: Tensor,
) -> list[Row]:
    """Measure every kind of network at every depth.

    The loss is the sum of output * upstream, so that `upstream` is its gradient with respect to the output.

    Args:
        builders: for each label a function that takes a depth and returns that many blocks, each of them
            with parameters, in a Sequential. It is called once for each depth.
        depths: at least 1 each.
        x: the input of every network. Not modified.
        upstream: of the shape of the outputs. Not modified.

    Returns:
        One row per network: all depths, as given, of the first label, then of the second, ...
    """
    # YOUR CODE HERE
    # For each label, for each depth: build, watch the blocks (the children of the Sequential, and nothing else),
    # one forward and one backward pass of the loss, one Row.
    raise NotImplementedError("one row per network")


def plot_study(rows: Sequence[Row]) -> Figure:
    """Draw the rows of a study as lines, on a new Figure with two Axes.

    - One Axes has the y label "output rms" and shows `output_rms`; the other has "gradient rms" and shows
      `grad_rms`. The x label of both is "block"; y axes are logarithmic, x axes linear.
    - Each row is one line in each Axes, drawn through the points (1, value of the first block), (2, ...), ... It has
      the label "LABEL, DEPTH blocks", such as "pre-norm, 8 blocks", and one colour in both. Nothing else is drawn.
    - The figure has a legend that names every row: in either Axes, in both, or of the figure.

    Pyplot is left alone: no figure stays open there and `rcParams` keep their values (see lab 1.2).

    Args:
        rows: at least one. Not modified.
    """
    # YOUR CODE HERE
    # 1. A matplotlib.figure.Figure with two Axes; pyplot is not needed.
    # 2. One `plot` per row and Axes. The colours "C0", "C1", ... are matplotlib's.
    # 3. Labels, the logarithmic scale, a legend.
    raise NotImplementedError("one line per row in both axes")
