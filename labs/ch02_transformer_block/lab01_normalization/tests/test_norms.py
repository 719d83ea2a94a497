"""Tests of ch02/lab01. Oracles: PyTorch's norms and autograd in float64, gradcheck, closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from norms import (
    LayerNorm,
    LayerNormFunction,
    RMSNorm,
    RMSNormFunction,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from shared.compare import assert_close
from torch import nn


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        "*layer_norm*",
        "*layernorm*",
        "*rms_norm*",
        "*group_norm*",
        "*batch_norm*",
        "*instance_norm*",
        why="write the normalisation out in sums, products and a root",
    )
    forbid(torch.autograd.grad, torch.autograd.backward, why="derive the backward by hand")


# --- what the tests are made of --------------------------------------------------------------

# A row alone, a matrix, and batches; no size twice in a shape, except where a wrong axis would fit unnoticed.
SHAPES = [(7,), (5, 6), (3, 5, 11), (2, 3, 4, 10), (6, 6), (1, 9)]
BOTH = pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
# Unit roundoff: the largest relative error of rounding once.
HALVES = pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
STATISTICS = "mean or rstd differs: mean over the last axis, keepdim=True, rstd = 1 / sqrt(biased var + eps)"


def oracle(kind, x, weight, bias=None, eps=1e-5):
    """PyTorch's y in float64."""
    x, weight, bias = (t if t is None else t.double() for t in (x, weight, bias))
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def gradients(y, inputs, grad_output):
    """Autograd's gradients of y. A scalar spares the heavy imports that torch makes for a grad_output."""
    return torch.autograd.grad((y * grad_output).sum(), inputs, retain_graph=True)


def oracle_gradients(kind, grad_output, x, *parameters, eps):
    """Autograd's gradients of the oracle with respect to x and every parameter, in float64."""
    inputs = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    return gradients(oracle(kind, *inputs, eps=eps), inputs, grad_output.double())


def layer_statistics(x, eps):
    """Mean and rstd by a float64 loop over rows, in the precision that the lab promises."""
    mean, rstd = [], []
    for row in x.reshape(-1, x.shape[-1]).double():
        m = math.fsum(row.tolist()) / len(row)
        var = math.fsum((v - m) ** 2 for v in row.tolist()) / len(row)
        mean.append(m)
        rstd.append(1 / math.sqrt(var + eps))
    shape, dtype = (*x.shape[:-1], 1), torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(torch.tensor(s, dtype=torch.float64).reshape(shape).to(dtype) for s in (mean, rstd))


def rms_statistics(x, eps):
    """1 / sqrt(mean(x^2) + eps) by a float64 loop over rows, in the precision that the lab promises."""
    rows = x.reshape(-1, x.shape[-1]).double().tolist()
    rrms = [1 / math.sqrt(math.fsum(v * v for v in row) / len(row) + eps) for row in rows]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor(rrms, dtype=torch.float64).reshape(*x.shape[:-1], 1).to(dtype)


def forward(kind, x, weight, bias, eps):
    """The learner's y for either kind; RMSNorm has no use for `bias`."""
    return layer_norm(x, weight, bias, eps)[0] if kind == "LayerNorm" else rms_norm(x, weight, eps)[0]


def backward(kind, grad_output, x, weight, eps):
    """The learner's gradients for either kind, from the oracle's statistics."""
    if kind == "LayerNorm":
        return layer_norm_backward(grad_output, x, weight, *layer_statistics(x, eps))
    return rms_norm_backward(grad_output, x, weight, rms_statistics(x, eps))


def parameters(kind, randn, D, dtype=torch.float64):
    """Random weight, and bias for LayerNorm: never their usual first values of 1 and 0."""
    drawn = (0.5 + randn(D)).to(dtype), randn(D).to(dtype)
    return drawn if kind == "LayerNorm" else drawn[:1]


def compare_gradients(actual, expected, atol, rtol=0.0, hint=""):
    assert len(actual) == len(expected), (
        f"{len(actual)} gradients came back; {len(expected)} are wanted: x, then each parameter"
    )
    for name, a, e in zip(("grad_x", "grad_weight", "grad_bias"), actual, expected, strict=False):
        assert_close(a, e, atol=atol, rtol=rtol, name=name, hint=hint)


def check_precision(statistic, dtype, name):
    assert statistic.dtype == dtype, (
        f"{name} has {statistic.dtype}, expected {dtype}: float64 for float64 inputs, else float32"
    )


# --- layer_norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_matches_pytorch(randn, shape):
    x, (weight, bias) = 2 * randn(*shape) + 1, parameters("LayerNorm", randn, shape[-1])
    y, *_ = layer_norm(x, weight, bias, 1e-3)
    hint = "each row of the last axis is normalised by its own mean and variance, then weight, then bias"
    assert_close(y, oracle("LayerNorm", x, weight, bias, 1e-3), atol=1e-12, name="y", hint=hint)


