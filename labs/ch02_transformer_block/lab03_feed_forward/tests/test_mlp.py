"""Tests of ch02/lab03. Oracles: PyTorch's activations in float64, Hugging Face's LlamaMLP, closed forms."""

import inspect
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from mlp import MLP, GatedMLP, gated, gated_width, gelu, gelu_tanh, silu
from shared.compare import assert_close
from torch import nn


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    why = "write the formula out; erf, tanh, sigmoid and relu are yours to use"
    forbid(nn.GELU, nn.SiLU, nn.GLU, "*gelu*", "*silu*", "*glu*", "*swish*", "*mish*", why=why)
    # Hugging Face's activations, if something has imported them.
    theirs = vars(sys.modules.get("transformers.activations", math)).values()
    forbid(*(c for c in theirs if inspect.isclass(c) and c.__module__ == "transformers.activations"), why=why)


# --- oracles -------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": (gelu, lambda x: F.gelu(x)),
    "gelu_tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (silu, F.silu),
}
EACH = pytest.mark.parametrize("name", ACTIVATIONS)
GATES = {"glu": torch.sigmoid, "reglu": F.relu, "geglu": F.gelu, "swiglu": F.silu}
KINDS = pytest.mark.parametrize("kind", GATES)
# No size twice, and none a power of two, except where a wrong axis would fit unnoticed.
SHAPES = [(7,), (5, 6), (3, 5, 11), (2, 3, 5, 7), (6, 6), (1, 9), ()]
# Unit roundoff: the largest relative error of rounding once.
HALVES = pytest.mark.parametrize(("dtype", "roundoff"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
FAR = [-10_000.0, -1_000.0, -300.0, -90.0, -40.0, 40.0, 90.0, 300.0, 1_000.0, 10_000.0]


def gate_oracle(kind, gate, up):
    """PyTorch's answer in float64. F.glu wants both in one tensor, and its gate second."""
    gate, up = gate.double(), up.double()
    return F.glu(torch.cat((up, gate), dim=-1), dim=-1) if kind == "glu" else GATES[kind](gate) * up


def gradients(y, inputs, upstream):
    """Autograd's gradients of (y * upstream).sum(); zeros where none flows."""
    assert y.requires_grad, "no gradient flows: is there a detach, a no_grad or a .data?"
    return torch.autograd.grad((y * upstream).sum(), inputs, allow_unused=True, materialize_grads=True)


def refuses(call, what):
    try:
        result = call()
    except ValueError:
        return
    pytest.fail(f"{what}: returned {type(result).__name__} instead of raising ValueError", pytrace=False)


# --- Part 1: GELU by erf ---------------------------------------------------------------------


def test_gelu_exact_of_a_few_numbers_by_hand():
    # Of the normal distribution, 84.134 % lie below 1 and 2.275 % below -2.
    x = torch.tensor([0.0, 1.0, -1.0, -2.0, 3.0], dtype=torch.float64)
    below = [0.5, 0.8413447460685429, 0.15865525393145707, 0.022750131948179195, 0.9986501019683699]
    hint = "x times the share of the normal distribution below x: (1 + erf(x / sqrt(2))) / 2"
    assert_close(gelu(x), x * torch.tensor(below, dtype=torch.float64), atol=1e-14, name="gelu(x)", hint=hint)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_exact_matches_pytorch(randn, shape):
    x = 2 * randn(1, *shape)[0]
    hint = "erf, not its approximation by tanh or by a sigmoid; its argument is x / sqrt(2)"
    assert_close(gelu(x), F.gelu(x), atol=1e-13, name="gelu(x)", hint=hint)


def test_gelu_exact_differs_from_the_approximation_where_it_should():
    x = torch.linspace(-6, 6, 241).double()
    hint = "`gelu` is the exact one: it differs from gelu_tanh by up to 0.0005, near |x| = 2"
    assert_close(gelu(x), F.gelu(x), atol=1e-13, name="gelu(x)", hint=hint)


def test_gelu_exact_minus_its_mirror_image_is_x(randn):
    # x Phi(x) - (-x) Phi(-x) = x (Phi(x) + Phi(-x)) = x
    x = 3 * randn(5, 7)
    assert_close(gelu(x) - gelu(-x), x, atol=1e-13, hint="Phi(x) + Phi(-x) must be 1")
    assert_close(gelu(x), F.gelu(x), atol=1e-13, name="gelu(x)")


# --- Part 1: GELU by tanh --------------------------------------------------------------------


def test_gelu_tanh_of_a_few_numbers_by_hand():
    x = [0.0, 1.0, -1.0, 2.5]
    expected = [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v * v * v))) for v in x]
    hint = "0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))"
    assert_close(
        gelu_tanh(torch.tensor(x, dtype=torch.float64)),
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-14,
        hint=hint,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_tanh_matches_pytorch(randn, shape):
    x = 2 * randn(1, *shape)[0]
    hint = "0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): which of the constants, which power?"
    expected = F.gelu(x, approximate="tanh")
    assert_close(gelu_tanh(x), expected, atol=1e-13, name="gelu_tanh(x)", hint=hint)


def test_gelu_tanh_is_the_approximation_not_the_exact_one():
    x = torch.linspace(-6, 6, 241).double()
    hint = "GPT-2 was trained with the approximation: near |x| = 2 it is off by 0.0005, and has to be"
    assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"), atol=1e-13, name="gelu_tanh(x)", hint=hint)


# --- Part 1: SiLU ------------------------------------------------------------------------------


def test_silu_of_a_few_numbers_by_hand():
    # sigmoid(ln 3) = 3 / 4
    x = torch.tensor([0.0, math.log(3), -math.log(3)], dtype=torch.float64)
    expected = x * torch.tensor([0.5, 0.75, 0.25], dtype=torch.float64)
    assert_close(silu(x), expected, atol=1e-14, name="silu(x)", hint="x / (1 + exp(-x))")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_matches_pytorch(randn, shape):
    x = 2 * randn(1, *shape)[0]
    hint = "x * sigmoid(x), without a factor in the exponent"
    assert_close(silu(x), F.silu(x), atol=1e-13, name="silu(x)", hint=hint)


# --- Part 1: all three activations -------------------------------------------------------------


@EACH
def test_activations_have_the_right_gradient(randn, name):
    mine, theirs = ACTIVATIONS[name]
    x, upstream = (2 * randn(3, 5, 7)).requires_grad_(), randn(3, 5, 7)
    y = mine(x)
    assert_close(y, theirs(x), atol=1e-13, name=f"{name}(x)")
    hint = "the value is right and the gradient is not: every x in the formula must carry one"
    (actual,), (expected,) = gradients(y, [x], upstream), gradients(theirs(x), [x], upstream)
    assert_close(actual, expected, atol=1e-12, name="gradient", hint=hint)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@EACH
def test_activations_stay_right_far_from_zero(name, dtype):
    mine, theirs = ACTIVATIONS[name]
    x = torch.tensor(FAR, dtype=dtype, requires_grad=True)
    y = mine(x)
    hint = "far from 0 it is x on the right and 0 on the left: does an exponential overflow?"
    assert_close(y, theirs(x.double()), atol=1e-12, rtol=1e-6, name=f"{name}(x)", hint=hint)
    (actual,) = gradients(y, [x], torch.ones_like(x))
    expected = torch.tensor([0.0] * 5 + [1.0] * 5)
    hint = "far from 0 the gradient is 1 on the right and 0 on the left: inf / inf on the way back?"
    assert_close(actual, expected, atol=1e-6, name="gradient", hint=hint)


@EACH
def test_activations_are_accurate_in_float32(randn, name):
    mine, theirs = ACTIVATIONS[name]
    x = 2 * randn(7, 300, dtype=torch.float32)
    y = mine(x)
    assert y.dtype == torch.float32, f"{name} of float32 is {y.dtype}"
    assert_close(y, theirs(x.double()), atol=2e-6, name=f"{name}(x)")


@HALVES
@EACH
def test_activations_of_half_precision_compute_in_float32(randn, name, dtype, roundoff):
    mine, theirs = ACTIVATIONS[name]
    x = torch.cat((2 * randn(2_000), 60 * randn(100), torch.tensor([300.0, -300.0]))).to(dtype)
    y = mine(x)
    assert y.dtype == dtype, f"{name} of {dtype} is {y.dtype}"
    hint = "compute in float32 (widen) and round once, at the end"
    assert_close(y, theirs(x.double()), atol=2e-6, rtol=1.02 * roundoff, name=f"{name}(x)", hint=hint)


@HALVES
@EACH
def test_activations_of_half_precision_pass_gradients_back(randn, name, dtype, roundoff):
    mine, theirs = ACTIVATIONS[name]
    x = (2 * randn(500)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (actual,) = gradients(mine(x), [x], torch.ones_like(x))
    (expected,) = gradients(theirs(exact), [exact], torch.ones_like(exact))
    assert_close(actual, expected, atol=4 * roundoff, name="gradient")


@EACH
def test_activations_read_strided_views_and_leave_them_alone(randn, name):
    mine, theirs = ACTIVATIONS[name]
    x = randn(6, 9, 14).transpose(0, 1)[::2, :, ::2]
    before = x.clone()
    assert_close(mine(x), theirs(before), atol=1e-13, name=f"{name}(x)", hint="x is a strided view here")
    assert torch.equal(x, before), "x was modified (an in-place operation such as *= or mul_?)"
    wide = torch.tensor([-1.0, 2.0], dtype=torch.float64)[:, None].expand(2, 3)
    assert_close(mine(wide), theirs(wide), atol=1e-13, name=f"{name}(x)")


@EACH
def test_activations_work_on_the_device_of_their_input(randn, device, name):
    mine, theirs = ACTIVATIONS[name]
    x = randn(3, 5)
    y = mine(x.to(device))
    assert y.device.type == device, f"x is on {device}, the result is on {y.device}"
    assert_close(y, theirs(x), atol=1e-12, name=f"{name}(x)")


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_in_float32_are_right_everywhere(name):
    ours = {"gelu": gelu, "gelu_tanh": gelu_tanh, "silu": silu}[name]
    theirs = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}[name]
    x = torch.linspace(-12, 12, 4801, dtype=torch.float32)
    assert_close(ours(x).double(), theirs(x.double()), atol=2e-6, name=name)


# --- Part 2: gates -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "share"), [("glu", 0.75), ("reglu", math.log(3)), ("swiglu", 0.75 * math.log(3))]
)
def test_gate_by_hand_is_the_activated_one(kind, share):
    # sigmoid(ln 3) = 3 / 4. `up` is negative: were it activated, the sign or the size would be another.
    gate, up = torch.tensor([math.log(3)], dtype=torch.float64), torch.tensor([-8.0], dtype=torch.float64)
    hint = "the activation acts on `gate`, and `up` is multiplied as it is"
    assert_close(gated(gate, up, kind), share * up, atol=1e-13, hint=hint)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s], ids=str)
