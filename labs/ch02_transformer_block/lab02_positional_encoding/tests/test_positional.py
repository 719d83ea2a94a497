"""Tests of ch02/lab02. Oracles: closed forms, complex numbers in float64, and Hugging Face's models."""

import math

import pytest
import torch
from positional import (
    LearnedPositions,
    alibi_bias,
    alibi_slopes,
    apply_rope,
    half_to_interleaved,
    interleaved_to_half,
    rope_tables,
    sinusoidal,
)
from shared.compare import assert_close

FAR = 131_071  # the last position of a context of 128k tokens

# --- oracles -------------------------------------------------------------------------------


def angle(position, i, width, base=10000.0):
    return position * math.pow(base, -2 * i / width)


def formula(trig, positions, width, base=10000.0):
    """trig(angle) for every position and pair, by Python's own functions: (T, width / 2), float64."""
    rows = [[trig(angle(p, i, width, base)) for i in range(width // 2)] for p in positions]
    return torch.tensor(rows, dtype=torch.float64)


def sinusoidal_formula(positions, width, base=10000.0):
    table = torch.empty(len(positions), width, dtype=torch.float64)
    table[:, 0::2] = formula(math.sin, positions, width, base)
    table[:, 1::2] = formula(math.cos, positions, width, base)
    return table


def turn(x, positions, layout, base=10000.0):
    """RoPE by complex numbers: pair i of token t becomes (a + ib) * exp(i * angle), in float64."""
    x, D = x.double(), x.shape[-1]
    pairs = {
        "half": [(i, i + D // 2) for i in range(D // 2)],
        "interleaved": [(2 * i, 2 * i + 1) for i in range(D // 2)],
    }[layout]
    y = torch.empty_like(x)
    for i, (a, b) in enumerate(pairs):
        theta = torch.tensor([angle(p, i, D, base) for p in positions], dtype=torch.float64)
        z = torch.complex(x[..., a].contiguous(), x[..., b].contiguous()) * torch.polar(
            torch.ones_like(theta), theta
        )
        y[..., a], y[..., b] = z.real, z.imag
    return y


def exact_tables(positions, D, base=10000.0, dtype=torch.float64):
    """The oracle's tables, so that a test of `apply_rope` does not depend on `rope_tables`."""
    return tuple(formula(f, positions, D, base).to(dtype) for f in (math.cos, math.sin))


def refuses(call, what):
    try:
        result = call()
    except ValueError:
        return
    pytest.fail(f"{what}: returned {type(result).__name__} instead of raising ValueError", pytrace=False)


def wave(*shape):
    """The input with which Hugging Face's outputs below were recorded."""
    n = math.prod(shape)
    return torch.sin(torch.arange(1, n + 1, dtype=torch.float64) * 1.7).reshape(shape).float()


# Recorded from transformers 5.16.1: importing its models takes longer than all the tests here. The tests
# marked slow compare with the live library (pytest --slow).
# modeling_gptj.create_sinusoidal_positions(20, 6), rows 0, 1, 7, 19: all sines, then all cosines
HF_SINUSOIDAL = [
    [0.0, 0.0, 0.0, 1.0, 1.0, 1.0],
    [0.841471, 0.0463992, 0.0021544, 0.5403023, 0.9989229, 0.9999977],
    [0.6569866, 0.3192246, 0.0150805, 0.7539023, 0.9476791, 0.9998863],
    [0.1498772, 0.7719492, 0.0409228, 0.9887046, 0.6356842, 0.9991623],
]
# LlamaRotaryEmbedding with head_dim 6, rope_theta 500, positions 0, 1, 7, 30: first half of each row
HF_POSITIONS = [0, 1, 7, 30]
HF_COS = [
    [1.0, 1.0, 1.0],
    [0.5403023362, 0.9920734763, 0.9998739958],
    [0.7539022565, 0.6356510520, 0.9938327074],
    [0.1542514563, -0.8031869531, 0.8887339830],
]
HF_SIN = [
    [0.0, 0.0, 0.0],
    [0.8414709568, 0.1256590337, 0.0158733428],
    [0.6569865942, 0.7719764709, 0.1108895391],
    [-0.9880316257, -0.5957270861, 0.4584232867],
]
# modeling_llama.apply_rotary_pos_emb of wave(2, 3, 4, 6) with these tables, at [1, 2]
HF_HALF = [
    [-0.9972396, 0.0548573, 0.9831035, -0.3081923, -0.9036857, 0.5410621],
    [-0.3325603, -0.7756051, -0.558535, 1.1217774, 0.2503102, -0.9840344],
    [0.5577322, 0.3189803, -0.2564582, -0.7838901, 1.0319532, 0.8284904],
    [0.3789118, -0.0007315, 0.8280076, 0.6959991, 1.1586912, 0.1550201],
]
# modeling_gptj.apply_rotary_pos_emb of wave(2, 3, 4, 6) with base 10000, the same positions, at [1, 2]
HF_INTERLEAVED = [
    [-0.9972396, 0.0548573, 0.9831035, -0.3081923, -0.9036857, 0.5410621],
    [1.03394, 0.2443576, -0.6145732, 0.8583475, 0.3478878, -0.9742973],
    [-0.7278611, 0.691348, 0.1511483, -0.9593425, 0.3968244, 0.8579014],
    [-0.7784801, 0.5153071, -0.3309643, 0.8795962, -0.9135194, -0.3014381],
]
# the slopes in modeling_bloom.build_alibi_tensor
HF_SLOPES = {
    1: [0.00390625],
    2: [0.0625, 0.00390625],
    3: [0.0625, 0.00390625, 0.25],
    5: [0.25, 0.0625, 0.015625, 0.00390625, 0.5],
    6: [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125],
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
    10: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.70710677, 0.35355338],
}

# --- Part 1: sinusoidal --------------------------------------------------------------------


def test_sinusoidal_of_four_features_by_hand():
    # base 100: the frequencies are 1 and 100^(-2/4) = 1/10.
    expected = [
        [0.0, 1.0, 0.0, 1.0],
        [math.sin(1), math.cos(1), math.sin(0.1), math.cos(0.1)],
        [math.sin(2), math.cos(2), math.sin(0.2), math.cos(0.2)],
    ]
    assert_close(
        sinusoidal(3, 4, base=100.0, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-12,
        hint="sines in the even columns, cosines in the odd ones; pair i has frequency base^(-2i / d_model)",
    )


@pytest.mark.parametrize(
    ("T", "d_model", "base"), [(7, 6, 10000.0), (5, 14, 10000.0), (11, 2, 500.0), (1, 10, 70.0)]
)
def test_sinusoidal_matches_the_formula(T, d_model, base):
    assert_close(
        sinusoidal(T, d_model, base, dtype=torch.float64),
        sinusoidal_formula(range(T), d_model, base),
        atol=1e-12,
        hint="the angle of pair i at position p is p * base^(-2i / d_model)",
    )


def test_sinusoidal_matches_hugging_face():
    recorded = torch.tensor(HF_SINUSOIDAL)  # keeps sines and cosines apart; the columns are the same
    expected = torch.stack((recorded[:, :3], recorded[:, 3:]), dim=-1).flatten(1)
    assert_close(sinusoidal(20, 6)[[0, 1, 7, 19]], expected, atol=1e-6, hint="the default base is 10000")


def test_sinusoidal_shift_by_k_is_the_same_rotation_at_every_position():
    T, d_model, k = 40, 6, 9
    table = sinusoidal(T, d_model, dtype=torch.float64)
    z = torch.complex(table[:, 1::2].contiguous(), table[:, 0::2].contiguous())  # cos + i sin
    step = torch.complex(formula(math.cos, [k], d_model), formula(math.sin, [k], d_model))
    shifted = z[:-k] * step
    assert_close(
        z[k:].real, shifted.real, atol=1e-12, hint="PE[p + k] must be PE[p] rotated by k times the frequency"
    )
    assert_close(z[k:].imag, shifted.imag, atol=1e-12)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_sinusoidal_goes_on_far_beyond_any_training_length(dtype, atol):
    rows = [2_048, 65_537, FAR]
    table = sinusoidal(FAR + 1, 6, dtype=dtype)
    assert table.dtype == dtype, f"asked for {dtype}, got {table.dtype}"
    assert_close(
        table[rows],
        sinusoidal_formula(rows, 6),
        atol=atol,
        hint="far positions are imprecise: compute angles in float64 (all factors), round only the result",
    )


def test_sinusoidal_is_float32_by_default():
    table = sinusoidal(5, 6)
    assert table.dtype == torch.float32
    assert_close(table, sinusoidal_formula(range(5), 6), atol=1e-6)


def test_sinusoidal_refuses_an_odd_number_of_features():
    assert_close(sinusoidal(3, 6, dtype=torch.float64), sinusoidal_formula(range(3), 6), atol=1e-12)
    for d_model in (1, 5, 7):
        refuses(lambda d=d_model: sinusoidal(3, d), f"d_model {d_model} leaves a sine without its cosine")


# --- Part 1: learned -----------------------------------------------------------------------


def learned(randn, max_positions, d_model):
    """The learner's module in float64, with a table of the test's own."""
    module = LearnedPositions(max_positions, d_model).double()
    weight = randn(max_positions, d_model)
    module.load_state_dict({"weight": weight})
    return module, weight


def test_learned_init_draws_a_normal_table_with_std_002():
    module = LearnedPositions(500, 70)
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {"weight": (500, 70)}, (
        "the module must have one nn.Parameter, `weight`, of shape (max_positions, d_model)"
    )
    assert set(module.state_dict()) == {"weight"}, "the state dict must hold `weight` and nothing else"
    weight = module.weight.detach()
    assert abs(weight.mean().item()) < 1e-3, f"mean {weight.mean():.3g}, expected 0"
    assert 0.0195 < weight.std().item() < 0.0205, f"standard deviation {weight.std():.3g}, expected 0.02"
    assert weight.abs().max() > 0.06, "no entry beyond 3 standard deviations: is the distribution normal?"
    assert (weight.std(0) > 0.015).all(), "some feature is the same at all positions"
    assert (weight.std(1) > 0.01).all(), "some position has the same number in all features"


def test_learned_adds_row_t_to_token_t(randn):
    module, weight = learned(randn, 11, 6)
    x = randn(2, 7, 6)
    expected = torch.stack([torch.stack([x[b, t] + weight[t] for t in range(7)]) for b in range(2)])
    assert_close(module(x), expected, atol=1e-12, hint="token t of every sequence gets row t, unscaled")


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_learned_offset_is_the_position_of_the_first_token(randn, offset):
    module, weight = learned(randn, 11, 6)
    x = randn(2, 3, 6)
    expected = torch.stack([x[:, t] + weight[offset + t] for t in range(3)], dim=1)
    assert_close(module(x, offset=offset), expected, atol=1e-12, hint="token t gets row offset + t")


def test_learned_token_by_token_equals_all_at_once(randn):
    module, weight = learned(randn, 9, 4)
    x = randn(3, 9, 4)
    steps = torch.cat([module(x[:, t : t + 1], t) for t in range(9)], dim=1)
    assert_close(steps, x + weight, atol=1e-12, hint="one token at offset t must get row t, up to the last")


def test_learned_knows_nothing_beyond_its_table(randn):
    module, weight = learned(randn, 7, 4)
    x = randn(2, 3, 4)
    assert_close(
        module(x, offset=4), x + weight[4:7], atol=1e-12, hint="the last rows are still in the table"
    )
    refuses(lambda: module(x, offset=5), "offset 5 and 3 tokens, of 7 positions")
    refuses(lambda: module(x, offset=7), "offset 7 and 3 tokens, of 7 positions")
    refuses(lambda: module(x[:, :1], offset=7), "offset 7 and 1 token, of 7 positions")
    refuses(lambda: module(randn(2, 8, 4)), "8 tokens, of 7 positions")


def test_learned_refuses_negative_positions(randn):
    module, weight = learned(randn, 7, 4)
    x = randn(2, 3, 4)
    assert_close(module(x, offset=0), x + weight[:3], atol=1e-12)
    refuses(lambda: module(x, offset=-1), "offset -1")
    refuses(lambda: module(x, offset=-3), "offset -3: Python counts from the end in silence")


def test_learned_keeps_no_count_between_calls(randn):
    module, weight = learned(randn, 11, 4)
    x = randn(2, 3, 4)
    for offset in (0, 5, 0, 0):
        expected = x + weight[offset : offset + 3]
        hint = "the offset alone says where x begins, 0 without one"
        assert_close(module(x, offset=offset), expected, atol=1e-12, hint=hint)
        assert_close(module(x[:, :1]), x[:, :1] + weight[0], atol=1e-12, hint=hint)


def test_learned_gradients_reach_the_input_and_the_rows_in_use(randn):
    module, _ = learned(randn, 8, 5)
    x, g = randn(2, 3, 5).requires_grad_(), randn(2, 3, 5)
    (module(x, offset=2) * g).sum().backward()
    expected = torch.zeros(8, 5, dtype=torch.float64)
    expected[2:5] = g.sum(0)
    assert module.weight.grad is not None, "no gradient reaches `weight`: is it used as a Parameter?"
    assert_close(module.weight.grad, expected, atol=1e-12, hint="row offset + t sums over the batch")
    assert_close(x.grad, g, atol=1e-12, hint="the gradient of the input")


def test_learned_leaves_its_input_alone_and_reads_strided_views(randn):
    module, weight = learned(randn, 6, 4)
    x = randn(5, 2, 4).transpose(0, 1)
    before = x.clone()
    assert_close(module(x), before + weight[:5], atol=1e-12)
    assert torch.equal(x, before), "the input was changed (in-place +=?)"
    assert torch.equal(module.weight.detach(), weight), "a forward pass changed the table"


# --- Part 2: the tables of RoPE ------------------------------------------------------------


def test_rope_tables_by_hand():
    # head_dim 4, base 100: the frequencies are 1 and 1/10.
    cos, sin = rope_tables(torch.tensor([0, 1, 3]), 4, base=100.0, dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.1], [3.0, 0.3]], dtype=torch.float64)
    hint = "the angle of pair i at position p is p * base^(-2i / head_dim)"
    assert_close(cos, expected.cos(), atol=1e-12, name="cos", hint=hint)
    assert_close(sin, expected.sin(), atol=1e-12, name="sin", hint=hint)


@pytest.mark.parametrize(("head_dim", "base"), [(2, 10000.0), (6, 10000.0), (10, 500.0), (14, 500000.0)])
def test_rope_tables_match_the_formula(head_dim, base):
    positions = [0, 1, 2, 3, 50, 999]
    cos, sin = rope_tables(torch.tensor(positions), head_dim, base, dtype=torch.float64)
    assert_close(cos, formula(math.cos, positions, head_dim, base), atol=1e-11, name="cos")
    assert_close(sin, formula(math.sin, positions, head_dim, base), atol=1e-11, name="sin")


def test_rope_tables_match_hugging_face():
    cos, sin = rope_tables(torch.tensor(HF_POSITIONS), 6, base=500.0)
    hint = "differs from LlamaRotaryEmbedding"
    assert_close(cos, torch.tensor(HF_COS), atol=3e-6, name="cos", hint=hint)
    assert_close(sin, torch.tensor(HF_SIN), atol=3e-6, name="sin", hint=hint)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rope_tables_positions_have_any_order_and_may_repeat(dtype):
    positions = [5, 0, 17, 5, 3]
    given = torch.tensor(positions, dtype=dtype)
    cos, sin = rope_tables(given, 6, dtype=torch.float64)
    hint = "row t belongs to positions[t], not to t; the default base is 10000"
    assert_close(cos, formula(math.cos, positions, 6), atol=1e-12, name="cos", hint=hint)
    assert_close(sin, formula(math.sin, positions, 6), atol=1e-12, name="sin", hint=hint)
    assert given.tolist() == positions, "the positions were changed"
    assert given.dtype == dtype


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-9)])
def test_rope_tables_go_on_far_beyond_any_training_length(dtype, atol):
    positions = [2_048, 65_537, 100_003, FAR]
    cos, sin = rope_tables(torch.tensor(positions), 10, dtype=dtype)
    hint = "far positions are imprecise: compute angles in float64 (all factors), round only the result"
    assert (cos.dtype, sin.dtype) == (dtype, dtype), f"asked for {dtype}, got {cos.dtype} and {sin.dtype}"
    assert_close(cos, formula(math.cos, positions, 10), atol=atol, name="cos", hint=hint)
    assert_close(sin, formula(math.sin, positions, 10), atol=atol, name="sin", hint=hint)


def test_rope_tables_are_float32_by_default():
    cos, sin = rope_tables(torch.tensor([4, 5, 6]), 6)
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    assert_close(cos, formula(math.cos, [4, 5, 6], 6), atol=1e-6, name="cos")
    assert_close(sin, formula(math.sin, [4, 5, 6], 6), atol=1e-6, name="sin")


def test_rope_tables_refuse_an_odd_head_dim():
    cos, _ = rope_tables(torch.tensor([0, 2]), 6, dtype=torch.float64)
    assert_close(cos, formula(math.cos, [0, 2], 6), atol=1e-12)
    for head_dim in (1, 5, 7):
        refuses(
            lambda d=head_dim: rope_tables(torch.tensor([0, 2]), d), f"head_dim {head_dim} leaves one alone"
        )


# --- Part 2: the rotation ------------------------------------------------------------------

LAYOUTS = pytest.mark.parametrize("layout", ["half", "interleaved"])
# B, H, T, D
SHAPES = [(2, 3, 5, 6), (1, 5, 7, 10), (3, 2, 4, 2), (2, 4, 1, 14), (2, 5, 5, 10), (3, 3, 3, 6)]


@pytest.mark.parametrize(
    ("layout", "expected"), [("half", [-3.0, 20.0, 1.0, 40.0]), ("interleaved", [-2.0, 1.0, 30.0, 40.0])]
)
def test_rotation_of_one_pair_by_a_right_angle(layout, expected):
    # Pair 0 turns by 90 degrees, (a, b) -> (-b, a); pair 1 stays.
    x = {"half": [1.0, 20.0, 3.0, 40.0], "interleaved": [1.0, 2.0, 30.0, 40.0]}[layout]
    x = torch.tensor(x, dtype=torch.float64).reshape(1, 1, 1, 4)
    cos, sin = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    assert_close(
        apply_rope(x.clone(), cos, sin, layout=layout)[0, 0, 0],
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-12,
        hint="(a, b) becomes (a cos - b sin, a sin + b cos) and goes back to its two places",
    )


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_matches_complex_numbers(randn, layout, shape):
    x, positions = randn(*shape), [3 * t + 1 for t in range(shape[2])]
    assert_close(
        apply_rope(x.clone(), *exact_tables(positions, shape[3]), layout=layout),
        turn(x, positions, layout),
        atol=1e-11,
        hint="pair i of token t must be multiplied by exp(i * angle): cos[t, i] and sin[t, i]",
    )


def test_rotation_half_matches_hugging_face_llama():
    x = wave(2, 3, 4, 6)
    y = apply_rope(x.clone(), torch.tensor(HF_COS), torch.tensor(HF_SIN), layout="half")
    assert_close(y[1, 2], torch.tensor(HF_HALF), atol=2e-6, hint="differs from Llama's apply_rotary_pos_emb")
    assert_close(y, turn(x, HF_POSITIONS, "half", 500.0).float(), atol=5e-6)


def test_rotation_interleaved_matches_hugging_face_gptj():
    x = wave(2, 3, 4, 6)
    cos, sin = exact_tables(HF_POSITIONS, 6, dtype=torch.float32)
    y = apply_rope(x.clone(), cos, sin, layout="interleaved")
    assert_close(
        y[1, 2], torch.tensor(HF_INTERLEAVED), atol=2e-6, hint="differs from GPT-J's apply_rotary_pos_emb"
    )
    assert_close(y, turn(x, HF_POSITIONS, "interleaved").float(), atol=2e-6)


def test_rotation_uses_the_half_layout_by_default(randn):
    x = randn(2, 3, 4, 6)
    assert_close(
        apply_rope(x.clone(), *exact_tables([1, 2, 3, 4], 6)), turn(x, [1, 2, 3, 4], "half"), atol=1e-12
    )


@LAYOUTS
def test_rotation_at_position_zero_changes_nothing(randn, layout):
    x = randn(2, 3, 2, 6)
    y = apply_rope(x.clone(), *exact_tables([0, 1], 6), layout=layout)
    assert_close(y[:, :, 0], x[:, :, 0], atol=1e-12, hint="position 0 has angle 0")
    assert_close(y[:, :, 1], turn(x, [0, 1], layout)[:, :, 1], atol=1e-12, hint="position 1 does turn")


@LAYOUTS
def test_rotation_keeps_every_norm(randn, layout):
    x, positions = 5 * randn(2, 3, 4, 10), [0, 11, 222, 3333]
    y = apply_rope(x.clone(), *exact_tables(positions, 10), layout=layout)
    assert_close(y.norm(dim=-1), x.norm(dim=-1), atol=1e-11, hint="a rotation does not change lengths")
    assert_close(y, turn(x, positions, layout), atol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("start", [0, 1, 1_000, 100_000])
def test_scores_depend_only_on_the_distance(randn, layout, start):
    # Tables and rotation together. The query stands at start + 7, the keys at start + 0, 1, ..., 12.
    q, k = randn(1, 2, 1, 10), randn(1, 2, 13, 10)
    at_q, at_k = torch.tensor([start + 7]), torch.arange(start, start + 13)
    turned_q = apply_rope(q.clone(), *rope_tables(at_q, 10, dtype=torch.float64), layout=layout)
    turned_k = apply_rope(k.clone(), *rope_tables(at_k, 10, dtype=torch.float64), layout=layout)
    scores = turned_q @ turned_k.transpose(-1, -2)
    # The same, with the query not rotated and each key rotated by its distance.
    expected = q @ turn(k, [n - 7 for n in range(13)], layout).transpose(-1, -2)
    assert_close(scores, expected, atol=1e-8, hint="q at m and k at n must see only m - n", name="q·k")


@LAYOUTS
def test_rotation_of_one_decoded_token_equals_the_whole_sequence(randn, layout):
    x, T = randn(2, 3, 9, 6), 9
    steps = [
        apply_rope(x[:, :, t : t + 1], *rope_tables(torch.tensor([t]), 6, dtype=torch.float64), layout=layout)
        for t in range(T)
    ]
    assert_close(
        torch.cat(steps, dim=2),
        turn(x, range(T), layout),
        atol=1e-11,
        hint="with a cache, the token at position t comes alone: use positions[t], not its index",
    )


@LAYOUTS
def test_rotation_twice_adds_the_angles(randn, layout):
    x = randn(2, 3, 4, 6)
    once = apply_rope(x.clone(), *exact_tables([1, 5, 20, 300], 6), layout=layout)
    twice = apply_rope(once, *exact_tables([30, 4, 11, 9], 6), layout=layout)
    assert_close(
        twice, turn(x, [31, 9, 31, 309], layout), atol=1e-11, hint="pairs must go back to their places"
    )


@LAYOUTS
def test_rotation_reads_strided_views_and_leaves_them_alone(randn, layout):
    x = randn(2, 5, 3, 6).transpose(1, 2)  # as split from (B, T, H * D)
    cos, sin = exact_tables([2, 3, 4, 5, 6], 6)
    before, cos_before, sin_before = x.clone(), cos.clone(), sin.clone()
    y = apply_rope(x, cos, sin, layout=layout)
    assert_close(y, turn(before, [2, 3, 4, 5, 6], layout), atol=1e-11)
    assert torch.equal(x, before), "the input was changed: were its features written in place?"
    assert torch.equal(cos, cos_before), "the table of cosines was changed"
    assert torch.equal(sin, sin_before), "the table of sines was changed"
    wide = randn(2, 3, 5, 12)[..., ::2]
    assert_close(apply_rope(wide, cos, sin, layout=layout), turn(wide, [2, 3, 4, 5, 6], layout), atol=1e-11)


@LAYOUTS
def test_rotation_passes_gradients_back_rotated_the_other_way(randn, layout):
    x, g = randn(2, 3, 4, 6).requires_grad_(), randn(2, 3, 4, 6)
    positions = [1, 2, 30, 4]
    (apply_rope(x, *exact_tables(positions, 6), layout=layout) * g).sum().backward()
    assert x.grad is not None, "no gradient reaches x"
    assert_close(x.grad, turn(g, [-p for p in positions], layout), atol=1e-11)


@LAYOUTS
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 3.95e-3), (torch.float16, 5.0e-4)])
def test_rotation_of_low_precision_rounds_only_the_result(randn, layout, dtype, rtol):
    x = randn(2, 3, 50, 6).to(dtype)
    positions = range(100, 150)
    y = apply_rope(x.clone(), *exact_tables(positions, 6, dtype=torch.float32), layout=layout)
    assert y.dtype == dtype, f"x is {dtype}, the result is {y.dtype}"
    assert_close(
        y,
        turn(x, positions, layout),
        atol=2e-6,
        rtol=rtol,  # half a unit in the last place: 2^-8 and 2^-11
        hint=f"computed in {dtype}? Keep float32 tables and products, and round once at the end",
    )