def test_layer_norm_variance_divides_by_d(randn):
    # Two features, one apart from the mean: biased variance 1, unbiased variance 2.
    x = torch.tensor([[4.0, 6.0], [1.0, -1.0]], dtype=torch.float64)
    y, *_ = layer_norm(x, torch.ones(2).double(), torch.zeros(2).double(), 1e-14)
    expected = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert_close(y, expected, atol=1e-12, name="y", hint="variance: divide by D, not by D - 1")


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.01, 4.0])
def test_layer_norm_epsilon_is_inside_the_root(eps):
    # Rows c - d, c + d have the variance d^2. With d^2 = eps, half of what is under the root is eps.
    d = math.sqrt(eps)
    x = torch.tensor([[-d, d], [0.25 + 3 * d, 0.25 - 3 * d]], dtype=torch.float64)
    y, *_ = layer_norm(x, torch.ones(2).double(), torch.zeros(2).double(), eps)
    a, b = 1 / math.sqrt(2), 3 / math.sqrt(10)
    expected = torch.tensor([[-a, a], [b, -b]], dtype=torch.float64)
    hint = "eps is added to the variance before the root, not to the standard deviation after it"
    assert_close(y, expected, atol=1e-10, name="y", hint=hint)


def test_layer_norm_default_epsilon_is_1e_5():
    d = math.sqrt(1e-5)
    y, *_ = layer_norm(torch.tensor([-d, d]).double(), torch.ones(2).double(), torch.zeros(2).double())
    a = 1 / math.sqrt(2)
    assert_close(y, torch.tensor([-a, a]).double(), atol=1e-6, name="y", hint="without an eps, eps is 1e-5")


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 1)], ids=["constant rows", "one feature"])
def test_layer_norm_of_rows_without_variance_is_the_bias(randn, shape):
    D = shape[-1]
    x = torch.tensor([-2.5, 0.0, 1.5]).double()[:, None].expand(shape).contiguous()
    weight, bias = parameters("LayerNorm", randn, D)
    y, mean, rstd = layer_norm(x, weight, bias, 1e-4)
    hint = "a row of equal numbers has variance 0: x - mean is 0, eps keeps the root from 0, and y = bias"
    assert_close(y, bias.expand(shape), atol=1e-12, name="y", hint=hint)
    assert_close(mean, x[..., :1], atol=1e-12, name="mean", hint=hint)
    assert_close(rstd, torch.full_like(mean, 100.0), atol=1e-8, name="rstd", hint=hint)


@pytest.mark.parametrize(
    ("dtype", "offset", "atol"),
    [(torch.float32, 1e4, 0.01), (torch.float32, -1e4, 0.01), (torch.float64, 1e6, 1e-8)],
    ids=["float32, 10000", "float32, -10000", "float64, 1000000"],
)
def test_layer_norm_survives_offsets_far_above_the_spread(randn, dtype, offset, atol):
    x = (offset + randn(4, 37)).to(dtype)
    weight, bias = (p.to(dtype) for p in parameters("LayerNorm", randn, 37))
    y, _, rstd = layer_norm(x, weight, bias)
    hint = "E[x^2] - E[x]^2 cancels far from 0: subtract the mean first, then square"
    assert_close(y, oracle("LayerNorm", x, weight, bias), atol=atol, name="y", hint=hint)
    assert_close(rstd, layer_statistics(x, 1e-5)[1], atol=atol / 10, name="rstd", hint=hint)


def test_layer_norm_rows_do_not_see_each_other(randn):
    # One row is large, one tiny, one far away: shared statistics would drown two of them.
    x = (
        randn(3, 4, 6) * torch.tensor([1e3, 1.0, 1e-3])[:, None, None]
        + torch.tensor([0.0, 0.0, 50.0])[:, None, None]
    )
    weight, bias = parameters("LayerNorm", randn, 6)
    y, *_ = layer_norm(x, weight, bias, 1e-6)
    hint = "every row has statistics of its own, whatever stands in the others"
    assert_close(y, oracle("LayerNorm", x, weight, bias, 1e-6), atol=1e-9, name="y", hint=hint)