@KINDS
def test_gate_matches_pytorch(randn, kind, shape):
    gate, up = 2 * randn(*shape), 2 * randn(*shape)
    hint = "activation(gate) * up; glu: sigmoid, reglu: relu, geglu: exact gelu, swiglu: silu"
    assert_close(gated(gate, up, kind), gate_oracle(kind, gate, up), atol=1e-12, hint=hint)


def test_gate_of_geglu_uses_the_exact_gelu():
    gate = torch.linspace(-4, 4, 81).double()
    up = torch.full_like(gate, 3.0)
    hint = "GEGLU is made with the exact GELU here, not with the approximation by tanh"
    assert_close(gated(gate, up, "geglu"), 3 * F.gelu(gate), atol=1e-12, hint=hint)


@KINDS
def test_gate_passes_gradients_to_both(randn, kind):
    gate, up = (2 * randn(3, 5, 7)).requires_grad_(), randn(3, 5, 7).requires_grad_()
    upstream = randn(3, 5, 7)
    y = gated(gate, up, kind)
    assert_close(y, gate_oracle(kind, gate, up), atol=1e-12)
    expected = gradients(gate_oracle(kind, gate, up), [gate, up], upstream)
    for name, a, e in zip(("gate", "up"), gradients(y, [gate, up], upstream), expected, strict=True):
        assert_close(a, e, atol=1e-12, name=f"the gradient of {name}")


