"""Tests of ch01/lab03. Oracles: a float64 loop over heads and queries, nn.MultiheadAttention, closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from multihead import MultiHeadAttention, attention_weights, merge_heads, split_heads
from shared.compare import assert_close
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")

# --- the oracle ----------------------------------------------------------------------------


def loop_over_heads(state, num_heads, x, context=None, mask=None, factor=None):
    """Attend one sequence, one head, one query at a time, and never look at a hidden key.

    `state` holds the parameters by name; `factor` (B, H, T_q, T_k), if any, multiplies the weights.
    """
    context = x if context is None else context
    B, H, T_q, T_k = x.shape[0], num_heads, x.shape[1], context.shape[1]
    D = x.shape[2] // H
    mask = torch.ones(B, H, T_q, T_k, dtype=torch.bool) if mask is None else mask.expand(B, H, T_q, T_k)

    def project(name, tokens, rows=slice(None)):
        bias = state.get(f"{name}.bias")
        return tokens @ state[f"{name}.weight"][rows].T + (0 if bias is None else bias[rows])

    outputs, weights = [], []
    for b in range(B):
        read, looked = [], []
        for h in range(H):
            rows = slice(h * D, (h + 1) * D)
            q, k = project("q_proj", x[b], rows), project("k_proj", context[b], rows)
            w = []
            for t in range(T_q):
                seen = mask[b, h, t].nonzero()[:, 0]
                scores = k[seen] @ q[t] / math.sqrt(D)
                w.append(x.new_zeros(T_k).index_copy(0, seen, torch.softmax(scores, 0)))
            w = torch.stack(w) if factor is None else torch.stack(w) * factor[b, h]
            read.append(w @ project("v_proj", context[b], rows))
            looked.append(w)
        outputs.append(project("out_proj", torch.cat(read, -1)))
        weights.append(torch.stack(looked))
    return torch.stack(outputs), torch.stack(weights)


def draw_state(randn, d_model, kv_dim=None, bias=True):
    """Draw parameters of the promised names and shapes, all different from each other."""
    kv_dim = d_model if kv_dim is None else kv_dim
    state = {}
    for name, width in zip(PROJECTIONS, (d_model, kv_dim, kv_dim, d_model), strict=True):
        state[f"{name}.weight"] = randn(d_model, width) / math.sqrt(width)
        if bias:
            state[f"{name}.bias"] = randn(d_model)
    return state


def build(state, num_heads, *, dropout=0.0):
    """Build the learner's module in evaluation mode, in float64, with the parameters `state`."""
    d_model, kv_dim = state["k_proj.weight"].shape
    module = MultiHeadAttention(
        d_model, num_heads, kv_dim=kv_dim, bias="q_proj.bias" in state, dropout=dropout
    )
    module = module.double().eval()
    module.load_state_dict(state)
    return module


def random_mask(rng, *shape):
    """A random mask in which every row sees at least one key, and no row sees them all."""
    mask = rng.random(shape) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    mask[..., -1] &= ~mask.all(-1)
    return torch.from_numpy(mask)


# B, H, D, T_q, T_k and the width of the context
SIZES = [(2, 3, 5, 4, 7, 11), (3, 5, 2, 7, 4, 6), (1, 1, 6, 3, 5, 4), (2, 7, 1, 1, 6, 9), (3, 2, 3, 5, 1, 10)]


# --- splitting and merging -----------------------------------------------------------------


@pytest.mark.parametrize(("B", "T", "H", "D"), [(2, 5, 3, 7), (3, 4, 6, 1), (2, 7, 1, 5), (2, 3, 3, 3)])
def test_split_heads_gives_each_head_its_slice_of_the_features(B, T, H, D):
    x = torch.arange(B * T * H * D, dtype=torch.float64).view(B, T, H * D)
    expected = torch.stack([x[:, :, h * D : (h + 1) * D] for h in range(H)], dim=1)
    hint = "out[b, h, t, d] must be x[b, t, h * D + d]: cut the last axis first, then move axes"
    assert_close(split_heads(x, H), expected, atol=0, name="split_heads(x)", hint=hint)


def test_split_heads_keeps_all_heads_of_a_token_at_that_token():
    # Token t is filled with the number t, so every head must see 0, 1, 2, 3 along time.
    x = torch.arange(4.0).double()[None, :, None].expand(2, 4, 6)
    expected = torch.arange(4.0).double()[None, None, :, None].expand(2, 3, 4, 2)
    hint = "tokens got mixed with heads: a reshape straight to (B, H, T, D) does that, a transpose does not"
    assert_close(split_heads(x, 3), expected, atol=0, name="split_heads(x)", hint=hint)


def test_split_heads_takes_neighbouring_features_not_every_h_th():
    # The features are numbered 0 to 5: with two heads, head 0 gets 0, 1, 2 and head 1 gets 3, 4, 5.
    x = torch.arange(6.0).double().expand(2, 4, 6)
    expected = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).double()[None, :, None].expand(2, 2, 4, 3)
    hint = "head h owns features h * D to (h + 1) * D: the head number is the slower of the two"
    assert_close(split_heads(x, 2), expected, atol=0, name="split_heads(x)", hint=hint)


