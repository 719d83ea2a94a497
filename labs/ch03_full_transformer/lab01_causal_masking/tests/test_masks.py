"""Tests of ch03/lab01. Oracles: the rules in plain loops, PyTorch's attention, and gradients that must be 0."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from masks import (
    PADDING,
    additive_mask,
    all_of,
    any_of,
    causal_mask,
    dependencies,
    document_ids,
    document_mask,
    find_leaks,
    masked_attention,
    padding_mask,
    positions,
    prefix_lm_mask,
    sliding_window_mask,
)
from shared.compare import assert_close
from torch import nn

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        nn.MultiheadAttention,
        "*scaled_dot_product*",
        "*multi_head_attention*",
        why="write the attention out: scores, additive mask, softmax, values",
    )


# --- what the tests are made of ---------------------------------------------------------------


def by_rule(may_see, *shape):
    """A boolean tensor whose entries are `may_see(*indices)`: the rule, in a plain loop."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in itertools.product(*map(range, shape)):
        mask[index] = bool(may_see(*index))
    return mask


def assert_mask(actual, expected, *, device="cpu", hint="", name="mask"):
    """Same shape and entries, boolean, and where it belongs."""
    __tracebackhide__ = True
    assert isinstance(actual, torch.Tensor), f"{name} is {actual!r:.80}, not a tensor"
    assert actual.dtype == torch.bool, f"{name} is {actual.dtype}: masks are boolean, True = may attend"
    assert actual.device.type == device, f"{name} is on {actual.device}, expected on {device}"
    assert_close(actual, expected, atol=0, name=name, hint=hint)


def refused(function, *args, why, **kwargs):
    __tracebackhide__ = True
    try:
        result = function(*args, **kwargs)
    except ValueError:
        return
    pytest.fail(f"{why}: raise ValueError. Returned instead:\n{result!r:.200}", pytrace=False)


def strided(values, dtype=torch.int64, device="cpu"):
    """The same numbers in a tensor whose neighbours in memory are others."""
    tensor = torch.tensor(values, dtype=dtype, device=device)
    return torch.stack([tensor, tensor + 77], dim=-1)[..., 0]


def random_mask(randn, *shape, blind=()):
    """A random mask: every row sees a key and misses one, except the rows in `blind`, which see nothing."""
    mask = randn(*shape) > 0
    mask[..., 0] |= ~mask.any(-1)
    mask[..., -1] &= ~mask.all(-1)
    for row in blind:
        mask[row] = False
    return mask


def attention_by_loop(Q, K, V, mask):
    """In float64, one query at a time, over the keys it may see and no others."""
    B, H, T_q, D = Q.shape
    Q, K, V = Q.double(), K.double(), V.double()
    mask = mask.expand(B, H, T_q, K.shape[2])
    rows = []
    for b, h, i in itertools.product(range(B), range(H), range(T_q)):
        seen = [j for j in range(K.shape[2]) if mask[b, h, i, j]]
        if seen:
            scores = torch.stack([(Q[b, h, i] * K[b, h, j]).sum() / math.sqrt(D) for j in seen])
            share = (scores - scores.max()).exp()
            rows.append(sum(w * V[b, h, j] for w, j in zip(share / share.sum(), seen, strict=True)))
        else:
            rows.append(0.0 * V[b, h, 0])
    return torch.stack(rows).view(B, H, T_q, -1)


# --- Part 1: masks from positions -------------------------------------------------------------

SIZES = [(3, 3), (3, 7), (1, 5), (5, 6), (1, 1), (0, 3), (0, 0)]  # T_q, T_k


@pytest.mark.parametrize(("T_q", "T_k"), SIZES)
def test_positions_of_queries_are_the_last_ones(T_q, T_k):
    i, j = positions(T_q, T_k)
    hint = "the last query stands where the last key stands: the first one at T_k - T_q"
    queries = torch.tensor([[T_k - T_q + n] for n in range(T_q)], dtype=torch.int64).view(T_q, 1)
    assert_close(i, queries, atol=0, name="positions of the queries", hint=hint)
    assert_close(j, torch.tensor([list(range(T_k))]), atol=0, name="positions of the keys")
    assert i.dtype == j.dtype == torch.int64, f"positions are integers, not {i.dtype} and {j.dtype}"


def test_positions_without_a_number_of_keys_are_those_of_self_attention():
    i, j = positions(3)
    assert_close(i, torch.tensor([[0], [1], [2]]), atol=0, name="positions of the queries")
    assert_close(j, torch.tensor([[0, 1, 2]]), atol=0, name="positions of the keys")


IMPOSSIBLE = pytest.mark.parametrize(("T_q", "T_k"), [(4, 3), (1, 0), (-1, 2), (-2, None)])


@IMPOSSIBLE
def test_positions_of_impossible_sizes_are_refused(T_q, T_k):
    refused(positions, T_q, T_k, why=f"{T_q} queries cannot be the last of {T_k} tokens")


