"""Tests of ch01/lab04. The oracle is torch.nn.MultiheadAttention itself, with every parameter randomised."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity import ParityAttention, attention_weights, merge_masks, split_packed
from shared.compare import assert_close, max_error
from torch import nn

# PyTorch only warns that it may one day refuse a boolean mask beside a floating one.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

B, H, T_Q, T_K, E, D = 2, 3, 5, 7, 12, 4
K_DIM, V_DIM = 10, 14
PACKED = {}
SEPARATE = {"kdim": K_DIM, "vdim": V_DIM}
WEIGHTS = pytest.mark.parametrize("sizes", [PACKED, SEPARATE], ids=["packed", "separate"])


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        nn.MultiheadAttention,
        "*scaled_dot_product*",
        "*multi_head_attention*",
        why="write the attention out in matrix products",
    )


# --- what the tests are made of ---------------------------------------------------------------


def oracle(randn, embed_dim=E, num_heads=H, dtype=torch.float64, **options):
    """An nn.MultiheadAttention all of whose parameters are random: PyTorch's biases start at 0."""
    module = nn.MultiheadAttention(embed_dim, num_heads, dtype=dtype, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(randn(*p.shape) * (p.shape[1] ** -0.5 if p.dim() == 2 else 0.5))
    return module


def twin(module, **options):
    """A ParityAttention with the state of `module`, made without from_torch."""
    ours = ParityAttention(
        module.embed_dim,
        module.num_heads,
        dropout=module.dropout,
        bias=module.in_proj_bias is not None,
        kdim=module.kdim,
        vdim=module.vdim,
        batch_first=module.batch_first,
        dtype=module.out_proj.weight.dtype,
    )
    ours.load_state_dict(module.state_dict())
    return ours.train(module.training)


def qkv(randn, module, batch=B, t_q=T_Q, t_k=T_K, dtype=torch.float64):
    """query, key and value for `module`, in its layout; batch None is unbatched."""
    shapes = ((t_q, module.embed_dim), (t_k, module.kdim), (t_k, module.vdim))
    if batch is None:
        return [randn(*shape, dtype=dtype) for shape in shapes]
    xs = [randn(batch, *shape, dtype=dtype) for shape in shapes]
    return xs if module.batch_first else [x.transpose(0, 1).contiguous() for x in xs]


MASKS = [
    (a, p) for a in ("none", "bool2d", "float2d", "bool3d", "float3d") for p in ("none", "bool", "float")
]
MASK_IDS = [f"attn_{a}-padding_{p}" for a, p in MASKS]
EVERY_MASK = pytest.mark.parametrize(("attn", "padding"), MASKS, ids=MASK_IDS)


def make_masks(rng, attn, padding, batch=B, heads=H, t_q=T_Q, t_k=T_K, dtype=torch.float64):
    """attn_mask and key_padding_mask in PyTorch's polarity; together they leave every query a key."""

    def build(kind, hidden):
        if kind.startswith("none"):
            return None
        if kind.startswith("bool"):
            return torch.from_numpy(hidden)
        return torch.from_numpy(np.where(hidden, -np.inf, rng.standard_normal(hidden.shape))).to(dtype)

    shape = (batch * heads, t_q, t_k) if attn.endswith("3d") else (t_q, t_k)
    hidden = rng.random(shape) < 0.4
    hidden[..., np.arange(t_q), np.arange(t_q) % 2] = False  # query i keeps key 0 or 1 ...
    hidden[..., 0, -1] = True
    padded = rng.random((batch, t_k)) < 0.4
    padded[:, :2] = False  # ... and neither is ever padding
    padded[np.arange(batch), -1 - np.arange(batch) % (t_k - 2)] = True
    return build(attn, hidden), build(padding, padded)


def run(module, inputs, attn_mask=None, key_padding_mask=None, upstream=None, **options):
    """Call `module` on fresh leaves. Return outputs and, given upstream gradients, all gradients, by name."""
    leaves = dict(zip(("query", "key", "value"), inputs, strict=True))
    leaves |= {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
    for name, x in leaves.items():
        if x is not None:
            leaves[name] = x.clone().requires_grad_(x.is_floating_point() and upstream is not None)
    output, weights = module(**leaves, **options)
    results = {"output": output} | ({} if weights is None else {"weights": weights})
    if upstream is not None:
        loss = sum((results[name] * g).sum() for name, g in upstream.items())
        wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
        wanted |= dict(module.named_parameters())
        grads = torch.autograd.grad(loss, list(wanted.values()))
        results |= {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return {name: x.detach() for name, x in results.items()}


def assert_same(ours, theirs, *, atol=1e-12, hint=""):
    for name, expected in theirs.items():
        assert name in ours, f"{name} is missing: it is None"
        assert_close(ours[name], expected, atol=atol, name=name, hint=hint)


# --- split_packed -----------------------------------------------------------------------------


def test_split_weight_is_query_then_key_then_value(randn):
    packed = randn(18, 6)
    (W_q, W_k, W_v), _ = split_packed(packed, None, 6)
    for name, part, rows in (("W_q", W_q, range(6)), ("W_k", W_k, range(6, 12)), ("W_v", W_v, range(12, 18))):
        expected = torch.stack([packed[row] for row in rows])
        assert_close(part, expected, atol=0, name=name, hint="the rows of q come first, then k, then v")


def test_split_bias_is_query_then_key_then_value():
    _, (b_q, b_k, b_v) = split_packed(None, torch.arange(1.0, 16.0), 5)
    for name, part, start in (("b_q", b_q, 1), ("b_k", b_k, 6), ("b_v", b_v, 11)):
        expected = torch.arange(start, start + 5.0)
        assert_close(part, expected, atol=0, name=name, hint="the bias has the order of the weight: q, k, v")


def test_split_of_nothing_is_none(randn):
    weight, bias = randn(12, 4), randn(12)
    (_, W_k, _), biases = split_packed(weight, None, 4)
    assert_close(W_k, weight[4:8], atol=0, name="W_k")
    assert tuple(biases) == (None, None, None), "without in_proj_bias all three biases are None"
    weights, (_, _, b_v) = split_packed(None, bias, 4)
    assert_close(b_v, bias[8:], atol=0, name="b_v")
    assert tuple(weights) == (None, None, None), "without in_proj_weight all three weights are None"


def test_split_parts_pass_their_gradients_on(randn):
    weight, bias = randn(12, 4).requires_grad_(), randn(12).requires_grad_()
    (W_q, W_k, W_v), (b_q, b_k, b_v) = split_packed(weight, bias, 4)
    loss = 2 * W_q.sum() + 3 * W_k.sum() + 5 * W_v.sum() + 7 * b_q.sum() + 11 * b_k.sum() + 13 * b_v.sum()
    assert loss.requires_grad, (
        "the parts are cut off from the packed parameters (detach, .data, nn.Parameter?)"
    )
    loss.backward()
    expected = torch.tensor([2.0, 3.0, 5.0]).double().repeat_interleave(4)[:, None].expand(12, 4)
    assert_close(weight.grad, expected, atol=0, name="gradient of in_proj_weight")
    expected = torch.tensor([7.0, 11.0, 13.0]).double().repeat_interleave(4)
    assert_close(bias.grad, expected, atol=0, name="gradient of in_proj_bias")


# --- merge_masks ------------------------------------------------------------------------------


def merged(attn_mask, key_padding_mask, batch=B, heads=H, t_q=T_Q, t_k=T_K, dtype=torch.float64):
    mask = merge_masks(attn_mask, key_padding_mask, batch, heads, dtype)
    assert mask is not None, "merge_masks returned None although there is a mask"
    shape = (batch, heads, t_q, t_k)
    try:
        return mask.broadcast_to(shape)
    except RuntimeError:
        message = f"a mask of shape {tuple(mask.shape)} does not broadcast to (B, H, T_q, T_k) = {shape}"
    pytest.fail(message, pytrace=False)


def merged_slowly(attn_mask, key_padding_mask, batch=B, heads=H, t_q=T_Q, t_k=T_K):
    """One number at a time, straight from PyTorch's documentation."""

    def number(entry):
        return (-math.inf if entry else 0.0) if entry.dtype == torch.bool else entry.item()

    out = torch.zeros(batch, heads, t_q, t_k, dtype=torch.float64)
    for b, h, i, j in np.ndindex(*out.shape):
        if attn_mask is not None:
            own = attn_mask if attn_mask.dim() == 2 else attn_mask[b * heads + h]
            out[b, h, i, j] += number(own[i, j])
        if key_padding_mask is not None:
            out[b, h, i, j] += number(key_padding_mask[b, j])
    return out


def test_merge_hides_where_a_mask_is_true():
    visible, hidden = 0.0, -math.inf
    result = merged(torch.tensor([[False, True, False], [True, False, False]]), None, 1, 1, 2, 3)
    expected = torch.tensor([[visible, hidden, visible], [hidden, visible, visible]]).double()[None, None]
    assert_close(result, expected, atol=0, hint="attn_mask: here True means hidden, not lab 1.1's may look")
    result = merged(None, torch.tensor([[False, False, True]]), 1, 1, 2, 3)
    expected = torch.tensor([[visible, visible, hidden]] * 2).double()[None, None]
    assert_close(result, expected, atol=0, hint="key_padding_mask: True marks padding, which is hidden")


@pytest.mark.parametrize(("attn", "padding"), MASKS[1:], ids=MASK_IDS[1:])
def test_merge_adds_both_masks_up(rng, attn, padding):
    masks = make_masks(rng, attn, padding)
    assert_close(
        merged(*masks),
        merged_slowly(*masks),
        atol=1e-15,
        name="merged mask",
        hint="True is -inf, False is 0, a float is itself, and the two masks add up",
    )


def test_merge_of_masks_that_hide_nothing_is_zero():
    masks = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    for given in (masks, (masks[0], None), (None, masks[1])):
        result = merged(*given, 2, 3, 4, 5)
        hint = "False everywhere hides nothing: 0 for every key"
        assert_close(result, torch.zeros(2, 3, 4, 5).double(), atol=0, name="merged mask", hint=hint)


@pytest.mark.parametrize("hiding", ["attn_mask", "key_padding_mask"])
def test_merge_hides_where_either_mask_hides(hiding):
    attn_mask, padding = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    (attn_mask if hiding == "attn_mask" else padding)[1, 3] = True
    expected = merged_slowly(attn_mask, padding, 2, 3, 4, 5)
    hint = f"a key is hidden if either mask hides it; here {hiding} does"
    assert_close(merged(attn_mask, padding, 2, 3, 4, 5), expected, atol=0, name="merged mask", hint=hint)


def test_merge_of_no_masks_is_none(rng):
    assert merge_masks(None, None, B, H, torch.float64) is None
    masks = make_masks(rng, "bool2d", "none")
    assert_close(merged(*masks), merged_slowly(*masks), atol=0, name="merged mask")


def test_merge_gives_row_b_times_h_plus_h_to_head_h_of_sample_b():
    attn_mask = torch.arange(6.0).double()[:, None, None].expand(6, 4, 5)  # row r is r everywhere
    result = merged(attn_mask, None, 2, 3, 4, 5)[:, :, 0, 0]
    expected = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).double()
    assert_close(
        result, expected, atol=0, name="[b, h] entry", hint="the heads of one sample lie side by side"
    )


def test_merge_puts_key_padding_on_samples_and_keys(rng):
    # As many queries as keys as samples, so that every axis could be mistaken for every other.
    padding = torch.tensor([[0, 0, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    expected = merged_slowly(None, padding, 3, 3, 3, 3)
    result = merged(None, padding, 3, 3, 3, 3)
    assert_close(
        result, expected, atol=0, hint="padding hides keys (the last axis), for each sample (the first)"
    )


def test_merge_hides_nothing_by_finite_numbers():
    numbers = [-1e9, -1e4, -1.0, 0.0, 1.0, 3.5, 1e4]
    result = merged(torch.tensor([numbers]).double(), torch.zeros(1, 7).double(), 1, 1, 1, 7)
    expected = torch.tensor([[[numbers]]]).double()
    assert_close(result, expected, atol=0, hint="a floating mask is added as it is; only -inf hides")
    result = merged(torch.zeros(1, 7).double(), torch.tensor([numbers]).double(), 1, 1, 1, 7)
    assert_close(result, expected, atol=0, hint="a floating key_padding_mask is added as it is too")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_returns_the_dtype_asked_for(rng, dtype):
    for attn, padding in (("bool2d", "none"), ("none", "bool"), ("float3d", "bool"), ("bool2d", "float")):
        masks = make_masks(rng, attn, padding, dtype=torch.float64)
        result = merged(*masks, dtype=dtype)
        assert result.dtype == dtype, f"attn {attn}, padding {padding}: dtype {result.dtype}, not {dtype}"
        assert_close(result, merged_slowly(*masks), atol=1e-6, name="merged mask")


@pytest.mark.parametrize(("attn", "padding"), [("float2d", "float"), ("bool3d", "bool"), ("float3d", "bool")])
def test_merge_does_not_modify_the_masks(rng, attn, padding):
    masks = make_masks(rng, attn, padding)
    before = [mask.clone() for mask in masks]
    assert_close(merged(*masks), merged_slowly(*before), atol=1e-15, name="merged mask")
    for name, now, then in zip(("attn_mask", "key_padding_mask"), masks, before, strict=True):
        assert torch.equal(now, then), f"{name} was modified (+=, masked_fill_ ?)"


def test_merge_passes_gradients_to_both_floating_masks(randn):
    attn_mask, padding = randn(T_Q, T_K).requires_grad_(), randn(B, T_K).requires_grad_()
    g = randn(B, H, T_Q, T_K)
    loss = (merged(attn_mask, padding) * g).sum()
    assert loss.requires_grad, "the merged mask is cut off from the floating masks (detach, torch.tensor?)"
    loss.backward()
    assert_close(attn_mask.grad, g.sum((0, 1)), atol=1e-12, name="gradient of attn_mask")
    assert_close(padding.grad, g.sum((1, 2)), atol=1e-12, name="gradient of key_padding_mask")


@pytest.mark.parametrize("which", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32, torch.int8])
def test_merge_refuses_masks_of_integers(which, dtype):
    mask = torch.tensor([[0, 1, 0], [1, 0, 0]], dtype=dtype)
    arguments = (mask, None) if which == "attn_mask" else (None, mask)
    try:
        merge_masks(*arguments, 2, 2, torch.float64)
    except ValueError:
        arguments = tuple(m if m is None else m.bool() for m in arguments)
        assert_close(merged(*arguments, 2, 2, 2, 3), merged_slowly(*arguments, 2, 2, 2, 3), atol=0)
        return
    pytest.fail(f"a {which} of {dtype} was accepted: is its 1 added, or does it hide? Raise ValueError")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_merge_takes_floating_masks_of_any_precision(dtype):
    attn, padding = (torch.tensor([[0.5, -torch.inf, -2.0], [0.0, 3.0, 0.25]]).roll(n, 0) for n in range(2))
    result = merged(attn.to(dtype), padding.to(dtype), 2, 2, 2, 3)
    assert_close(result, merged_slowly(attn.double(), padding.double(), 2, 2, 2, 3), atol=0)


# --- attention_weights ------------------------------------------------------------------------


def weights_oracle(q, k, mask=None):
    # PyTorch's fused attention, reading the identity as values; its own rule for blind rows is 0 as well.
    eye = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(q, k, eye, attn_mask=mask)


def test_attention_weights_match_pytorch_without_a_mask(randn):
    q, k = randn(B, H, T_Q, D), randn(B, H, T_K, D)
    hint = "softmax over the keys (the last axis) of q k^T / sqrt(D)"
    assert_close(attention_weights(q, k, None), weights_oracle(q, k), atol=1e-12, name="weights", hint=hint)


def test_attention_weights_are_scaled_by_the_square_root_of_the_head_dimension():
    # q·k is 18 and 0 and D is 36, so the odds are exp(18 / 6) : 1.
    q, k = torch.full((1, 1, 1, 36), 0.5).double(), torch.stack([torch.ones(36), torch.zeros(36)]).double()
    p = 1 / (1 + math.exp(-3))
    expected = torch.tensor([[[[p, 1 - p]]]]).double()
    assert_close(
        attention_weights(q, k[None, None], None), expected, atol=1e-7, hint="divide by sqrt(D), here 6"
    )


def test_attention_weights_add_the_mask_to_the_scaled_scores(randn):
    q, k, mask = randn(B, H, T_Q, D), randn(B, H, T_K, D), randn(B, H, T_Q, T_K)
    hint = "scale first, add the mask as it is, then softmax"
    assert_close(
        attention_weights(q, k, mask), weights_oracle(q, k, mask), atol=1e-12, name="weights", hint=hint
    )


@pytest.mark.parametrize("shape", [(T_Q, T_K), (B, 1, 1, T_K), (B, H, T_Q, T_K)])
def test_attention_weights_hide_keys_before_the_softmax(rng, randn, shape):
    q, k = randn(B, H, T_Q, D), randn(B, H, T_K, D)
    hidden = rng.random(shape) < 0.5
    hidden[..., 0], hidden[..., -1] = False, True
    mask = torch.zeros(shape).double().masked_fill(torch.from_numpy(hidden), -math.inf)
    weights = attention_weights(q, k, mask)
    expected = weights_oracle(q, k, mask.broadcast_to(B, H, T_Q, T_K))
    hint = "the mask goes in before the softmax, so that the visible keys still sum to 1"
    assert_close(weights, expected, atol=1e-12, name="weights", hint=hint)


def blind_mask():
    mask = torch.zeros(B, H, T_Q, T_K).double()
    mask[..., 1, 3] = mask[1, 0, 0, 4:] = -math.inf
    mask[0, 1, 2] = mask[1, 2, 4] = -math.inf  # two queries that see nothing
    return mask


def test_attention_weights_of_a_blind_query_are_exactly_zero(randn):
    q, k, mask = randn(B, H, T_Q, D), randn(B, H, T_K, D), blind_mask()
    weights = attention_weights(q, k, mask)
    for row in (weights[0, 1, 2], weights[1, 2, 4]):
        hint = "softmax of nothing but -inf is 0/0: such a row must be 0"
        assert_close(row, torch.zeros(T_K).double(), atol=0, name="row", hint=hint)
    seen = ~mask.isneginf().all(-1)
    assert_close(weights[seen], weights_oracle(q, k, mask)[seen], atol=1e-12, name="the other rows")


def test_attention_weights_of_a_blind_query_leave_no_nan_in_the_gradient(randn):
    q, k, mask, g = randn(B, H, T_Q, D), randn(B, H, T_K, D), blind_mask(), randn(B, H, T_Q, T_K)
    blind = mask.isneginf().all(-1, keepdim=True)

    def gradients(function, mask, g):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        return torch.autograd.grad((function(*leaves, mask) * g).sum(), leaves)

    ours = gradients(attention_weights, mask, g)
    # Weights that are constant have no gradient: as if nobody had asked for those rows.
    theirs = gradients(weights_oracle, mask.masked_fill(blind, 0.0), g.masked_fill(blind, 0.0))
    for name, actual, expected in zip("qk", ours, theirs, strict=True):
        hint = "zeroing a NaN after the softmax is too late: its gradient is NaN already"
        assert_close(actual, expected, atol=1e-12, name=f"gradient of {name}", hint=hint)


@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_attention_weights_survive_extreme_scores(randn, magnitude):
    q, k = randn(B, H, T_Q, D), randn(B, H, T_K, D)
    q[..., 0], k[..., 0] = 2.0, magnitude + k[..., 0]
    mask = blind_mask()
    for m in (None, mask):
        hint = "scores of 1e4: subtract the largest of each row before exp"
        assert_close(
            attention_weights(q, k, m), weights_oracle(q, k, m), atol=1e-9, name="weights", hint=hint
        )


def test_attention_weights_are_not_hidden_by_finite_numbers(randn):
    q, k = randn(B, H, T_Q, D), randn(B, H, T_K, D)
    mask = torch.full((T_Q, T_K), -1e4).double()
    hint = "-1e4 everywhere is a shift, and softmax ignores shifts: only -inf hides"
    assert_close(attention_weights(q, k, mask), weights_oracle(q, k), atol=1e-9, name="weights", hint=hint)


def test_attention_weights_do_not_modify_their_inputs(randn):
    inputs = [randn(B, H, T_Q, D), randn(B, H, T_K, D), blind_mask()]
    before = [x.clone() for x in inputs]
    weights = attention_weights(*inputs)
    assert_close(weights, weights_oracle(*before), atol=1e-12, name="weights")
    for name, now, then in zip(("q", "k", "mask"), inputs, before, strict=True):
        assert torch.equal(now, then), f"{name} was modified"


# --- ParityAttention.project --------------------------------------------------------------------


@WEIGHTS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_project_cuts_the_projections_into_heads(randn, sizes, bias):
    module = oracle(randn, batch_first=True, bias=bias, **sizes)
    inputs = qkv(randn, module)
    separate = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    for n, actual in enumerate(twin(module).project(*inputs)):
        x, offset = inputs[n], n * E
        W, first = (separate[n], 0) if sizes else (module.in_proj_weight, offset)
        expected = torch.zeros(B, H, x.shape[1], D, dtype=torch.float64)
        for b, h, t, d in np.ndindex(*expected.shape):
            feature = h * D + d
            expected[b, h, t, d] = x[b, t] @ W[first + feature].detach()
            if bias:
                expected[b, h, t, d] += module.in_proj_bias[offset + feature].detach()
        hint = "feature d of head h is row h * D + d of the projection x @ W.T + b"
        assert_close(actual.detach(), expected, atol=1e-12, name="qkv"[n], hint=hint)


# --- ParityAttention.forward --------------------------------------------------------------------


@WEIGHTS
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_forward_matches_pytorch_without_masks(randn, sizes, batch_first):
    module = oracle(randn, batch_first=batch_first, **sizes)
    inputs = qkv(randn, module)
    hint = "no masks yet: heads side by side again, then out_proj; and check batch_first"
    assert_same(run(twin(module), inputs), run(module, inputs), hint=hint)


@pytest.mark.parametrize(("embed_dim", "num_heads"), [(12, 1), (12, 2), (10, 5), (9, 9), (21, 3)])
def test_forward_matches_pytorch_with_any_number_of_heads(randn, embed_dim, num_heads):
    module = oracle(randn, embed_dim, num_heads)
    inputs = qkv(randn, module, batch=3)
    assert_same(run(twin(module), inputs), run(module, inputs))


@pytest.mark.parametrize("sizes", [{"kdim": 10}, {"vdim": 14}, {"kdim": 12, "vdim": 12}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_matches_pytorch_with_any_size_of_key_and_value(randn, sizes, bias):
    module = oracle(randn, bias=bias, **sizes)
    inputs = qkv(randn, module)
    upstream = {"output": randn(T_Q, B, E)}
    ours, theirs = (run(m, inputs, upstream=upstream) for m in (twin(module), module))
    assert_same(ours, theirs, hint="separate weights are used when kdim or vdim differs from embed_dim")


@EVERY_MASK
def test_forward_matches_pytorch_with_every_mask(rng, randn, attn, padding):
    module = oracle(randn, batch_first=True)
    inputs, masks = qkv(randn, module), make_masks(rng, attn, padding)
    for average in (True, False):
        ours, theirs = (run(m, inputs, *masks, average_attn_weights=average) for m in (twin(module), module))
        assert_same(ours, theirs)


@EVERY_MASK
def test_forward_gradients_match_pytorch_with_every_mask(rng, randn, attn, padding):
    module = oracle(randn, **SEPARATE)
    inputs, masks = qkv(randn, module), make_masks(rng, attn, padding)
    upstream = {"output": randn(T_Q, B, E)}
    ours, theirs = (run(m, inputs, *masks, upstream=upstream) for m in (twin(module), module))
    assert_same(ours, theirs)


def test_forward_lets_gradients_through_the_weights(rng, randn):
    module = oracle(randn)
    inputs, masks = qkv(randn, module), make_masks(rng, "float2d", "float")
    for average, shape in ((True, (B, T_Q, T_K)), (False, (B, H, T_Q, T_K))):
        upstream = {"output": randn(T_Q, B, E), "weights": randn(*shape)}
        options = {"upstream": upstream, "average_attn_weights": average}
        ours, theirs = (run(m, inputs, *masks, **options) for m in (twin(module), module))
        assert_same(ours, theirs, hint="the weights returned are part of the graph: no detach")


def test_forward_hides_keys_not_queries_in_self_attention(randn):
    # T_q = T_k: padding put on the queries' axis would fit, and be wrong.
    module = oracle(randn, batch_first=True)
    x = randn(B, 6, E)
    padding = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    upstream = {"output": randn(B, 6, E)}
    ours, theirs = (run(m, [x, x, x], None, padding, upstream=upstream) for m in (twin(module), module))
    assert_same(ours, theirs, hint="key_padding_mask hides keys; padded queries still get an output")


def test_forward_averages_the_weights_over_heads(randn):
    module = oracle(randn)
    inputs = qkv(randn, module)
    theirs = run(module, inputs, average_attn_weights=False)["weights"]
    ours = run(twin(module), inputs)["weights"]
    assert_close(
        ours, theirs.mean(1), atol=1e-12, name="weights", hint="by default: the mean over heads, axis 1"
    )


def test_forward_returns_weights_per_head_on_request(randn):
    module = oracle(randn)
    inputs = qkv(randn, module)
    ours, theirs = (run(m, inputs, average_attn_weights=False) for m in (twin(module), module))
    assert_same(ours, theirs, hint="average_attn_weights=False: (B, H, T_q, T_k)")


@pytest.mark.parametrize("average", [True, False])
def test_forward_returns_weights_only_if_needed(rng, randn, average):
    module = oracle(randn)
    inputs, masks = qkv(randn, module), make_masks(rng, "bool2d", "bool")
    options = {"need_weights": False, "average_attn_weights": average}
    for mode in (True, False):
        module.train(mode)
        ours, theirs = (run(m, inputs, *masks, **options) for m in (twin(module).train(mode), module))
        assert_same(ours, theirs)
        assert "weights" not in ours, "need_weights=False: the second result must be None"


@WEIGHTS
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
@pytest.mark.parametrize("average", [True, False], ids=["average", "per_head"])
def test_forward_of_unbatched_input_matches_pytorch(rng, randn, sizes, batch_first, average):
    module = oracle(randn, batch_first=batch_first, **sizes)
    inputs = qkv(randn, module, batch=None)
    for attn, padding in (("none", "none"), ("float2d", "bool"), ("bool3d", "float")):
        attn_mask, key_padding_mask = make_masks(rng, attn, padding, batch=1)
        masks = (attn_mask, None if key_padding_mask is None else key_padding_mask[0])
        ours, theirs = (run(m, inputs, *masks, average_attn_weights=average) for m in (twin(module), module))
        assert_same(ours, theirs, hint=f"unbatched, attn {attn}, padding {padding}: no batch axis anywhere")


def test_forward_keeps_the_axis_of_a_batch_of_one(rng, randn):
    module = oracle(randn)
    inputs, masks = qkv(randn, module, batch=1), make_masks(rng, "bool3d", "bool", batch=1)
    assert_same(run(twin(module), inputs, *masks), run(module, inputs, *masks))


def test_forward_of_one_query_or_one_key_matches_pytorch(randn):
    module = oracle(randn)
    for t_q, t_k in ((1, T_K), (T_Q, 1), (1, 1)):
        inputs = qkv(randn, module, t_q=t_q, t_k=t_k)
        assert_same(run(twin(module), inputs), run(module, inputs))


def test_forward_takes_arguments_in_the_order_of_pytorch(rng, randn):
    module = oracle(randn)
    inputs, (_, padding) = qkv(randn, module), make_masks(rng, "none", "bool")
    causal = torch.ones(T_Q, T_K, dtype=torch.bool).triu(1)
    arguments = (*inputs, padding, True, causal, False, True)
    for name, ours, theirs in zip(
        ("output", "weights"), twin(module)(*arguments), module(*arguments), strict=True
    ):
        assert_close(ours, theirs, atol=1e-12, name=name)


def test_forward_takes_is_causal_as_a_promise_about_the_mask(randn):
    module = oracle(randn)
    inputs = qkv(randn, module, t_q=6, t_k=6)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for need_weights in (True, False):
        options = {"is_causal": True, "need_weights": need_weights}
        ours, theirs = (run(m, inputs, causal, **options) for m in (twin(module), module))
        assert_same(ours, theirs)
    for padding in (None, torch.zeros(B, 6, dtype=torch.bool)):
        try:
            twin(module)(*inputs, key_padding_mask=padding, is_causal=True)
        except ValueError:
            continue
        hint = "" if padding is None else ", also with a key_padding_mask"
        pytest.fail(f"is_causal without attn_mask must raise ValueError{hint}", pytrace=False)


# --- queries that see nothing ---------------------------------------------------------------------


def blind_case(randn, bias=True, **options):
    """Rows that are blind only by both masks together, and in sample 1 by padding alone."""
    module = oracle(randn, batch_first=True, bias=bias, **options)
    attn_mask = torch.zeros(T_Q, T_K, dtype=torch.bool)
    attn_mask[3, :4] = attn_mask[0, 2] = True
    padding = torch.zeros(B, T_K, dtype=torch.bool)
    padding[0, 4:] = padding[1] = True
    blind = torch.zeros(B, T_Q, dtype=torch.bool)
    blind[0, 3] = blind[1] = True
    return module, qkv(randn, module), attn_mask, padding, blind


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_blind_query_gets_the_output_bias(randn, kind, bias):
    module, inputs, attn_mask, padding, blind = blind_case(randn, bias)
    # PyTorch answers so without need_weights; with need_weights it answers NaN.
    expected = run(module, inputs, attn_mask, padding, need_weights=False)["output"]
    if kind == "float":
        attn_mask, padding = (
            torch.zeros(m.shape).double().masked_fill(m, -math.inf) for m in (attn_mask, padding)
        )
    for need_weights in (True, False):
        ours = run(twin(module), inputs, attn_mask, padding, need_weights=need_weights)
        out_bias = module.out_proj.bias.detach() if bias else torch.zeros(E).double()
        hint = "a query that reads nothing gets only the bias of out_proj"
        assert_close(ours["output"][blind], out_bias.expand(6, E), atol=1e-12, name="blind rows", hint=hint)
        assert_close(ours["output"], expected, atol=1e-12, name="output")


@pytest.mark.parametrize("average", [True, False], ids=["average", "per_head"])
def test_blind_query_gets_weights_of_zero(randn, average):
    module, inputs, attn_mask, padding, _ = blind_case(randn)
    ours, theirs = (
        run(m, inputs, attn_mask, padding, average_attn_weights=average)["weights"]
        for m in (twin(module), module)
    )
    expected = theirs.nan_to_num(0.0)  # PyTorch's own answer for these rows is NaN
    assert_close(
        ours, expected, atol=1e-12, name="weights", hint="rows without a visible key must be 0, not NaN"
    )


def test_blind_queries_leave_the_gradients_right(randn):
    module, inputs, attn_mask, padding, _ = blind_case(randn)
    upstream = {"output": randn(B, T_Q, E)}
    theirs = run(module, inputs, attn_mask, padding, upstream=upstream, need_weights=False)
    ours = run(twin(module), inputs, attn_mask, padding, upstream=upstream)
    assert_same(ours, theirs, hint="a blind row must not send NaN into the gradients")


# --- dropout ----------------------------------------------------------------------------------


def test_dropout_does_nothing_in_evaluation_mode(rng, randn):
    module = oracle(randn, dropout=0.4).eval()
    inputs, masks = qkv(randn, module), make_masks(rng, "bool2d", "none")
    upstream = {"output": randn(T_Q, B, E)}
    ours, theirs = (run(m, inputs, *masks, upstream=upstream) for m in (twin(module), module))
    assert_same(ours, theirs, hint="is dropout on in eval()?")


def test_dropout_drops_weights_and_scales_up_the_rest_in_training_mode(randn):
    p = 0.4
    module = oracle(randn, dropout=p)
    inputs = qkv(randn, module, batch=4, t_q=11, t_k=13)
    ours = run(twin(module), inputs, average_attn_weights=False)["weights"]
    kept = run(module.eval(), inputs, average_attn_weights=False)["weights"] / (1 - p)
    dropped = ours == 0
    assert_close(
        ours,
        kept.masked_fill(dropped, 0.0),
        atol=1e-12,
        name="weights",
        hint="each weight is 0 or w / (1 - p)",
    )
    share = dropped.double().mean().item()  # of 1716 weights: one standard deviation is 0.012
    assert abs(share - p) < 0.08, f"{share:.3f} of the weights were dropped, expected about {p}"
    for axis, name in enumerate(("samples", "heads", "queries", "keys")):
        # One decision for a whole axis would keep all of the variance p (1 - p); independent ones average out.
        variance = dropped.double().mean(axis).var().item()
        assert variance < 0.6 * p * (1 - p), f"weights are dropped together along the {name}, not one by one"


def test_dropout_acts_on_the_output_as_on_the_weights_returned(randn):
    module = oracle(randn, dropout=0.4, batch_first=True)
    inputs = qkv(randn, module)
    ours = run(twin(module), inputs, average_attn_weights=False)
    W_v, b_v = module.in_proj_weight[2 * E :].detach(), module.in_proj_bias[2 * E :].detach()
    v = (inputs[2] @ W_v.T + b_v).reshape(B, T_K, H, D)
    heads = torch.einsum("bhqk,bkhd->bqhd", ours["weights"], v).reshape(B, T_Q, E)
    expected = heads @ module.out_proj.weight.detach().T + module.out_proj.bias.detach()
    assert_close(ours["output"], expected, atol=1e-12, name="output", hint="drop weights once, then use them")


def test_dropout_acts_whether_the_weights_are_returned_or_not(randn):
    module = oracle(randn, dropout=0.5)
    inputs = qkv(randn, module)
    ours = twin(module).train()(*inputs, need_weights=False)[0]
    complete = module.eval()(*inputs, need_weights=False)[0]
    assert not torch.allclose(ours, complete), "in training mode dropout acts with need_weights=False, too"


def test_dropout_comes_before_the_average_over_heads(randn):
    module = oracle(randn, num_heads=1, dropout=0.5)
    inputs = qkv(randn, module)
    weights = run(twin(module, num_heads=1), inputs)["weights"]
    assert (weights == 0).any(), "average what is left after dropout, as in PyTorch"


# --- robustness -------------------------------------------------------------------------------


def test_forward_does_not_modify_its_arguments(rng, randn):
    module = oracle(randn, **SEPARATE)
    ours = twin(module)
    for attn, padding in (("float2d", "float"), ("bool3d", "bool")):
        arguments = [*qkv(randn, module), *make_masks(rng, attn, padding)]
        before = [x.clone() for x in arguments]
        names = ("query", "key", "value", "attn_mask", "key_padding_mask")
        with torch.no_grad():
            output, _ = ours(**dict(zip(names, arguments, strict=True)))
            expected, _ = module(**dict(zip(names, before, strict=True)))
        assert_close(output, expected, atol=1e-12, name="output")
        for name, now, then in zip(names, arguments, before, strict=True):
            assert torch.equal(now, then), f"{name} was modified"


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_forward_takes_strided_views(rng, randn, batch_first):
    module = oracle(randn, batch_first=batch_first)
    wide = [randn(2 * x.shape[0], x.shape[2], x.shape[1]) for x in qkv(randn, module)]
    inputs = [x[::2].transpose(1, 2) for x in wide]
    attn_mask, padding = make_masks(rng, "float3d", "bool")
    attn_mask = attn_mask.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = {"attn_mask": attn_mask, "key_padding_mask": padding}
    with torch.no_grad():
        ours, theirs = (m(*inputs, **arguments) for m in (twin(module), module))
    assert_close(ours[0], theirs[0], atol=1e-12, name="output")
    assert_close(ours[1], theirs[1], atol=1e-12, name="weights")


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 5e-6), (torch.bfloat16, 0.06)], ids=str)
def test_forward_in_lower_precision_stays_close_to_float64(rng, randn, dtype, atol):
    module = oracle(randn, **SEPARATE).to(dtype)
    inputs = [x.to(dtype) for x in qkv(randn, module)]
    masks = make_masks(rng, "bool2d", "bool")
    output, weights = twin(module)(*inputs, attn_mask=masks[0], key_padding_mask=masks[1])
    assert output.dtype == weights.dtype == dtype, f"{dtype} in, {output.dtype} and {weights.dtype} out"
    expected = run(module.double(), [x.double() for x in inputs], *masks)
    assert_close(output.detach(), expected["output"], atol=atol, name="output")
    assert_close(weights.detach(), expected["weights"], atol=atol, name="weights")


def test_forward_survives_scores_in_the_thousands(rng, randn):
    module = oracle(randn)
    query, key, value = qkv(randn, module)
    inputs, masks = [100 * query, 100 * key, value], make_masks(rng, "bool2d", "float")
    assert_same(run(twin(module), inputs, *masks), run(module, inputs, *masks), atol=1e-9)


# --- ParityAttention.from_torch ---------------------------------------------------------------------


@WEIGHTS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_from_torch_computes_what_the_source_computes(rng, randn, sizes, bias, batch_first):
    module = oracle(randn, bias=bias, batch_first=batch_first, **sizes)
    inputs, masks = qkv(randn, module), make_masks(rng, "float3d", "bool")
    upstream = {"output": randn(*inputs[0].shape)}
    ours = ParityAttention.from_torch(module)
    assert_same(run(ours, inputs, *masks, upstream=upstream), run(module, inputs, *masks, upstream=upstream))


@WEIGHTS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_from_torch_has_the_state_of_the_source(randn, sizes, bias):
    module = oracle(randn, bias=bias, **sizes)
    ours, theirs = ParityAttention.from_torch(module).state_dict(), module.state_dict()
    assert set(ours) == set(theirs), f"state {sorted(ours)}, expected {sorted(theirs)}"
    for name in theirs:
        assert_close(ours[name], theirs[name], atol=0, name=name)


@WEIGHTS
def test_from_torch_copies_so_that_the_source_cannot_change_the_copy(randn, sizes):
    module = oracle(randn, **sizes)
    inputs = qkv(randn, module)
    before = run(module, inputs)
    ours = ParityAttention.from_torch(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    assert_same(run(ours, inputs), before, hint="the parameters are shared with the source, not copied")


@WEIGHTS
def test_from_torch_copies_so_that_the_copy_cannot_change_the_source(randn, sizes):
    module = oracle(randn, **sizes)
    inputs = qkv(randn, module)
    before = run(module, inputs)
    ours = ParityAttention.from_torch(module)
    assert_same(run(ours, inputs), before)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1.0)
    assert_same(
        run(module, inputs), before, hint="training the copy would change the source: copy the parameters"
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_torch_leaves_the_source_alone(randn, training):
    module = oracle(randn, dropout=0.3).train(training)
    state = {name: p.clone() for name, p in module.state_dict().items()}
    inputs = qkv(randn, module)
    ours = ParityAttention.from_torch(module)
    assert module.training is training, "from_torch changed the mode of the source"
    for name, p in module.named_parameters():
        assert torch.equal(p, state[name]), f"from_torch changed {name} of the source"
        assert p.requires_grad, f"from_torch froze {name} of the source"
    assert_same(run(ours.eval(), inputs), run(module.eval(), inputs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_torch_copies_the_mode(randn, training):
    module = oracle(randn, dropout=0.5).train(training)
    inputs = qkv(randn, module)
    ours = ParityAttention.from_torch(module)
    mode = "training" if training else "evaluation"
    assert ours.training is training, f"the source is in {mode} mode, its copy is not"
    if not training:
        assert_same(run(ours, inputs), run(module, inputs), hint="in evaluation mode nothing is dropped")
    assert_same(run(ours.eval(), inputs), run(module.eval(), inputs))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_torch_copies_dropout(randn, training):
    module = oracle(randn, dropout=0.5).train(training)
    inputs = qkv(randn, module, batch=4)
    ours = ParityAttention.from_torch(module).train()
    weights = run(ours, inputs, average_attn_weights=False)["weights"]
    message = "the source drops half of the weights in training mode, its copy does not"
    assert 0.3 < (weights == 0).double().mean() < 0.7, message  # of 420 weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_from_torch_keeps_the_dtype(randn, dtype):
    module = oracle(randn, dtype=dtype)
    ours = ParityAttention.from_torch(module)
    for name, p in ours.named_parameters():
        assert p.dtype == dtype, f"{name} is {p.dtype}, in the source {dtype}"
        assert_close(p.detach(), module.get_parameter(name).detach(), atol=0, name=name)
    inputs = qkv(randn, module, dtype=dtype)
    atol = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 0.06}[dtype]
    assert_same(run(ours, inputs), run(module, inputs), atol=atol)


@WEIGHTS
def test_from_torch_gives_a_copy_that_trains_like_the_source(randn, sizes):
    module = oracle(randn, **sizes)
    ours = ParityAttention.from_torch(module)
    inputs, target = qkv(randn, module), randn(T_Q, B, E)
    for m in (ours, module):
        for _ in range(3):
            parameters = list(m.parameters())
            grads = torch.autograd.grad((m(*inputs)[0] - target).square().mean(), parameters)
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(g)
    for name, p in module.named_parameters():
        hint = "after three steps of gradient descent the two modules differ: are all parameters registered?"
        assert_close(ours.get_parameter(name).detach(), p.detach(), atol=1e-12, name=name, hint=hint)


def test_from_torch_keeps_the_device():
    ours = ParityAttention.from_torch(nn.MultiheadAttention(E, H, device="meta"))  # of shapes alone
    found = {name: p.device.type for name, p in ours.named_parameters()}
    assert set(found.values()) == {"meta"}, f"the source is on the device meta, the copy: {found}"


def test_from_torch_of_a_subclass_makes_one_of_that_subclass(randn):
    class Mine(ParityAttention):
        pass

    assert type(Mine.from_torch(oracle(randn))) is Mine, "call cls: a subclass inherits this method"


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_from_torch_refuses_modules_with_extra_keys(randn, option):
    plain = oracle(randn)
    inputs = qkv(randn, plain)
    assert_same(run(ParityAttention.from_torch(plain), inputs), run(plain, inputs))
    for make in (ParityAttention.from_torch, lambda _: ParityAttention(E, H, **{option: True})):
        try:
            make(oracle(randn, **{option: True}))
        except ValueError:
            continue
        pytest.fail(f"{option} adds a key that this lab does not have: raise ValueError", pytrace=False)


# --- the milestone -----------------------------------------------------------------------------------


def largest_difference(rng, randn, dtype):
    """The largest difference over all results and gradients, for every mask, packed and separate."""
    batch, heads, t_q, t_k, embed_dim = 3, 6, 19, 33, 72
    worst, largest_entries = 0.0, []
    for sizes in (PACKED, {"kdim": 48, "vdim": 96}):
        module = nn.MultiheadAttention(embed_dim, heads, batch_first=True, dtype=dtype, **sizes)
        with torch.no_grad():
            for bias in (module.in_proj_bias, module.out_proj.bias):
                bias.copy_(0.5 * randn(*bias.shape))
        ours = ParityAttention.from_torch(module)
        for attn, padding in MASKS:
            inputs = qkv(randn, module, batch, t_q, t_k, dtype)
            masks = make_masks(rng, attn, padding, batch, heads, t_q, t_k, dtype)
            # The gradient of a parameter is a sum over all queries: divide, so that its entries are about 1.
            upstream = {"output": randn(batch, t_q, embed_dim, dtype=dtype) / (3 * math.sqrt(batch * t_q))}
            for average in (True, False):
                options = {"upstream": upstream, "average_attn_weights": average}
                a, e = (run(m, inputs, *masks, **options) for m in (ours, module))
                for name, expected in e.items():
                    assert name in a, f"{name} is missing"
                    assert a[name].dtype == expected.dtype, f"{name} is {a[name].dtype}, not {expected.dtype}"
                    error = max_error(a[name], expected)
                    worst = worst if error <= worst else error  # a NaN is kept, and reaches no target
                    if worst != worst:
                        return worst
                largest_entries += [
                    e[f"gradient of {name}"].abs().max() for name, _ in module.named_parameters()
                ]
    # The differences mean something only if what is compared is neither tiny nor huge.
    low, high = min(largest_entries), max(largest_entries)
    assert low > 0.1, f"the test is broken: a parameter's largest gradient is {low:.2g}"
    assert high < 10, f"the test is broken: a parameter's largest gradient is {high:.2g}"
    return worst


@pytest.mark.milestone
def test_milestone_outputs_and_gradients_match_pytorch_in_float32(rng, randn, milestone):
    """All outputs, weights and gradients (of inputs, parameters and floating masks) in float32.

    Weights are as nn.MultiheadAttention draws them; biases, which it sets to 0, are N(0, 1/4) and inputs
    N(0, 1). 72 features, 6 heads, batches of 3, 19 queries, 33 keys, all 15 combinations of masks, packed and
    separate projections. The loss is scaled so that the largest entry of each parameter's gradient
    lies between 0.1 and 10 (checked); outputs reach 3.
    """
    milestone(
        "largest difference from nn.MultiheadAttention",
        largest_difference(rng, randn, torch.float32),
        target=1e-5,
        unit="absolute",
        better="lower",
    )


def test_outputs_and_gradients_match_pytorch_to_the_last_digits_of_float64(rng, randn):
    """The milestone's measurement in float64, where rounding cannot hide a mistake."""
    worst = largest_difference(rng, randn, torch.float64)
    assert worst <= 1e-12, f"the largest difference is {worst:.3g} in float64: more than rounding"