def test_split_heads_of_a_strided_view(randn):
    x = randn(5, 24, 3).permute(2, 0, 1)[:, :, ::2]  # (3, 5, 12), every stride unusual
    before = x.clone()
    expected = torch.stack(before.split(4, dim=-1), dim=1)
    assert_close(split_heads(x, 3), expected, atol=0, name="split_heads(x)")
    assert torch.equal(x, before), "split_heads changed its input"


@pytest.mark.parametrize(("B", "H", "T", "D"), [(2, 3, 5, 7), (3, 6, 4, 1), (2, 1, 7, 5), (2, 3, 3, 3)])
def test_merge_heads_puts_heads_side_by_side(randn, B, H, T, D):
    x = randn(B, H, T, D)
    expected = torch.cat([x[:, h] for h in range(H)], dim=-1)
    hint = "out[b, t, h * D + d] must be x[b, h, t, d]: bring H next to D before you merge them"
    assert_close(merge_heads(x), expected, atol=0, name="merge_heads(x)", hint=hint)


def test_merge_heads_keeps_each_token_together():
    # Token t is filled with the number t in every head, so it must stay filled with t.
    x = torch.arange(5.0).double()[None, None, :, None].expand(2, 3, 5, 2).contiguous()
    expected = torch.arange(5.0).double()[None, :, None].expand(2, 5, 6)
    hint = "tokens got mixed: transpose back to (B, T, H, D) before the reshape"
    assert_close(merge_heads(x), expected, atol=0, name="merge_heads(x)", hint=hint)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
def test_merge_heads_accepts_any_memory_layout(randn, order):
    x = randn(2, 3, 5, 4)
    strided = x.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    expected = torch.cat(list(x.unbind(1)), dim=-1)
    assert_close(merge_heads(strided), expected, atol=0, name="merge_heads(x)", hint="use reshape, not view")
    assert torch.equal(strided, x), "merge_heads changed its input"


# --- the weights ---------------------------------------------------------------------------


def oracle_weights(Q, K, mask=None):
    """PyTorch's weights: attend to the identity. Only for masks that leave every query a key."""
    eye = torch.eye(K.shape[-2], dtype=Q.dtype).expand(*K.shape[:-2], -1, -1)
    return F.scaled_dot_product_attention(Q, K, eye, attn_mask=mask)


def mask_shapes(B, H, T_q, T_k):
    return [
        (T_k,),
        (T_q, T_k),
        (H, 1, T_k),
        (H, T_q, T_k),
        (B, 1, 1, T_k),
        (B, 1, T_q, T_k),
        (1, H, T_q, T_k),
        (B, H, T_q, T_k),
    ]


@pytest.mark.parametrize(("B", "H", "D", "T_q", "T_k", "_"), SIZES)
def test_attention_weights_match_pytorch(randn, B, H, D, T_q, T_k, _):
    Q, K = 2 * randn(B, H, T_q, D), randn(B, H, T_k, D)
    hint = (
        "the weights of a query over the keys (dim=-1) must be softmax(q·k / sqrt(D)), D the size of a head"
    )
    assert_close(attention_weights(Q, K), oracle_weights(Q, K), atol=1e-12, name="weights", hint=hint)


def test_attention_weights_divide_scores_by_sqrt_of_the_head_size():
    # q·k is 32 for the first key and 0 for the second; D is 64, so the odds are exp(32 / 8) : 1.
    Q = torch.full((2, 3, 1, 64), 0.5, dtype=torch.float64)
    K = torch.stack([torch.ones(64), torch.zeros(64)]).double().expand(2, 3, 2, 64)
    p = 1 / (1 + math.exp(-4))
    expected = torch.tensor([p, 1 - p], dtype=torch.float64).expand(2, 3, 1, 2)
    hint = "divide the scores by sqrt(D), here 8"
    assert_close(attention_weights(Q, K), expected, atol=1e-12, name="weights", hint=hint)


def test_attention_weights_see_where_the_mask_is_true():
    mask = torch.tensor([[True, False, False], [False, True, True]])
    weights = attention_weights(torch.zeros(2, 1, 2, 4).double(), torch.ones(2, 1, 3, 4).double(), mask)
    expected = torch.tensor([[1, 0, 0], [0, 0.5, 0.5]]).double().expand(2, 1, 2, 3)
    hint = "True means may look: is the mask inverted?"
    assert_close(weights, expected, atol=1e-12, name="weights", hint=hint)


@pytest.mark.parametrize("shape", mask_shapes(2, 3, 5, 7), ids=str)
def test_attention_weights_hide_keys_before_the_softmax(randn, rng, shape):
    Q, K = 2 * randn(2, 3, 5, 4), randn(2, 3, 7, 4)
    mask = random_mask(rng, *shape)
    hint = "a mask broadcasts to (B, H, T_q, T_k); hidden keys get 0 and the visible ones still sum to 1"
    assert_close(
        attention_weights(Q, K, mask),
        oracle_weights(Q, K, mask.expand(2, 3, 5, 7)),
        atol=1e-12,
        name="weights",
        hint=hint,
    )


