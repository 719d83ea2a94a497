"""Tests of ch01/lab01. Oracles: PyTorch in float64, and closed forms worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attention import attend, dot, scaled_dot_product_attention, softmax, softmax_list
from shared.compare import assert_close

# --- Part 1: Python lists ------------------------------------------------------------------


def oracle_attend(query, keys, values):
    q, k, v = (torch.tensor(x, dtype=torch.float64) for x in ([query], keys, values))
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0, 0].tolist()


def test_dot_multiplies_pairs_and_adds_them_up():
    assert_close(dot([1.0, 2.0, 3.0], [4.0, -5.0, 6.0]), 12.0, atol=1e-12, name="dot")
    assert_close(dot([0.5], [0.25]), 0.125, atol=1e-12, name="dot")


def test_dot_refuses_vectors_of_different_lengths():
    for a, b in [([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0, 3.0], [1.0, 2.0]), ([], [1.0])]:
        try:
            result = dot(a, b)
        except ValueError:
            continue
        pytest.fail(
            f"dot returned {result} for lengths {len(a)} and {len(b)}: "
            "does zip drop the tail? Raise ValueError",
            pytrace=False,
        )


def test_softmax_list_of_known_odds():
    # exp(log n) = n, so these scores ask for weights in the ratio 1 : 2 : 5.
    weights = softmax_list([math.log(1), math.log(2), math.log(5)])
    assert_close(
        weights, [1 / 8, 2 / 8, 5 / 8], atol=1e-12, hint="weights must be exp(s_i) / sum of exp(s_j)"
    )


def test_softmax_list_of_one_score_is_one():
    assert_close(softmax_list([-3.7]), [1.0], atol=1e-12)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_softmax_list_survives_scores_far_from_zero(offset):
    try:
        weights = softmax_list([offset + s for s in (0.0, 1.0, -2.0)])
    except (OverflowError, ZeroDivisionError) as error:
        pytest.fail(f"{error}: subtract the largest score before math.exp", pytrace=False)
    expected = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64).softmax(0).tolist()
    assert_close(weights, expected, atol=1e-9, hint="a shift of all scores must not change the weights")


@pytest.mark.parametrize("scores", [[0.0, -2000.0, 1.0], [700.0, 710.0, -5000.0], [-2000.0, 3.0]])
def test_softmax_list_survives_scores_far_from_each_other(scores):
    try:
        weights = softmax_list(scores)
    except (OverflowError, ZeroDivisionError) as error:
        pytest.fail(f"{error}: subtract the largest score, not the largest in size", pytrace=False)
    expected = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    assert_close(weights, expected, atol=1e-12, hint="which score must be subtracted from all?")


def test_softmax_list_returns_python_floats_and_leaves_its_input_alone():
    scores = [1.0, 3.0, 2.0]
    weights = softmax_list(scores)
    assert scores == [1.0, 3.0, 2.0], "softmax_list changed the list it was given"
    assert all(isinstance(w, float) for w in weights)
    assert_close(weights, torch.tensor(scores, dtype=torch.float64).softmax(0).tolist(), atol=1e-12)


def test_attend_reads_one_value_when_one_key_matches():
    # The query is 200 along the second axis: the second key wins by a factor of e^100.
    result = attend(
        [0.0, 200.0, 0.0, 0.0], [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]], [[1.0], [2.0], [3.0]]
    )
    assert_close(result, [2.0], atol=1e-9, hint="with one matching key the result is that key's value")


def test_attend_averages_values_when_all_keys_are_equal():
    result = attend([0.3, -0.7], [[1.0, 2.0]] * 4, [[1.0, 0, 8], [2.0, 0, 8], [3.0, 4, 8], [6.0, 0, 8]])
    assert_close(result, [3.0, 1.0, 8.0], atol=1e-12, hint="equal scores mean equal weights")


@pytest.mark.parametrize(("t", "d_k", "d_v"), [(5, 3, 2), (2, 7, 4), (1, 2, 3), (6, 1, 5)])
def test_attend_matches_pytorch(rng, t, d_k, d_v):
    query, keys, values = (2 * rng.standard_normal(s) for s in ((d_k,), (t, d_k), (t, d_v)))
    query, keys, values = query.tolist(), keys.tolist(), values.tolist()
    assert_close(
        attend(query, keys, values),
        oracle_attend(query, keys, values),
        atol=1e-12,
        hint="attend differs from PyTorch: are scores divided by sqrt(d_k), the length of the query?",
    )


# --- Part 2: softmax in NumPy ---------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
def test_softmax_matches_pytorch_along_every_axis(rng, axis):
    x = 3 * rng.standard_normal((3, 5, 7))
    expected = torch.from_numpy(x).softmax(axis).numpy()
    assert_close(
        softmax(x, axis=axis), expected, atol=1e-12, hint=f"softmax along axis {axis} is wrong: keepdims?"
    )


def test_softmax_goes_along_the_last_axis_by_default(rng):
    x = rng.standard_normal((4, 4))
    assert_close(softmax(x), torch.from_numpy(x).softmax(-1).numpy(), atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3, 1, 4)])
def test_softmax_keeps_the_shape(rng, shape):
    x = rng.standard_normal(shape)
    assert_close(softmax(x), torch.from_numpy(x).softmax(-1).numpy(), atol=1e-12)


def test_softmax_of_large_scores_does_not_overflow():
    x = np.array([[1e4, 1e4 - 1.0, -1e4], [-1e4, -1e4, -1e4], [-1.0, -3e3, -2.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        weights = softmax(x)
    p = 1 / (1 + math.exp(-1))
    assert_close(
        weights,
        np.array([[p, 1 - p, 0.0], [1 / 3] * 3, [p, 0.0, 1 - p]]),
        atol=1e-12,
        hint="subtract the maximum before exp",
    )


def test_softmax_subtracts_the_maximum_of_each_row_not_of_the_array():
    # The second row lies 2000 below the first: with one global maximum all of it underflows to 0/0.
    x = np.array([[1000.0, 999.0], [-1000.0, -1001.0]])
    with np.errstate(invalid="ignore", divide="ignore"):
        weights = softmax(x)
    p = 1 / (1 + math.exp(-1))
    assert_close(weights, np.array([[p, 1 - p]] * 2), atol=1e-12, hint="each row needs its own maximum")


def test_softmax_gives_minus_infinity_a_weight_of_exactly_zero():
    weights = softmax(np.array([[0.0, -np.inf, 0.0, math.log(2)]]))
    assert_close(weights, np.array([[0.25, 0.0, 0.25, 0.5]]), atol=1e-12)
    assert weights[0, 1] == 0.0


def test_softmax_does_not_modify_its_input(rng):
    x = rng.standard_normal((3, 4))
    before = x.copy()
    weights = softmax(x)
    assert_close(weights, torch.from_numpy(before).softmax(-1).numpy(), atol=1e-12)
    assert np.array_equal(x, before), "softmax changed the array it was given (in-place -= or /= ?)"


# --- Part 2: attention in NumPy --------------------------------------------------------------


def oracle(Q, K, V, mask=None):
    """PyTorch's weights and output in float64; only for masks that leave every query a key."""
    q, k, v = (torch.from_numpy(np.ascontiguousarray(x)).double() for x in (Q, K, V))
    m = None if mask is None else torch.from_numpy(mask)
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=m)
    # Reading the identity as values gives the weights themselves.
    eye = torch.eye(k.shape[-2], dtype=torch.float64).expand(*k.shape[:-2], -1, -1)
    return output.numpy(), F.scaled_dot_product_attention(q, k, eye, attn_mask=m).numpy()