@IMPOSSIBLE
@pytest.mark.parametrize("name", ["causal_mask", "sliding_window_mask", "prefix_lm_mask"])
def test_masks_of_impossible_sizes_are_refused(name, T_q, T_k):
    make = {
        "causal_mask": causal_mask,
        "sliding_window_mask": lambda *sizes: sliding_window_mask(2, *sizes),
        "prefix_lm_mask": lambda *sizes: prefix_lm_mask(torch.tensor([1]), *sizes),
    }[name]
    refused(make, T_q, T_k, why=f"{name}: {T_q} queries cannot be the last of {T_k} tokens")


@pytest.mark.parametrize(
    "name", ["positions", "causal_mask", "sliding_window_mask", "padding_mask", "prefix_lm_mask"]
)
def test_device_of_the_result_is_the_one_asked_for(name, device):
    numbers = torch.tensor([2, 0], device=device)
    make = {
        "positions": lambda: positions(2, 3, device=device),
        "causal_mask": lambda: causal_mask(2, 3, device=device),
        "sliding_window_mask": lambda: sliding_window_mask(2, 2, 3, device=device),
        "padding_mask": lambda: padding_mask(numbers, 3),
        "prefix_lm_mask": lambda: prefix_lm_mask(numbers, 2, 3),
    }[name]
    # Tensors made without a device now land on one that has no memory, and give themselves away.
    hint = f"{name}: make every tensor on the device asked for, or on that of the lengths"
    try:
        with torch.device("meta"):
            made = make()
    except RuntimeError as error:
        if isinstance(error, NotImplementedError):
            raise
        pytest.fail(f"{hint}. Two devices met: {error}", pytrace=False)
    for tensor in made if name == "positions" else [made]:
        assert tensor.device.type == device, f"{hint}. The result is on {tensor.device}"


@pytest.mark.parametrize(("T_q", "T_k"), SIZES)
def test_causal_mask_follows_its_rule(T_q, T_k):
    expected = by_rule(lambda i, j: j <= T_k - T_q + i, T_q, T_k)
    hint = (
        "True means may attend; a query sees itself and all earlier tokens, and queries are the last tokens"
    )
    assert_mask(causal_mask(T_q, T_k), expected, hint=hint)


def test_causal_mask_of_self_attention_is_the_lower_triangle_with_its_diagonal():
    expected = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    assert_mask(causal_mask(3), expected, hint="True below and on the diagonal: may attend")


def test_causal_mask_of_the_last_queries_is_the_end_of_the_whole_mask():
    # With a cache, the last 2 of 5 tokens ask: their rows of the mask must not change.
    assert_mask(causal_mask(2, 5), by_rule(lambda i, j: j <= i, 5, 5)[-2:], hint="queries stand at the end")
    assert_mask(causal_mask(1, 5), torch.ones(1, 5).bool(), hint="the newest token sees all keys")


@pytest.mark.parametrize(("T_q", "T_k"), SIZES)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 50])
def test_window_mask_follows_its_rule(T_q, T_k, window):
    expected = by_rule(lambda i, j: 0 <= (T_k - T_q + i) - j <= window - 1, T_q, T_k)
    hint = f"a query sees {window} tokens: its own and the {window - 1} before it"
    assert_mask(sliding_window_mask(window, T_q, T_k), expected, hint=hint)


def test_window_mask_of_self_attention_needs_no_number_of_keys():
    expected = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert_mask(sliding_window_mask(2, 4), expected)


@pytest.mark.parametrize("window", [0, -1])
def test_window_that_shows_nothing_is_refused(window):
    refused(sliding_window_mask, window, 3, 5, why=f"a window of {window} shows nothing")


# --- Part 2: masks that differ from sample to sample ------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lengths", [[3, 0, 5, 1], [5], [0], [2, 4, 1, 5, 3]], ids=str)
def test_padding_mask_follows_its_rule(lengths, side, dtype, device):
    T, B = 5, len(lengths)  # once B = T, where a wrong axis fits

    def may_see(b, h, i, j):
        return j < lengths[b] if side == "right" else j >= T - lengths[b]

    hint = f"True where a key is a real token; the padding is on the {side}; the last axis is the keys"
    actual = padding_mask(strided(lengths, dtype, device), T, side=side)
    assert_mask(actual, by_rule(may_see, B, 1, 1, T), device=device, hint=hint)


def test_padding_mask_pads_on_the_right_by_default():
    expected = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool().view(2, 1, 1, 3)
    assert_mask(padding_mask(torch.tensor([2, 1]), 3), expected)


@pytest.mark.parametrize("side", ["Left", "both", "", None])
def test_padding_mask_refuses_other_sides(side):
    refused(padding_mask, torch.tensor([2, 1]), 3, side=side, why=f"there is no side {side!r}")