@KINDS
def test_gate_stays_right_far_from_zero(kind):
    gate = torch.tensor(FAR, dtype=torch.float32, requires_grad=True)
    up = torch.tensor([3.0, -10_000.0] * 5, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in (gate, up)]
    y, expected = gated(gate, up, kind), gate_oracle(kind, *exact)
    hint = "does an exponential overflow, forward or on the way back?"
    assert_close(y, expected, atol=1e-6, rtol=1e-6, hint=hint)
    one = torch.ones_like(gate)
    results = zip(("gate", "up"), gradients(y, [gate, up], one), gradients(expected, exact, one), strict=True)
    for name, a, e in results:
        assert_close(a, e, atol=1e-6, rtol=1e-6, name=f"the gradient of {name}", hint=hint)


@HALVES
@KINDS
def test_gate_of_half_precision_rounds_only_the_product(randn, kind, dtype, roundoff):
    gate, up = (2 * randn(3_000)).to(dtype), (2 * randn(3_000)).to(dtype)
    y = gated(gate, up, kind)
    assert y.dtype == dtype, f"the inputs are {dtype}, the result is {y.dtype}"
    hint = "widen before the activation, and round after the product, not before it as well"
    assert_close(y, gate_oracle(kind, gate, up), atol=4e-6, rtol=1.02 * roundoff, hint=hint)