@pytest.mark.parametrize("shape", [(7,), (3, 5, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_layer_norm_returns_mean_and_rstd(randn, dtype, shape):
    x, atol = (3 * randn(*shape) - 1).to(dtype), 1e-12 if dtype == torch.float64 else 2e-6
    weight, bias = (p.to(dtype) for p in parameters("LayerNorm", randn, shape[-1]))
    _, mean, rstd = layer_norm(x, weight, bias, 0.1)
    expected = layer_statistics(x, 0.1)
    check_precision(mean, dtype, "mean")
    check_precision(rstd, dtype, "rstd")
    assert_close(mean, expected[0], atol=atol, name="mean", hint=STATISTICS)
    assert_close(rstd, expected[1], atol=atol, name="rstd", hint=STATISTICS)


@HALVES
def test_layer_norm_of_half_precision_computes_in_float32(randn, dtype, roundoff):
    x = (100 + 300 * randn(6, 90)).to(dtype)  # squares overflow in float16
    weight, bias = parameters("LayerNorm", randn, 90, dtype)
    y, mean, rstd = layer_norm(x, weight, bias, 1e-5)
    assert y.dtype == dtype, f"y should have the dtype of x, {dtype}, but has {y.dtype}"
    expected = layer_statistics(x, 1e-5)
    check_precision(mean, torch.float32, "mean")
    check_precision(rstd, torch.float32, "rstd")
    assert_close(mean, expected[0], atol=0, rtol=1e-5, name="mean", hint="compute mean and rstd in float32")
    assert_close(rstd, expected[1], atol=0, rtol=1e-5, name="rstd", hint="compute mean and rstd in float32")
    hint = "round y once, at the end: x - mean, the product with rstd, weight and bias stay in float32"
    assert_close(
        y, oracle("LayerNorm", x, weight, bias), atol=1e-5, rtol=1.02 * roundoff, name="y", hint=hint
    )


# --- layer_norm_backward -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm_backward_matches_autograd(randn, shape):
    g, x, (weight, bias) = randn(*shape), 1 + randn(*shape), parameters("LayerNorm", randn, shape[-1])
    expected = oracle_gradients("LayerNorm", g, x, weight, bias, eps=1e-3)
    hint = "the gradients differ from autograd's"
    compare_gradients(backward("LayerNorm", g, x, weight, 1e-3), expected, 1e-12, hint=hint)


def test_layer_norm_backward_includes_the_way_through_the_mean(randn):
    # Adding a constant to a row changes nothing in y, so the gradient along (1, ..., 1) is 0.
    g, x, (weight, bias) = randn(4, 9), randn(4, 9), parameters("LayerNorm", randn, 9)
    grad_x, *_ = backward("LayerNorm", g, x, weight, 1e-9)
    hint = "a shift of x leaves y alone, so grad_x of a row adds up to 0: x also moves the mean"
    assert_close(grad_x.sum(-1), torch.zeros(4).double(), atol=1e-11, name="grad_x.sum(-1)", hint=hint)
    expected, *_ = oracle_gradients("LayerNorm", g, x, weight, bias, eps=1e-9)
    assert_close(grad_x, expected, atol=1e-11, name="grad_x")


def test_layer_norm_backward_includes_the_way_through_rstd(randn):
    # Without eps, stretching a row about its mean changes nothing in y: the gradient along x_hat is 0.
    g, x, (weight, bias) = randn(4, 9), randn(4, 9), parameters("LayerNorm", randn, 9)
    grad_x, *_ = backward("LayerNorm", g, x, weight, 1e-14)
    along = (grad_x * (x - x.mean(-1, keepdim=True))).sum(-1)
    hint = "a row stretched about its mean gives the same y, so grad_x · (x - mean) is 0: x also moves rstd"
    assert_close(along, torch.zeros(4).double(), atol=1e-11, name="grad_x · (x - mean)", hint=hint)
    expected, *_ = oracle_gradients("LayerNorm", g, x, weight, bias, eps=1e-14)
    assert_close(grad_x, expected, atol=1e-11, name="grad_x")


def test_layer_norm_backward_takes_epsilon_from_rstd(randn):
    g, x, (weight, bias) = randn(5, 6), 0.3 * randn(5, 6), parameters("LayerNorm", randn, 6)
    expected = oracle_gradients("LayerNorm", g, x, weight, bias, eps=2.0)
    hint = "eps is large here: use the rstd you are given; the mean square of x_hat is not 1"
    compare_gradients(backward("LayerNorm", g, x, weight, 2.0), expected, 1e-12, hint=hint)


def test_layer_norm_backward_of_rows_without_variance(randn):
    g, (weight, bias) = randn(3, 8), parameters("LayerNorm", randn, 8)
    x = torch.tensor([-2.5, 0.0, 1.5]).double()[:, None].expand(3, 8)
    expected = oracle_gradients("LayerNorm", g, x, weight, bias, eps=1e-4)
    hint = "where the variance is 0, rstd is 1 / sqrt(eps): grad_x is large, and finite"
    compare_gradients(backward("LayerNorm", g, x, weight, 1e-4), expected, 1e-9, hint=hint)


def test_layer_norm_backward_of_one_feature(randn):
    # x - mean is 0 whatever x is, so only the bias has a gradient.
    g, (weight, _) = randn(4, 1), parameters("LayerNorm", randn, 1)
    expected = torch.zeros(4, 1).double(), torch.zeros(1).double(), g.sum(0)
    compare_gradients(backward("LayerNorm", g, randn(4, 1), weight, 1e-3), expected, 1e-12)


def test_layer_norm_backward_survives_offsets_far_above_the_spread(randn):
    g, x = randn(4, 37, dtype=torch.float32), (1e4 + randn(4, 37)).float()
    weight, bias = parameters("LayerNorm", randn, 37, torch.float32)
    expected = oracle_gradients("LayerNorm", g, x, weight, bias, eps=1e-5)
    hint = "x is near 10,000: subtract the mean from x before anything is squared or multiplied"
    compare_gradients(backward("LayerNorm", g, x, weight, 1e-5), expected, 0.02, hint=hint)


# --- rms_norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_pytorch(randn, shape):
    x, (weight,) = 2 * randn(*shape) + 1, parameters("RMSNorm", randn, shape[-1])
    y, _ = rms_norm(x, weight, 1e-3)
    hint = "each row of the last axis is divided by the root of its own mean square, then weight"
    assert_close(y, oracle("RMSNorm", x, weight, eps=1e-3), atol=1e-12, name="y", hint=hint)


def test_rms_norm_does_not_subtract_the_mean():
    # A constant row has no variance, but its mean square is 9 (and 4 with 16: (16 + 4) / 2 = 10).
    x = torch.tensor([[3.0, 3.0], [4.0, 2.0]], dtype=torch.float64)
    y, _ = rms_norm(x, torch.ones(2).double(), 1e-14)
    expected = torch.tensor([[1.0, 1.0], [4 / math.sqrt(10), 2 / math.sqrt(10)]], dtype=torch.float64)
    hint = "RMSNorm squares x itself: no mean is subtracted, above or below the line"
    assert_close(y, expected, atol=1e-12, name="y", hint=hint)


def test_rms_norm_takes_the_mean_of_the_squares():
    # Three features: the sum of squares is 9, the mean is 3; divided by D - 1 it would be 4.5.
    y, _ = rms_norm(torch.tensor([1.0, -2.0, 2.0]).double(), torch.ones(3).double(), 1e-14)
    expected = torch.tensor([1.0, -2.0, 2.0]).double() / math.sqrt(3)
    hint = "the mean of the squares: their sum divided by D"
    assert_close(y, expected, atol=1e-12, name="y", hint=hint)


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 0.01, 4.0])
def test_rms_norm_epsilon_is_inside_the_root(eps):
    d = math.sqrt(eps)
    x = torch.tensor([[-d, d], [3 * d, -3 * d]], dtype=torch.float64)
    y, _ = rms_norm(x, torch.ones(2).double(), eps)
    a, b = 1 / math.sqrt(2), 3 / math.sqrt(10)
    expected = torch.tensor([[-a, a], [b, -b]], dtype=torch.float64)
    hint = "eps is added to the mean square before the root, not to the root"
    assert_close(y, expected, atol=1e-10, name="y", hint=hint)


def test_rms_norm_default_epsilon_is_1e_6():
    y, _ = rms_norm(torch.tensor([-1e-3, 1e-3]).double(), torch.ones(2).double())
    a = 1 / math.sqrt(2)
    assert_close(y, torch.tensor([-a, a]).double(), atol=1e-6, name="y", hint="without an eps, eps is 1e-6")


def test_rms_norm_of_a_row_of_zeros_is_zero(randn):
    x, (weight,) = torch.zeros(3, 5).double(), parameters("RMSNorm", randn, 5)
    x[1] = randn(5)
    y, rrms = rms_norm(x, weight, 1e-4)
    hint = "a row of zeros is divided by sqrt(eps), so it stays 0"
    assert_close(y, oracle("RMSNorm", x, weight, eps=1e-4), atol=1e-12, name="y", hint=hint)
    assert_close(rrms, rms_statistics(x, 1e-4), atol=1e-8, name="rrms", hint=hint)


def test_rms_norm_of_one_feature(randn):
    x, (weight,) = randn(4, 1), parameters("RMSNorm", randn, 1)
    y, _ = rms_norm(x, weight, 0.5)
    assert_close(y, weight * x / torch.sqrt(x * x + 0.5), atol=1e-12, name="y")


@pytest.mark.parametrize("shape", [(7,), (3, 5, 11)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_rms_norm_returns_rrms(randn, dtype, shape):
    x, atol = (3 * randn(*shape) - 1).to(dtype), 1e-12 if dtype == torch.float64 else 2e-6
    _, rrms = rms_norm(x, *parameters("RMSNorm", randn, shape[-1], dtype), 0.1)
    check_precision(rrms, dtype, "rrms")
    hint = "rrms = 1 / sqrt(mean of x^2 over the last axis + eps), with keepdim=True"
    assert_close(rrms, rms_statistics(x, 0.1), atol=atol, name="rrms", hint=hint)


@HALVES
def test_rms_norm_of_half_precision_computes_in_float32(randn, dtype, roundoff):
    x = (100 + 300 * randn(6, 90)).to(dtype)  # squares overflow in float16
    (weight,) = parameters("RMSNorm", randn, 90, dtype)
    y, rrms = rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype, f"y should have the dtype of x, {dtype}, but has {y.dtype}"
    check_precision(rrms, torch.float32, "rrms")
    assert_close(
        rrms, rms_statistics(x, 1e-5), atol=0, rtol=1e-5, name="rrms", hint="compute rrms in float32"
    )
    hint = "round y once, at the end: the products with rrms and weight stay in float32"
    expected = oracle("RMSNorm", x, weight, eps=1e-5)
    assert_close(y, expected, atol=1e-5, rtol=1.02 * roundoff, name="y", hint=hint)


# --- rms_norm_backward -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1)], ids=str)
def test_rms_norm_backward_matches_autograd(randn, shape):
    g, x, (weight,) = randn(*shape), 1 + randn(*shape), parameters("RMSNorm", randn, shape[-1])
    expected = oracle_gradients("RMSNorm", g, x, weight, eps=1e-3)
    hint = "the gradients differ from autograd's"
    compare_gradients(backward("RMSNorm", g, x, weight, 1e-3), expected, 1e-12, hint=hint)


def test_rms_norm_backward_includes_the_way_through_rrms(randn):
    # Without eps, y does not change when a row is multiplied by a number: the gradient along x is 0.
    g, x, (weight,) = randn(4, 9), 1 + randn(4, 9), parameters("RMSNorm", randn, 9)
    grad_x, _ = backward("RMSNorm", g, x, weight, 1e-14)
    hint = "a longer row gives the same y, so grad_x · x is 0: x also moves rrms"
    assert_close((grad_x * x).sum(-1), torch.zeros(4).double(), atol=1e-11, name="grad_x · x", hint=hint)
    expected, _ = oracle_gradients("RMSNorm", g, x, weight, eps=1e-14)
    assert_close(grad_x, expected, atol=1e-11, name="grad_x")


def test_rms_norm_backward_has_no_way_through_a_mean():
    # g has no part along x, so x does not move rrms, 1/2: all of g stays, divided by 2.
    x, g = torch.tensor([[2.0, -2.0]]).double(), torch.tensor([[3.0, 3.0]]).double()
    grad_x, _ = backward("RMSNorm", g, x, torch.ones(2).double(), 1e-14)
    expected = torch.tensor([[1.5, 1.5]], dtype=torch.float64)
    hint = "RMSNorm has no mean, so the gradient has no part that goes through one"
    assert_close(grad_x, expected, atol=1e-11, name="grad_x", hint=hint)


def test_rms_norm_backward_takes_epsilon_from_rrms(randn):
    g, x, (weight,) = randn(5, 6), 0.3 * randn(5, 6), parameters("RMSNorm", randn, 6)
    expected = oracle_gradients("RMSNorm", g, x, weight, eps=2.0)
    hint = "eps is large here: use the rrms you are given; the mean square of x_hat is not 1"
    compare_gradients(backward("RMSNorm", g, x, weight, 2.0), expected, 1e-12, hint=hint)


def test_rms_norm_backward_of_a_row_of_zeros(randn):
    g, x, (weight,) = randn(3, 5), torch.zeros(3, 5).double(), parameters("RMSNorm", randn, 5)
    x[1] = randn(5)
    expected = oracle_gradients("RMSNorm", g, x, weight, eps=1e-4)
    compare_gradients(backward("RMSNorm", g, x, weight, 1e-4), expected, 1e-9)


# --- both kinds of functions ---------------------------------------------------------------------
# The names of these tests begin with both, so that `-k` of a step leaves them for the end of it.


@BOTH
def test_both_forwards_work_in_float32_on_strided_views(randn, kind):
    x = randn(6, 9, 14, dtype=torch.float32).transpose(0, 1)[::2, :, ::2]  # (5, 6, 7)
    weight, bias = randn(14, dtype=torch.float32)[::2], randn(7, dtype=torch.float32)
    y = forward(kind, x, weight, bias, 1e-5)
    assert y.dtype == torch.float32, f"y should have the dtype of x, torch.float32, but has {y.dtype}"
    assert_close(y, oracle(kind, x, weight, bias), atol=5e-6, name="y", hint="x is a strided view here")


@BOTH
def test_both_backwards_work_in_float32_on_strided_views(randn, kind):
    g, x = (randn(6, 9, 14, dtype=torch.float32).transpose(0, 1)[::2, :, ::2] for _ in range(2))
    weights = parameters(kind, randn, 7, torch.float32)
    expected = oracle_gradients(kind, g, x, *weights, eps=1e-5)
    actual = backward(kind, g, x, weights[0], 1e-5)
    hint = "x and grad_output are strided views here: reshape where view refuses"
    compare_gradients(actual, expected, 2e-5, hint=hint)
    for result in actual:
        assert result.dtype == torch.float32, f"a gradient of float32 inputs has {result.dtype}"


@BOTH
def test_both_backwards_add_the_parameters_gradients_over_all_rows(randn, kind):
    # With grad_output = 1 everywhere the bias gets the number of rows, the weight the sum of x_hat.
    x, weights = randn(3, 4, 5), parameters(kind, randn, 5)
    actual = backward(kind, torch.ones(1, 1, 1).double().expand(3, 4, 5), x, weights[0], 1e-3)
    x_hat = oracle(kind, x, torch.ones(5), torch.zeros(5), 1e-3)
    hint = "every row used the same parameter: add over all leading axes, do not average"
    assert_close(actual[1], x_hat.reshape(12, 5).sum(0), atol=1e-12, name="grad_weight", hint=hint)
    if kind == "LayerNorm":
        assert_close(actual[2], torch.full((5,), 12.0).double(), atol=1e-12, name="grad_bias", hint=hint)


@HALVES
@BOTH
def test_both_backwards_of_half_precision_compute_in_float32(randn, kind, dtype, roundoff):
    g, x = randn(2, 300, 12).to(dtype), (100 + 300 * randn(2, 300, 12)).to(dtype)
    x[0] *= 1e-2
    weights = parameters(kind, randn, 12, dtype)
    actual = backward(kind, g, x, weights[0], 1e-5)
    expected = oracle_gradients(kind, g, x, *weights, eps=1e-5)
    hint = "compute in float32 and round each gradient once, at the end, after the sum over rows"
    for name, a, e in zip(("grad_x", "grad_weight", "grad_bias"), actual, expected, strict=False):
        assert a.dtype == dtype, f"{name} should have the dtype of x, {dtype}, but has {a.dtype}"
        atol = 1e-6 if name == "grad_x" else 1e-4
        assert_close(a, e, atol=atol, rtol=1.02 * roundoff, name=name, hint=hint)


@BOTH
def test_both_forwards_leave_their_inputs_alone(randn, kind):
    inputs = [randn(3, 5), randn(5), randn(5)]
    before = [t.clone() for t in inputs]
    y = forward(kind, *inputs, 1e-3)
    assert_close(y, oracle(kind, *before, 1e-3), atol=1e-12, name="y")
    for name, now, then in zip(("x", "weight", "bias"), inputs, before, strict=True):
        assert torch.equal(now, then), f"{name} was modified (an in-place operation such as -= or mul_?)"


@BOTH
def test_both_backwards_leave_their_inputs_alone(randn, kind):
    g, x, (weight, *bias) = randn(3, 5), randn(3, 5), parameters(kind, randn, 5)
    statistics = layer_statistics(x, 1e-3) if kind == "LayerNorm" else (rms_statistics(x, 1e-3),)
    inputs = [g, x, weight, *statistics]
    before = [t.clone() for t in inputs]
    actual = (layer_norm_backward if kind == "LayerNorm" else rms_norm_backward)(*inputs)
    expected = oracle_gradients(kind, before[0], before[1], weight.clone(), *bias, eps=1e-3)
    compare_gradients(actual, expected, 1e-12)
    for now, then in zip(inputs, before, strict=True):
        assert torch.equal(now, then), "an input of the backward was modified (-= or mul_?)"


@BOTH
def test_both_stay_on_the_device_of_their_inputs(randn, device, kind):
    weights = parameters(kind, randn, 7)
    g, x = randn(2, 3, 7), randn(2, 3, 7)
    inputs = [t.to(device).requires_grad_() for t in (x, *weights)]
    y = function(kind).apply(*inputs, 0.1)
    hint = "a tensor you make yourself must be made on the device of x"
    assert y.device == inputs[0].device, f"y is on {y.device}, x on {inputs[0].device}"
    assert_close(y, oracle(kind, x, *weights, eps=0.1), atol=1e-12, name="y", hint=hint)
    expected = oracle_gradients(kind, g, x, *weights, eps=0.1)
    compare_gradients(gradients(y, inputs, g.to(device)), expected, 1e-12, hint=hint)


# --- the autograd Functions ------------------------------------------------------------------------


def function(kind):
    return LayerNormFunction if kind == "LayerNorm" else RMSNormFunction


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)], ids=str)
@BOTH
def test_function_passes_gradcheck(randn, kind, shape):
    x, weights = randn(*shape).requires_grad_(), parameters(kind, randn, shape[-1])
    weights = [w.requires_grad_() for w in weights]
    y = function(kind).apply(x, *weights, 0.01)
    assert_close(y, oracle(kind, x, *weights, eps=0.01), atol=1e-12, name="y")
    assert torch.autograd.gradcheck(lambda *a: function(kind).apply(*a, 0.01), (x, *weights))