def test_attention_weights_of_a_query_that_sees_no_key_are_zero(randn, rng):
    Q, K = randn(2, 3, 5, 4), randn(2, 3, 7, 4)
    mask = random_mask(rng, 2, 3, 5, 7)
    mask[0, 1, 3] = mask[1, 0] = False
    blind = ~mask.any(-1, keepdim=True)
    expected = oracle_weights(Q, K, mask | blind).masked_fill(blind, 0.0)
    weights = attention_weights(Q, K, mask)
    hint = "a row with no visible key must be exactly 0, not NaN and not uniform"
    assert_close(weights, expected, atol=1e-12, name="weights", hint=hint)
    assert_close(weights[1, 0], torch.zeros(5, 7).double(), atol=0, name="weights of blind rows", hint=hint)


def test_attention_weights_under_a_mask_per_query(randn):
    # (T_q, 1): a query sees every key or none.
    Q, K = randn(2, 3, 4, 5), randn(2, 3, 6, 5)
    mask = torch.tensor([True, False, True, False])[:, None]
    expected = oracle_weights(Q, K) * mask
    hint = "the mask (T_q, 1) shows a query all keys or none"
    assert_close(attention_weights(Q, K, mask), expected, atol=1e-12, name="weights", hint=hint)


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_attention_weights_of_extreme_scores(randn, rng, level):
    # Scores near ±1e4 with differences near 1: exp overflows, and a fill value of -1e4 is not low enough.
    Q, K = randn(2, 3, 5, 4), randn(2, 3, 7, 4)
    Q[..., 0], K[..., 0] = 2.0, level + K[..., 0]
    mask = random_mask(rng, 2, 3, 5, 7)
    for m in (None, mask):
        hint = "softmax must not overflow, and hidden keys stay hidden however low the visible scores are"
        assert_close(
            attention_weights(Q, K, m), oracle_weights(Q, K, m), atol=1e-9, name="weights", hint=hint
        )


def test_attention_weights_of_queries_with_very_different_scores(randn, rng):
    # The scores of query t lie about 5000 * t from zero, with differences near 1 between keys.
    Q, K = randn(2, 3, 4, 5), randn(2, 3, 6, 5)
    Q[..., 0], K[..., 0] = 5000.0 * torch.arange(-1, 3), math.sqrt(5)
    for m in (None, random_mask(rng, 2, 3, 4, 6)):
        hint = "each query needs the maximum of its own scores, not that of all"
        assert_close(
            attention_weights(Q, K, m), oracle_weights(Q, K, m), atol=1e-9, name="weights", hint=hint
        )


@pytest.mark.parametrize("kind", ["no", "some"])
def test_attention_weights_pass_back_the_right_gradients_beside_blind_rows(randn, rng, kind):
    Q, K = randn(2, 3, 5, 4), randn(2, 3, 7, 4)
    mask = random_mask(rng, 2, 3, 5, 7)
    if kind == "some":
        mask[0, 1, 3] = mask[1, 0] = False
    blind = ~mask.any(-1, keepdim=True)
    upstream = randn(2, 3, 5, 7)

    def gradients(weigh):
        q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
        return torch.autograd.grad((weigh(q, k) * upstream).sum(), (q, k))

    found = gradients(lambda q, k: attention_weights(q, k, mask))
    wanted = gradients(lambda q, k: oracle_weights(q, k, mask | blind) * ~blind)
    for name, actual, expected in zip(("Q", "K"), found, wanted, strict=True):
        hint = "a NaN that was repaired afterwards still poisons the gradient: keep it from arising"
        assert_close(actual, expected, atol=1e-12, name=f"the gradient of {name}", hint=hint)


def test_attention_weights_leave_their_inputs_alone(randn, rng):
    Q, K, mask = randn(2, 3, 5, 4), randn(2, 3, 7, 4), random_mask(rng, 2, 1, 5, 7)
    before = [tensor.clone() for tensor in (Q, K, mask)]
    weights = attention_weights(Q, K, mask)
    assert_close(weights, oracle_weights(*before), atol=1e-12, name="weights")
    for name, now, then in zip(("Q", "K", "mask"), (Q, K, mask), before, strict=True):
        assert torch.equal(now, then), f"attention_weights changed {name}"


def test_attention_weights_hide_by_no_finite_number():
    Q = torch.full((1, 1, 1, 4), 1e5, dtype=torch.float64)
    K = torch.tensor([-5e4, -5e4, 5e4], dtype=torch.float64)[:, None].expand(1, 1, 3, 4)
    weights = attention_weights(Q, K, torch.tensor([True, True, False]))
    expected = torch.tensor([[[[0.5, 0.5, 0.0]]]], dtype=torch.float64)
    assert_close(weights, expected, atol=1e-6, hint="-1e9 is not low enough: hide with -inf")


def test_attention_weights_leave_a_mask_with_blind_rows_alone(randn):
    mask = torch.tensor([[True, False], [False, False]])
    before = mask.clone()
    attention_weights(randn(1, 1, 2, 4), randn(1, 1, 2, 4), mask)
    assert torch.equal(mask, before), "attention_weights changed the mask"


