"""The loop around the optimizers: learning rate, clipping, accumulation, checkpoints.

Sources: Loshchilov and Hutter 2016, "SGDR", arXiv:1608.03983 (the cosine); Goyal et al. 2017,
"Accurate, Large Minibatch SGD", section 2.2, arXiv:1706.02677 (the warm-up); Pascanu et al. 2012, "On the
difficulty of training recurrent neural networks", algorithm 1, arXiv:1211.5063 (clipping by the norm).

A micro-batch is a pair (inputs, targets); the model makes logits of the inputs. Targets that are
`IGNORED` do not count. A loss function returns the *sum* of the losses of the targets that count.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

IGNORED = -100

MicroBatch = tuple[Tensor, Tensor]
LossSum = Callable[[Tensor, Tensor], Tensor]  # (logits, targets) -> sum of the losses, a scalar


class Data(Protocol):
    """Where batches come from, and how far we have got in it."""

    def next_batch(self) -> list[MicroBatch]:
        """Return the next batch, cut into micro-batches."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position: tensors, numbers, strings, and lists, tuples and dictionaries of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned."""


# --- Part 1: before the step ------------------------------------------------------------------


def learning_rate(step: int, *, peak: float, warmup: int, total: int, final: float = 0.0) -> float:
    """Return the learning rate of step number `step`: a straight line up, half a cosine down.

    Args:
        step: 0 for the first update.
        peak: the rate at step `warmup`.
        warmup: how many steps come before that. They rise by the same amount each, from
            peak / (warmup + 1) at step 0, so that no step is wasted on a rate of 0.
        total: the number of steps. From step `warmup` to step `total` the rate falls from `peak` to
            `final` like a cosine from 0 to pi.
        final: the rate at step `total` and at all later ones.

    Raises:
        ValueError: unless 0 <= warmup <= total and step >= 0.
    """
    if not 0 <= warmup <= total or step < 0:
        raise ValueError(f"step {step}, warmup {warmup}, total {total}: need step >= 0, total >= warmup >= 0")
    # YOUR CODE HERE
    # Three cases: the straight line, the cosine, and `final` for ever after.
    # For the cosine: how far is it from the peak to the end, from 0 to 1? What is 1 + cos at both ends?
    # Which cases are left if warmup is 0, or equal to total?
    raise NotImplementedError("warm-up and cosine")


def clip_gradients_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Shorten the gradients, all together, to a norm of at most `max_norm`.

    The norm is that of all entries of all gradients as one long vector. Every gradient is multiplied,
    in place, by min(1, max_norm / (norm + 1e-6)).

    Args:
        parameters: any iterable, also one that can be read only once. Those without a gradient count as 0.
        max_norm: positive.

    Returns:
        the norm before clipping, a scalar tensor; 0 if there is no gradient.

    Raises:
        RuntimeError: the norm is infinite or NaN. The gradients are then as they were.
    """
    # YOUR CODE HERE
    # 1. Collect the gradients that are there. Can `parameters` be read a second time?
    # 2. The norm of all of them as one vector, from the norms of each. Not finite: RuntimeError.
    # 3. Multiply each in place by the same factor, which is never above 1.
    raise NotImplementedError("one norm, one factor, for all gradients")


class Split(NamedTuple):
    """The parameters of a model, by what the optimizers should do with them.

    Attributes:
        matrices: two or more axes, and no embedding. They decay; those with two axes may go to Muon.
        embeddings: weights of `nn.Embedding`. They do not decay: a row has a gradient only when
            its token occurs, so decay would wear away the rows of rare tokens.
        vectors: fewer than two axes, such as biases and the weights of norms. They do not decay.
    """

    matrices: list[nn.Parameter]
    embeddings: list[nn.Parameter]
    vectors: list[nn.Parameter]


def split_parameters(model: nn.Module) -> Split:
    """Return every parameter that requires a gradient, exactly once, in the order of `model.parameters()`.

    A tensor that is an embedding anywhere is an embedding: tied to an output layer, it is in
    `embeddings`, whichever of the two modules comes first.
    """
    # YOUR CODE HERE
    # 1. Find the embeddings: model.modules() and isinstance.
    # 2. Go through model.parameters(), which gives a tied parameter once, and put each into its list.
    #    Compare tensors by identity (`is`, `id`): `==` and `in` compare their entries.
    raise NotImplementedError("matrices, embeddings and vectors")


def accumulate_gradients(model: nn.Module, loss_fn: LossSum, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Add to the gradients those of the mean loss over all micro-batches, as if they were one batch.

    The mean is over all targets that count, wherever they are: a micro-batch with twice as many has
    twice the weight, and one without any has none. One micro-batch after the other goes forward and
    backward, so that the activations of only one are alive at any time. Nor is any graph kept: memory does
    not grow with the number of micro-batches.

    Args:
        model: called once with the inputs of each micro-batch, in order.
        loss_fn: (logits, targets) -> the sum of the losses of the targets that are not IGNORED.
        micro_batches: (inputs, targets), of any sizes.

    Returns:
        the mean loss, a scalar without a graph.

    Raises:
        ValueError: no target counts. The gradients are then as they were.
    """
    # YOUR CODE HERE
    # 1. How many targets count, in all micro-batches together? That is known before any forward.
    # 2. For each micro-batch: forward, the sum of its losses, divided by the count of *all*; backward.
    # 3. What you keep of a loss must not keep its graph: detach.
    raise NotImplementedError("gradients of the mean over all targets")


