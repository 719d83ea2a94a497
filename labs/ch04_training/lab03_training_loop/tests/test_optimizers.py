"""Tests of ch04/lab03, optimizers. Oracles: torch.optim step by step, closed forms, and the SVD."""

import io
import math

import pytest
import torch
from optimizers import AdamW, Muon, adjusted_lr, newton_schulz
from shared.compare import assert_close
from torch import nn
from torch.optim import _muon
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import TorchDispatchMode

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.Muon,
        adam,
        adamw,
        _muon.muon,
        _muon._single_tensor_muon,
        _muon._zeropower_via_newtonschulz,
        "_fused_adam*",
        why="write the step out: running means, corrections, and the change of the parameter",
    )
    forbid(
        "*svd*", "*eigh*", "*linalg_qr*", "*polar*", why="Muon needs matrix products only, no decomposition"
    )


# --- what the tests are made of ---------------------------------------------------------------

SHAPES = [(5, 3), (7,), (), (2, 3, 4)]
MATRICES = [(5, 3), (4, 7), (6, 6), (1, 5), (3, 1)]


def strided(values):
    """The same numbers, in every second place of a larger tensor, its axes in reverse order."""
    axes = tuple(reversed(range(values.dim())))
    return torch.stack([values.permute(axes), values.permute(axes) + 77], dim=-1)[..., 0].permute(axes)


def normal(randn, shape, **options):
    return randn(*shape, 1, **options)[..., 0]  # randn() of no size at all is no tensor


def parameters(randn, shapes, dtype=torch.float64, device="cpu"):
    """Two equal lists of parameters: for ours and for the oracle."""
    values = [1.5 * normal(randn, shape, dtype=dtype, device=device) for shape in shapes]
    return tuple([nn.Parameter(v.clone()) for v in values] for _ in range(2))


def set_gradients(lists, gradients):
    """Give every parameter a copy of its gradient, some of them strided."""
    for params in lists:
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            p.grad = None if g is None else strided(g) if i % 2 else g.clone()


def random_gradients(randn, shapes, step, dtype=torch.float64, device="cpu"):
    """Gradients whose size changes from step to step, between 0.01 and 10."""
    return [10.0 ** (step * 7 % 4 - 2) * normal(randn, shape, dtype=dtype, device=device) for shape in shapes]


def assert_same(ours, theirs, *, atol, step, hint, rtol=0.0):
    for p, q in zip(ours, theirs, strict=True):
        name = f"the parameter of shape {tuple(p.shape)} after step {step}"
        assert p.dtype == q.dtype, f"{name} is {p.dtype}"
        assert_close(p, q, atol=atol, rtol=rtol, name=name, hint=hint)


def follow(ours, theirs, params, references, randn, *, steps, hint, atol, dtype=torch.float64, device="cpu"):
    """Take the same steps with both optimizers and compare every parameter after each."""
    shapes = [tuple(p.shape) for p in params]
    for step in range(1, steps + 1):
        set_gradients((params, references), random_gradients(randn, shapes, step, dtype, device))
        ours.step()
        theirs.step()
        assert_same(params, references, atol=atol, step=step, hint=hint)


class Dispatched(TorchDispatchMode):
    """Remembers every floating result that was computed, and the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.entries, self.product_dtypes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.entries = max(self.entries, result.numel())
            if func.__name__.split(".")[0] in ("mm", "addmm", "bmm", "baddbmm", "matmul"):
                self.product_dtypes.add(result.dtype)
        return result


def reload(state):
    """A state dict, written to a file and read again."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- AdamW ------------------------------------------------------------------------------------

ADAMW = [
    {},
    {"lr": 0.1, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 0.4},
    {"lr": 0.03, "betas": (0.95, 0.8), "weight_decay": 0.0},
    {"lr": 0.03, "betas": (0.0, 0.9), "eps": 0.3},
    {"lr": 0.03, "betas": (0.6, 0.0), "weight_decay": 3.0},
]


