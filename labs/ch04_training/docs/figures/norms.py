"""Figure of lecture 2: gradients at every block of transformers with pre-norm, with post-norm, and without norms."""

import numpy as np
import torch
from matplotlib.figure import Figure
from shared.earlier import solution_of
from shared.figures import BLUE, INK, PINK, VERMILION, panels, publish
from torch import Tensor, nn

DEPTH, E, HEADS, TOKENS, SEEDS = 32, 64, 4, 32, 8


class Bare(nn.Module):
    """A block with shortcuts and without any norm."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block.attention(x)
        return x + self.block.feed_forward(x)


def measure(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rms of each block's output and of the gradient there, (DEPTH,) both, over all seeds."""
    lab = solution_of("ch04/lab02")
    squares = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = lab.transformer_stack("post" if kind == "post" else "pre", DEPTH, E, HEADS).double()
        lab.init_(model, "xavier", generator=generator)
        if kind == "bare":
            model = nn.Sequential(*(Bare(block) for block in model))
        x, upstream = (torch.randn(2, TOKENS, E, generator=generator, dtype=torch.float64) for _ in range(2))
        (row,) = lab.study({kind: lambda depth, model=model: model}, [DEPTH], x, upstream)
        squares.append([np.square(row.output_rms), np.square(row.grad_rms)])
    # The geometric mean: single networks lie above and below by about the same factor.
    output, grad = np.exp(np.log(squares).mean(axis=0) / 2)
    return output, grad


def draw() -> Figure:
    torch.set_num_threads(1)
    figure, [axes] = panels(height=3.4)
    blocks = np.arange(1, DEPTH + 1)
    for kind, name, colour, x, y in (
        ("pre", "pre-norm", BLUE, 4, 4.5),
        ("post", "post-norm", VERMILION, 4, 0.35),
        ("bare", "no norm", PINK, 9, 1e2),
    ):
        output, grad = measure(kind)
        axes.plot(blocks, grad / grad[-1], "o", color=colour, markersize=4.5)
        axes.text(x, y, name, color=colour)
        if kind == "pre":
            axes.plot(blocks, output[-1] / output, color=INK, linewidth=1.2)
    axes.set(yscale="log", xlabel="block", ylabel="gradient rms / that at the last block")
    axes.set_xticks((1, 8, 16, 24, 32))
    return figure


if __name__ == "__main__":
    publish(draw, __file__)