@KINDS
def test_gate_in_float32_reads_strided_views_and_leaves_them_alone(randn, kind):
    both = randn(3, 5, 14, dtype=torch.float32)
    gate, up = both[..., 0::2], both[..., 1::2]
    before = both.clone()
    y = gated(gate, up, kind)
    assert y.dtype == torch.float32, f"the inputs are float32, the result is {y.dtype}"
    assert_close(y, gate_oracle(kind, gate, up), atol=5e-6)
    assert torch.equal(both, before), "gate or up was modified (relu_, mul_ or *=?)"


@KINDS
def test_gate_works_on_the_device_of_its_inputs(randn, device, kind):
    gate, up = randn(3, 5), randn(3, 5)
    y = gated(gate.to(device), up.to(device), kind)
    assert y.device.type == device, f"the inputs are on {device}, the result is on {y.device}"
    assert_close(y, gate_oracle(kind, gate, up), atol=1e-12)


def test_gate_refuses_an_unknown_kind(randn):
    gate, up = randn(2, 3), randn(2, 3)
    assert_close(gated(gate, up, "swiglu"), gate_oracle("swiglu", gate, up), atol=1e-12)
    for kind in ("bilinear", "SwiGLU", ""):
        refuses(lambda k=kind: gated(gate, up, k), f"kind {kind!r}")


# --- Part 2: how wide ------------------------------------------------------------------------------


def search(plain_width, multiple_of):
    """The first multiple with which three matrices weigh at least as much as two."""
    width = multiple_of
    while 3 * width < 2 * plain_width:
        width += multiple_of
    return width


@pytest.mark.parametrize(
    ("d_model", "multiple_of", "width"),
    [(4096, 256, 11008), (5120, 256, 13824), (8192, 256, 22016), (768, 1, 2048)],
    ids=["Llama 2 7B", "Llama 2 13B", "Llama 65B", "GPT-2's size"],
)
def test_width_is_that_of_published_models(d_model, multiple_of, width):
    hint = "two thirds of 4 * d_model, up to the next multiple"
    assert_close(gated_width(4 * d_model, multiple_of), width, atol=0, name="width", hint=hint)