@pytest.mark.parametrize(("T_q", "T_k"), [(6, 6), (3, 7), (1, 5), (5, 5), (0, 2)])
def test_prefix_mask_follows_its_rule(T_q, T_k, device):
    lengths = [2, 0, T_k, 1, T_k + 3]

    def may_see(b, h, i, j):
        return j <= T_k - T_q + i or j < lengths[b]

    expected = by_rule(may_see, len(lengths), 1, T_q, T_k)
    hint = "everyone sees the first prefix_lengths[b] keys; beyond them the mask is causal"
    assert_mask(prefix_lm_mask(strided(lengths, device=device), T_q, T_k), expected, device=device, hint=hint)


def test_prefix_mask_of_a_prefix_of_two():
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()[None, None]
    hint = "the prefix is the first 2 tokens, and none of them sees token 2"
    assert_mask(prefix_lm_mask(torch.tensor([2]), 4), expected, hint=hint)


LENGTHS = [
    ([[2, 3, 1], [1, 1, 5], [4, 1, 1]], 7),
    ([[2, 0, 3], [0, 0, 4], [0, 2, 0], [0, 0, 0]], 5),
    ([[4], [0], [6]], 6),
    ([[1, 0, 0, 2, 1], [0, 3, 0, 0, 0]], 4),
    ([[2, 1], [1, 2], [0, 3]], 3),  # no padding anywhere
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("lengths", "T"), LENGTHS)
def test_document_ids_count_documents_one_after_the_other(lengths, T, dtype, device):
    rows = []
    for row in lengths:
        ids = [n for n, length in enumerate(row) for _ in range(length)]
        rows.append(ids + [PADDING] * (T - len(ids)))
    actual = document_ids(strided(lengths, dtype, device), T)
    hint = "document n gets lengths[b, n] tokens; empty ones count too; what is left over is PADDING"
    assert_close(actual, torch.tensor(rows, device=device), atol=0, name="document_ids", hint=hint)
    assert actual.dtype == torch.int64, f"ids are int64, not {actual.dtype}"
    assert actual.device.type == device


@pytest.mark.parametrize("lengths", [[[2, 1], [3, 3]], [[6, 0], [1, 1]], [[0, 7], [0, 0]]], ids=str)
def test_document_ids_refuse_rows_that_are_too_long(lengths):
    refused(document_ids, torch.tensor(lengths), 5, why="a row has more tokens than fit in T")


IDS = [
    [[0, 0, 1, 1, 1, 2], [0, 1, 1, 3, 3, 3], [5, 5, 5, 5, 5, 5]],
    [[0, 0, 1, PADDING, PADDING], [PADDING, PADDING, 0, 0, 7], [PADDING] * 5, [0, 1, 2, 3, 4]],
    [[4, 4, 1, 1, 4], [9, 0, 9, PADDING, 9]],  # not in order, and a document in two pieces
    [[0]],
]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ids", IDS, ids=["in_order", "padded", "in_pieces", "one"])
def test_document_mask_follows_its_rule(ids, dtype, device):
    def may_see(b, h, i, j):
        return ids[b][i] == ids[b][j] != PADDING and j <= i

    B, T = len(ids), len(ids[0])
    given = strided(ids, dtype, device)
    before = given.clone()
    hint = "equal ids, not later, and padding neither sees nor is seen"
    assert_mask(document_mask(given), by_rule(may_see, B, 1, T, T), device=device, hint=hint)
    assert torch.equal(given, before), "document_mask changed the ids"


def test_sample_lengths_are_not_modified(device):
    lengths = torch.tensor([[2, 0, 1], [1, 1, 2]], device=device)
    before = lengths.clone()
    padding_mask(lengths[:, 0], 4, side="left")
    padding_mask(lengths[:, 0], 4)
    prefix_lm_mask(lengths[:, 2], 2, 4)
    document_ids(lengths, 5)
    assert torch.equal(lengths, before), "a function changed the lengths that it was given"


# --- Part 3: combining and using them ---------------------------------------------------------

SHAPES = [
    [(3, 5), (2, 1, 1, 5)],
    [(2, 1, 1, 5), (3, 5)],
    [(3, 5), (3, 5)],
    [(1, 5)],
    [(2, 1, 3, 5)],
    [(3, 5), (2, 1, 1, 5), (1, 4, 3, 1), (2, 4, 3, 5)],
    [(3, 1), (1, 5), (2, 1, 1, 1)],
    [(2, 2), (2, 1, 1, 2)],  # where a wrong axis fits
]
COMBINE = pytest.mark.parametrize(
    ("combine", "join"), [(all_of, all), (any_of, any)], ids=["all_of", "any_of"]
)


