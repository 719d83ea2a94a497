"""Gradients across the processes: each side keeps the graphs of what it computed and is asked for their gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared.apart.wire import Encoder

Backward = Callable[[Sequence[torch.Tensor | None]], list[torch.Tensor | None]]


class _Attached(torch.autograd.Function):
    """Puts tensors that the other side computed into the graph of what it computed them from."""

    @staticmethod
    def forward(ctx: Any, backward: Backward, outputs: list[torch.Tensor], *inputs: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.ask = backward
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        return (None, None, *ctx.ask(gradients))


@functools.lru_cache(maxsize=256)
def _class(made_by: str) -> Any:
    name = made_by.removesuffix("Backward")
    return type(name, (_Attached,), {}) if name.isidentifier() and len(name) < 80 else _Attached


def attach(
    backward: Backward, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], made_by: str = ""
) -> tuple[torch.Tensor, ...]:
    """Return `outputs` with gradients.

    Args:
        backward: given the outputs' gradients (None for zero) returns those of the inputs.
        outputs: what the other side computed.
        inputs: what from.
        made_by: name of the `grad_fn` on the other side, which the one here takes over.
    """
    detached = [t.detach() for t in outputs]
    attached: tuple[torch.Tensor, ...] = _class(made_by).apply(backward, detached, *inputs)
    return attached


def gradients(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor | None],
    encoder: Encoder,
) -> list[Any]:
    """Return the encoded gradients of `inputs`, given those of `outputs`."""
    wanted = [(o, g) for o, g in zip(outputs, given, strict=True) if g is not None]
    with torch.enable_grad():
        found = torch.autograd.grad(
            [o for o, _ in wanted], inputs, [g for _, g in wanted], allow_unused=True, retain_graph=True
        )
    return [encoder(None if g is None else g.detach()) for g in found]