def qkv(rng, batch, t_q, t_k, d_k, d_v, scale=1.0):
    shapes = ((*batch, t_q, d_k), (*batch, t_k, d_k), (*batch, t_k, d_v))
    return tuple(scale * rng.standard_normal(shape) for shape in shapes)


def readable_mask(rng, *shape):
    """A random mask in which every query sees at least one key, and not every key."""
    mask = rng.random(shape) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    mask[..., -1] &= ~mask.all(-1)
    return mask


SHAPES = [
    ((), 3, 5, 7, 2),
    ((2,), 5, 3, 6, 11),
    ((3, 2), 4, 7, 5, 3),
    ((2, 3), 6, 6, 10, 10),
    ((2,), 1, 9, 3, 4),
]


@pytest.mark.parametrize(("batch", "t_q", "t_k", "d_k", "d_v"), SHAPES)
def test_attention_output_matches_pytorch(rng, batch, t_q, t_k, d_k, d_v):
    Q, K, V = qkv(rng, batch, t_q, t_k, d_k, d_v)
    output, _ = scaled_dot_product_attention(Q, K, V)
    assert_close(output, oracle(Q, K, V)[0], atol=1e-12, name="output")


@pytest.mark.parametrize(("batch", "t_q", "t_k", "d_k", "d_v"), SHAPES)
def test_attention_weights_match_pytorch(rng, batch, t_q, t_k, d_k, d_v):
    Q, K, V = qkv(rng, batch, t_q, t_k, d_k, d_v)
    _, weights = scaled_dot_product_attention(Q, K, V)
    assert_close(
        weights,
        oracle(Q, K, V)[1],
        atol=1e-12,
        name="weights",
        hint="rows must sum to 1: is softmax over keys (axis=-1)?",
    )