@BOTH
def test_function_gradients_match_pytorch(randn, kind):
    g, x, weights = randn(2, 5, 7), randn(2, 5, 7), parameters(kind, randn, 7)
    inputs = [t.clone().requires_grad_() for t in (x, *weights)]
    y = function(kind).apply(*inputs, 0.25)
    assert_close(y, oracle(kind, x, *weights, eps=0.25), atol=1e-12, name="y", hint="is eps handed on?")
    actual = gradients(y, inputs, g)
    hint = "save in forward what the backward function takes; return gradients in the order of the arguments"
    compare_gradients(actual, oracle_gradients(kind, g, x, *weights, eps=0.25), 1e-12, hint=hint)


@BOTH
def test_function_calls_do_not_mix(randn, kind):
    # Two calls are open at once, and the first is asked last, twice.
    weights = [w.requires_grad_() for w in parameters(kind, randn, 6)]
    g, first, second = randn(4, 6), randn(4, 6).requires_grad_(), randn(4, 6).requires_grad_()
    ys = [function(kind).apply(x, *weights, eps) for x, eps in ((first, 0.3), (second, 0.7))]
    actual = [gradients(ys[i], (x, *weights), g) for i, x in ((1, second), (0, first))]
    again = gradients(ys[0], (first, *weights), g)
    hint = "every call keeps its own tensors, in its own ctx, and a backward leaves them as they are"
    compare_gradients(actual[0], oracle_gradients(kind, g, second, *weights, eps=0.7), 1e-12, hint=hint)
    compare_gradients(actual[1], oracle_gradients(kind, g, first, *weights, eps=0.3), 1e-12, hint=hint)
    compare_gradients(again, oracle_gradients(kind, g, first, *weights, eps=0.3), 1e-12, hint=hint)