@COMBINE
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_combined_masks_follow_the_rule(randn, combine, join, shapes, device):
    masks = [randn(*shape) > 0 for shape in shapes]
    shape = torch.broadcast_tensors(torch.ones(1, 1, 1, 1), *masks)[0].shape
    spread = [mask.expand(shape).tolist() for mask in masks]
    expected = by_rule(lambda b, h, i, j: join(mask[b][h][i][j] for mask in spread), *shape)
    given = [mask.to(device) for mask in masks]
    hint = f"an entry is True if {join.__name__} of the masks are True there"
    assert_mask(combine(*given), expected, device=device, hint=hint)
    for mask, before in zip(given, masks, strict=True):
        assert torch.equal(mask.cpu(), before), "a mask was modified: is there an in-place &= or |= ?"


def test_combined_masks_of_full_size_are_not_modified(randn):
    # The first mask has the shape of the result already: nothing stops an in-place operation.
    a, b = randn(2, 3, 4, 5) > 0, randn(2, 3, 4, 5) > 0
    before = a.clone(), b.clone()
    all_of(a, b)
    any_of(a, b)
    assert torch.equal(a, before[0]), "the first mask was modified"
    assert torch.equal(b, before[1]), "the second mask was modified"


def test_combined_with_none_which_shows_everything(randn):
    mask, other = randn(3, 5) > 0, randn(2, 1, 1, 5) > 0
    hint = "None shows everything: it changes nothing in an `and`"
    for masks in ((mask, None), (None, mask), (None, mask, None)):
        assert_mask(all_of(*masks), mask[None, None], hint=hint)
    assert_mask(all_of(mask, None, other), mask & other, hint=hint)
    for masks in ((None,), (None, None)):
        assert all_of(*masks) is None, "if no mask hides anything, the result is None"
    for masks in ((mask, None), (None, mask), (None,), (mask, None, other), (None, None)):
        assert any_of(*masks) is None, (
            "whatever else there is, with None everything is shown: the result is None"
        )


BAD_MASKS = {
    "integers": torch.ones(3, 3, dtype=torch.int64),
    "numbers": torch.zeros(2, 1, 3, 3),
    "three_axes": torch.ones(2, 3, 3, dtype=torch.bool),
    "one_axis": torch.ones(3, dtype=torch.bool),
    "five_axes": torch.ones(1, 1, 1, 3, 3, dtype=torch.bool),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_of_another_convention_are_refused(randn, kind):
    bad, good = BAD_MASKS[kind], torch.ones(3, 3, dtype=torch.bool)
    why = f"a mask is boolean and has two or four axes, this one is {bad.dtype}, {tuple(bad.shape)}"
    for combine in (all_of, any_of):
        for masks in ((bad,), (good, bad), (bad, good), (None, bad), (bad, None)):
            refused(combine, *masks, why=why)
    refused(additive_mask, bad, why=why)
    refused(masked_attention, *(randn(2, 2, 3, 4) for _ in range(3)), bad, why=why)
    refused(find_leaks, lambda x: x, randn(2, 3, 4), bad, why=why)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (2, 1, 1, 5), (2, 3, 4, 5), (1, 1)], ids=str)
def test_additive_mask_is_zero_or_minus_infinity(randn, dtype, shape, device):
    mask = randn(*shape) > 0
    mask[..., -1, :] = False
    mask[..., 0, 0] = True
    if shape[-2:] == (1, 5):
        mask[0] = False  # a sample that is all padding
    before, rows = mask.clone(), mask.view(-1, shape[-1]).tolist()
    expected = [[0.0 if seen or not any(row) else -math.inf for seen in row] for row in rows]
    result = additive_mask(mask.to(device), dtype)
    assert result.dtype == dtype, f"asked for {dtype}, got {result.dtype}"
    assert result.device.type == device
    hint = "0 where a query may attend, -inf where not; rows that see nothing are 0 throughout"
    expected = torch.tensor(expected, dtype=torch.float64, device=device).view(shape)
    assert_close(result, expected, atol=0, name="additive_mask", hint=hint)
    assert torch.equal(mask, before), "additive_mask changed the mask"


def test_additive_mask_is_float32_by_default():
    result = additive_mask(causal_mask(3))
    assert result.dtype == torch.float32
    inf = math.inf
    assert_close(result, torch.tensor([[0, -inf, -inf], [0, 0, -inf], [0, 0, 0]]), atol=0)


def test_additive_mask_of_a_strided_mask(randn):
    mask = (randn(5, 2, 3, 8) > 0).permute(1, 2, 0, 3)[..., ::2]  # (2, 3, 5, 4)
    mask[1, 2, 3] = False
    expected = torch.zeros(2, 3, 5, 4).double()
    for b, h, i, j in itertools.product(range(2), range(3), range(5), range(4)):
        if not mask[b, h, i, j] and mask[b, h, i].any():
            expected[b, h, i, j] = -math.inf
    assert_close(additive_mask(mask, torch.float64), expected, atol=0, name="additive_mask")