@pytest.mark.parametrize(
    "options", ADAMW, ids=["defaults", "all_options", "no_decay", "no_mean", "no_square"]
)
def test_adamw_matches_torch_after_every_step(randn, options):
    params, references = parameters(randn, SHAPES)
    ours, theirs = AdamW(params, **options), torch.optim.AdamW(references, **options)
    hint = "compare with the four formulas of the docstring, one after the other"
    follow(ours, theirs, params, references, randn, steps=12, hint=hint, atol=1e-12)


def test_adamw_takes_its_options_in_the_order_of_torch(randn):
    params, references = parameters(randn, SHAPES)
    options = 0.1, (0.7, 0.95), 1e-3, 0.4
    ours, theirs = AdamW(iter(params), *options), torch.optim.AdamW(references, *options)
    hint = "lr, betas, eps, weight_decay"
    follow(ours, theirs, params, references, randn, steps=3, hint=hint, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"lr": 0.01, "weight_decay": 0.4}], ids=["defaults", "options"])
def test_adamw_in_float32_stays_close_to_torch(randn, options, device):
    params, references = parameters(randn, SHAPES, torch.float32, device)
    ours, theirs = AdamW(params, **options), torch.optim.AdamW(references, **options)
    hint = "m, v and p stay in the dtype and on the device of the parameter"
    dtype = torch.float32
    follow(
        ours, theirs, params, references, randn, steps=20, hint=hint, atol=1.5e-5, dtype=dtype, device=device
    )


def test_adamw_first_step_has_the_size_of_lr(randn):
    # m_hat = g and v_hat = g^2 whatever the betas: the size of the gradient does not matter.
    (p,), _ = parameters(randn, [(4, 3)])
    before, g = p.detach().clone(), 10.0 ** torch.arange(-6, 6).double().view(4, 3)
    g[::2] *= -1
    p.grad = g.clone()
    AdamW([p], lr=0.01, weight_decay=0.0, eps=1e-15).step()
    hint = "at t = 1 the corrections 1 - beta^t undo the factors 1 - beta: is t counted from 1?"
    assert_close(p, before - 0.01 * g.sign(), atol=1e-10, name="the parameter", hint=hint)


def test_adamw_eps_is_added_to_the_corrected_root(randn):
    # With a constant gradient m_hat = g and v_hat = g^2 at every step.
    (p,), _ = parameters(randn, [(4, 3)])
    g, expected = 0.1 * randn(4, 3), p.detach().clone()
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, eps=0.05)
    hint = "the denominator is sqrt(v_hat) + eps: not sqrt(v_hat + eps), nor sqrt(v) + eps"
    for step in range(1, 8):
        p.grad = g.clone()
        optimizer.step()
        expected -= 0.1 * g / (g.abs() + 0.05)
        assert_close(p, expected, atol=1e-12, name=f"the parameter after step {step}", hint=hint)


def test_adamw_decay_does_not_pass_through_the_means(randn):
    # Without a gradient's pull a parameter shrinks by the same factor each step.
    (p,), _ = parameters(randn, [(4, 3)])
    expected = p.detach().clone()
    optimizer = AdamW([p], lr=0.1, weight_decay=0.5)
    hint = "decoupled: p itself is multiplied by 1 - lr weight_decay; the decay is not added to the gradient"
    for step in range(1, 5):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        expected *= 1 - 0.1 * 0.5
        assert_close(p, expected, atol=1e-13, name=f"the parameter after step {step}", hint=hint)


def test_adamw_decay_takes_its_share_of_the_old_parameter():
    # With lr = weight_decay = 1 nothing is left of the old parameter, only the move by -lr.
    p = nn.Parameter(torch.tensor([3.0, -8.0], dtype=torch.float64))
    p.grad = torch.tensor([2.0, -5.0], dtype=torch.float64)
    AdamW([p], lr=1.0, weight_decay=1.0, eps=0.0).step()
    hint = "lr weight_decay p is taken from the parameter as it was *before* the step"
    assert_close(p, torch.tensor([-1.0, 1.0]).double(), atol=1e-12, name="the parameter", hint=hint)