@pytest.mark.parametrize("changed", ["x", "weight"])
@BOTH
def test_function_never_uses_what_was_changed_after_the_forward(randn, kind, changed):
    g, x, weights = randn(3, 5), randn(3, 5), parameters(kind, randn, 5)
    inputs = [t.clone().requires_grad_() for t in (x, *weights)]
    y = function(kind).apply(*inputs, 0.1)
    assert_close(y, oracle(kind, x, *weights, eps=0.1), atol=1e-12, name="y")
    with torch.no_grad():
        inputs[("x", "weight").index(changed)].copy_(randn(*inputs[("x", "weight").index(changed)].shape))
    try:
        actual = gradients(y, inputs, g)
    except NotImplementedError:
        raise
    except RuntimeError:  # save_for_backward noticed: what it is for
        return
    hint = f"{changed} changed between forward and backward, and the gradient is wrong: use save_for_backward"
    compare_gradients(actual, oracle_gradients(kind, g, x, *weights, eps=0.1), 1e-12, hint=hint)


# --- the modules ------------------------------------------------------------------------------------


def trained(kind, module):
    """The module's parameters in the order of the Function's arguments, whatever order it made them in."""
    return [module.weight, module.bias] if kind == "LayerNorm" else [module.weight]


def build(kind, D, *eps):
    return LayerNorm(D, *eps) if kind == "LayerNorm" else RMSNorm(D, *eps)