@pytest.mark.parametrize("multiple_of", [1, 2, 3, 7, 10, 64])
def test_width_is_the_smallest_multiple_with_enough_weights(multiple_of):
    hint = "the smallest multiple with 3 * width >= 2 * plain_width"
    for plain_width in range(1, 700):
        width = gated_width(plain_width, multiple_of)
        expected, name = search(plain_width, multiple_of), f"gated_width({plain_width}, {multiple_of})"
        assert_close(width, expected, atol=0, name=name, hint=hint)


def test_width_of_a_multiple_of_three_is_exactly_two_thirds():
    for third in (1, 5, 1024, 4097, 123_457):
        hint = "no rounding is needed here: it must be exactly two thirds"
        assert_close(gated_width(3 * third), 2 * third, atol=0, name="width", hint=hint)


def test_width_needs_no_multiple_and_takes_it_by_name():
    assert_close(gated_width(100), 67, atol=0, name="width", hint="without a multiple, any integer will do")
    assert_close(gated_width(100, multiple_of=8), 72, atol=0, name="width")


def test_width_is_an_exact_integer_for_numbers_of_any_size():
    for plain_width, multiple_of in ((3 * 10**18 + 1, 1), (3 * 10**18, 1), (10**20, 7)):
        width = gated_width(plain_width, multiple_of)
        assert type(width) is int, (
            f"the width is {type(width).__name__}, expected int: nn.Linear takes no other"
        )
        enough, fewer = 3 * width >= 2 * plain_width, 3 * (width - multiple_of) < 2 * plain_width
        assert width % multiple_of == 0, f"{width} is no multiple of {multiple_of}"
        assert enough, "a little too narrow: do floats come in? Stay with integers"
        assert fewer, "a little too wide: do floats come in? Stay with integers"


@pytest.mark.parametrize(("plain_width", "multiple_of"), [(0, 1), (-3, 1), (6, 0), (6, -2)])
def test_width_refuses_what_is_below_one(plain_width, multiple_of):
    assert_close(gated_width(6, 2), 4, atol=0, name="width")
    refuses(lambda: gated_width(plain_width, multiple_of), f"gated_width({plain_width}, {multiple_of})")


# --- Part 3: the layers ----------------------------------------------------------------------------

PLAIN = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
PLAINS = pytest.mark.parametrize("activation", PLAIN)
BIASES = pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
INPUTS = pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 4, 6), (2, 3, 5, 6), (6, 6)], ids=str)


def draw_state(randn, names, d_model, d_ff, bias):
    """Draw parameters of the promised names and shapes, all different from each other."""
    state = {}
    for name in names:
        out, width = (d_model, d_ff) if name == "down_proj" else (d_ff, d_model)
        state[f"{name}.weight"] = randn(out, width) / math.sqrt(width)
        if bias:
            state[f"{name}.bias"] = randn(out)
    return state


def plain_state(randn, d_model, d_ff, bias=True):
    return draw_state(randn, ("up_proj", "down_proj"), d_model, d_ff, bias)


def gated_state(randn, d_model, d_ff, bias=False):
    return draw_state(randn, ("gate_proj", "up_proj", "down_proj"), d_model, d_ff, bias)


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def plain_oracle(state, activation, x):
    return linear(state, "down_proj", PLAIN[activation](linear(state, "up_proj", x)))


def gated_oracle(state, kind, x):
    gate, up = linear(state, "gate_proj", x), linear(state, "up_proj", x)
    return linear(state, "down_proj", GATES[kind](gate) * up)


def load(module, state):
    """Give the learner's module the parameters `state`, in their dtype."""
    module = module.to(next(iter(state.values())).dtype)
    assert set(module.state_dict()) == set(state), (
        f"the state dict should hold {sorted(state)}, but holds {sorted(module.state_dict())}"
    )
    module.load_state_dict(state)
    return module