def test_adamw_groups_have_options_of_their_own(randn):
    params, references = parameters(randn, SHAPES)

    def grouped(p):
        return [
            {"params": p[:1], "lr": 0.2, "weight_decay": 0.7},
            {"params": p[1:2], "betas": (0.5, 0.6)},
            {"params": p[2:], "eps": 0.2, "weight_decay": 0.0},
        ]

    ours, theirs = AdamW(grouped(params), lr=0.05), torch.optim.AdamW(grouped(references), lr=0.05)
    hint = "every option comes from the parameter's group"
    follow(ours, theirs, params, references, randn, steps=6, hint=hint, atol=1e-12)


def test_adamw_options_may_change_between_steps(randn):
    # This is what a schedule does.
    params, references = parameters(randn, SHAPES)
    ours, theirs = AdamW(params), torch.optim.AdamW(references)
    for step in range(1, 7):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(
                lr=0.1 / step, weight_decay=0.1 * step, betas=(0.9, 0.9 + step / 99)
            )
        set_gradients((params, references), random_gradients(randn, SHAPES, step))
        ours.step()
        theirs.step()
        hint = "read the options from the group at every step"
        assert_same(params, references, atol=1e-12, step=step, hint=hint)


def test_adamw_leaves_parameters_without_gradient_alone(randn):
    # The first parameter never has a gradient, the second in steps 4, 5, 7 and 8 only.
    params, references = parameters(randn, [(2, 5), (4,), (3, 2)])
    untouched = params[0].detach().clone()
    ours = AdamW(params, lr=0.1, weight_decay=0.5)
    theirs = torch.optim.AdamW(references, lr=0.1, weight_decay=0.5)
    for step in range(1, 9):
        g = random_gradients(randn, [(3, 2), (4,)], step)
        set_gradients((params, references), [None, g[1] if step in (4, 5, 7, 8) else None, g[0]])
        ours.step()
        theirs.step()
        hint = "no gradient: no decay, and the t of this parameter does not count the step"
        assert_same(params, references, atol=1e-12, step=step, hint=hint)
    assert torch.equal(params[0], untouched), "a parameter that never had a gradient has changed"


def test_adamw_state_is_in_its_state_dict(randn):
    params, copies = parameters(randn, SHAPES)
    options = {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.3}
    check_resume(AdamW(params, **options), params, copies, lambda p: AdamW(p), SHAPES, randn)


def check_state(make, randn):
    parameter = nn.Parameter(randn(2, 3).bfloat16())
    parameter.grad = torch.ones_like(parameter)
    optimizer = make([parameter])
    assert optimizer.state_dict()["state"] == {}, "the state is empty before the first step"
    optimizer.step()
    found = {x.dtype for x in optimizer.state[parameter].values() if torch.is_tensor(x) and x.dim()}
    assert found == {torch.bfloat16}, f"the parameter is in bfloat16, its state in {found}"


def test_adamw_state_is_in_the_dtype_of_the_parameter(randn):
    check_state(AdamW, randn)


def check_resume(optimizer, params, copies, make, shapes, randn):
    """Save after three steps; a new optimizer of the copies must go on exactly like the first."""
    for step in range(1, 8):
        if step == 4:
            with torch.no_grad():
                for p, q in zip(params, copies, strict=True):
                    q.copy_(p)
            copy = make(copies)
            copy.load_state_dict(reload(optimizer.state_dict()))
        gradients = random_gradients(randn, shapes, step)
        set_gradients((params, copies), gradients)
        optimizer.step()
        if step >= 4:
            copy.step()
            for p, q in zip(params, copies, strict=True):
                assert torch.equal(p, q), (
                    f"step {step}: an optimizer loaded after step 3 goes another way. "
                    "Is everything it remembers in self.state[parameter]?"
                )