def theirs(kind, D, eps):
    """PyTorch's module of that kind in float64, with random parameters."""
    module = (nn.LayerNorm if kind == "LayerNorm" else nn.RMSNorm)(D, eps=eps).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return module


@BOTH
def test_module_has_the_promised_parameters(randn, kind):
    module = build(kind, 6).double()
    names = {name for name, _ in module.named_parameters()}
    wanted = {"weight", "bias"} if kind == "LayerNorm" else {"weight"}
    assert names == wanted, f"{kind} should have the parameters {sorted(wanted)}, but has {sorted(names)}"
    assert set(module.state_dict()) == wanted, f"the state dict should hold nothing but {sorted(wanted)}"
    hint = "weight starts at 1 and bias at 0"
    assert_close(module.weight, torch.ones(6).double(), atol=0, name="weight", hint=hint)
    if kind == "LayerNorm":
        assert_close(module.bias, torch.zeros(6).double(), atol=0, name="bias", hint=hint)
    x = randn(4, 6)
    assert_close(module(x), oracle(kind, x, torch.ones(6), torch.zeros(6), module.eps), atol=1e-12, name="y")


@BOTH
def test_module_matches_pytorch_with_its_state_dict(randn, kind):
    reference, module = theirs(kind, 7, 0.02), build(kind, 7, 0.02).double()
    module.load_state_dict(reference.state_dict())
    x, g = randn(2, 5, 7).requires_grad_(), randn(2, 5, 7)
    y, expected = module(x), reference(x)
    assert_close(y, expected, atol=1e-12, name="y", hint="does forward use weight, bias and self.eps?")
    actual = gradients(y, (x, *trained(kind, module)), g)
    compare_gradients(actual, gradients(expected, (x, *trained(kind, reference)), g), 1e-12)