@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 1, 7), (2, 1, 5, 7), (1, 3, 5, 7), (2, 3, 5, 7)], ids=str)
def test_attention_matches_pytorch(randn, shape, device):
    Q, K, V = randn(2, 3, 5, 4).to(device), randn(2, 3, 7, 4).to(device), randn(2, 3, 7, 6).to(device)
    mask = random_mask(randn, *shape).to(device)
    expected = F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    hint = "softmax(Q K^T / sqrt(D)) V over the keys where the mask is True"
    assert_close(masked_attention(Q, K, V, mask), expected, atol=1e-12, name="output", hint=hint)


def test_attention_without_a_mask_sees_everything(randn):
    Q, K, V = randn(2, 3, 5, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 6)
    expected = F.scaled_dot_product_attention(Q, K, V)
    assert_close(masked_attention(Q, K, V), expected, atol=1e-12, name="output")


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 0.06)], ids=str
)
def test_attention_of_queries_that_see_nothing_is_zero(randn, dtype, atol, device):
    Q, K, V = (randn(*s, dtype=dtype).to(device) for s in ((3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 6)))
    mask = random_mask(randn, 3, 2, 5, 7, blind=[(0, 1, 2), (1,), (2, 0, 0)])
    output = masked_attention(Q, K, V, mask.to(device))
    assert output.dtype == dtype, f"the output is {output.dtype} for inputs in {dtype}"
    hint = "a query that may attend to nothing gets zeros; all others their softmax over what they see"
    expected = attention_by_loop(Q.cpu(), K.cpu(), V.cpu(), mask).to(device)
    assert_close(output, expected, atol=atol, name="output", hint=hint)
    blind = ~mask.any(-1)
    assert (output.cpu()[blind] == 0).all(), f"{hint}: exactly 0"


def test_attention_of_a_sample_that_is_all_padding_is_zero(randn):
    Q, K, V = randn(3, 2, 5, 4), randn(3, 2, 5, 4), randn(3, 2, 5, 6)
    mask = by_rule(lambda b, h, i, j: j < [4, 0, 1][b], 3, 1, 1, 5)
    expected = attention_by_loop(Q, K, V, mask)
    assert_close(masked_attention(Q, K, V, mask), expected, atol=1e-12, name="output")


def test_attention_passes_back_the_right_gradients(randn):
    inputs = [randn(2, 2, 3, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 3)]
    mask, upstream = random_mask(randn, 2, 1, 3, 5, blind=[(0, 0, 1), (1, 0, 2)]), randn(2, 2, 3, 3)

    def gradients(attend):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad((attend(*leaves, mask) * upstream).sum(), leaves)

    actual, expected = gradients(masked_attention), gradients(attention_by_loop)
    hint = "is a NaN replaced after the softmax? Its gradient is NaN for good: keep it from arising"
    for name, a, e in zip("QKV", actual, expected, strict=True):
        assert_close(a, e, atol=1e-12, name=f"the gradient of {name}", hint=hint)
    # Sample 0's query 1 sees nothing in either head.
    assert (actual[0][0, :, 1] == 0).all(), "a query that sees nothing passes back exactly 0"


@pytest.mark.parametrize("level", [1e4, -1e4, 1e10, -1e10])
def test_attention_with_extreme_scores(randn, level):
    # The visible keys score near `level`, the hidden ones near -level: hiding them by a number such as
    # -1e9 shows them. All entries are multiples of 1/8 and D is 4, so that the scores are exact.
    Q, K = (8 * randn(2, 3, 5, 4)).round() / 8, (8 * randn(2, 3, 7, 4)).round() / 8
    mask, V = random_mask(randn, 7, blind=()).expand(5, 7), randn(2, 3, 7, 6)
    Q[..., 0] = 2.0
    K[..., 0] += torch.where(mask[0], level, -level)
    hint = "hidden keys stay hidden, however low the visible scores and however high theirs"
    expected = attention_by_loop(Q, K, V, mask)
    assert_close(masked_attention(Q, K, V, mask), expected, atol=1e-12, name="output", hint=hint)


def test_attention_of_strided_inputs_which_stay_as_they_are(randn):
    Q = randn(5, 2, 8, 3).permute(1, 3, 0, 2)[..., ::2]  # (2, 3, 5, 4)
    K, V = randn(2, 14, 3, 4).transpose(1, 2)[:, :, ::2], randn(7, 6, 3, 2).permute(3, 2, 0, 1)
    mask = random_mask(randn, 7, 5, 2, 1).permute(2, 3, 1, 0)  # (2, 1, 5, 7)
    mask[1, 0, 3] = False
    inputs = {"Q": Q, "K": K, "V": V, "mask": mask}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    expected = attention_by_loop(*before.values())
    assert_close(masked_attention(Q, K, V, mask), expected, atol=1e-12, name="output")
    for name, tensor in inputs.items():
        assert torch.equal(tensor, before[name]), f"masked_attention changed {name}"