@LAYOUTS
def test_rotation_in_float32_is_close_to_exact(randn, layout):
    x, positions = randn(2, 3, 50, 10, dtype=torch.float32), range(FAR - 49, FAR + 1)
    y = apply_rope(x.clone(), *rope_tables(torch.tensor(positions), 10), layout=layout)
    assert y.dtype == torch.float32
    assert_close(y, turn(x, positions, layout), atol=4e-6, hint="tables or rotation lose precision")


def test_rotation_refuses_an_unknown_layout(randn):
    x, tables = randn(1, 2, 3, 6), exact_tables([1, 2, 3], 6)
    assert_close(apply_rope(x.clone(), *tables, "interleaved"), turn(x, [1, 2, 3], "interleaved"), atol=1e-12)
    for layout in ("quarter", "", "Half"):
        refuses(lambda name=layout: apply_rope(x.clone(), *tables, layout=name), f"layout {layout!r}")


@LAYOUTS
def test_rotation_works_on_the_device_of_its_input(randn, device, layout):
    x, positions = randn(2, 3, 4, 6), torch.tensor([7, 8, 9, 10])
    tables = rope_tables(positions.to(device), 6, dtype=torch.float64)
    y = apply_rope(x.to(device), *tables, layout=layout)
    hint = "a tensor you make yourself must be made on the device of the positions"
    assert y.device.type == device, f"x and positions are on {device}, the result is on {y.device}"
    assert_close(y, turn(x, positions.tolist(), layout), atol=1e-11, hint=hint)