def compare_gradients(module, state, x, oracle):
    """Compare the gradients with respect to x and every parameter with those of the oracle."""
    x = x.clone().requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    parameters = dict(module.named_parameters())
    assert set(parameters) == set(state), "everything in the state dict must be a parameter"
    y, expected = module(x), oracle(leaves, x)
    assert_close(y, expected, atol=1e-12, name="y")
    upstream = torch.cos(torch.arange(y.numel()).double()).reshape(y.shape)
    actual = gradients(y, [x, *(parameters[name] for name in leaves)], upstream)
    wanted = gradients(expected, [x, *leaves.values()], upstream)
    for name, a, e in zip(("x", *leaves), actual, wanted, strict=True):
        assert_close(a, e, atol=1e-12, name=f"the gradient of {name}")


@BIASES
def test_mlp_has_the_promised_parameters(randn, bias):
    module = MLP(6, 10, bias=bias)
    state = plain_state(randn, 6, 10, bias)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {name: tuple(v.shape) for name, v in state.items()}
    x = randn(3, 6)
    assert_close(load(module, state)(x), plain_oracle(state, "gelu_tanh", x), atol=1e-12, name="y")


@INPUTS
@PLAINS
def test_mlp_matches_the_formula(randn, activation, shape):
    state, x = plain_state(randn, 6, 10), 2 * randn(*shape)
    module = load(MLP(6, 10, activation=activation), state)
    hint = "down_proj(activation(up_proj(x))): one activation, between the two"
    assert_close(module(x), plain_oracle(state, activation, x), atol=1e-12, name="y", hint=hint)


def test_mlp_uses_gelu_by_tanh_and_biases_without_being_told(randn):
    state, x = plain_state(randn, 6, 10), 3 * randn(4, 6)
    y = load(MLP(6, 10), state)(x)
    assert_close(
        y, plain_oracle(state, "gelu_tanh", x), atol=1e-12, name="y", hint="the default is gelu_tanh"
    )


@PLAINS
def test_mlp_gradients_match_the_formula(randn, activation):
    state, x = plain_state(randn, 6, 10), randn(2, 3, 6)
    module = load(MLP(6, 10, activation=activation), state)
    compare_gradients(module, state, x, lambda s, x: plain_oracle(s, activation, x))


def test_mlp_refuses_an_unknown_activation(randn):
    state, x = plain_state(randn, 6, 10), randn(4, 6)
    assert_close(load(MLP(6, 10, activation="relu"), state)(x), plain_oracle(state, "relu", x), atol=1e-12)
    for activation in ("tanh", "GELU", "", "swiglu"):
        refuses(lambda a=activation: MLP(6, 10, activation=a), f"activation {activation!r}")


@BIASES
def test_gated_mlp_has_the_promised_parameters(randn, bias):
    module = GatedMLP(6, 10, bias=bias)
    state = gated_state(randn, 6, 10, bias)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {name: tuple(v.shape) for name, v in state.items()}, "d_ff is taken as it is given"
    x = randn(3, 6)
    assert_close(load(module, state)(x), gated_oracle(state, "swiglu", x), atol=1e-12, name="y")


@INPUTS
@KINDS
def test_gated_mlp_matches_the_formula(randn, kind, shape):
    state, x = gated_state(randn, 6, 10), 2 * randn(*shape)
    module = load(GatedMLP(6, 10, kind=kind), state)
    hint = "down_proj(activation(gate_proj(x)) * up_proj(x)): is the gate the one that is activated?"
    assert_close(module(x), gated_oracle(state, kind, x), atol=1e-12, name="y", hint=hint)


def test_gated_mlp_is_swiglu_without_biases_if_not_told_otherwise(randn):
    state, x = gated_state(randn, 6, 10), 3 * randn(4, 6)
    hint = "the defaults are swiglu and no biases"
    y = load(GatedMLP(6, 10), state)(x)
    assert_close(y, gated_oracle(state, "swiglu", x), atol=1e-12, name="y", hint=hint)


@BIASES
@KINDS
def test_gated_mlp_gradients_match_the_formula(randn, kind, bias):
    state, x = gated_state(randn, 6, 10, bias), randn(2, 3, 6)
    module = load(GatedMLP(6, 10, kind=kind, bias=bias), state)
    compare_gradients(module, state, x, lambda s, x: gated_oracle(s, kind, x))