@pytest.mark.parametrize("eps", [None, 0.5])
@BOTH
def test_module_keeps_its_epsilon(kind, eps):
    module = build(kind, 2, *([] if eps is None else [eps])).double()
    eps = eps or (1e-5 if kind == "LayerNorm" else 1e-6)
    assert module.eps == eps, f"{kind}.eps is {module.eps}, expected {eps}"
    d, a = math.sqrt(eps), 1 / math.sqrt(2)
    y = module(torch.tensor([[-d, d]], dtype=torch.float64))
    assert_close(
        y, torch.tensor([[-a, a]]).double(), atol=1e-6, name="y", hint=f"eps of the module is {eps:g}"
    )


@BOTH
def test_module_goes_through_the_function(randn, kind):
    module, x = build(kind, 5).double(), randn(3, 5).requires_grad_()
    y = module(x)
    assert_close(y, oracle(kind, x, torch.ones(5), torch.zeros(5), module.eps), atol=1e-12, name="y")
    name = y.grad_fn.name() if y.grad_fn is not None else "nothing"
    assert name == f"{kind}FunctionBackward", (
        f"y was made by {name}: call {kind}Function.apply, or autograd does your backward's work"
    )
    start = [torch.ones(5), torch.zeros(5)][: len(trained(kind, module))]
    g = randn(3, 5)
    expected = oracle_gradients(kind, g, x, *start, eps=module.eps)
    compare_gradients(gradients(y, (x, *trained(kind, module)), g), expected, 1e-11)