def check_instances(make, shape, randn):
    """Two optimizers that step in turn must do what each does alone."""
    (p, q), (p_alone, q_alone) = parameters(randn, [shape] * 2)
    first, second = make([p]), make([q])
    alone = make([p_alone])
    later = None
    for step in range(1, 5):
        g = random_gradients(randn, [shape] * 2, step)
        set_gradients(([p, q], [p_alone, q_alone]), g)
        first.step()
        second.step()
        alone.step()
        later = later or make([q_alone])
        later.step()
    assert torch.equal(p, p_alone), "two optimizers disturb each other"
    assert torch.equal(q, q_alone), "two optimizers disturb each other"


def test_adamw_instances_do_not_share_anything(randn):
    check_instances(lambda p: AdamW(p, lr=0.1), (3, 2), randn)


def check_gradients_kept(make, shapes, randn):
    params, _ = parameters(randn, shapes)
    optimizer = make(params)
    for step in range(1, 4):
        gradients = random_gradients(randn, shapes, step)
        set_gradients([params], gradients)
        held = [p.grad for p in params]
        optimizer.step()
        for p, g, grad in zip(params, gradients, held, strict=True):
            assert p.grad is grad, "step has replaced a gradient"
            assert torch.equal(grad, g), "step has changed a gradient: it belongs to the caller"
            assert p.is_leaf, "step must not be recorded by autograd"
            assert p.requires_grad, "a parameter still needs gradients after the step"


def test_adamw_leaves_gradients_as_they_are(randn):
    check_gradients_kept(lambda p: AdamW(p, lr=0.1, weight_decay=0.5), SHAPES, randn)


@pytest.mark.parametrize(
    "options",
    [{"lr": -0.1}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}],
    ids=["lr", "eps", "weight_decay", "beta1", "beta2"],
)
def test_adamw_refuses_options_out_of_range(randn, options):
    params, _ = parameters(randn, [(3,)])
    check_gradients_kept(
        lambda p: AdamW(p, lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0), [(3,)], randn
    )
    with pytest.raises(ValueError, match=r"\d"):
        AdamW(params, **options)


def test_adamw_steps_of_size_zero_count(randn):
    ours, theirs = parameters(randn, SHAPES)
    pair = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(4):
        for optimizer in pair:
            optimizer.param_groups[0]["lr"] = 0.1 * (step % 2)
        set_gradients((ours, theirs), random_gradients(randn, SHAPES, step))
        for optimizer in pair:
            optimizer.step()
        assert_same(ours, theirs, atol=1e-12, step=step, hint="with a rate of 0 the means still move, and t")


# --- Newton-Schulz ----------------------------------------------------------------------------


def by_svd(G, steps):
    """The definition: the polynomial, applied to each singular value in float64."""
    a, b, c = COEFFICIENTS
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    x = S / S.square().sum().sqrt().clamp(min=1e-7)
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return U * x @ Vh


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 8])
@pytest.mark.parametrize(("m", "n"), [(3, 7), (9, 4), (5, 5), (1, 6), (6, 1), (1, 1)])
def test_newton_schulz_applies_the_polynomial_to_singular_values(randn, m, n, steps):
    G = randn(m, n)
    hint = "X becomes a X + b (X X^T) X + c (X X^T)^2 X, `steps` times, from G divided by its norm"
    result = newton_schulz(G, steps, dtype=torch.float64)
    assert_close(result, by_svd(G, steps), atol=1e-11, name="newton_schulz(G)", hint=hint)


def test_newton_schulz_takes_five_steps_unless_told(randn):
    G = randn(4, 6)
    result = newton_schulz(G, dtype=torch.float64)
    assert_close(result, by_svd(G, 5), atol=1e-11, name="newton_schulz(G)", hint="steps is 5 by default")