def every_kind_of_mask():
    """(2, 1, 5, 5) masks, by rule: what each of the masks of this lab does to 2 samples of 5 tokens."""
    ids, lengths, prefix = [[0, 0, 1, 1, 1], [3, 0, 0, -1, -1]], [5, 2], [0, 3]
    rules = {
        "causal": lambda b, h, i, j: j <= i,
        "window": lambda b, h, i, j: 0 <= i - j < 2,
        "prefix": lambda b, h, i, j: j <= i or j < prefix[b],
        "packed": lambda b, h, i, j: ids[b][i] == ids[b][j] >= 0 and j <= i,
        "causal and left padding": lambda b, h, i, j: 5 - lengths[b] <= j <= i,
    }
    return {name: by_rule(rule, 2, 1, 5, 5) for name, rule in rules.items()}


KINDS = every_kind_of_mask()


@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["ordinary", "extreme"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_leaks_nothing(randn, kind, dtype, scale, device):
    mask = KINDS[kind]
    x = [randn(2, 2, 5, 3) for _ in range(3)]
    Q, K, V = (t.to(device, dtype) for t in (x[0] * scale, x[1], x[2]))
    K.requires_grad_(), V.requires_grad_()
    output = masked_attention(Q, K, V, mask.to(device))
    for i in range(5):
        for name, g in zip(
            "KV", torch.autograd.grad(output[:, :, i].sum(), (K, V), retain_graph=True), strict=True
        ):
            hidden = ~mask[:, 0, i]  # (B, T_k)
            leaked = g.cpu().transpose(1, 2)[hidden]
            assert (leaked == 0).all(), (
                f"{kind}: query {i} depends on a hidden token of {name}; the gradient reaches "
                f"{leaked.abs().max():.2g} and must be exactly 0. Is the mask applied before the softmax?"
            )
    if scale == 1.0:
        shown = torch.autograd.grad(output.sum(), V)[0].abs().sum((1, 3)).cpu()  # (B, T_k)
        assert (shown[mask[:, 0].any(1)] > 0).all(), (
            f"{kind}: a token that somebody may attend to is never read"
        )


def test_attention_over_packed_documents_is_attention_over_each(randn):
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, -1], [4, 4, 4, 4, 4, 6, 6]])
    Q, K, V = randn(2, 3, 7, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 5)
    expected = torch.zeros(2, 3, 7, 5).double()
    for b, spans in enumerate(([(0, 3), (3, 4), (4, 6)], [(0, 5), (5, 7)])):
        for start, end in spans:
            q, k, v = (t[b : b + 1, :, start:end] for t in (Q, K, V))
            expected[b, :, start:end] = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0]
    hint = "packing must not change what a document gets; padding gets zeros"
    assert_close(
        masked_attention(Q, K, V, document_mask(ids)), expected, atol=1e-12, name="output", hint=hint
    )


def test_attention_over_a_left_padded_batch_is_attention_over_each_sample(randn):
    lengths, T = [5, 2, 0, 3], 5
    Q, K, V = randn(4, 2, T, 3), randn(4, 2, T, 3), randn(4, 2, T, 6)
    mask = all_of(causal_mask(T), padding_mask(torch.tensor(lengths), T, side="left"))
    output = masked_attention(Q, K, V, mask)
    for b, length in enumerate(lengths):
        start = T - length
        alone = F.scaled_dot_product_attention(*(t[b : b + 1, :, start:] for t in (Q, K, V)), is_causal=True)[
            0
        ]
        assert_close(
            output[b, :, start:], alone, atol=1e-12, name=f"sample {b}", hint="padding changes nothing"
        )
        zeros = torch.zeros(2, start, 6).double()
        assert_close(output[b, :, :start], zeros, atol=0, name=f"the padding of sample {b}")


def test_attention_of_the_last_queries_is_the_end_of_the_whole(randn):
    # Decoding with a cache: the last 2 of 7 tokens ask. Prefix and window must agree with the whole as well.
    Q, K, V = randn(3, 2, 7, 4), randn(3, 2, 7, 4), randn(3, 2, 7, 5)
    prefix = torch.tensor([6, 0, 2])
    for name, make in {
        "causal_mask": causal_mask,
        "sliding_window_mask": lambda *sizes: sliding_window_mask(3, *sizes),
        "prefix_lm_mask": lambda *sizes: prefix_lm_mask(prefix, *sizes),
        "both": lambda *sizes: any_of(sliding_window_mask(2, *sizes), prefix_lm_mask(prefix, *sizes)),
    }.items():
        whole = F.scaled_dot_product_attention(Q, K, V, attn_mask=make(7))
        part = masked_attention(Q[:, :, -2:], K, V, make(2, 7))
        assert_close(part, whole[:, :, -2:], atol=1e-12, name=name, hint="queries are the last tokens")


# --- Part 4: does anything leak? --------------------------------------------------------------