def test_scores_are_scaled_by_sqrt_d_k():
    # One query, two keys; q·k is 32 and 0 and d_k is 64, so the odds are exp(32 / 8) : 1.
    Q, K = np.full((1, 64), 0.5), np.stack([np.ones(64), np.zeros(64)])
    _, weights = scaled_dot_product_attention(Q, K, np.eye(2, 3))
    p = 1 / (1 + math.exp(-4))
    assert_close(weights, np.array([[p, 1 - p]]), atol=1e-12, hint="divide the scores by sqrt(d_k), here 8")


def test_scale_does_not_depend_on_d_v_or_on_the_number_of_keys():
    Q = np.full((1, 4), 1.0)
    for t_k, d_v in ((2, 1), (2, 9), (16, 4)):
        K = np.concatenate([np.full((1, 4), 0.5), np.zeros((t_k - 1, 4))])
        _, weights = scaled_dot_product_attention(Q, K, np.ones((t_k, d_v)))
        expected = np.array([[math.e] + [1.0] * (t_k - 1)]) / (math.e + t_k - 1)
        assert_close(weights, expected, atol=1e-12, hint="the scale is sqrt of the length of a query")


@pytest.mark.parametrize(("batch", "t_q", "t_k", "d_k", "d_v"), SHAPES)
def test_mask_hides_keys_before_the_softmax(rng, batch, t_q, t_k, d_k, d_v):
    Q, K, V = qkv(rng, batch, t_q, t_k, d_k, d_v)
    mask = readable_mask(rng, *batch, t_q, t_k)
    output, weights = scaled_dot_product_attention(Q, K, V, mask)
    expected_output, expected_weights = oracle(Q, K, V, mask)
    hint = "True means a query may look; hidden keys get no weight and the visible ones still sum to 1"
    assert_close(weights, expected_weights, atol=1e-12, name="weights", hint=hint)
    assert_close(output, expected_output, atol=1e-12, name="output", hint=hint)


def test_true_in_the_mask_means_may_look():
    mask = np.array([[True, False, False], [False, True, True]])
    _, weights = scaled_dot_product_attention(np.zeros((2, 4)), np.ones((3, 4)), np.ones((3, 2)), mask)
    assert_close(weights, np.array([[1, 0, 0], [0, 0.5, 0.5]]), atol=1e-12, hint="is the mask inverted?")


def test_one_mask_serves_a_whole_batch(rng):
    Q, K, V = qkv(rng, (3, 2), 5, 5, 4, 6)
    causal = np.tril(np.ones((5, 5), dtype=bool))
    output, weights = scaled_dot_product_attention(Q, K, V, causal)
    expected = oracle(Q, K, V, np.broadcast_to(causal, (3, 2, 5, 5)).copy())
    assert_close(weights, expected[1], atol=1e-12, name="weights")
    assert_close(output, expected[0], atol=1e-12, name="output")


