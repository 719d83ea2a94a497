"""Figure of lecture 1: bytes alive during one forward and one backward pass, for three ways to the same loss."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from shared.figures import BLUE, GREEN, INK, VERMILION, panels, publish
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

N, V, E, CHUNK = 1024, 1000, 16, 64
ALL_LOGITS = N * V * 4


class Alive(TorchDispatchMode):
    """Writes down, after every operation, the bytes of all tensors made so far that are still alive."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given}
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}
        self.history: list[int] = [0]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.given:
                self.sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.sizes = {key: entry for key, entry in self.sizes.items() if not entry[0].expired()}
        self.history.append(sum(size for _, size in self.sizes.values()))
        return result


def at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets)


def loop(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.stack([F.cross_entropy(h @ weight.T, t, reduction="sum") for h, t in chunks]).sum() / N


class Chunked(torch.autograd.Function):
    """The lab's idea without its options: the gradients are known on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total, by_hidden, by_weight = torch.zeros(()), torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, N, CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = F.log_softmax(hidden[rows] @ weight.T, dim=-1)
            total -= log_p.gather(-1, targets[rows, None]).sum()
            gradient = log_p.exp_().scatter_add_(-1, targets[rows, None], -torch.ones(CHUNK, 1))
            by_hidden[rows] = gradient @ weight
            by_weight += gradient.T @ hidden[rows]
        ctx.save_for_backward(by_hidden / N, by_weight / N)
        return total / N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * upstream, by_weight * upstream, None


def history(loss: Callable[..., Tensor]) -> tuple[list[float], float]:
    """Return the bytes alive over the operations, in units of all logits, and where the backward pass starts."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, E, requires_grad=True), torch.randn(V, E, requires_grad=True)
    targets = torch.randint(V, (N,))
    with Alive(hidden, weight, targets) as alive:
        value = loss(hidden, weight, targets)
        turn = len(alive.history)
        grads = torch.autograd.grad(value, (hidden, weight))
        del grads
    sizes = alive.history
    return [size / ALL_LOGITS for size in sizes], turn / len(sizes)


def draw() -> Figure:
    figure, axes = panels(3, height=2.9)
    ways = (
        ("all at once", at_once, VERMILION),
        ("a loop under autograd", loop, BLUE),
        ("gradients on the way forward", Chunked.apply, GREEN),
    )
    for panel, (title, loss, colour) in zip(axes, ways, strict=True):
        sizes, turn = history(loss)
        x = [i / (len(sizes) - 1) for i in range(len(sizes))]
        panel.fill_between(x, sizes, step="post", color=colour, alpha=0.85, linewidth=0)
        panel.axhline(1, color=INK, linewidth=0.8, linestyle=":")
        panel.axvline(turn, color=INK, linewidth=0.8, linestyle="--")
        panel.text(turn - 0.02, 3.3, "forward", ha="right", color=INK, fontsize=9)
        panel.text(turn + 0.02, 3.3, "back", ha="left", color=INK, fontsize=9)
        panel.text(0.02, 2.75, f"peak {max(sizes):.2f}", color=colour, fontsize=10.5)
        panel.set_title(title, fontsize=10)
        panel.set(xlim=(0, 1), ylim=(0, 3.6), xticks=[], yticks=[0, 1, 2, 3], xlabel="operations")
    axes[0].set_ylabel("bytes alive / all logits")
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