def test_learned_works_on_the_device_of_its_input(randn, device):
    module, weight = learned(randn, 9, 4)
    x = randn(2, 3, 4)
    y = module.to(device)(x.to(device), offset=5)
    assert y.device.type == device, f"x is on {device}, the result is on {y.device}"
    assert_close(y, x + weight[5:8], atol=1e-12)


@pytest.mark.parametrize("layout", ["interlaced", "inter", "half "])
def test_rotation_refuses_layouts_that_begin_right(randn, layout):
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        apply_rope(randn(1, 2, 3, 6), torch.ones(3, 3), torch.zeros(3, 3), layout=layout)


# --- Part 2: from one layout to the other --------------------------------------------------

# For one head of 6: old rows 0 1 2 | 3 4 5 are pairs (0, 3), (1, 4), (2, 5).
TO_INTERLEAVED = [0, 3, 1, 4, 2, 5]
TO_HALF = [0, 2, 4, 1, 3, 5]
CONVERSIONS = pytest.mark.parametrize(
    ("convert", "order"),
    [(half_to_interleaved, TO_INTERLEAVED), (interleaved_to_half, TO_HALF)],
    ids=["to_interleaved", "to_half"],
)


@CONVERSIONS
def test_layout_conversion_of_a_small_head_by_hand(convert, order):
    weight = torch.arange(6.0)[:, None] * torch.ones(1, 2)
    assert_close(
        convert(weight, 1),
        weight[order],
        atol=0,
        hint=f"row r of the result must be row {order}[r] of the old",
    )