def test_a_mask_per_key_is_broadcast_over_queries(rng):
    Q, K, V = qkv(rng, (2,), 4, 6, 3, 5)
    padding = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=bool)[:, None, :]  # (2, 1, T_k)
    output, weights = scaled_dot_product_attention(Q, K, V, padding)
    expected = oracle(Q, K, V, np.broadcast_to(padding, (2, 4, 6)).copy())
    assert_close(weights, expected[1], atol=1e-12, name="weights")
    assert_close(output, expected[0], atol=1e-12, name="output")


@pytest.mark.parametrize(
    "shape", [(5,), (1,), (5, 1), (1, 5), (2, 5, 5), (2, 1, 5), (3, 1, 1, 5), (3, 1, 5, 5)]
)
def test_a_mask_of_any_shape_that_broadcasts(rng, shape):
    # As many queries as keys: a mask that is laid along the wrong axis still fits.
    Q, K, V = qkv(rng, (3, 2), 5, 5, 4, 6)
    mask = readable_mask(rng, *shape) if shape[-1] > 1 else rng.random(shape) < 0.7
    full = np.broadcast_to(mask, (3, 2, 5, 5))
    output, weights = scaled_dot_product_attention(Q, K, V, mask)
    seen = full.any(-1)
    expected = oracle(Q, K, V, np.where(seen[..., None], full, True))
    hint = "NumPy's rules: axes are matched from the last one on"
    assert_close(weights, expected[1] * seen[..., None], atol=1e-12, name="weights", hint=hint)
    assert_close(output, expected[0] * seen[..., None], atol=1e-12, name="output", hint=hint)


def test_the_only_key_may_be_hidden(rng):
    Q, K, V = qkv(rng, (2,), 3, 1, 4, 6)
    mask = np.array([True, False, True])[:, None]
    output, weights = scaled_dot_product_attention(Q, K, V, mask)
    assert_close(weights, np.broadcast_to(mask, (2, 3, 1)).astype(float), atol=1e-12, name="weights")
    assert_close(output, np.where(mask, V, 0.0), atol=1e-12, name="output")


def test_a_mask_that_hides_everything(rng):
    Q, K, V = qkv(rng, (2,), 3, 5, 4, 6)
    with np.errstate(invalid="ignore"):
        output, weights = scaled_dot_product_attention(Q, K, V, np.zeros((3, 5), dtype=bool))
    assert_close(weights, np.zeros((2, 3, 5)), atol=0, name="weights")
    assert_close(output, np.zeros((2, 3, 6)), atol=0, name="output")


def test_hidden_keys_cannot_influence_the_result(rng):
    Q, K, V = qkv(rng, (2,), 3, 5, 4, 6)
    mask = np.array([True, True, False, True, False])[None, None]
    before, _ = scaled_dot_product_attention(Q, K, V, mask)
    K[:, [2, 4]], V[:, [2, 4]] = 1e3 * K[:, [2, 4]], -1e6
    after, _ = scaled_dot_product_attention(Q, K, V, mask)
    assert_close(after, before, atol=1e-12, hint="a hidden key or value leaks into the output")
    assert_close(after, oracle(Q, K, V, np.broadcast_to(mask, (2, 3, 5)).copy())[0], atol=1e-9, name="output")