def reads(*pairs, weight=1.0, B=2, T=3):
    """A function in which token i of sample b gets weight * token j of sample c, and the set of such tuples."""

    def f(x):
        rows = [[0.0 * x[b, i] for i in range(T)] for b in range(B)]
        for b, i, c, j in pairs:
            rows[b][i] = rows[b][i] + weight * x[c, j].sin()
        return torch.stack([torch.stack(row) for row in rows])

    return f


def as_tensor(pairs, B, T):
    return by_rule(lambda *index: index in set(pairs), B, T, B, T)


PAIRS = [(0, 0, 0, 2), (0, 1, 0, 1), (0, 2, 1, 0), (1, 2, 1, 0), (1, 2, 1, 1), (1, 0, 0, 0)]


def test_dependencies_of_a_function_whose_reads_are_known(randn, device):
    x = randn(2, 3, 5).to(device)
    hint = "[b, i, c, j] is True if output i of sample b depends on token j of sample c"
    assert_mask(
        dependencies(reads(*PAIRS), x), as_tensor(PAIRS, 2, 3), device=device, hint=hint, name="dependencies"
    )


@pytest.mark.parametrize("weight", [1e-30, -1e-30, -1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dependencies_of_any_size_and_sign_are_found(randn, weight, dtype):
    found = dependencies(reads(*PAIRS, weight=weight), randn(2, 3, 5, dtype=dtype))
    assert_mask(found, as_tensor(PAIRS, 2, 3), hint="compare with 0 exactly", name="dependencies")


CANCELLING = {
    "features of the output": lambda y: torch.stack([y[..., 0], -y[..., 0]], dim=-1),
    "features of the token": lambda y: (y[..., :1] - y[..., 1:2]).expand(*y.shape[:-1], 2),
    "tokens": lambda y: y * torch.tensor([1.0, -1.0, 0.0]).double()[:, None],
    "one feature of many": lambda y: y[..., 2:3] * torch.tensor([0.0, 0.0, 1.0]).double(),
}


@pytest.mark.parametrize("kind", CANCELLING)
def test_dependencies_that_cancel_in_a_sum_are_found(randn, kind):
    # Everybody reads the token before it, linearly, so that derivatives add up to exactly 0.
    make = CANCELLING[kind]
    pairs = {(b, i, b, (i - 1) % 3) for b, i in itertools.product(range(2), range(3))}
    if kind == "tokens":
        pairs = {pair for pair in pairs if pair[1] != 2}
    found = dependencies(lambda x: make(x.roll(1, dims=1)), randn(2, 3, 4))
    hint = "derivatives of +1 and -1 add up to 0: look at each of them before you join them"
    assert_mask(found, as_tensor(pairs, 2, 3), hint=hint, name="dependencies")


def test_dependencies_that_cancel_between_samples_and_tokens_are_found(randn):
    def f(x):  # sample 0 gets the difference of two tokens, sample 1 the opposite
        y = (x[0, 0] - x[1, 2])[None, None].expand(1, 3, -1)
        return torch.cat([y, -y])

    pairs = {(b, i, c, j) for b, i in itertools.product(range(2), range(3)) for c, j in ((0, 0), (1, 2))}
    assert_mask(dependencies(f, randn(2, 3, 4)), as_tensor(pairs, 2, 3), name="dependencies")


def test_dependencies_through_nan_gradients_are_found(randn):
    # The classic: the values are repaired, the gradients are not.
    def f(x):
        scores = x @ x.mT + torch.tensor([[0.0], [-math.inf], [-math.inf]])  # rows 1 and 2 see nothing
        weights = scores.softmax(-1)
        return torch.where(weights.isnan(), 0.0, weights) @ x.detach()

    x = randn(2, 3, 4)
    assert f(x).isfinite().all()
    found = dependencies(f, x)
    hint = "a gradient of NaN is not 0"
    # In the backward pass of the softmax NaN meets every gradient, those of 0 too: all of them are spoilt.
    assert_mask(found, torch.ones(2, 3, 2, 3).bool(), hint=hint, name="dependencies")


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "times_zero"])
def test_dependencies_of_a_function_that_ignores_its_input(randn, constant):
    found = dependencies(lambda x: torch.ones(2, 3, 7) if constant else 0.0 * x, randn(2, 3, 4))
    assert_mask(found, torch.zeros(2, 3, 2, 3).bool(), name="dependencies")


def test_dependencies_of_a_function_that_changes_the_number_of_features(randn):
    W, V = randn(5, 7), randn(5, 1)
    every = by_rule(lambda b, i, c, j: b == c and i == j, 2, 3, 2, 3)
    assert_mask(dependencies(lambda x: x @ W, randn(2, 3, 5)), every, name="dependencies, E > D")
    assert_mask(dependencies(lambda x: x @ V, randn(2, 3, 5)), every, name="dependencies, E < D")