@pytest.mark.parametrize("scale", [1e-5, 1e6, 1e-7, 1e-9])
@pytest.mark.parametrize(("m", "n"), [(4, 7), (8, 3)])
def test_newton_schulz_does_not_depend_on_the_size_of_its_input(randn, m, n, scale):
    # Below a norm of 1e-7 it does: then it is divided by 1e-7.
    G = randn(m, n)
    G *= scale / G.norm()
    result = newton_schulz(G, dtype=torch.float64)
    hint = "divide by max(|G|, 1e-7), with |G| the root of the sum of all squares"
    assert_close(result, by_svd(G, 5), atol=1e-11, name="newton_schulz(G)", hint=hint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_schulz_of_zero_is_zero(dtype):
    for shape in ((3, 5), (5, 3)):
        result = newton_schulz(torch.zeros(shape), dtype=dtype)
        assert_close(result, torch.zeros(shape), atol=0, name="newton_schulz(0)", hint="0 / 0 is NaN")


def test_newton_schulz_brings_singular_values_near_one(randn):
    # Singular values between 1 and 40: equal they never become, but near 1.
    U, _ = torch.linalg.qr(randn(20, 9))
    V, _ = torch.linalg.qr(randn(30, 9))
    G = (U * torch.linspace(1, 40, 9).double()) @ V.T
    values = torch.linalg.svdvals(newton_schulz(G, dtype=torch.float64))[:9]
    assert values.min() > 0.68, f"the smallest singular value is {values.min():.3f}"
    assert values.max() < 1.21, f"the largest singular value is {values.max():.3f}"


@pytest.mark.parametrize(("m", "n"), [(16, 40), (48, 20), (32, 32)])
def test_newton_schulz_is_the_one_of_torch(randn, m, n, device):
    # In bfloat16 another order of the operations moves the result by some percent.
    G = randn(m, n, dtype=torch.float32, device=device)
    theirs = _muon._zeropower_via_newtonschulz(G.clone(), COEFFICIENTS, 5, 1e-7).float()
    result = newton_schulz(G)
    error = ((result - theirs).norm() / theirs.norm()).item()
    assert error < 0.2, f"newton_schulz(G) differs from torch.optim.Muon's by {error:.0%}"


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_newton_schulz_computes_in_its_dtype(randn, dtype):
    wanted = dtype or torch.bfloat16
    G = randn(6, 10)
    with Dispatched() as seen:
        result = newton_schulz(G, 5, dtype=dtype) if dtype else newton_schulz(G, 5)
    strangers = seen.product_dtypes - {wanted}
    assert not strangers, f"matrix products in {strangers}: all arithmetic is in dtype, {wanted} here"
    assert result.dtype == G.dtype, f"the result is {result.dtype}, expected G's {G.dtype}"
    assert torch.equal(result, result.to(wanted).to(G.dtype)), f"the result was not computed in {wanted}"
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.15}[wanted]
    assert_close(result, by_svd(G, 5), atol=limit, name="newton_schulz(G)", hint="round G, then iterate")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_newton_schulz_leaves_its_input_alone(randn, dtype):
    for shape in ((3, 5), (6, 4)):
        G = randn(*shape).to(dtype)
        before = G.clone()
        for arithmetic in (torch.bfloat16, torch.float32, torch.float64):
            result = newton_schulz(G, dtype=arithmetic)
            assert torch.equal(G, before), f"G, {dtype}, was changed by an iteration in {arithmetic}"
            assert result.dtype == dtype, f"the result is {result.dtype}, expected G's {dtype}"


def test_newton_schulz_of_strided_matrices(randn):
    for G in (randn(7, 4).T, randn(6, 8)[::2, 1::2], strided(randn(5, 3)), randn(1, 6).expand(4, 6)):
        result = newton_schulz(G, dtype=torch.float64)
        assert_close(result, by_svd(G, 5), atol=1e-9, name=f"newton_schulz(G), G {tuple(G.shape)}")