def test_gated_mlp_refuses_an_unknown_kind(randn):
    state, x = gated_state(randn, 6, 10), randn(4, 6)
    assert_close(load(GatedMLP(6, 10, kind="glu"), state)(x), gated_oracle(state, "glu", x), atol=1e-12)
    for kind in ("gelu", "SwiGLU", ""):
        refuses(lambda k=kind: GatedMLP(6, 10, kind=k), f"kind {kind!r}, when the layer is made")


@pytest.mark.parametrize("d_ff", [12, 30, 300])
def test_gated_mlp_of_gated_width_has_as_many_weights_as_a_plain_one(randn, d_ff):
    plain, fair = MLP(7, d_ff, bias=False), GatedMLP(7, gated_width(d_ff))
    counts = [sum(p.numel() for p in module.parameters()) for module in (plain, fair)]
    assert counts[0] == counts[1] == 14 * d_ff, f"plain has {counts[0]} weights, gated {counts[1]}"
    state, x = gated_state(randn, 7, 2 * d_ff // 3), randn(3, 7)
    assert_close(load(fair, state)(x), gated_oracle(state, "swiglu", x), atol=1e-12, name="y")


# --- Part 3: both layers -------------------------------------------------------------------------------


def both(randn, d_model=6, d_ff=10):
    """Both layers in float64, with their oracles."""
    plain, fair = plain_state(randn, d_model, d_ff), gated_state(randn, d_model, d_ff)
    return [
        (load(MLP(d_model, d_ff), plain), lambda x: plain_oracle(plain, "gelu_tanh", x)),
        (load(GatedMLP(d_model, d_ff), fair), lambda x: gated_oracle(fair, "swiglu", x)),
    ]


def test_layers_read_strided_views_and_leave_them_alone(randn):
    for module, oracle in both(randn):
        x = randn(5, 3, 12).transpose(0, 1)[..., ::2]
        before, state = x.clone(), {n: v.clone() for n, v in module.state_dict().items()}
        assert_close(module(x), oracle(before), atol=1e-12, name="y", hint="x is a strided view here")
        assert torch.equal(x, before), "x was modified"
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), f"{name} was modified"


def test_layers_leave_no_trace_on_the_next_call_or_on_each_other(randn):
    cases = both(randn) + both(randn)
    inputs = [randn(2, 3, 6), randn(4, 6), randn(2, 3, 6)]
    hint = "a layer remembers an earlier call, or shares something with another layer"
    for x in inputs:
        for module, oracle in cases:
            assert_close(module(x), oracle(x), atol=1e-12, name="y", hint=hint)
    for module, _ in cases[:2]:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-0.5)
        state = module.state_dict()
        oracle = gated_oracle if "gate_proj.weight" in state else plain_oracle
        expected = oracle(state, "swiglu" if oracle is gated_oracle else "gelu_tanh", inputs[0])
        hint = "the layer still works with parameters it had before"
        assert_close(module(inputs[0]), expected, atol=1e-12, name="y", hint=hint)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_do_the_same_in_training_and_in_evaluation(randn, mode):
    for module, oracle in both(randn):
        x = randn(5, 6)
        assert_close(
            module.train(mode == "train")(x), oracle(x), atol=1e-12, name="y", hint="no dropout here"
        )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_layers_in_lower_precision_stay_close_to_float64(randn, dtype, atol):
    for module, oracle in both(randn):
        x = randn(2, 5, 6, dtype=dtype)
        y, expected = module.to(dtype)(x), oracle(x.double())
        assert y.dtype == dtype, f"x is {dtype}, the result is {y.dtype}"
        assert_close(y, expected, atol=atol, name="y")


def test_layers_work_on_the_device_of_their_input(randn, device):
    for module, oracle in both(randn):
        x = randn(3, 6)
        y = module.to(device)(x.to(device))
        assert y.device.type == device, f"x is on {device}, the result is on {y.device}"
        assert_close(y, oracle(x), atol=1e-12, name="y")


