"""Tests of ch03/lab02, the embeddings. Oracles: F.embedding, F.linear and autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from embeddings import TiedEmbeddings, tied_gradient
from shared.compare import assert_close

B, T, V, C, E = 3, 5, 13, 11, 6  # sequences, tokens, vocabulary, context, features: all different


@pytest.fixture
def ids(rng, device):
    """Every id of the vocabulary, and two of them once more."""
    every = rng.permutation([*range(V), *rng.integers(0, V, size=B * T - V)])
    return torch.from_numpy(every.reshape(B, T)).to(device)


@pytest.fixture
def ends(randn, device):
    """Both ends with random float64 parameters of size 1."""
    return make(randn, device)


def make(randn, device, dtype=torch.float64):
    module = TiedEmbeddings(V, C, E).to(device=device, dtype=dtype)
    with torch.no_grad():
        module.token.copy_(randn(V, E))
        module.position.copy_(randn(C, E))
    return module


def expected_embedding(module, ids, start=0):
    """F.embedding of ids and of positions, in float64."""
    places = torch.arange(start, start + ids.shape[-1], device=ids.device).expand(ids.shape)
    tables = (module.token.detach().double(), module.position.detach().double())
    return F.embedding(ids, tables[0]) + F.embedding(places, tables[1])


# --- embed ---------------------------------------------------------------------------------


def test_embed_adds_a_token_row_and_a_position_row(ends, ids):
    assert_close(
        ends.embed(ids),
        expected_embedding(ends, ids),
        atol=1e-12,
        hint="token t of a sequence gets token[ids[t]] + position[t]",
    )


def test_embed_tells_positions_apart_by_their_place_not_by_their_id(ends, device):
    ids = torch.full((2, 4), 7, device=device)
    assert_close(ends.embed(ids), expected_embedding(ends, ids), atol=1e-12, hint="equal ids at four places")


@pytest.mark.parametrize("start", [1, 4, C - T])
def test_embed_counts_positions_from_start(ends, ids, start):
    assert_close(
        ends.embed(ids, start=start),
        expected_embedding(ends, ids, start),
        atol=1e-12,
        hint="the first token stands at `start`; the last row of the table is allowed",
    )


@pytest.mark.parametrize("shape", [(T,), (1,), (1, 1), (2, 3, 4), (C,), (2, C)])
def test_embed_takes_any_number_of_leading_dimensions(ends, rng, device, shape):
    ids = torch.from_numpy(rng.integers(0, V, size=shape)).to(device)
    assert_close(ends.embed(ids), expected_embedding(ends, ids), atol=1e-12)


def test_embed_of_strided_ids_which_stay_as_they_are(ends, rng, device):
    ids = torch.from_numpy(rng.integers(0, V, size=(T, 2 * B))).to(device).T[::2]
    before = ids.clone()
    assert_close(ends.embed(ids), expected_embedding(ends, ids), atol=1e-12)
    assert torch.equal(ids, before), "embed changed the ids it was given"


@pytest.mark.parametrize(
    ("length", "start"), [(C + 1, 0), (T, C - T + 1), (1, C), (1, C + 5), (2, -1), (3, -3), (2, -5)]
)
def test_embed_refuses_positions_outside_the_context(ends, device, length, start):
    ids = torch.ones(2, length, dtype=torch.int64, device=device)
    try:
        out = ends.embed(ids, start=start)
    except ValueError:
        return
    pytest.fail(
        f"{length} tokens from position {start} do not fit a context of {C}, but embed returned "
        f"shape {tuple(out.shape)}: a slice does not complain. Raise ValueError",
        pytrace=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed_and_logits_in_lower_precision(randn, device, ids, dtype):
    ends, x = make(randn, device, dtype), randn(B, T, E, dtype=dtype, device=device)
    embedded, logits = ends.embed(ids), ends.logits(x)
    assert embedded.dtype == logits.dtype == dtype, f"{embedded.dtype} and {logits.dtype}, expected {dtype}"
    eps = torch.finfo(dtype).eps
    assert_close(embedded, expected_embedding(ends, ids).to(dtype), atol=4 * eps)
    assert_close(logits, F.linear(x.double(), ends.token.detach().double()).to(dtype), atol=30 * eps)


# --- logits --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(B, T, E), (T, E), (E,), (2, 1, 4, E)])
def test_logits_compare_x_with_every_token(ends, randn, device, shape):
    x = randn(*shape, device=device)
    assert_close(
        ends.logits(x),
        F.linear(x, ends.token.detach()),
        atol=1e-12,
        hint="logits[..., v] is the dot product of x with row v of `token`: no bias, no scale",
    )


def test_logits_of_a_strided_input_which_stays_as_it_is(ends, randn, device):
    x = randn(E, T, 2 * B, device=device).permute(2, 1, 0)[::2]  # (B, T, E)
    before = x.clone()
    assert_close(ends.logits(x), F.linear(x, ends.token.detach()), atol=1e-12)
    assert torch.equal(x, before), "logits changed the tensor it was given"


# --- tying ---------------------------------------------------------------------------------


def test_tied_ends_have_one_token_weight_and_one_position_weight(ends, ids, randn, device):
    ends.logits(ends.embed(ids))
    shapes = {name: tuple(value.shape) for name, value in ends.named_parameters(remove_duplicate=False)}
    assert shapes == {"token": (V, E), "position": (C, E)}, "one parameter for both ends of the token weight"
    assert set(ends.state_dict()) == {"token", "position"}
    assert_close(ends.logits(ends.embed(ids)), ends.embed(ids).detach() @ ends.token.detach().T, atol=1e-12)


def test_tied_ends_change_together(ends, ids, randn, device):
    x = randn(B, T, E, device=device)
    ends.logits(ends.embed(ids))  # whatever was kept from this call must not be used below
    with torch.no_grad():
        ends.token.mul_(3.0)
    assert_close(ends.embed(ids), expected_embedding(ends, ids), atol=1e-12, hint="embed uses an old weight")
    assert_close(
        ends.logits(x), F.linear(x, ends.token.detach()), atol=1e-12, hint="logits use an old weight"
    )


def losses_and_gradients(run, token, position, ids, upstream):
    """The gradients of a loss that uses both ends, with something bent in between."""
    token, position = (p.detach().clone().requires_grad_() for p in (token, position))
    loss = (run(token, position, ids) * upstream).sum()
    return torch.autograd.grad(loss, (token, position))


def functional(token, position, ids):
    places = torch.arange(ids.shape[-1], device=ids.device)
    return F.linear(torch.tanh(F.embedding(ids, token) + F.embedding(places, position)), token)


def test_tied_weight_learns_from_both_ends(ends, ids, randn, device):
    upstream = randn(B, T, V, device=device)
    token, position = losses_and_gradients(functional, ends.token, ends.position, ids, upstream)
    (ends.logits(torch.tanh(ends.embed(ids))) * upstream).sum().backward()
    for name, ours, theirs in (
        ("token", ends.token.grad, token),
        ("position", ends.position.grad, position),
    ):
        assert ours is not None, f"no gradient reaches `{name}`"
        assert_close(
            ours, theirs, atol=1e-11, name=f"gradient of {name}", hint="both uses of the weight must add up"
        )


def test_tied_weight_learns_from_each_end_alone(ends, ids, randn, device):
    x, up, upstream = (randn(B, T, n, device=device) for n in (E, E, V))
    for name, loss, expected in (
        ("the embedding", (ends.embed(ids) * up).sum(), lambda w: (F.embedding(ids, w) * up).sum()),
        ("the head", (ends.logits(x) * upstream).sum(), lambda w: (F.linear(x, w) * upstream).sum()),
    ):
        w = ends.token.detach().clone().requires_grad_()
        (theirs,) = torch.autograd.grad(expected(w), w)
        (ours,) = torch.autograd.grad(loss, ends.token, allow_unused=True)
        assert ours is not None, f"no gradient reaches `token` from {name}"
        assert_close(ours, theirs, atol=1e-11, name=f"gradient of token through {name}")


def test_logits_pass_a_gradient_to_their_input(ends, randn, device):
    x, upstream = randn(B, T, E, device=device).requires_grad_(), randn(B, T, V, device=device)
    (ours,) = torch.autograd.grad((ends.logits(x) * upstream).sum(), x)
    assert_close(ours, upstream @ ends.token.detach(), atol=1e-11, name="gradient of x")


# --- the gradient by hand ------------------------------------------------------------------


def by_autograd(ids, grad_embedded, x, grad_logits, vocab_size):
    w = torch.zeros(vocab_size, x.shape[-1], dtype=torch.float64, device=x.device, requires_grad=True)
    loss = (F.embedding(ids, w) * grad_embedded.double()).sum()
    loss = loss + (F.linear(x.double(), w) * grad_logits.double()).sum()
    return torch.autograd.grad(loss, w)[0]


def test_tied_gradient_matches_autograd(ids, randn, device):
    given = (ids, *(randn(B, T, n, device=device) for n in (E, E, V)), V)
    assert_close(tied_gradient(*given), by_autograd(*given), atol=1e-11, name="gradient")


def test_tied_gradient_of_the_embedding_adds_up_repeated_ids(randn, device):
    ids = torch.tensor([[2, 2, 0, 2, 12], [0, 2, 2, 2, 2]], device=device)
    g, x, zero = (randn(2, 5, E, device=device), randn(2, 5, E, device=device), torch.zeros(2, 5, V))
    ours = tied_gradient(ids, g, x, zero.double().to(device), V)
    expected = torch.zeros(V, E, dtype=torch.float64, device=device)
    for b in range(2):
        for t in range(5):
            expected[ids[b, t]] += g[b, t]
    assert_close(
        ours,
        expected,
        atol=1e-11,
        hint="row i is the sum over all places with id i: grad[ids] += g keeps one",
    )


def test_tied_gradient_of_the_head_is_an_outer_product_per_token(ids, randn, device):
    x, g = randn(B, T, E, device=device), randn(B, T, V, device=device)
    expected = sum(torch.outer(g[b, t], x[b, t]) for b in range(B) for t in range(T))
    # The last ids of the vocabulary do not occur, and their rows learn all the same.
    assert_close(tied_gradient(ids % 7, torch.zeros_like(x), x, g, V), expected, atol=1e-11)


def test_tied_gradient_of_strided_inputs_which_stay_as_they_are(rng, randn, device):
    given = [
        torch.from_numpy(rng.integers(0, V, size=(T, B))).to(device).T,
        *(randn(n, T, B, device=device).permute(2, 1, 0) for n in (E, E, V)),
    ]
    before = [tensor.clone() for tensor in given]
    assert_close(tied_gradient(*given, V), by_autograd(*given, V), atol=1e-11, name="gradient")
    for tensor, copy in zip(given, before, strict=True):
        assert torch.equal(tensor, copy), "tied_gradient changed a tensor it was given"


def test_tied_gradient_in_float32(ids, randn, device):
    given = (ids, *(randn(B, T, n, dtype=torch.float32, device=device) for n in (E, E, V)), V)
    ours = tied_gradient(*given)
    assert ours.dtype == torch.float32
    assert_close(ours, by_autograd(*given).float(), atol=1e-5, name="gradient")


def test_tied_gradient_is_worked_out_by_hand(ids, randn, device, forbid):
    given = (ids, *(randn(B, T, n, device=device) for n in (E, E, V)), V)
    expected = by_autograd(*given)
    forbid(torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward, why="add up the two parts")
    assert_close(tied_gradient(*given), expected, atol=1e-11, name="gradient")