# --- Part 2: checkpoints ----------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Return the state of every generator that training may draw from.

    They are Python's `random`, NumPy's global one, PyTorch's on the CPU, and its on every CUDA device.
    The result can be saved by `torch.save` and read by `torch.load(..., weights_only=True)`. That takes
    tensors, numbers, strings, None, and lists, tuples and dictionaries of these, but no NumPy array.
    """
    # YOUR CODE HERE
    # random.getstate, np.random.get_state, torch.get_rng_state, torch.cuda.get_rng_state_all if
    # torch.cuda.is_available(). NumPy's is a tuple with an array in it: make that a list or a tensor.
    raise NotImplementedError("the states of four generators")


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every generator into a state that `random_state` returned, on this machine or another.

    States of CUDA devices that this machine does not have are left out.
    """
    # YOUR CODE HERE
    # The counterparts: random.setstate, np.random.set_state, torch.set_rng_state, and
    # torch.cuda.set_rng_state(state, device) for each device that is here.
    raise NotImplementedError("the four states put back")


def save_checkpoint(
    path: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    data: Data,
) -> None:
    """Write all that training needs to go on as if it had never stopped.

    The file is a dictionary: "step", "model", "optimizers" (a list) and "data" are `step` and the
    state dicts, "random" is `random_state()`. `torch.load(path, weights_only=True)` reads it.

    At every moment there is a whole checkpoint at `path`, the old one or the new one: the new one is
    written to another file in the same folder, which then takes the old one's place by a rename.
    If anything fails, the error goes to the caller, the old file is as it was, and nothing else is left
    in the folder. Saving draws no random number and changes none of its arguments.

    Args:
        path: of the checkpoint; its folder exists.
        step: how many steps have been taken.
        model: its parameters and buffers are saved.
        optimizers: their states and options are saved, in this order.
        data: its position is saved.
    """
    # YOUR CODE HERE
    # 1. Put all states into one dictionary.
    # 2. torch.save it to a file with another name in the same folder, then rename: `Path.replace` takes the
    #    old file's place in one stroke.
    # 3. Whatever goes wrong, the partial file must go, and the error must reach the caller.
    raise NotImplementedError("a checkpoint that is whole or not there")


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    data: Data,
) -> int:
    """Put a checkpoint into `model`, `optimizers`, `data` and the random generators.

    The file is loaded with `weights_only=True`: a checkpoint from elsewhere must not run code. It may
    have been saved on a device that this machine does not have.

    Args:
        path: a file written by `save_checkpoint`.
        model: built like the one that was saved, on any device.
        optimizers: of the parameters of `model`, as many as were saved, in the same order.
        data: it goes to the position that was saved.

    Returns:
        how many steps had been taken.

    Raises:
        ValueError: there are more or fewer optimizers than were saved. Nothing has changed then.
    """
    # YOUR CODE HERE
    # 1. torch.load with weights_only=True and map_location="cpu": random states live on the CPU, and
    #    load_state_dict brings parameters and optimizer states to their device.
    # 2. Refuse a wrong number of optimizers before anything is changed.
    # 3. load_state_dict for everyone, the random states, and the step.
    raise NotImplementedError("everything put back, and the step")


# --- Part 3: the loop -------------------------------------------------------------------------


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Give every group `factor` times the learning rate that it was made with.

    That rate is kept in the group, as "peak_lr". So it is in the optimizer's state dict, too.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("peak_lr", group["lr"])


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    loss_fn: LossSum,
    data: Data,
    *,
    steps: int,
    schedule: Callable[[int], float],
    max_norm: float | None = None,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = False,
) -> list[float]:
    """Train until `steps` steps have been taken, those before a checkpoint included.

    Each step, numbered from 0: set the learning rates, draw a batch, compute the gradients of its mean
    loss (and of nothing older), clip all of the model's gradients together, let every optimizer step.

    Args:
        model: put into training mode.
        optimizers: together they have the parameters of the model.
        loss_fn: as in `accumulate_gradients`.
        data: `next_batch` is called once for each step.
        steps: the number of the last step, plus 1.
        schedule: step -> factor, for `set_learning_rates`.
        max_norm: for `clip_gradients_`; None does not clip.
        checkpoint: where to save after the last step, and after every `save_every` steps: steps
            number save_every, 2 save_every, ..., counted from the very first one. None saves nothing.
        save_every: None saves after the last step only.
        resume: first load `checkpoint`, then go on with the first step that is not in it. The result
            is then, bit for bit, the same as without the interruption.

    Returns:
        the mean loss of each step taken by this call, before the step changed the parameters.

    Raises:
        ValueError: `resume` or `save_every` without a `checkpoint`.
    """
    if checkpoint is None and (resume or save_every is not None):
        raise ValueError("resume and save_every need a checkpoint")
    # YOUR CODE HERE
    # 1. With `resume`, load; the first step is then the number of steps taken. Training mode.
    # 2. For each step: learning rates, no old gradients, next batch, clip, all optimizers.
    # 3. Save when it is time: with the number of steps *taken*, and after the optimizers have moved.
    raise NotImplementedError("the loop")
