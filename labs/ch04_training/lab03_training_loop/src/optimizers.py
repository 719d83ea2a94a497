"""Two optimizers: AdamW, and Muon for the matrices of a network.

Sources: Kingma and Ba 2014, "Adam: A Method for Stochastic Optimization", algorithm 1, arXiv:1412.6980;
Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", algorithm 2, arXiv:1711.05101 (AdamW);
Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", kellerjordan.github.io;
Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2, arXiv:2502.16982 ("match_rms_adamw").

A step changes the parameters in place. It reads their gradients, of any memory layout, and leaves them
as they are.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# What `params` may be: parameters, or groups {"params": [...], "lr": ...} with options of their own.
Params = Iterable[Tensor] | Iterable[dict[str, Any]]

# --- Part 1: AdamW ----------------------------------------------------------------------------


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    Everything that a step remembers is in `self.state[parameter]`, a dictionary that is empty at first.
    So `state_dict()` and `load_state_dict()`, which every optimizer inherits, save and restore all of it.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """Remember the parameters and the options of each group.

        Args:
            params: parameters, or groups of them; a group may have its own value of any option.
            lr: the learning rate.
            betas: decay of the running means of the gradient and of its square, each in [0, 1).
            eps: added to the root in the denominator.
            weight_decay: share of the parameter that a step with lr = 1 takes away.

        Raises:
            ValueError: an option is out of range.
        """
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr {lr}, eps {eps} and weight_decay {weight_decay} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {betas} must be at least 0 and below 1")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient.

        With g the gradient, p the parameter, t = 1, 2, ... the number of steps *this parameter* has
        taken, and m = v = 0 before the first:

            m = beta1 m + (1 - beta1) g               v = beta2 v + (1 - beta2) g^2
            m_hat = m / (1 - beta1^t)                 v_hat = v / (1 - beta2^t)
            p = p - lr weight_decay p - lr m_hat / (sqrt(v_hat) + eps)

        The p on the right-hand side is the one before the step. Options are those of the parameter's
        group, as they stand now. A parameter whose gradient is None is left alone: it does not decay,
        and its t does not count. m and v have the dtype and device of the parameter.
        """
        # YOUR CODE HERE
        # For each group, for each of its parameters that has a gradient:
        # 1. Fetch its state. If that is still empty, put t = 0 and two tensors of zeros into it.
        # 2. Update t, m and v, the tensors in place, so that the next step finds them.
        # 3. Correct m and v for their start at 0, then change p in place. Where does eps stand?
        raise NotImplementedError("AdamW's step")


# --- Part 2: Muon -----------------------------------------------------------------------------

# The polynomial a x + b x^3 + c x^5 that is applied to every singular value, five times.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7


def newton_schulz(G: Tensor, steps: int = 5, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a matrix with the singular vectors of G, and singular values near 1.

        X = G / max(|G|, 1e-7)                                  |G| = sqrt of the sum of all squares
        `steps` times:  X = a X + b (X X^T) X + c (X X^T)^2 X   a, b, c = NS_COEFFICIENTS

    After five steps a singular value that was above 0.003 |G| lies between 0.68 and 1.21. A tall G is
    iterated as its transpose, so that no matrix on the way has more entries than G.

    Args:
        G: (m, n), of any memory layout: wide, tall or square. It is not modified, whatever its dtype.
        steps: how often the polynomial is applied; 0 only divides by the norm.
        dtype: of all the arithmetic. It starts with rounding G to it.

    Returns:
        (m, n), of the dtype of G. Zeros if G is zero.

    Raises:
        ValueError: G is not a matrix.
    """
    if G.dim() != 2:
        raise ValueError(f"Newton-Schulz needs a matrix, not a tensor of shape {tuple(G.shape)}")
    # YOUR CODE HERE
    # 1. To `dtype`, then divide by the norm, but never by less than NS_EPS. If G has that dtype
    #    already, `G.to(dtype)` *is* G: whose numbers does an in-place division change then?
    # 2. X X^T is (m, m). For a tall G work on its transpose, which has the smaller square.
    # 3. Iterate, transpose back, and return the dtype of G.
    raise NotImplementedError("the polynomial of the singular values, `steps` times")


def adjusted_lr(lr: float, shape: Sequence[int], rule: str) -> float:
    """Return the learning rate for a matrix whose update has singular values near 1.

    Args:
        lr: the learning rate of the group.
        shape: (m, n) of the parameter, as nn.Linear stores it: m outputs, n inputs.
        rule: "original": lr sqrt(max(1, m / n)). "match_rms_adamw": 0.2 lr sqrt(max(m, n)).

    Raises:
        ValueError: there is no such rule.
    """
    # YOUR CODE HERE
    # One line for each rule; any other rule is a ValueError.
    # Which of the two numbers of `shape` counts the outputs?
    raise NotImplementedError("the learning rate, adjusted to the shape")


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton and Schulz: for matrices only.

    What a step remembers is in `self.state[parameter]`, as in `AdamW`.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        ns_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Remember the parameters and the options of each group.

        Args:
            params: matrices, or groups of them; a group may have its own value of any option.
            lr: the learning rate, before `adjusted_lr`.
            momentum: decay of the running mean of the gradient, in [0, 1).
            weight_decay: share of the parameter that a step with lr = 1 takes away.
            nesterov: look one step ahead, see `step`.
            ns_steps: steps of `newton_schulz`.
            adjust_lr: the rule for `adjusted_lr`.
            ns_dtype: dtype of the arithmetic of `newton_schulz`.

        Raises:
            ValueError: a parameter is not a matrix, or an option is out of range.
        """
        if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"lr {lr} and weight_decay {weight_decay} must not be negative, momentum {momentum} in [0, 1)"
            )
        adjusted_lr(lr, (1, 1), adjust_lr)  # refuses an unknown rule
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(
            params, options | {"ns_steps": ns_steps, "adjust_lr": adjust_lr, "ns_dtype": ns_dtype}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices; the constructor calls this for each of its groups.

        Raises:
            ValueError: a parameter is not a matrix.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.dim() != 2:
                self.param_groups.pop()
                raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter that has a gradient.

        With g the gradient, p the parameter, mu the momentum, and B = 0 before the first step:

            B = mu B + (1 - mu) g
            U = mu B + (1 - mu) g  if nesterov, with the new B;  else U = B
            p = p - lr weight_decay p - adjusted_lr(lr, ...) newton_schulz(U)

        The p on the right-hand side is the one before the step. Options are those of the parameter's
        group, as they stand now. A parameter whose gradient is None is left alone. B has the dtype
        and device of the parameter.
        """
        # YOUR CODE HERE
        # For each group, for each of its parameters that has a gradient:
        # 1. Update B, in place, in its state.
        # 2. U is a new tensor or B itself; p.grad stays as it is.
        # 3. newton_schulz with the group's ns_steps and ns_dtype. Then decay and move p, in place. Which of
        #    the two learning rates is for which?
        raise NotImplementedError("Muon's step")