@pytest.mark.parametrize(("m", "n"), [(3, 40), (40, 3)])
def test_newton_schulz_multiplies_on_the_smaller_side(randn, m, n):
    G = randn(m, n)
    with Dispatched() as seen:
        newton_schulz(G, dtype=torch.float64)
    assert seen.entries <= m * n, (
        f"a tensor of {seen.entries} entries was made for a G of {m} x {n}: X X^T is (m, m), so "
        "work on the transpose of a tall matrix"
    )


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (1, 3, 4)])
def test_newton_schulz_refuses_what_is_no_matrix(randn, shape):
    assert newton_schulz(randn(1, 1)).shape == (1, 1)
    with pytest.raises(ValueError, match="matrix"):
        newton_schulz(normal(randn, shape))


# --- adjusted_lr ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rule", "expected"),
    [
        ((36, 4), "original", 0.3),
        ((4, 36), "original", 0.1),
        ((5, 5), "original", 0.1),
        ((36, 4), "match_rms_adamw", 0.12),
        ((4, 36), "match_rms_adamw", 0.12),
        ((1, 1), "match_rms_adamw", 0.02),
    ],
)
def test_adjusted_lr_follows_its_rule(shape, rule, expected):
    hint = "m is the number of rows, the outputs of a linear layer"
    for kind in (tuple, torch.Size):
        value = adjusted_lr(0.1, kind(shape), rule)
        assert_close(value, expected, atol=1e-15, name=f"adjusted_lr(0.1, {shape})", hint=hint)


@pytest.mark.parametrize("rule", ["none", "", "Original", None])
def test_adjusted_lr_refuses_unknown_rules(rule):
    with pytest.raises(ValueError, match="match_rms_adamw"):
        adjusted_lr(0.1, (3, 4), rule)


# --- Muon -------------------------------------------------------------------------------------


class TorchMuon(torch.optim.Muon):
    """torch.optim.Muon, whose arithmetic in bfloat16 is done in float64 instead."""

    def step(self):
        with pytest.MonkeyPatch.context() as patch:
            # A copy: what `bfloat16` returns is divided in place.
            patch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
            super().step()


MUON = [
    {},
    {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.7},
    {"lr": 0.1, "nesterov": False, "weight_decay": 0.0},
    {"lr": 0.02, "adjust_lr": "match_rms_adamw", "weight_decay": 2.0},
    {"lr": 0.1, "ns_steps": 2, "momentum": 0.0},
]


def for_torch(options):
    return {("adjust_lr_fn" if name == "adjust_lr" else name): value for name, value in options.items()}


def muon(params, **options):
    return Muon(params, **options, ns_dtype=torch.float64)


@pytest.mark.parametrize(
    "options", MUON, ids=["defaults", "momentum", "no_nesterov", "match_rms_adamw", "ns_steps"]
)
def test_muon_matches_torch_after_every_step(randn, options):
    params, references = parameters(randn, MATRICES)
    ours, theirs = muon(params, **options), TorchMuon(references, **for_torch(options))
    hint = "compare with the three formulas of the docstring, one after the other"
    follow(ours, theirs, params, references, randn, steps=8, hint=hint, atol=1e-9)


def test_muon_takes_its_options_in_the_order_given(randn):
    params, references = parameters(randn, MATRICES)
    ours = Muon(iter(params), 0.1, 0.6, 0.7, False, 2, "match_rms_adamw", torch.float64)
    options = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.7, "nesterov": False, "ns_steps": 2}
    theirs = TorchMuon(references, **options, adjust_lr_fn="match_rms_adamw")
    hint = "lr, momentum, weight_decay, nesterov, ns_steps, adjust_lr, ns_dtype"
    follow(ours, theirs, params, references, randn, steps=3, hint=hint, atol=1e-9)