def test_layers_of_different_kinds_do_not_disturb_each_other(randn):
    x = randn(4, 6)
    families = (
        [lambda kind=kind: GatedMLP(6, 10, kind=kind).double() for kind in ("swiglu", "reglu", "glu")],
        [lambda name=name: MLP(6, 10, activation=name).double() for name in ("gelu", "relu", "gelu_tanh")],
    )
    for family in families:
        first = family[0]()
        alone = first(x).detach()
        for make in family[1:]:
            make()(x)
        assert_close(first(x), alone, atol=0, hint="a layer made later changed an earlier one")


# --- Part 3: Hugging Face ----------------------------------------------------------------------------


def wave(*shape, phase=0.0):
    """The tensors with which Hugging Face's outputs below were recorded."""
    angles = 1.7 * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64) + phase
    return torch.sin(angles).reshape(shape)


# Recorded in float64 from transformers 5.16.1, whose import takes longer than all the tests here. The
# test marked slow compares with the live library (pytest --slow).
# LlamaMLP with hidden_size 6 and intermediate_size 10: y at [1]
HF_Y = [
    [5.5903078290, -2.3100683782, -4.3190155769, 4.6869378647, 1.7396686407, -5.6443239252],
    [-2.8195540771, 11.7828790484, -3.6648785846, -9.7659985987, 9.0393681322, 4.7913931804],
    [-11.4791157619, 3.2650735336, 9.6822586969, -8.5934787795, -4.9530380840, 11.3192677648],
]
# and the gradient of y.sum() with respect to x, at [1]
HF_GRAD_X = [
    [-3.6954532787, 4.7339309954, 2.4755713884, -5.3718584827, -1.0913026092, 5.6530751483],
    [5.7800705180, -1.0937660952, -5.4982190392, 2.5105965985, 4.8512659409, -3.7607144122],
    [-3.9918938398, -5.6300495093, 5.4426956036, 4.2275267840, -6.5320827048, -2.5442809984],
]


def test_layers_agree_with_hugging_face_llama():
    state = {
        "gate_proj.weight": wave(10, 6),
        "up_proj.weight": wave(10, 6, phase=1.0),
        "down_proj.weight": wave(6, 10, phase=2.0),
    }
    x = wave(2, 3, 6, phase=3.0).requires_grad_()
    y = load(GatedMLP(6, 10), state)(x)
    hint = "differs from LlamaMLP with the same weights"
    assert_close(y[1], torch.tensor(HF_Y, dtype=torch.float64), atol=1e-8, name="y[1]", hint=hint)
    (grad_x,) = gradients(y, [x], torch.ones_like(y))
    expected = torch.tensor(HF_GRAD_X, dtype=torch.float64)
    assert_close(grad_x[1], expected, atol=1e-8, name="the gradient of x at [1]", hint=hint)


@pytest.mark.slow
@BIASES
def test_live_llama_agrees_on_outputs_and_gradients(randn, bias):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=12, intermediate_size=34, mlp_bias=bias, num_attention_heads=3)
    theirs = llama.LlamaMLP(config).double()
    state = gated_state(randn, 12, 34, bias)
    theirs.load_state_dict(state)
    mine = load(GatedMLP(12, 34, bias=bias), state)
    x, upstream = randn(2, 5, 12).requires_grad_(), randn(2, 5, 12)
    y, expected = mine(x), theirs(x)
    hint = "differs from the installed LlamaMLP with the same weights"
    assert_close(y, expected, atol=1e-12, name="y", hint=hint)
    results = []
    for module, out in ((mine, y), (theirs, expected)):
        parameters = dict(module.named_parameters())
        results.append(gradients(out, [x, *(parameters[name] for name in state)], upstream))
    for name, a, e in zip(("x", *state), *results, strict=True):
        assert_close(a, e, atol=1e-12, name=f"the gradient of {name}", hint=hint)