# --- making the module ---------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_dim", [None, 7])
def test_init_makes_four_linear_projections(randn, bias, kv_dim):
    state = draw_state(randn, 12, kv_dim, bias)
    module = MultiHeadAttention(12, 3, kv_dim=kv_dim, bias=bias).double()
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    assert found == wanted, f"the state dict holds {found}, expected {wanted}: kv_dim, bias, names?"
    module.load_state_dict(state)
    for name in PROJECTIONS:
        tokens = randn(2, 5, state[f"{name}.weight"].shape[1])
        expected = F.linear(tokens, state[f"{name}.weight"], state.get(f"{name}.bias"))
        hint = "each projection is an nn.Linear of its own; none shares its weights with another"
        assert_close(getattr(module, name)(tokens), expected, atol=1e-12, name=name, hint=hint)


def test_init_has_biases_and_reads_d_model_features_unless_told_otherwise(randn):
    state = draw_state(randn, 10)
    module = MultiHeadAttention(10, 2).double()
    module.load_state_dict(state)
    tokens = randn(3, 10)
    expected = F.linear(tokens, state["v_proj.weight"], state["v_proj.bias"])
    assert_close(module.v_proj(tokens), expected, atol=1e-12, name="v_proj")


@pytest.mark.parametrize(("d_model", "num_heads"), [(10, 3), (7, 2), (3, 6)])
def test_init_refuses_heads_that_do_not_divide_d_model(randn, d_model, num_heads):
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        MultiHeadAttention(d_model, num_heads)
    # The width of the context is free: only d_model is shared out among the heads.
    state = draw_state(randn, 2 * num_heads, 2 * num_heads + 1)
    x, context = randn(2, 3, 2 * num_heads), randn(2, 4, 2 * num_heads + 1)
    module = build(state, num_heads)
    expected = F.linear(x, state["q_proj.weight"], state["q_proj.bias"])
    assert_close(module.q_proj(x), expected, atol=1e-12, name="q_proj")
    expected = F.linear(context, state["k_proj.weight"], state["k_proj.bias"])
    assert_close(module.k_proj(context), expected, atol=1e-12, name="k_proj")


# --- self-attention ------------------------------------------------------------------------


def assert_both_close(found, wanted, hint="", atol=1e-12):
    (output, weights), (expected_output, expected_weights) = found, wanted
    assert_close(weights, expected_weights, atol=atol, name="weights", hint=hint)
    assert_close(output, expected_output, atol=atol, name="output", hint=hint)


@pytest.mark.parametrize(("B", "H", "D", "T", "_", "__"), SIZES)
def test_self_attention_matches_a_loop_over_heads(randn, B, H, D, T, _, __):
    state, x = draw_state(randn, H * D), randn(B, T, H * D)
    assert_both_close(build(state, H)(x), loop_over_heads(state, H, x))


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_matches_nn_multiheadattention(randn, rng, bias):
    B, H, T, d_model = 3, 5, 7, 20
    state, x, mask = draw_state(randn, d_model, bias=bias), randn(B, T, d_model), random_mask(rng, T, T)
    torchs = nn.MultiheadAttention(d_model, H, bias=bias, batch_first=True, dtype=torch.float64).eval()
    packed = {
        f"in_proj_{k}": [state[f"{n}.{k}"] for n in PROJECTIONS[:3]] for k in ["weight", "bias"][: 1 + bias]
    }
    torchs.load_state_dict(
        {name: torch.cat(parts) for name, parts in packed.items()}
        | {name: value for name, value in state.items() if name.startswith("out_proj")}
    )
    for m in (None, mask):
        hidden = None if m is None else ~m  # there, True means hidden
        expected = torchs(x, x, x, attn_mask=hidden, average_attn_weights=False)
        assert_both_close(build(state, H)(x, mask=m), expected)


def test_self_attention_divides_by_sqrt_of_the_head_size_not_of_d_model():
    # Every projection is the identity. In each of 4 heads of size 4, token 0 scores 8 with
    # itself and 0 with token 1, which is zero: the odds are exp(8 / 2) : 1.
    state = {f"{name}.weight": torch.eye(16).double() for name in PROJECTIONS}
    x = torch.zeros(2, 2, 16).double()
    x[:, 0] = math.sqrt(2)
    p = 1 / (1 + math.exp(-4))
    _, weights = build(state, 4)(x)
    expected = torch.tensor([[p, 1 - p], [0.5, 0.5]], dtype=torch.float64).expand(2, 4, 2, 2)
    hint = "divide by sqrt of d_model / num_heads, here 2: a head adds up only its own products"
    assert_close(weights, expected, atol=1e-12, name="weights", hint=hint)