@pytest.mark.parametrize("leaf", [True, False], ids=["requires_grad", "plain"])
def test_dependencies_leave_no_trace(randn, leaf):
    layer = nn.Linear(4, 4).double()
    x = randn(4, 3, 4).transpose(0, 2)[::2].transpose(1, 2).contiguous().transpose(1, 2)  # (2, 3, 4), strided
    x.requires_grad_(leaf)
    before = x.detach().clone()
    found = dependencies(lambda x: layer(x).tanh(), x)
    expected = by_rule(lambda b, i, c, j: b == c and i == j, 2, 3, 2, 3)
    assert_mask(found, expected, name="dependencies")
    assert torch.equal(x, before), "x was modified"
    assert x.requires_grad == leaf, "x.requires_grad was changed"
    assert x.grad is None, "a gradient was left on x: use torch.autograd.grad, not backward"
    assert all(p.grad is None for p in layer.parameters()), "a gradient was left on a parameter that f uses"


def listed(found):
    __tracebackhide__ = True
    assert isinstance(found, list), f"find_leaks returns a list, not {type(found).__name__}"
    for leak in found:
        assert type(leak) is tuple, f"a leak is a tuple (b, i, c, j) of ints, not {leak!r}"
        assert [type(n) for n in leak] == [int] * 4, f"a leak is a tuple of four ints, not {leak!r}"
    return found


def test_leaks_are_the_dependencies_that_the_mask_forbids(randn, device):
    x, f = randn(2, 3, 5).to(device), reads(*PAIRS)
    per_sample = torch.zeros(2, 1, 3, 3, dtype=torch.bool, device=device)
    per_sample[1, 0, 2, 0] = True
    cases = {
        "causal": causal_mask(3, device=device),
        "nothing": torch.zeros(3, 3, dtype=torch.bool, device=device),
        "everything": torch.ones(1, 1, 1, 3, dtype=torch.bool, device=device),
        "per sample": per_sample,
        "keys of sample 0": padding_mask(torch.tensor([3, 0], device=device), 3),
    }
    allowed = {
        "causal": lambda b, i, j: j <= i,
        "nothing": lambda b, i, j: False,
        "everything": lambda b, i, j: True,
        "per sample": lambda b, i, j: (b, i, j) == (1, 2, 0),
        "keys of sample 0": lambda b, i, j: b == 0,
    }
    for name, mask in cases.items():
        rule, before = allowed[name], mask.clone()
        expected = sorted((b, i, c, j) for b, i, c, j in PAIRS if b != c or not rule(b, i, j))
        found = listed(find_leaks(f, x, mask))
        assert found == expected, (
            f"mask {name!r}: found {found}, expected {expected}. A dependence leaks if the mask of its own "
            "sample forbids it, or if it comes from another sample"
        )
        assert torch.equal(mask, before), "find_leaks changed the mask"


@pytest.mark.parametrize("B", [1, 3])
def test_leaks_of_every_size_of_batch(randn, B):
    # Everybody reads everybody in the sample; the mask is causal: all pairs with j > i leak.
    f = lambda x: x + x.mean(dim=1, keepdim=True)  # noqa: E731
    expected = [(b, i, b, j) for b in range(B) for i in range(4) for j in range(i + 1, 4)]
    found = listed(find_leaks(f, randn(B, 4, 3), by_rule(lambda i, j: j <= i, 4, 4)))
    assert found == expected, f"found {found}, expected {expected}"


def attend(x, mask):
    scores = (x @ x.mT / math.sqrt(x.shape[-1]))[:, None]
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ x[:, None])[:, 0]


def leaky(x, mask):
    """The mask comes after the softmax: hidden keys are gone, but were counted in the denominator."""
    scores = (x @ x.mT / math.sqrt(x.shape[-1]))[:, None]
    return (scores.softmax(-1).masked_fill(~mask, 0.0) @ x[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["causal", "window", "prefix"])
def test_leaks_of_attention_masked_before_and_after_the_softmax(randn, kind):
    mask, x = KINDS[kind], randn(2, 5, 3)
    assert listed(find_leaks(lambda x: attend(x, mask), x, mask)) == [], "this attention does not leak"
    expected = [(b, i, b, j) for b, _, i, j in (~mask).nonzero().tolist()]
    found = listed(find_leaks(lambda x: leaky(x, mask), x, mask))
    assert found == expected, "masked after the softmax, every hidden token leaks through the denominator"


def test_leaks_of_a_shift_in_the_wrong_direction(randn):
    # The most common leak in practice: targets and inputs shifted the wrong way, or across samples.
    ahead = listed(
        find_leaks(lambda x: x.roll(-1, dims=1), randn(2, 4, 3), by_rule(lambda i, j: j <= i, 4, 4))
    )
    assert ahead == [(b, i, b, i + 1) for b in range(2) for i in range(3)], f"found {ahead}"
    across = listed(find_leaks(lambda x: x.roll(1, dims=0), randn(2, 2, 3), torch.ones(2, 2).bool()))
    assert across == [(b, i, 1 - b, i) for b in range(2) for i in range(2)], f"found {across}"