@pytest.mark.parametrize("options", MUON[:4], ids=["defaults", "momentum", "no_nesterov", "match_rms_adamw"])
def test_muon_in_bfloat16_stays_close_to_torch(randn, options, device):
    # As it is used: parameters in float32, Newton-Schulz in bfloat16. Each update may be off by some
    # percent of its size, sqrt(min(m, n)) times the adjusted rate.
    shapes = [(16, 40), (48, 20), (24, 24)]
    params, references = parameters(randn, shapes, torch.float32, device)
    ours, theirs = Muon(params, **options), torch.optim.Muon(references, **for_torch(options))
    for step in range(1, 6):
        set_gradients((params, references), random_gradients(randn, shapes, step, torch.float32, device))
        with Dispatched() as seen:
            ours.step()
        theirs.step()
        strangers = seen.product_dtypes - {torch.bfloat16}
        assert not strangers, f"matrix products in {strangers}: ns_dtype is bfloat16 by default"
        for p, q in zip(params, references, strict=True):
            m, n = p.shape
            lr, rule = options.get("lr", 1e-3), options.get("adjust_lr")
            rate = lr * (0.2 * math.sqrt(max(m, n)) if rule else math.sqrt(max(1, m / n)))
            error = (p - q).norm().item() / (step * rate * math.sqrt(min(m, n)))
            assert error < 0.15, (
                f"after step {step} the {m} x {n} parameter is off by {error:.0%} of an update"
            )


def test_muon_first_step_along_an_orthogonal_gradient(randn):
    # All singular values are equal: the update is the gradient, rescaled, however long that is.
    Q, _ = torch.linalg.qr(randn(9, 9))
    x = 1 / 3  # 1 / |Q|
    for _ in range(5):
        x = COEFFICIENTS[0] * x + COEFFICIENTS[1] * x**3 + COEFFICIENTS[2] * x**5
    for size in (1e-4, 1.0, 1e4):
        p = nn.Parameter(torch.zeros(9, 9, dtype=torch.float64))
        p.grad = size * Q
        muon([p], lr=0.1, weight_decay=0.0).step()
        hint = "the length of the gradient must not matter"
        assert_close(p, -0.1 * x * Q, atol=1e-10, name="the parameter", hint=hint)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12)])
@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_muon_decay_uses_the_plain_learning_rate(randn, shape, rule):
    (p,), _ = parameters(randn, [shape])
    expected = p.detach().clone()
    optimizer = muon([p], lr=0.1, weight_decay=0.5, adjust_lr=rule)
    hint = "p is multiplied by 1 - lr weight_decay: lr is not adjusted here"
    for step in range(1, 4):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        expected *= 1 - 0.1 * 0.5
        assert_close(p, expected, atol=1e-13, name=f"the parameter after step {step}", hint=hint)


def test_muon_remembers_earlier_gradients(randn):
    # A large gradient, then a small one: the direction of the large one is still there.
    Q, _ = torch.linalg.qr(randn(4, 4))
    for nesterov, share in ((False, (0.05 * 0.95, 0.05)), (True, (0.05 * 0.95**2, 0.05 * 0.95 + 0.05))):
        p = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = muon([p], lr=1.0, weight_decay=0.0, nesterov=nesterov)
        g = [2.0 * Q, torch.diag(torch.tensor([1.0, -2.0, 3.0, -4.0]).double()) @ Q]
        for gradient in g:
            before = p.detach().clone()
            p.grad = gradient.clone()
            optimizer.step()
        hint = f"nesterov={nesterov}: the second update follows {share[0]:.4f} g1 + {share[1]:.4f} g2"
        expected = by_svd(share[0] * g[0] + share[1] * g[1], 5)
        assert_close(before - p, expected, atol=1e-10, name="the second update", hint=hint)


def test_muon_momentum_of_bfloat16_parameters_survives_newton_schulz(randn):
    # Here the running mean has the dtype that Newton-Schulz computes in: it must not work on the mean itself.
    (p,), _ = parameters(randn, [(8, 12)], torch.bfloat16)
    (q,), _ = parameters(randn, [(8, 12)])
    with torch.no_grad():
        q.copy_(p)
    ours, theirs = Muon([p], lr=0.1, nesterov=False), TorchMuon([q], lr=0.1, nesterov=False)
    for size in (1000, 100, 10):
        g = size * randn(8, 12).bfloat16()
        p.grad, q.grad = g.clone(), g.double()
        before = p.detach().double() - q.detach()
        ours.step()
        theirs.step()
        error = (p.detach().double() - q.detach() - before).norm() / (0.1 * math.sqrt(8))
        assert error < 0.3, f"an update of size {size} is off by {error:.0%}: has the running mean changed?"