def test_self_attention_of_equal_scores_is_the_mean_over_time(randn):
    # Zero queries: uniform weights. With identities behind them the output is the mean token.
    state = {f"{name}.weight": torch.eye(12).double() for name in PROJECTIONS}
    state["q_proj.weight"] = torch.zeros(12, 12).double()
    x = randn(2, 5, 12)
    output, _ = build(state, 3)(x)
    hint = "a mean over tokens keeps every feature in its place: do split and merge fit together?"
    assert_close(output, x.mean(1, keepdim=True).expand(2, 5, 12), atol=1e-12, name="output", hint=hint)


def test_self_attention_lets_each_head_look_elsewhere(randn):
    # Head 0 sees only token 0 and head 1 only the token itself: two slices of the features, two sources.
    state = {f"{name}.weight": torch.eye(6).double() for name in PROJECTIONS}
    x = randn(2, 4, 6)
    first = torch.zeros(4, 4, dtype=torch.bool)
    first[:, 0] = True
    mask = torch.stack([first, torch.eye(4, dtype=torch.bool)])  # (H, T, T)
    output, _ = build(state, 2)(x, mask=mask)
    expected = torch.cat([x[:, :1, :3].expand(2, 4, 3), x[:, :, 3:]], dim=-1)
    hint = "head 0 must fill features 0, 1, 2 and head 1 features 3, 4, 5"
    assert_close(output, expected, atol=1e-12, name="output", hint=hint)


@pytest.mark.parametrize("bias", [True, False])
def test_out_proj_is_applied_to_what_v_proj_made(randn, bias):
    # A query that sees only its own token reads its own value, whatever the scores are.
    state, x = draw_state(randn, 15, bias=bias), randn(2, 4, 15)
    output, _ = build(state, 3)(x, mask=torch.eye(4, dtype=torch.bool))
    values = F.linear(x, state["v_proj.weight"], state.get("v_proj.bias"))
    expected = F.linear(values, state["out_proj.weight"], state.get("out_proj.bias"))
    hint = "with one visible token the output is out_proj(v_proj(x))"
    assert_close(output, expected, atol=1e-12, name="output", hint=hint)


def test_queries_and_keys_come_from_their_own_projections(randn):
    # Values and out_proj are identities, so only q_proj and k_proj are in doubt.
    state, x = draw_state(randn, 10), randn(2, 4, 10)
    for name in ("v_proj", "out_proj"):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.eye(10).double(), torch.zeros(10).double()
    hint = "Q is q_proj of the tokens that ask, K is k_proj of the tokens that are read"
    assert_both_close(build(state, 2)(x), loop_over_heads(state, 2, x), hint)


# --- cross-attention -----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("B", "H", "D", "T_q", "T_k", "kv_dim"), SIZES)
def test_cross_attention_matches_a_loop_over_heads(randn, B, H, D, T_q, T_k, kv_dim, bias):
    state = draw_state(randn, H * D, kv_dim, bias)
    x, context = randn(B, T_q, H * D), randn(B, T_k, kv_dim)
    hint = "queries come from x, keys and values from context"
    assert_both_close(build(state, H)(x, context), loop_over_heads(state, H, x, context), hint)


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_matches_nn_multiheadattention(randn, bias):
    B, H, T_q, T_k, d_model, kv_dim = 2, 3, 5, 7, 12, 10
    state = draw_state(randn, d_model, kv_dim, bias)
    x, context = randn(B, T_q, d_model), randn(B, T_k, kv_dim)
    torchs = nn.MultiheadAttention(
        d_model, H, bias=bias, kdim=kv_dim, vdim=kv_dim, batch_first=True, dtype=torch.float64
    ).eval()
    theirs = {f"{name}_weight": state[f"{name}.weight"] for name in PROJECTIONS[:3]}
    theirs |= {name: value for name, value in state.items() if name.startswith("out_proj")}
    if bias:
        theirs["in_proj_bias"] = torch.cat([state[f"{name}.bias"] for name in PROJECTIONS[:3]])
    torchs.load_state_dict(theirs)
    expected = torchs(x, context, context, average_attn_weights=False)
    assert_both_close(build(state, H)(x, context), expected)


def test_cross_attention_reads_values_from_the_context(randn):
    # x and context have the same shape here, so a mix-up raises no error. All weights are equal.
    state = {f"{name}.weight": torch.eye(6).double() for name in PROJECTIONS}
    state["q_proj.weight"] = torch.zeros(6, 6).double()
    x, context = randn(2, 5, 6), randn(2, 5, 6)
    output, _ = build(state, 3)(x, context)
    expected = context.mean(1, keepdim=True).expand(2, 5, 6)
    assert_close(output, expected, atol=1e-12, name="output", hint="values come from context, not from x")


def test_cross_attention_compares_x_with_the_context(randn):
    # Same shapes again: a query or key taken from the wrong sequence raises no error.
    state, x, context = draw_state(randn, 6), randn(2, 5, 6), randn(2, 5, 6)
    _, weights = build(state, 3)(x, context)
    _, expected = loop_over_heads(state, 3, x, context)
    hint = "queries come from x, keys from context"
    assert_close(weights, expected, atol=1e-12, name="weights", hint=hint)