def test_a_query_that_sees_no_key_gets_exactly_zero(rng):
    Q, K, V = qkv(rng, (2,), 4, 5, 3, 6)
    mask = readable_mask(rng, 2, 4, 5)
    mask[0, 1] = mask[1, 3] = False
    with np.errstate(invalid="ignore"):
        output, weights = scaled_dot_product_attention(Q, K, V, mask)
    for name, value in (("weights", weights), ("output", output)):
        for row in (value[0, 1], value[1, 3]):
            assert_close(
                row,
                np.zeros_like(row),
                atol=0,
                name=name,
                hint="a row with no visible key must be zero, not NaN",
            )
    seen = mask.any(-1)
    safe = np.where(mask.any(-1, keepdims=True), mask, True)
    assert_close(output[seen], oracle(Q, K, V, safe)[0][seen], atol=1e-12, name="output of the other rows")


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_extreme_logits_give_finite_correct_weights(rng, magnitude):
    # Scores of about ±1e4, and differences of about 1: exp overflows unless a maximum is subtracted.
    Q, K, V = qkv(rng, (2,), 3, 5, 4, 2)
    Q[..., 0], K[..., 0] = 2.0, magnitude + K[..., 0]
    mask = readable_mask(rng, 2, 3, 5)
    for m in (None, mask):
        with np.errstate(over="ignore", invalid="ignore"):
            output, weights = scaled_dot_product_attention(Q, K, V, m)
        expected = oracle(Q, K, V, m)
        assert_close(
            weights, expected[1], atol=1e-9, name="weights", hint="subtract each row's maximum before exp"
        )
        assert_close(output, expected[0], atol=1e-9, name="output")


def test_queries_with_very_different_scores_do_not_disturb_each_other(rng):
    Q, K, V = qkv(rng, (2,), 4, 5, 3, 6)
    # Scores of query t lie about 5000 * t from zero, with differences of order 1 between keys.
    Q[..., 0] = 5000.0 * np.arange(-1, 3)
    K[..., 0] = 1.0
    for mask in (None, readable_mask(rng, 2, 4, 5)):
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            output, weights = scaled_dot_product_attention(Q, K, V, mask)
        expected = oracle(Q, K, V, mask)
        hint = "each query needs the maximum of its own scores"
        assert_close(weights, expected[1], atol=1e-9, name="weights", hint=hint)
        assert_close(output, expected[0], atol=1e-9, name="output", hint=hint)


def test_hidden_keys_stay_hidden_when_visible_scores_are_very_low():
    # The visible scores are -1e4; a mask that writes a finite -1e4 would let hidden keys back in.
    Q, K = np.full((1, 4), 100.0), np.array([[-50.0] * 4, [-50.0] * 4, [50.0] * 4])
    _, weights = scaled_dot_product_attention(Q, K, np.ones((3, 2)), np.array([[True, True, False]]))
    assert_close(weights, np.array([[0.5, 0.5, 0.0]]), atol=1e-12, hint="hide with -inf")


def test_hidden_keys_stay_hidden_however_low_the_visible_scores():
    # The visible scores are -2e10.
    Q, K = np.full((1, 4), 1e5), np.array([[-1e5] * 4, [-1e5] * 4, [1e5] * 4])
    _, weights = scaled_dot_product_attention(Q, K, np.ones((3, 2)), np.array([[True, True, False]]))
    assert_close(
        weights, np.array([[0.5, 0.5, 0.0]]), atol=1e-5, hint="-1e9 is not low enough: hide with -inf"
    )


def test_float32_and_non_contiguous_inputs(rng):
    Q, K, V = qkv(rng, (2,), 10, 14, 12, 6)
    Q, K, V = (x.astype(np.float32)[:, ::2, ::2] for x in (Q, K, V))
    mask = readable_mask(rng, 2, 5, 7)
    output, weights = scaled_dot_product_attention(Q, K, V, mask)
    expected = oracle(Q, K, V, mask)
    assert_close(np.asarray(weights, np.float64), expected[1], atol=2e-6, name="weights")
    assert_close(np.asarray(output, np.float64), expected[0], atol=5e-6, name="output")


def test_inputs_are_not_modified(rng):
    Q, K, V = qkv(rng, (2,), 3, 4, 5, 6)
    mask = readable_mask(rng, 2, 3, 4)
    before = [x.copy() for x in (Q, K, V, mask)]
    output, _ = scaled_dot_product_attention(Q, K, V, mask)
    assert_close(output, oracle(*before)[0], atol=1e-12, name="output")
    for name, now, then in zip(("Q", "K", "V", "mask"), (Q, K, V, mask), before, strict=True):
        assert np.array_equal(now, then), f"{name} was modified"