def test_muon_groups_have_options_of_their_own(randn):
    params, references = parameters(randn, MATRICES)

    def grouped(p, rule):
        return [
            {"params": p[:1], "lr": 0.2, "weight_decay": 0.7},
            {"params": p[1:2], "momentum": 0.5, "nesterov": False},
            {"params": p[2:3], "ns_steps": 3},
            {"params": p[3:], rule: "match_rms_adamw"},
        ]

    ours = muon(grouped(params, "adjust_lr"), lr=0.05)
    theirs = TorchMuon(grouped(references, "adjust_lr_fn"), lr=0.05)
    hint = "every option comes from the parameter's group"
    follow(ours, theirs, params, references, randn, steps=5, hint=hint, atol=1e-9)


def test_muon_options_may_change_between_steps(randn):
    params, references = parameters(randn, MATRICES)
    ours, theirs = muon(params), TorchMuon(references)
    for step in range(1, 5):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0].update(lr=0.1 / step, weight_decay=0.1 * step, ns_steps=step)
        set_gradients((params, references), random_gradients(randn, MATRICES, step))
        ours.step()
        theirs.step()
        hint = "read the options from the group at every step"
        assert_same(params, references, atol=1e-9, step=step, hint=hint)


def test_muon_leaves_parameters_without_gradient_alone(randn):
    params, references = parameters(randn, [(2, 5), (4, 5), (3, 2)])
    untouched = params[0].detach().clone()
    ours, theirs = muon(params, weight_decay=0.5, lr=0.1), TorchMuon(references, weight_decay=0.5, lr=0.1)
    for step in range(1, 8):
        g = random_gradients(randn, [(3, 2), (4, 5)], step)
        set_gradients((params, references), [None, g[1] if step in (3, 4, 6, 7) else None, g[0]])
        ours.step()
        theirs.step()
        hint = "no gradient: no decay, no move, and the running mean stays"
        assert_same(params, references, atol=1e-9, step=step, hint=hint)
    assert torch.equal(params[0], untouched), "a parameter that never had a gradient has changed"


def test_muon_state_is_in_the_dtype_of_the_parameter(randn):
    check_state(Muon, randn)


def test_muon_state_is_in_its_state_dict(randn):
    params, copies = parameters(randn, MATRICES)
    optimizer = muon(params, lr=0.1, momentum=0.8, weight_decay=0.3)
    check_resume(optimizer, params, copies, lambda p: Muon(p), MATRICES, randn)


def test_muon_instances_do_not_share_anything(randn):
    check_instances(lambda p: muon(p, lr=0.1), (3, 2), randn)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_leaves_gradients_as_they_are(randn, nesterov):
    check_gradients_kept(lambda p: muon(p, lr=0.1, nesterov=nesterov), MATRICES, randn)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_muon_refuses_what_is_no_matrix(randn, shape):
    params, _ = parameters(randn, [(3, 2), shape])
    for wrong in (params, [{"params": params[:1]}, {"params": params[1:]}]):
        with pytest.raises(ValueError, match=r"\("):
            Muon(wrong)
    optimizer = Muon(params[:1])
    with pytest.raises(ValueError, match=r"\("):
        optimizer.add_param_group({"params": params[1:]})


@pytest.mark.parametrize(
    "options",
    [{"lr": -0.1}, {"momentum": -0.1}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"adjust_lr": "adamw"}],
    ids=["lr", "momentum", "no_memory", "weight_decay", "adjust_lr"],
)
def test_muon_refuses_options_out_of_range(randn, options):
    params, _ = parameters(randn, [(3, 2)])
    check_gradients_kept(lambda p: muon(p, lr=0.0, momentum=0.0, weight_decay=0.0), [(3, 2)], randn)
    with pytest.raises(ValueError, match=r"must"):
        Muon(params, **options)