def test_cross_attention_reads_a_changed_context_again(randn):
    module, x, context = MultiHeadAttention(6, 2).double().eval(), randn(2, 3, 6), randn(2, 4, 6)
    module(x, context)
    context.mul_(-2.0)
    assert_close(module(x, context)[0], module(x, context.clone())[0], atol=1e-12)


# --- masks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", mask_shapes(2, 3, 5, 7), ids=str)
def test_mask_of_every_shape_over_a_context(randn, rng, shape):
    state, x, context = draw_state(randn, 12, 10), randn(2, 5, 12), randn(2, 7, 10)
    mask = random_mask(rng, *shape)
    hint = "the mask broadcasts to (B, H, T_q, T_k), from the right: (H, T_q, T_k) is a mask per head"
    assert_both_close(build(state, 3)(x, context, mask), loop_over_heads(state, 3, x, context, mask), hint)


@pytest.mark.parametrize("shape", mask_shapes(3, 2, 4, 4), ids=str)
def test_mask_of_every_shape_over_x_itself(randn, rng, shape):
    state, x = draw_state(randn, 10, bias=False), randn(3, 4, 10)
    mask = random_mask(rng, *shape)
    hint = "self-attention must use the mask too; its last axis is the keys"
    assert_both_close(build(state, 2)(x, mask=mask), loop_over_heads(state, 2, x, mask=mask), hint)


def test_mask_keeps_hidden_tokens_from_having_any_influence(randn):
    state, x, context = draw_state(randn, 12, 5), randn(2, 4, 12), randn(2, 6, 5)
    mask = torch.tensor([True, True, False, True, False, True])
    module = build(state, 3)
    before = module(x, context, mask)
    context[:, [2, 4]] = 1e3 * randn(2, 2, 5)
    hint = "a hidden token leaks into the result"
    assert_both_close(module(x, context, mask), before, hint)
    shown = context[:, mask]  # as if the hidden tokens were not there
    expected, _ = loop_over_heads(state, 3, x, shown)
    assert_close(before[0], expected, atol=1e-12, name="output", hint=hint)


@pytest.mark.parametrize("bias", [True, False])
def test_mask_that_hides_everything_leaves_only_a_bias(randn, rng, bias):
    state, x, context = draw_state(randn, 12, 10, bias), randn(2, 5, 12), randn(2, 7, 10)
    mask = random_mask(rng, 2, 1, 5, 7)
    mask[0, :, 3] = mask[1, :, 0] = False
    output, weights = build(state, 3)(x, context, mask)
    expected = state["out_proj.bias"] if bias else torch.zeros(12).double()
    for b, t in ((0, 3), (1, 0)):
        hint = "a query that sees nothing reads zeros; only the bias of out_proj is left"
        assert_close(output[b, t], expected, atol=1e-15, name=f"output[{b}, {t}]", hint=hint)
    assert_both_close((output, weights), loop_over_heads(state, 3, x, context, mask))


def test_mask_that_blinds_one_head_leaves_the_other_heads_alone(randn, rng):
    state, x = draw_state(randn, 12), randn(2, 5, 12)
    mask = random_mask(rng, 2, 3, 5, 5)
    mask[:, 1] = mask[0, 2, 4] = False
    hint = "blindness is a matter of one query in one head"
    assert_both_close(build(state, 3)(x, mask=mask), loop_over_heads(state, 3, x, mask=mask), hint)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 4)])
def test_mask_axes_are_matched_from_the_last_even_if_all_sizes_agree(randn, rng, shape):
    x, module = randn(4, 4, 8), MultiHeadAttention(8, 4).double().eval()  # B = H = T = 4
    mask = torch.from_numpy(rng.random(shape) < 0.6)
    ours, theirs = module(x, mask=mask), module(x, mask=mask.broadcast_to(4, 4, 4, 4).clone())
    for name, a, b in zip(("output", "weights"), ours, theirs, strict=True):
        assert_close(a, b, atol=1e-12, name=name, hint="a mask of fewer axes is the same for all in front")