@CONVERSIONS
@pytest.mark.parametrize("num_heads", [2, 3, 5])
def test_layout_conversion_stays_within_each_head(randn, convert, order, num_heads):
    weight = randn(num_heads * 6, 7)
    before = weight.clone()
    expected = torch.cat([before[6 * h : 6 * h + 6][order] for h in range(num_heads)])
    assert_close(convert(weight, num_heads), expected, atol=0, hint="each head has its own D rows")
    assert torch.equal(weight, before), "the weight was changed"


@CONVERSIONS
def test_layout_conversion_takes_biases_too(randn, convert, order):
    bias = randn(12)
    expected = torch.cat([bias[:6][order], bias[6:][order]])
    assert_close(convert(bias, 2), expected, atol=0, hint="a bias has one axis, (H * D,)")


@CONVERSIONS
def test_layout_conversion_reads_strided_weights(randn, convert, order):
    weight = randn(7, 12).T
    assert_close(convert(weight, 2), torch.cat([weight[:6][order], weight[6:][order]]), atol=0)


@pytest.mark.parametrize(("num_heads", "D"), [(3, 10), (2, 14), (5, 2)])
def test_layout_conversion_there_and_back(randn, num_heads, D):
    weight = randn(num_heads * D, 4)
    i = torch.arange(D // 2)
    pairs = torch.stack((i, i + D // 2), dim=1).flatten()  # the order of the first head's rows
    there = half_to_interleaved(weight, num_heads)
    assert_close(there[:D], weight[:D][pairs], atol=0)
    assert_close(interleaved_to_half(there, num_heads), weight, atol=0, hint="the two must undo each other")
    back = interleaved_to_half(weight, num_heads)
    assert_close(half_to_interleaved(back, num_heads), weight, atol=0, hint="the two must undo each other")


def test_layout_conversion_keeps_all_scores(randn):
    B, H, T, D, d_in = 2, 3, 5, 10, 7
    x, w_q, w_k = randn(B, T, d_in), randn(H * D, d_in), randn(H * D, d_in)
    tables = exact_tables(range(T), D)

    def scores(rotate, w_q, w_k):
        q, k = ((x @ w.T).reshape(B, T, H, D).transpose(1, 2) for w in (w_q, w_k))
        return rotate(q) @ rotate(k).transpose(-1, -2)

    expected = scores(lambda z: turn(z, range(T), "half"), w_q, w_k)
    converted = scores(
        lambda z: apply_rope(z, *tables, layout="interleaved"),
        half_to_interleaved(w_q, H),
        half_to_interleaved(w_k, H),
    )
    assert_close(converted, expected, atol=1e-10, hint="both layouts must give the same q·k", name="q·k")


@pytest.mark.parametrize("convert", [half_to_interleaved, interleaved_to_half])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layout_conversion_keeps_the_dtype(randn, convert, dtype):
    weight = randn(12, 5, dtype=dtype)
    converted = convert(weight, 2)
    assert converted.dtype == dtype
    assert_close(converted.double(), convert(weight.double(), 2), atol=0)


# --- Part 3: ALiBi -------------------------------------------------------------------------


def slopes_by_rule(H):
    """The rule head by head: exponents of 2, for a power of two and for what is left over."""
    n = 1
    while 2 * n <= H:
        n *= 2
    exponents = [8 * (h + 1) / n if h < n else 8 * (2 * (h - n) + 1) / (2 * n) for h in range(H)]
    return torch.tensor([math.exp2(-e) for e in exponents], dtype=torch.float64)


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8, 16, 64])
def test_slopes_of_powers_of_two_are_a_geometric_series(num_heads):
    expected = [0.5 ** (8 * (h + 1) / num_heads) for h in range(num_heads)]
    assert_close(
        alibi_slopes(num_heads, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        atol=1e-14,
        rtol=1e-12,
        hint="head h of n has the slope 2^(-8 (h + 1) / n): steepest first, 2^-8 last",
    )


@pytest.mark.parametrize("num_heads", [3, 5, 6, 7, 12, 20, 48, 71, 112])
def test_slopes_of_other_numbers_take_every_second_slope_of_the_next_power(num_heads):
    assert_close(
        alibi_slopes(num_heads, dtype=torch.float64),
        slopes_by_rule(num_heads),
        atol=1e-14,
        rtol=1e-12,
        hint="n heads as for n, the power of two below; the others the 1st, 3rd, 5th ... slope for 2n heads",
    )


@pytest.mark.parametrize("num_heads", HF_SLOPES)
def test_slopes_match_hugging_face_bloom(num_heads):
    slopes = alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32, "slopes are float32 by default"
    assert_close(slopes, torch.tensor(HF_SLOPES[num_heads]), atol=0, rtol=2e-6)


def test_bias_by_hand():
    inf = math.inf
    # Two heads have the slopes 1/16 and 1/256.
    distances = torch.tensor([[0.0, -inf, -inf], [-1, 0, -inf], [-2, -1, 0]], dtype=torch.float64)
    assert_close(
        alibi_bias(2, 3, 3, dtype=torch.float64),
        torch.stack((distances / 16, distances / 256)),
        atol=1e-14,
        hint="-slope * distance: 0 for the token itself, further back more negative, -inf in the future",
    )


@pytest.mark.parametrize(
    ("H", "T_q", "T_k"), [(3, 5, 5), (6, 2, 7), (5, 1, 9), (4, 3, 4), (1, 6, 6), (2, 2, 2)]
)
def test_bias_queries_are_the_last_positions(H, T_q, T_k):
    slopes = slopes_by_rule(H).tolist()
    expected = torch.full((H, T_q, T_k), -math.inf, dtype=torch.float64)
    for h in range(H):
        for i in range(T_q):
            p = T_k - T_q + i
            for j in range(p + 1):
                expected[h, i, j] = -slopes[h] * (p - j)
    assert_close(
        alibi_bias(H, T_q, T_k, dtype=torch.float64),
        expected,
        atol=1e-13,
        hint="query i stands at T_k - T_q + i and sees the keys up to itself",
    )


def test_bias_of_one_decoded_token_is_the_last_row_of_the_whole():
    rows = torch.cat([alibi_bias(6, 1, t + 1, dtype=torch.float64)[:, 0, -1:] for t in range(4)], dim=1)
    assert_close(
        rows, torch.zeros(6, 4, dtype=torch.float64), atol=0, hint="a token is at distance 0 from itself"
    )
    slopes = slopes_by_rule(6)[:, None]
    expected = -slopes * torch.arange(8, -1, -1)
    assert_close(alibi_bias(6, 1, 9, dtype=torch.float64)[:, 0], expected, atol=1e-13)


def test_bias_gives_the_attention_weights_of_bloom(randn):
    # BLOOM adds slope * j and masks the future: softmax does not see the part that is equal for all keys.
    H, T = 6, 7
    scores = randn(2, H, T, T)
    slopes = torch.tensor(HF_SLOPES[H], dtype=torch.float64)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    bloom = (scores + slopes[:, None, None] * torch.arange(T)).masked_fill(future, -math.inf).softmax(-1)
    weights = (scores + alibi_bias(H, T, T, dtype=torch.float64)).softmax(-1)
    assert_close(weights, bloom, atol=1e-12, hint="the weights differ from BLOOM's", name="weights")


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_bias_goes_on_far_beyond_any_training_length(dtype, rtol):
    bias = alibi_bias(3, 2, FAR + 1, dtype=dtype)
    assert bias.dtype == dtype, f"asked for {dtype}, got {bias.dtype}"
    distance = FAR - torch.arange(FAR + 1, dtype=torch.float64)
    assert_close(bias[:, 1], -slopes_by_rule(3)[:, None] * distance, atol=0, rtol=rtol)
    assert bias[:, 0, -1].tolist() == [-math.inf] * 3, "the first of two queries must not see the last key"


def test_bias_is_float32_by_default():
    bias = alibi_bias(3, 1, 4)
    assert bias.dtype == torch.float32
    expected = -slopes_by_rule(3)[:, None, None] * torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert_close(bias, expected.float(), atol=1e-6)


def test_bias_refuses_more_queries_than_positions():
    expected = [[[-2 / 256, -1 / 256, 0.0]]]
    assert_close(alibi_bias(1, 1, 3, dtype=torch.float64), torch.tensor(expected).double(), atol=1e-9)
    for T_q, T_k in [(4, 3), (9, 2)]:
        refuses(lambda q=T_q, k=T_k: alibi_bias(2, q, k), f"{T_q} queries, {T_k} keys")


@pytest.mark.parametrize(
    "make",
    [
        lambda: [sinusoidal(5, 6)],
        lambda: rope_tables(torch.tensor([0, 3]), 6),
        lambda: [alibi_slopes(6)],
        lambda: [alibi_bias(6, 2, 3)],
    ],
    ids=["sinusoidal", "rope_tables", "alibi_slopes", "alibi_bias"],
)
def test_results_belong_to_the_caller(make):
    first = [t.clone() for t in make()]
    for t in make():
        t.fill_(7.0)  # as a model that works in place does
    for t, expected in zip(make(), first, strict=True):
        assert_close(t, expected, atol=0, hint="a call leaves no trace on the next: is a tensor kept?")


@pytest.mark.parametrize("num_heads", [128, 200])
def test_slopes_of_many_heads(num_heads):
    power = 128  # the largest power of two that is not above
    exponents = [
        8 * (h + 1) / power if h < power else 4 * (2 * (h - power) + 1) / power for h in range(num_heads)
    ]
    expected = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
    assert_close(alibi_slopes(num_heads, dtype=torch.float64), expected, atol=1e-14)


# --- the live library: pytest --slow ---------------------------------------------------------


@pytest.mark.slow
def test_live_llama_agrees_on_tables_and_rotation(randn):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=30, num_attention_heads=3, head_dim=10, rope_theta=70.0)
    positions = torch.tensor([0, 5, 6, 300])
    q, k = randn(2, 3, 4, 10, dtype=torch.float32), randn(2, 1, 4, 10, dtype=torch.float32)
    expected = llama.apply_rotary_pos_emb(q, k, *llama.LlamaRotaryEmbedding(config)(q, positions[None]))
    tables = rope_tables(positions, 10, base=70.0)
    for x, y in zip((q, k), expected, strict=True):
        assert_close(apply_rope(x, *tables), y, atol=1e-4, hint="differs from the installed Llama")


@pytest.mark.slow
def test_live_gptj_agrees_on_the_interleaved_layout(randn):
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    positions = torch.tensor([0, 5, 6, 30])
    x = randn(2, 3, 4, 10, dtype=torch.float32)
    sin, cos = gptj.create_sinusoidal_positions(31, 10)[None, positions].split(5, dim=-1)
    expected = gptj.apply_rotary_pos_emb(x.transpose(1, 2), sin, cos).transpose(1, 2)
    y = apply_rope(x, *rope_tables(positions, 10), layout="interleaved")
    assert_close(y, expected.contiguous(), atol=1e-5, hint="differs from the installed GPT-J")


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [3, 16, 71])
def test_live_bloom_agrees_on_slopes(num_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    alibi = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), num_heads, torch.float32)
    assert_close(alibi_slopes(num_heads), alibi[:, 0, 1], atol=0, rtol=5e-6, hint="differs from BLOOM")
