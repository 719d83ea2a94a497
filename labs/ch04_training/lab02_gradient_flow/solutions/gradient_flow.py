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
    x = tensor.detach().double()
    return TensorStats(
        mean=x.mean().item(),
        std=x.std(correction=0).item(),
        rms=x.square().mean().sqrt().item(),
        max_abs=x.abs().max().item(),
        zeros=(x == 0).double().mean().item(),
    )


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
        self.calls = []

        def watch(name: str, module: nn.Module) -> None:
            def after_forward(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple | list) and output else output
                if not isinstance(first, Tensor) or not first.is_floating_point():
                    return
                call = Call(name, summarize(first))
                self.calls.append(call)

                def on_gradient(grad: Tensor) -> None:
                    # It closes over the call's numbers, never over `first`: the graph owns this function,
                    # and would keep itself alive.
                    call.grad_rms = summarize(grad).rms

                if first.requires_grad:
                    self._handles.append(first.register_hook(on_gradient))

            self._handles.append(module.register_forward_hook(after_forward))

        for name, module in self.modules.items():
            watch(name, module)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove every hook this recorder has set, on modules and on tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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
    found = {}
    for name, parameter in model.named_parameters():
        weight = summarize(parameter).rms
        grad = None if parameter.grad is None else summarize(parameter.grad).rms
        ratio = None if grad is None else grad / weight if weight else math.inf
        found[name] = ParameterStats(weight, grad, ratio)
    return found


# --- Part 2: predicting -----------------------------------------------------------------------


def kept_share(activation: str) -> float:
    """Return E[f(y)²] / E[y²] for a y that is distributed symmetrically around 0, and never exactly 0.

    For both activations it is also E[f'(y)²]: the share of a mean square that survives, forward or backward.

    Args:
        activation: "linear" (no activation) or "relu".

    Raises:
        ValueError: any other activation.
    """
    shares = {"linear": 1.0, "relu": 0.5}
    if activation not in shares:
        raise ValueError(f"activation must be 'linear' or 'relu', not {activation!r}")
    return shares[activation]


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
    if len(stds) != len(widths) - 1:
        raise ValueError(f"{len(stds)} standard deviations for {len(widths) - 1} layers")
    share = kept_share(activation)
    moments, moment = [], 1.0  # of what the layer reads
    for fan_in, std in zip(widths[:-1], stds, strict=True):
        moments.append(fan_in * std**2 * moment)  # a sum of fan_in products
        moment = share * moments[-1]
    return moments


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
    if len(stds) != len(widths) - 1:
        raise ValueError(f"{len(stds)} standard deviations for {len(widths) - 1} layers")
    share = kept_share(activation)
    moments = [1.0]
    for fan_out, std in zip(reversed(widths[2:]), reversed(stds[1:]), strict=True):
        moments.append(share * fan_out * std**2 * moments[-1])  # y_l is read by fan_out sums
    return moments[::-1]


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
    added = written / (2 * num_blocks) if scaled and num_blocks else written
    return [1.0 + n * added for n in range(2 * num_blocks + 1)]


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
    if scheme == "xavier":
        return math.sqrt(2 / (fan_in + fan_out))
    if scheme == "he":
        return math.sqrt(2 / fan_in)
    if scheme == "gpt2":
        return 0.02
    raise ValueError(f"scheme must be 'xavier', 'he' or 'gpt2', not {scheme!r}")


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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    writers = [name for name in layers if name.rpartition(".")[2] in WRITERS]
    for name, layer in layers.items():
        std = weight_std(scheme, layer.in_features, layer.out_features)
        if scheme == "gpt2" and name in writers:
            std /= math.sqrt(len(writers))
        with torch.no_grad():
            layer.weight.normal_(0.0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    return model


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
    logs = [(i, math.log10(g)) for i, g in enumerate(grad_rms) if g > 0]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(logs, 2)]
    return -statistics.median(slopes) if slopes else 0.0


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
    if not grad_rms:
        raise ValueError("no layers, no diagnosis")
    if not all(math.isfinite(g) for g in grad_rms):
        return "exploding"
    decades = (len(grad_rms) - 1) * decades_per_layer(grad_rms)
    if decades <= -2:
        return "vanishing"
    if decades >= 2:
        return "exploding"
    return "dead" if 0 in grad_rms else "healthy"


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
    rows = []
    for label, build in builders.items():
        for depth in depths:
            model = build(depth)
            with Recorder(model, [name for name, _ in model.named_children()]) as recorder:
                (model(x) * upstream).sum().backward()
            output_rms = tuple(call.output.rms for call in recorder.calls)
            grad_rms = tuple(call.grad_rms for call in recorder.calls)
            rows.append(Row(label, depth, output_rms, grad_rms, diagnose(grad_rms)))
    return rows


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
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        for axes, values in ((left, row.output_rms), (right, row.grad_rms)):
            label = f"{row.label}, {row.depth} blocks"
            axes.plot(range(1, row.depth + 1), values, color=f"C{i}", marker=".", label=label)
    for axes, name in ((left, "output rms"), (right, "gradient rms")):
        axes.set(xlabel="block", ylabel=name, yscale="log")
    right.legend()
    return figure