# --- gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", ["no mask", "a mask", "blind rows"])
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("through", ["output", "weights"])
def test_gradients_match_a_loop_over_heads(randn, rng, kind, masked, through):
    state = draw_state(randn, 12, 12 if kind == "self" else 10)
    x, context = randn(2, 4, 12), None if kind == "self" else randn(2, 5, 10)
    T_k = 4 if kind == "self" else 5
    mask = None if masked == "no mask" else random_mask(rng, 2, 3, 4, T_k)
    if masked == "blind rows":
        mask[0, :, 1] = mask[1, 2, 3] = mask[1, :, 0] = False
    upstream = randn(2, 4, 12) if through == "output" else randn(2, 3, 4, T_k)

    def gradients(attend, parameters):
        inputs = {"x": x.clone().requires_grad_()}
        if context is not None:
            inputs["context"] = context.clone().requires_grad_()
        result = attend(*inputs.values(), mask=mask)[through == "weights"]
        assert result.requires_grad, f"no gradient flows through the {through}: is there a detach or no_grad?"
        wanted = inputs | parameters
        found = torch.autograd.grad(
            (result * upstream).sum(), list(wanted.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(wanted, found, strict=True))

    module = build(state, 3)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    found = gradients(module, dict(module.named_parameters()))
    expected = gradients(lambda *a, mask: loop_over_heads(leaves, 3, *a, mask=mask), leaves)
    for name in expected:
        hint = "the result is right but its gradient is not: a detach, an in-place change, or a repaired NaN"
        assert_close(found[name], expected[name], atol=1e-12, name=f"the gradient of {name}", hint=hint)


# --- dropout -------------------------------------------------------------------------------


def dropout_case(randn, p, *, B=2, T_q=9, T_k=40):
    state = draw_state(randn, 15, 8)
    return state, build(state, 3, dropout=p), randn(B, T_q, 15), randn(B, T_k, 8)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_dropout_zeroes_weights_and_scales_up_the_others(randn, rng, p):
    state, module, x, context = dropout_case(randn, p)
    mask = random_mask(rng, 2, 3, 9, 40)
    mask[0, 1, 2] = False
    _, clean = loop_over_heads(state, 3, x, context, mask)
    for m, whole in ((None, loop_over_heads(state, 3, x, context)[1]), (mask, clean)):
        with torch.no_grad():
            _, weights = module.train()(x, context, m)
        assert not torch.isnan(weights).any(), "dropout made NaN: is it applied to the scores?"
        dropped = (weights == 0) & (whole > 0)
        assert dropped.any(), "no weight was dropped in training mode"
        hint = f"a surviving weight must be its softmax weight divided by {1 - p:g}: drop after the softmax"
        assert_close(weights, torch.where(dropped, 0, whole / (1 - p)), atol=1e-12, name="weights", hint=hint)


@pytest.mark.parametrize("p", [0.1, 0.65])
def test_dropout_drops_the_promised_share(randn, p):
    _, module, x, context = dropout_case(randn, p, B=5, T_q=23)
    _, weights = module.train()(x, context)
    share = (weights == 0).double().mean().item()
    sigma = math.sqrt(p * (1 - p) / weights.numel())
    assert abs(share - p) < 6 * sigma, f"{share:.3f} of the weights were dropped, expected about {p}"


def test_dropout_decides_for_every_weight_alone(randn):
    # With 40 keys a row has 2^40 patterns: no two of the 54 rows are alike, unless they share a draw.
    _, module, x, context = dropout_case(randn, 0.5)
    _, weights = module.train()(x, context)
    rows = (weights == 0).flatten(0, 2)
    different = len({tuple(row.tolist()) for row in rows})
    assert different == len(rows), (
        f"{len(rows)} rows of weights have only {different} patterns of dropped keys: "
        "each query of each head of each sequence needs its own draw"
    )
    assert len(set(rows.sum(-1).tolist())) > 1, (
        "each row drops the same number of keys: every weight has its own draw"
    )
    columns = (weights == 0).permute(3, 0, 1, 2).flatten(1)
    assert len({tuple(column.tolist()) for column in columns}) == len(columns), "keys are dropped together"


def test_dropout_is_drawn_anew_in_every_call_and_repeats_with_the_seed(randn):
    _, module, x, context = dropout_case(randn, 0.5)
    module.train()
    torch.manual_seed(7)
    first, second = module(x, context), module(x, context)
    torch.manual_seed(7)
    again = module(x, context)
    assert not torch.equal(first[1], second[1]), "two calls in a row dropped the same weights"
    assert_both_close(again, first, "the same seed must drop the same weights: draw from torch's generator")


def test_dropout_acts_on_the_weights_that_mix_the_values_and_on_nothing_else(randn):
    state, module, x, context = dropout_case(randn, 0.4)
    output, weights = module.train()(x, context)
    _, whole = loop_over_heads(state, 3, x, context)
    expected, _ = loop_over_heads(state, 3, x, context, factor=weights.detach() / whole)
    hint = "the output is not the values mixed with the weights you returned: what else was dropped?"
    assert_close(output, expected, atol=1e-11, name="output", hint=hint)
    assert (weights == 0).any(), "no weight was dropped in training mode"


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_dropout_does_nothing_in_evaluation_mode(randn, p):
    state, module, x, context = dropout_case(randn, p)
    expected = loop_over_heads(state, 3, x, context)
    module.train()(x, context)
    hint = "in evaluation mode the weights are complete and not scaled: does dropout know self.training?"
    assert_both_close(module.eval()(x, context), expected, hint)


def test_dropout_of_zero_does_nothing_in_training_mode(randn):
    state, module, x, context = dropout_case(randn, 0.0)
    expected = loop_over_heads(state, 3, x, context)
    assert_both_close(module.train()(x, context), expected)
    left_out = MultiHeadAttention(15, 3, kv_dim=8).double()
    left_out.load_state_dict(state)
    assert_both_close(left_out.train()(x, context), expected, "nothing is dropped unless dropout is given")


def test_dropout_gradients_match_a_loop_with_the_same_weights_dropped(randn, rng):
    p = 0.4
    state, module, x, context = dropout_case(randn, p, T_q=4, T_k=6)
    mask = random_mask(rng, 4, 6)
    upstream = randn(2, 4, 15)
    output, weights = module.train()(x, context, mask)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(
        (output * upstream).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    found = dict(zip(parameters, found, strict=True))
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    factor = (weights != 0).double() / (1 - p)
    expected, _ = loop_over_heads(leaves, 3, x, context, mask, factor)
    expected = dict(
        zip(leaves, torch.autograd.grad((expected * upstream).sum(), list(leaves.values())), strict=True)
    )
    for name in leaves:
        assert_close(found[name], expected[name], atol=1e-12, name=f"the gradient of {name}")


def test_dropout_lets_gradients_through_the_weights(randn):
    module = MultiHeadAttention(6, 2, dropout=0.3).double().train()
    assert module(randn(2, 3, 6))[1].requires_grad, "the weights returned are cut off from the graph"


# --- robustness ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_lower_precision_stays_close_to_float64(randn, rng, dtype, atol):
    state = {name: value.to(dtype) for name, value in draw_state(randn, 12, 10).items()}
    x, context = randn(2, 5, 12, dtype=dtype), randn(2, 7, 10, dtype=dtype)
    mask = random_mask(rng, 2, 3, 5, 7)
    mask[0, :, 3] = False
    module = MultiHeadAttention(12, 3, kv_dim=10).to(dtype).eval()
    module.load_state_dict(state)
    state = {name: value.double() for name, value in state.items()}
    for m in (None, mask):
        output, weights = module(x, context, m)
        assert output.dtype == dtype, f"the output is {output.dtype} for inputs in {dtype}"
        expected = loop_over_heads(state, 3, x.double(), context.double(), m)
        assert_both_close((output, weights), expected, atol=atol)


def test_strided_inputs_give_the_same_result(randn, rng):
    state = draw_state(randn, 12, 10)
    x = randn(5, 2, 24).transpose(0, 1)[..., ::2]
    context = randn(10, 14, 2).permute(2, 1, 0)[:, ::2]
    mask = random_mask(rng, 7, 5).T
    assert_both_close(
        build(state, 3)(x, context, mask),
        loop_over_heads(state, 3, x.contiguous(), context.contiguous(), mask.contiguous()),
    )


def test_extreme_scores_stay_finite_and_right(randn, rng):
    state = draw_state(randn, 12, 10)
    for name in ("q_proj.weight", "k_proj.weight"):
        state[name] = 100 * state[name]  # scores of about ±1e4
    x, context, mask = randn(2, 5, 12), randn(2, 7, 10), random_mask(rng, 2, 3, 5, 7)
    for m in (None, mask):
        expected = loop_over_heads(state, 3, x, context, m)
        assert_both_close(build(state, 3)(x, context, m), expected, atol=1e-9)


def test_inputs_are_not_modified(randn, rng):
    state = draw_state(randn, 12, 10)
    x, context, mask = randn(2, 5, 12), randn(2, 7, 10), random_mask(rng, 5, 7)
    before = [tensor.clone() for tensor in (x, context, mask)]
    module = build(state, 3)
    assert_both_close(module(x, context, mask), loop_over_heads(state, 3, *before))
    for name, now, then in zip(("x", "context", "mask"), (x, context, mask), before, strict=True):
        assert torch.equal(now, then), f"{name} was modified"
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} was modified"


def test_a_call_leaves_no_trace_on_the_next(randn, rng):
    state, other = draw_state(randn, 12), draw_state(randn, 12)
    x, first, second = randn(2, 5, 12), randn(2, 5, 12), randn(2, 5, 12)
    module = build(state, 3)
    module(x, first, random_mask(rng, 5, 5))
    build(draw_state(randn, 8, 5), 4)
    hint = "the module remembers an earlier mask, context or length, or shares something with another module"
    assert_both_close(module(x, second), loop_over_heads(state, 3, x, second), hint)
    assert_both_close(module(x), loop_over_heads(state, 3, x), hint)
    longer = randn(3, 7, 12)
    assert_both_close(module(longer), loop_over_heads(state, 3, longer), hint)
    module.load_state_dict(other)
    hint = "the module still works with parameters it had before: read them in every call"
    assert_both_close(module(x, first), loop_over_heads(other, 3, x, first), hint)


# --- forbidden -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("masked", ["no mask", "a mask"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_shortcuts_are_not_taken(randn, rng, forbid, kind, masked, mode):
    forbid(
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        "*scaled_dot_product*",
        "*multi_head_attention*",
        why="build it from matrix products and a softmax",
    )
    state, x = draw_state(randn, 12), randn(2, 5, 12).requires_grad_()
    context = None if kind == "self" else randn(2, 5, 12)
    mask = None if masked == "no mask" else random_mask(rng, 5, 5)
    output, weights = build(state, 3, dropout=0.3).train(mode == "train")(x, context, mask)
    output.sum().backward()
    _, whole = loop_over_heads(state, 3, x, context, mask)
    factor = torch.where(whole > 0, weights / whole, 0.0) if mode == "train" else None
    expected = loop_over_heads(state, 3, x, context, mask, factor)
    assert_both_close((output, weights), expected, atol=1e-11)