@HALVES
@BOTH
def test_module_trains_in_half_precision(randn, kind, dtype, roundoff):
    module = build(kind, 12).to(dtype)
    x, g = (100 + 300 * randn(3, 12)).to(dtype).requires_grad_(), randn(3, 12).to(dtype)
    y = module(x)
    ones, zeros = torch.ones(12), torch.zeros(12)
    assert y.dtype == dtype, f"y should have the dtype of x, {dtype}, but has {y.dtype}"
    expected = oracle(kind, x, ones, zeros, module.eps)
    assert_close(y, expected, atol=1e-5, rtol=1.02 * roundoff, name="y")
    start = (ones, zeros) if kind == "LayerNorm" else (ones,)
    expected = oracle_gradients(kind, g, x, *start, eps=module.eps)
    actual = gradients(y, (x, *trained(kind, module)), g)
    hint = "are the statistics saved in float32?"
    compare_gradients(actual, expected, 1e-5, 1.02 * roundoff, hint)


@BOTH
def test_module_in_a_stack_trains_like_pytorchs(randn, kind):
    # The same two-layer network, once with each module, after three steps of gradient descent.
    networks = []
    for norm in (
        build(kind, 6, 1e-3).double(),
        (nn.LayerNorm if kind == "LayerNorm" else nn.RMSNorm)(6, 1e-3),
    ):
        torch.manual_seed(1)
        networks.append(nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh(), nn.Linear(6, 2)).double())
    x, target = randn(2, 4, 6), randn(2, 4, 2)
    for network in networks:
        for _ in range(3):
            loss = F.mse_loss(network(x), target)
            steps = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, step in zip(network.parameters(), steps, strict=True):
                    parameter -= 0.3 * step
    hint = "after three training steps the network differs: do all parameters get their gradients?"
    assert_close(networks[0][1].weight, networks[1][1].weight, atol=1e-10, name="weight", hint=hint)
    assert_close(networks[0](x), networks[1](x), atol=1e-10, name="output", hint=hint)


@BOTH
@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_module_gives_one_gradient_where_only_one_is_wanted(randn, kind, wanted):
    # The first layer of a model has an x without gradient; a frozen norm a weight without.
    module, x, g = build(kind, 5).double(), randn(3, 5), randn(3, 5)
    module.requires_grad_(wanted == "weight")
    x.requires_grad_(wanted == "x")
    target = x if wanted == "x" else module.weight
    ours = gradients(module(x), [target], g)[0]
    x2, weight = x.detach().clone().requires_grad_(), module.weight.detach().clone().requires_grad_()
    bias = torch.zeros_like(weight)
    expected = gradients(oracle(kind, x2, weight, bias, module.eps), [x2 if wanted == "x" else weight], g)[0]
    assert_close(ours, expected, atol=1e-12, name=f"gradient of {wanted}")


@BOTH
def test_module_leaves_x_alone_without_gradients(randn, kind):
    module, x = build(kind, 5).double(), randn(3, 5)
    before = x.clone()
    with torch.no_grad():
        module(x)
    assert torch.equal(x, before), "x was modified"


@BOTH
def test_module_reads_eps_when_it_is_called(kind):
    module = build(kind, 2).double()
    module.eps = 4.0
    y = module(torch.tensor([[-2.0, 2.0]], dtype=torch.float64)).detach()
    expected = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    assert_close(y, expected, atol=1e-12, hint="eps is an attribute")
