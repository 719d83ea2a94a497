"""Tests of ch02/lab04. Oracles: a float64 loop, nn.TransformerEncoderLayer, Hugging Face's GPT2Block."""

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from block import (
    GPT2_CONSTANTS,
    GPT2_NAMES,
    CausalSelfAttention,
    FeedForward,
    GPT2Block,
    PostNormBlock,
    PreNormBlock,
    causal_weights,
    conv1d_to_linear,
)
from shared.compare import assert_close, max_error
from torch import nn

BLOCKS = pytest.mark.parametrize("cls", [PreNormBlock, PostNormBlock], ids=["pre_norm", "post_norm"])
WHY = "write the block out: projections, a causal softmax, two sums"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        nn.MultiheadAttention,
        nn.Transformer,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        "*scaled_dot_product*",
        "*multi_head_attention*",
        "*transformer_encoder*",
        why=WHY,
    )
    if "transformers.models.gpt2.modeling_gpt2" in sys.modules:
        _forbid_hugging_face(forbid)


def _forbid_hugging_face(forbid):
    gpt2 = sys.modules["transformers.models.gpt2.modeling_gpt2"]
    forbid(gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP, gpt2.eager_attention_forward, why=WHY)


@pytest.fixture
def hugging_face(forbid, randn):
    """`hugging_face(d_model, num_heads, ...)`: a GPT2Block all of whose parameters are random.

    It comes with `run`, which hands it the causal mask: that is made by the model around the block.
    """
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block as TheirBlock

    _forbid_hugging_face(forbid)

    def make(d_model, num_heads, d_ff=None, *, eps=1e-5, dropout=0.0, dtype=torch.float64):
        config = GPT2Config(
            n_embd=d_model,
            n_head=num_heads,
            n_inner=d_ff,
            layer_norm_epsilon=eps,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            attn_implementation="eager",
        )
        block = TheirBlock(config, layer_idx=0).to(dtype).eval()
        randomise(block, randn)
        return block

    def run(block, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, -math.inf)
        result = block(x, attention_mask=mask[None, None])
        return result[0] if isinstance(result, tuple) else result

    make.run = run
    return make


# --- what the tests are made of ---------------------------------------------------------------


def randomise(module, randn):
    """Make every parameter random: norms start as 1 and 0 and biases as 0, which hides mistakes."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 2:
                p.copy_(randn(*p.shape) / math.sqrt(p.shape[0]))
            else:
                p.copy_(0.4 * randn(*p.shape) + (1.0 if name.endswith("weight") else 0.0))
    return module


def twin(theirs, num_heads, *, eps=1e-5, dropout=0.0):
    """A GPT2Block with the parameters of Hugging Face's."""
    d_model, d_ff = theirs.mlp.c_fc.weight.shape
    ours = GPT2Block(d_model, num_heads, d_ff, eps=eps, dropout=dropout).to(theirs.ln_1.weight.dtype)
    ours.load_conv1d(theirs.state_dict())
    return ours.eval()


def results(run, module, x, upstream):
    """Return the output and the gradients of x and of every parameter, by name."""
    x = x.clone().requires_grad_()
    leaves = {"x": x, **dict(module.named_parameters())}
    output = run(x)
    grads = torch.autograd.grad(
        (output * upstream).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    found = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"output": output.detach(), **found}


def by_our_names(theirs):
    """Rename Hugging Face's results and transpose the gradients of its Conv1D weights."""
    ours = {}
    for name, value in theirs.items():
        for their_name, our_name in GPT2_NAMES.items():
            if name.startswith(f"gradient of {their_name}."):
                name = f"gradient of {our_name}.{name.rpartition('.')[2]}"
                value = value.T if value.dim() == 2 else value
        ours[name] = value
    return ours


def assert_same(ours, theirs, *, atol=1e-12, hint=""):
    assert set(ours) == set(theirs), f"the block has {sorted(set(ours) ^ set(theirs))} too many or too few"
    for name, expected in theirs.items():
        assert_close(ours[name], expected, atol=atol, name=name, hint=hint)


def loop_over_queries(module, x):
    """Causal attention in float64: one sequence, one head, one query at a time, from `module`'s parameters."""
    state, H = {name: p.detach().double() for name, p in module.named_parameters()}, module.num_heads
    B, T, E = x.shape
    D = E // H
    outputs = torch.zeros(B, T, E, dtype=torch.float64)
    for b in range(B):
        read = torch.zeros(T, E, dtype=torch.float64)
        packed = x[b].double() @ state["qkv_proj.weight"].T + state["qkv_proj.bias"]  # (T, 3E)
        for h, i in itertools.product(range(H), range(T)):
            q = packed[i, h * D : (h + 1) * D]
            k = packed[: i + 1, E + h * D : E + (h + 1) * D]
            v = packed[: i + 1, 2 * E + h * D : 2 * E + (h + 1) * D]
            read[i, h * D : (h + 1) * D] = torch.softmax(k @ q / math.sqrt(D), 0) @ v
        outputs[b] = read @ state["out_proj.weight"].T + state["out_proj.bias"]
    return outputs


def attention(randn, d_model=15, num_heads=3, **options):
    return randomise(CausalSelfAttention(d_model, num_heads, **options).double(), randn).eval()


class Sublayer(nn.Module):
    """A small sub-layer of the test's own; it remembers what it was given and what it returned."""

    def __init__(self, randn, d_model):
        super().__init__()
        self.weight = nn.Parameter(randn(d_model, d_model) / math.sqrt(d_model))
        self.bias = nn.Parameter(randn(d_model))
        self.seen = []

    def forward(self, x):
        result = torch.sin(x @ self.weight + self.bias)
        self.seen.append(SimpleNamespace(input=x.detach().clone(), output=result.detach().clone()))
        return result


class Constant(nn.Module):
    """A sub-layer that always says the same; it remembers what it was given."""

    def __init__(self, value):
        super().__init__()
        self.value, self.seen = torch.as_tensor(value, dtype=torch.float64), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.value.expand(x.shape).clone()


def normalise(x, norm):
    """LayerNorm, written out, with the parameters of `norm`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def build(cls, randn, d_model=7, **options):
    block = cls(Sublayer(randn, d_model), Sublayer(randn, d_model), d_model, **options).double()
    return randomise_norms(block, randn).eval()


def randomise_norms(block, randn):
    for norm in (block.norm1, block.norm2):
        randomise(norm, randn)
    return block


def formula(block, x):
    """The definition of either block, without dropout."""
    att, mlp, n1, n2 = block.attention, block.feed_forward, block.norm1, block.norm2
    if isinstance(block, PreNormBlock):
        h = x + att(normalise(x, n1))
        return h + mlp(normalise(h, n2))
    h = normalise(x + att(x), n1)
    return normalise(h + mlp(h), n2)


# --- causal_weights ---------------------------------------------------------------------------


def weights_by_rows(Q, K):
    """The weights, one row at a time: softmax over the keys that a query may see, and zeros."""
    T, D = Q.shape[-2:]
    rows = []
    for i in range(T):
        scores = (K[..., : i + 1, :] * Q[..., i : i + 1, :]).sum(-1) / math.sqrt(D)  # (B, H, i + 1)
        rows.append(torch.cat([scores.softmax(-1), scores.new_zeros(*scores.shape[:-1], T - 1 - i)], dim=-1))
    return torch.stack(rows, dim=-2)


def test_weights_where_hidden_scores_are_far_above_the_visible():
    Q = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    K = torch.tensor([0.0, 1000.0], dtype=torch.float64)[:, None].expand(1, 1, 2, 1)
    expected = torch.eye(2, dtype=torch.float64)[None, None]
    hint = "hide the future before the maximum of a row is taken"
    assert_close(causal_weights(Q, K), expected, atol=1e-12, name="weights", hint=hint)


@pytest.mark.parametrize(("B", "H", "T", "D"), [(2, 3, 5, 7), (3, 1, 6, 2), (1, 5, 2, 3), (2, 3, 1, 4)])
def test_weights_match_a_softmax_over_the_past(randn, B, H, T, D):
    Q, K = 2 * randn(B, H, T, D), randn(B, H, T, D)
    hint = "row i must be the softmax over keys 0 to i of q·k / sqrt(D), D the size of one head"
    assert_close(causal_weights(Q, K), weights_by_rows(Q, K), atol=1e-13, name="weights", hint=hint)


def test_weights_let_a_token_read_itself_and_the_past():
    # All scores are equal: token i shares its attention among the i + 1 tokens up to itself.
    Q, K = torch.zeros(2, 3, 4, 5).double(), torch.ones(2, 3, 4, 5).double()
    expected = torch.tensor([[1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4])
    expected = expected.double().expand(2, 3, 4, 4)
    hint = "token i reads tokens 0 to i: is the triangle the right one, and does it leave out the diagonal?"
    assert_close(causal_weights(Q, K), expected, atol=1e-7, name="weights", hint=hint)


def test_weights_divide_scores_by_sqrt_of_the_head_size():
    # The second query has q·k = 32 with the first key and 0 with itself; D is 64.
    Q = torch.full((2, 3, 2, 64), 0.5, dtype=torch.float64)
    K = torch.stack([torch.ones(64), torch.zeros(64)]).double().expand(2, 3, 2, 64)
    p = 1 / (1 + math.exp(-4))
    expected = torch.tensor([p, 1 - p], dtype=torch.float64).expand(2, 3, 2)
    hint = "divide the scores by sqrt(D), here 8"
    assert_close(
        causal_weights(Q, K)[:, :, 1], expected, atol=1e-12, name="weights of the second token", hint=hint
    )


@pytest.mark.parametrize("level", [1e4, -1e4, 1e10, -1e10])
def test_weights_of_extreme_scores(randn, level):
    # Scores near ±level: exp overflows, and hiding with a number like -1e4 or -1e9 does not hide.
    # All numbers are multiples of 1/8 and D is 4, so that the scores are exact.
    Q, K = ((8 * randn(2, 3, 5, 4)).round() / 8 for _ in range(2))
    Q[..., 0], K[..., 0] = 2.0, level + K[..., 0]
    hint = "the future stays hidden however low the visible scores are"
    weights = causal_weights(Q, K)
    assert_close(weights, weights_by_rows(Q, K), atol=1e-12, name="weights", hint=hint)
    assert (weights.triu(1) == 0).all(), f"{hint}: its weights are exactly 0"


def test_weights_pass_back_the_right_gradients(randn):
    Q, K, upstream = randn(2, 3, 5, 4), randn(2, 3, 5, 4), randn(2, 3, 5, 5)

    def gradients(weigh):
        q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
        return torch.autograd.grad((weigh(q, k) * upstream).sum(), (q, k))

    for name, actual, expected in zip(
        ("Q", "K"), gradients(causal_weights), gradients(weights_by_rows), strict=True
    ):
        assert_close(actual, expected, atol=1e-12, name=f"the gradient of {name}")


def test_weights_of_strided_inputs_which_stay_as_they_are(randn):
    Q = randn(5, 2, 8, 3).permute(1, 3, 0, 2)[..., ::2]  # (2, 3, 5, 4)
    K = randn(2, 10, 3, 4).transpose(1, 2)[:, :, ::2]  # (2, 3, 5, 4)
    before = Q.clone(), K.clone()
    assert_close(causal_weights(Q, K), weights_by_rows(*before), atol=1e-13, name="weights")
    assert torch.equal(Q, before[0]), "causal_weights changed Q"
    assert torch.equal(K, before[1]), "causal_weights changed K"


# --- CausalSelfAttention ----------------------------------------------------------------------

SIZES = [(2, 5, 3, 7), (3, 4, 5, 2), (2, 6, 1, 5), (1, 3, 7, 1)]  # B, T, H, D


@pytest.mark.parametrize(("B", "T", "H", "D"), SIZES)
def test_attention_matches_a_loop(randn, B, T, H, D):
    module, x = attention(randn, H * D, H), randn(B, T, H * D)
    assert_close(module(x), loop_over_queries(module, x), atol=1e-12, name="attention(x)")


def test_attention_of_a_single_token_is_its_value(randn):
    # With one token there is nothing to choose: queries and keys do not matter.
    module, x = attention(randn), randn(4, 1, 15)
    value = x @ module.qkv_proj.weight[30:].T + module.qkv_proj.bias[30:]
    expected = value @ module.out_proj.weight.T + module.out_proj.bias
    hint = "the last third of qkv_proj's output is the values; out_proj, with its bias, comes last"
    assert_close(module(x), expected, atol=1e-12, name="attention of one token", hint=hint)


def test_attention_asks_with_queries_and_is_found_by_keys(randn):
    # Token 0's key and token 1's query fit, the other way round they do not.
    module = attention(randn, 2, 1)
    with torch.no_grad():
        module.qkv_proj.weight.copy_(torch.tensor([[0, 9], [0, 0], [9, 0], [0, 0], [1, 0], [0, 1]]))
        module.out_proj.weight.copy_(torch.eye(2))
        module.qkv_proj.bias.zero_()
        module.out_proj.bias.zero_()
    p = 1 / (1 + math.exp(-81 / math.sqrt(2)))
    expected = torch.tensor([[1.0, 0.0], [p, 1 - p]], dtype=torch.float64)[None]
    hint = "queries come first in qkv_proj's output, then keys, then values"
    assert_close(module(torch.eye(2).double()[None]), expected, atol=1e-12, name="attention(x)", hint=hint)


def test_attention_head_owns_neighbouring_features(randn):
    # Values are the input, out_proj hands on head 1 of 2 only: features 3, 4, 5.
    module, x = attention(randn, 6, 2), randn(2, 1, 6)
    with torch.no_grad():
        module.qkv_proj.weight[12:] = torch.eye(6)
        module.qkv_proj.bias.zero_()
        module.out_proj.weight.copy_(torch.diag(torch.tensor([0.0, 0, 0, 1, 1, 1])))
        module.out_proj.bias.zero_()
    expected = torch.cat([torch.zeros(2, 1, 3).double(), x[..., 3:]], dim=-1)
    hint = "head h owns features h * D to (h + 1) * D, side by side, before and after"
    assert_close(module(x), expected, atol=1e-12, name="attention(x)", hint=hint)


def test_attention_gradients_match_a_loop(randn):
    module, x, upstream = attention(randn, 12, 3), randn(2, 4, 12), randn(2, 4, 12)

    def dense(x):
        """The same in einsum, so that autograd gives the oracle's gradients."""
        q, k, v = (
            torch.einsum("bte,hde->bhtd", x, w) + b[:, None]
            for w, b in zip(
                module.qkv_proj.weight.view(3, 3, 4, 12), module.qkv_proj.bias.view(3, 3, 4), strict=True
            )
        )
        read = torch.einsum("bhij,bhjd->bihd", weights_by_rows(q, k), v)
        return torch.einsum("bihd,ehd->bie", read, module.out_proj.weight.view(12, 3, 4)) + (
            module.out_proj.bias
        )

    assert_close(dense(x), loop_over_queries(module, x), atol=1e-12, name="the test's own einsum")
    assert_same(results(module, module, x, upstream), results(dense, module, x, upstream))


def leaks(module, x):
    """The largest gradient, by absolute value, of any output with respect to a later token."""
    x = x.clone().requires_grad_()
    output = module(x)
    worst = 0.0
    for i in range(x.shape[1] - 1):
        (grad,) = torch.autograd.grad(output[:, i].square().sum(), x, retain_graph=True)
        worst = max(worst, grad[:, i + 1 :].abs().max().item())
        assert grad[:, : i + 1].abs().max() > 0, f"token {i} reads nothing at all"
    return worst


def test_attention_does_not_look_ahead(randn):
    module, x = attention(randn), randn(2, 6, 15)
    assert_close(module(x), loop_over_queries(module, x), atol=1e-12, name="attention(x)")
    leak = leaks(module, x)
    assert leak == 0, f"an output depends on a later token: gradient {leak:.2g}, must be exactly 0"


def dropping(randn, p, B=3, T=6, H=5):
    """An attention whose output *is* its weights: tokens are one-hot and so are the values."""
    E = T * H
    module = attention(randn, E, H, dropout=p)
    x = torch.zeros(B, T, E, dtype=torch.float64)
    x[..., :T] = torch.eye(T)
    with torch.no_grad():
        module.qkv_proj.weight[2 * E :] = 0
        for h in range(H):
            module.qkv_proj.weight[2 * E + h * T : 2 * E + (h + 1) * T, :T] = torch.eye(T)
        module.qkv_proj.bias[2 * E :] = 0
        module.out_proj.weight.copy_(torch.eye(E))
        module.out_proj.bias.zero_()
    whole = loop_over_queries(module, x)  # without dropout
    return module, x, whole


def test_attention_dropout_acts_on_each_weight_in_training(randn):
    p = 0.4
    module, x, whole = dropping(randn, p, B=8, T=9)
    weights = module.train()(x).detach()
    dropped = (weights == 0) & (whole > 0)
    hint = f"in training a weight must be 0 or its softmax weight divided by {1 - p:g}"
    assert_close(weights, torch.where(dropped, 0, whole / (1 - p)), atol=1e-12, name="weights", hint=hint)
    share = dropped.sum().item() / (whole > 0).sum().item()
    assert abs(share - p) < 0.08, f"{share:.2f} of the weights were dropped, expected about {p}"  # of 1,800
    last = dropped.view(8, 9, 5, 9)[:, -1]  # (B, H, T_k): the last query sees all keys
    patterns = {tuple(row.tolist()) for row in last.flatten(0, 1)}
    assert len(patterns) > 30, "samples or heads share the draw: every weight has its own"
    last, before_last = (dropped.view(8, 9, 5, 9)[:, i, :, :8] for i in (-1, -2))
    differ = (last != before_last).double().mean().item()
    assert differ > 0.2, (
        "two queries of a head drop the same keys: weights are dropped, not values"
    )  # about 0.48
    assert not torch.equal(module(x), weights), "two calls in a row dropped the same weights"


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_drops_nothing_in_evaluation(randn, p):
    module, x, whole = dropping(randn, p)
    module.train()(x)
    hint = "in evaluation mode nothing is dropped or scaled: does dropout know self.training?"
    assert_close(module.eval()(x), whole, atol=1e-12, name="weights", hint=hint)


def test_attention_of_a_strided_input_which_stays_as_it_is(randn):
    module, x = attention(randn), randn(5, 30, 2).permute(2, 0, 1)[..., ::2]
    before = x.clone()
    assert_close(module(x), loop_over_queries(module, before), atol=1e-12, name="attention(x)")
    assert torch.equal(x, before), "the input was modified"


# --- FeedForward ------------------------------------------------------------------------------


def feed_forward(randn, d_model, d_ff):
    return randomise(FeedForward(d_model, d_ff).double(), randn).eval()


def wide_tanh_narrow(module, x):
    u = x @ module.up_proj.weight.T + module.up_proj.bias
    bent = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return bent @ module.down_proj.weight.T + module.down_proj.bias


@pytest.mark.parametrize(("d_model", "d_ff"), [(5, 13), (7, 3), (1, 6)])
def test_feed_forward_matches_the_formula(randn, d_model, d_ff):
    module, x = feed_forward(randn, d_model, d_ff), 2 * randn(3, 4, d_model)
    hint = "down_proj(gelu(up_proj(x))), with the GELU by tanh"
    assert_close(module(x), wide_tanh_narrow(module, x), atol=1e-12, name="feed_forward(x)", hint=hint)


def test_feed_forward_bends_by_tanh_not_by_erf():
    # Projections of one feature that do nothing: the output is the GELU itself.
    module = FeedForward(1, 1).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.ones_like(p) if p.dim() == 2 else torch.zeros_like(p))
    x = torch.tensor([-3.0, -1.0, 0.5, 2.0], dtype=torch.float64)[None, :, None]
    expected = [0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in x[0, :, 0]]
    expected = torch.tensor(expected, dtype=torch.float64)[None, :, None]
    hint = "GPT-2's GELU is the one by tanh; the one by erf differs from it in the fourth decimal"
    assert_close(module(x), expected, atol=1e-12, name="feed_forward(x)", hint=hint)


def test_feed_forward_gradients_match_the_formula(randn):
    module, x, upstream = feed_forward(randn, 5, 13), randn(2, 3, 5), randn(2, 3, 5)
    expected = results(lambda x: wide_tanh_narrow(module, x), module, x, upstream)
    assert_same(results(module, module, x, upstream), expected)


def test_feed_forward_of_a_strided_input_which_stays_as_it_is(randn):
    module, x = feed_forward(randn, 5, 13), randn(10, 3, 2).permute(2, 1, 0)[..., ::2]
    before = x.clone()
    assert_close(module.train()(x), wide_tanh_narrow(module, before), atol=1e-12, name="feed_forward(x)")
    assert torch.equal(x, before), "the input was modified"


# --- PreNormBlock and PostNormBlock -----------------------------------------------------------


@BLOCKS
def test_block_matches_its_formula(randn, cls):
    block, x = build(cls, randn), 2 * randn(3, 5, 7)
    expected = formula(block, x)
    assert_close(block(x), expected, atol=1e-12, name="block(x)", hint="compare with the docstring's formula")


@pytest.mark.parametrize("eps", [1e-3, 0.5])
@BLOCKS
def test_block_uses_its_epsilon(randn, cls, eps):
    block, x = build(cls, randn, eps=eps), 0.1 * randn(3, 5, 7)
    assert_close(block(x), formula(block, x), atol=1e-12, name="block(x)", hint="is eps that of the norms?")
    assert block.norm1.eps == block.norm2.eps == eps
    default = build(cls, randn)
    assert default.norm1.eps == default.norm2.eps == 1e-5, "eps is 1e-5 unless it is given"


@BLOCKS
def test_block_gradients_match_its_formula(randn, cls):
    block, x, upstream = build(cls, randn), 2 * randn(3, 5, 7), randn(3, 5, 7)
    expected = results(lambda x: formula(block, x), block, x, upstream)
    hint = "the value is right and the gradient is not: is something detached?"
    assert_same(results(block, block, x, upstream), expected, hint=hint)


def test_pre_norm_stream_is_never_normalised(randn):
    # Both sub-layers are silent: what comes in goes out, to the last bit.
    block = randomise_norms(PreNormBlock(Constant(0.0), Constant(0.0), 7).double(), randn).eval()
    x = 5 + 3 * randn(3, 5, 7)
    hint = "with silent sub-layers a pre-norm block returns its input: the sum itself is not normalised"
    assert_close(block(x), x, atol=0, name="block(x)", hint=hint)


def test_pre_norm_sub_layers_read_normalised_streams(randn):
    block, x = build(PreNormBlock, randn), 5 + 3 * randn(3, 5, 7)
    output = block(x)
    (first,), (second,) = block.attention.seen, block.feed_forward.seen
    hint = "attention must be given norm1(x)"
    assert_close(first.input, normalise(x, block.norm1).detach(), atol=1e-12, name="its input", hint=hint)
    h = x + first.output
    hint = "feed_forward must be given norm2(h), where h = x + attention(norm1(x))"
    assert_close(second.input, normalise(h, block.norm2).detach(), atol=1e-12, name="its input", hint=hint)
    hint = "the output is h plus what feed_forward returned: h, not x, and not the normalised h"
    assert_close(output.detach(), h + second.output, atol=1e-12, name="block(x)", hint=hint)


def test_post_norm_sub_layers_read_the_stream_as_it_is(randn):
    block, x = build(PostNormBlock, randn), 5 + 3 * randn(3, 5, 7)
    output = block(x)
    (first,), (second,) = block.attention.seen, block.feed_forward.seen
    assert_close(first.input, x, atol=0, name="its input", hint="attention must be given x itself")
    h = normalise(x + first.output, block.norm1).detach()
    hint = "feed_forward must be given h = norm1(x + attention(x))"
    assert_close(second.input, h, atol=1e-12, name="its input", hint=hint)
    hint = "the output is norm2(h + what feed_forward returned)"
    expected = normalise(h + second.output, block.norm2).detach()
    assert_close(output.detach(), expected, atol=1e-12, name="block(x)", hint=hint)


@pytest.mark.parametrize(
    ("cls", "norm_first"), [(PreNormBlock, True), (PostNormBlock, False)], ids=["pre_norm", "post_norm"]
)
def test_block_matches_pytorch_layer(randn, cls, norm_first):
    B, T, E, H, F = 2, 5, 12, 3, 17
    theirs = nn.TransformerEncoderLayer(
        E,
        H,
        F,
        dropout=0.0,
        activation=lambda u: torch.nn.functional.gelu(u, approximate="tanh"),
        layer_norm_eps=1e-3,
        batch_first=True,
        norm_first=norm_first,
    ).double()
    randomise(theirs, randn)
    ours = cls(CausalSelfAttention(E, H), FeedForward(E, F), E, eps=1e-3).double()
    names = {
        "self_attn.in_proj_": "attention.qkv_proj.",
        "self_attn.out_proj.": "attention.out_proj.",
        "linear1.": "feed_forward.up_proj.",
        "linear2.": "feed_forward.down_proj.",
    }

    def ours_of(name):
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    ours.load_state_dict({ours_of(name): p for name, p in theirs.state_dict().items()})
    x, upstream = randn(B, T, E), randn(B, T, E)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = results(lambda x: theirs(x, src_mask=hidden, is_causal=True), theirs, x, upstream)
    expected = {ours_of(name): value for name, value in expected.items()}
    assert_same(results(ours, ours, x, upstream), expected)


@BLOCKS
def test_block_of_a_strided_input_which_stays_as_it_is(randn, cls):
    block, x = build(cls, randn), randn(5, 14, 3).permute(2, 0, 1)[..., ::2]
    before = x.clone()
    assert_close(block(x), formula(block, before), atol=1e-12, name="block(x)")
    assert torch.equal(x, before), "the input was modified: `x += ...` does that"


def one_of_the_patterns(actual, base, step, wrap):
    """Check that each row of `actual` is wrap(base + step * mask) for a mask of its own; return the masks."""
    d = base.shape[-1]
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=d)), dtype=torch.float64)  # (2^d, d)
    candidates = wrap(base[..., None, :] + step * masks)  # (B, T, 2^d, d)
    error, best = (candidates - actual[..., None, :]).abs().amax(-1).min(-1)  # (B, T)
    message = (
        "in training an entry of a sub-layer's output is either 0 or divided by 1 - p, before it is added; "
        f"no such choice gives these numbers (off by {error.max().item():.2g})"
    )
    assert error.max() < 1e-9, message
    return masks[best]


@BLOCKS
def test_block_drops_from_the_output_of_both_sub_layers_in_training(randn, cls):
    p, d = 0.4, 5
    # Not the same in all features: a norm would not see whether all or none are dropped.
    says = [1.0, 2.0, -1.5, 0.7, -2.2], [-2.0, 1.3, 0.9, -0.6, 1.7]
    block = cls(Constant(says[0]), Constant(says[1]), d, dropout=p).double().train()
    randomise_norms(block, randn)
    x = randn(6, 9, d)
    output = block(x).detach()
    (second,) = block.feed_forward.seen
    steps = [torch.tensor(values, dtype=torch.float64) / (1 - p) for values in says]

    def through(norm):
        return lambda x: normalise(x, norm).detach()

    if cls is PreNormBlock:
        first = one_of_the_patterns(second, x, steps[0], through(block.norm2))
        last = one_of_the_patterns(output, x + first * steps[0], steps[1], lambda y: y)
    else:
        first = one_of_the_patterns(second, x, steps[0], through(block.norm1))
        last = one_of_the_patterns(output, second, steps[1], through(block.norm2))
    for name, kept in (("attention", first), ("feed_forward", last)):
        share = 1 - kept.mean().item()
        assert abs(share - p) < 0.15, (
            f"{share:.2f} of {name}'s output was dropped, expected about {p}"
        )  # of 270
        patterns = {tuple(row) for row in kept.flatten(0, 1).tolist()}
        assert len(patterns) > 10, f"{name}: tokens share one draw"
        again = {tuple(row) for row in kept.flatten(1).tolist()}
        assert len(again) == 6, f"{name}: sequences share one draw"
    assert not torch.equal(first, last), "both sub-layers share one draw"


@BLOCKS
def test_block_drops_nothing_in_evaluation(randn, cls):
    block, x = build(cls, randn, dropout=0.5), randn(3, 5, 7)
    block.train()(x)
    block.eval()
    hint = "in evaluation mode nothing is dropped or scaled"
    assert_close(block(x), formula(block, x), atol=1e-12, name="block(x)", hint=hint)


# --- conv1d_to_linear -------------------------------------------------------------------------


def their_state(randn, d_model=5, d_ff=7, dtype=torch.float64):
    """A state dict as Hugging Face has it, of random tensors."""
    shapes = {
        "ln_1": (d_model,),
        "attn.c_attn": (d_model, 3 * d_model),
        "attn.c_proj": (d_model, d_model),
        "ln_2": (d_model,),
        "mlp.c_fc": (d_model, d_ff),
        "mlp.c_proj": (d_ff, d_model),
    }
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = randn(*shape, dtype=dtype)
        state[f"{name}.bias"] = randn(shape[-1], dtype=dtype)
    return state


OUR_NAMES = {
    "ln_1": "norm1",
    "attn.c_attn": "attention.qkv_proj",
    "attn.c_proj": "attention.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "feed_forward.up_proj",
    "mlp.c_proj": "feed_forward.down_proj",
}


def assert_converted(converted, state):
    assert isinstance(converted, dict), f"the result is a {type(converted).__name__}, not a dict"
    expected = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module in OUR_NAMES:
            rows = (
                [[float(tensor[i, j]) for i in range(tensor.shape[0])] for j in range(tensor.shape[-1])]
                if (tensor.dim() == 2)
                else tensor.tolist()
            )
            expected[f"{OUR_NAMES[module]}.{kind}"] = torch.tensor(rows, dtype=tensor.dtype)
    assert set(converted) == set(expected), (
        f"names too many or too few: {sorted(set(converted) ^ set(expected))}"
    )
    for name, tensor in expected.items():
        hint = "a Conv1D's weight is (in, out), nn.Linear's (out, in); vectors stay as they are"
        assert_close(converted[name], tensor, atol=0, name=name, hint=hint)
        assert converted[name].dtype == tensor.dtype, f"{name} is {converted[name].dtype}, not {tensor.dtype}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_conv1d_weights_are_renamed_and_transposed(randn, dtype):
    state = their_state(randn, dtype=dtype)
    assert_converted(conv1d_to_linear(state), state)


def test_conv1d_square_weight_is_transposed_too(randn):
    state = their_state(randn, d_model=4, d_ff=4)  # c_proj and c_fc fit either way round
    assert_converted(conv1d_to_linear(state), state)


def test_conv1d_state_is_left_alone(randn):
    state = their_state(randn)
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert_converted(conv1d_to_linear(state), before)
    assert list(state) == list(before), "the mapping was modified"
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), f"{name} was modified"


def test_conv1d_constants_of_old_checkpoints_are_ignored(randn):
    state = their_state(randn)
    mask = torch.ones(1, 1, 9, 9).tril()
    for extra in ({"attn.bias": mask}, {"attn.bias": mask, "attn.masked_bias": torch.tensor(-1e4)}):
        assert_converted(conv1d_to_linear({**extra, **state}), state)
    assert set(GPT2_CONSTANTS) == {"attn.bias", "attn.masked_bias"}


@pytest.mark.parametrize("kind", ["weight", "bias"])
@pytest.mark.parametrize("module", list(OUR_NAMES))
def test_conv1d_missing_parameters_are_refused(randn, module, kind):
    state = their_state(randn)
    assert_converted(conv1d_to_linear(state), state)
    del state[f"{module}.{kind}"]
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        conv1d_to_linear(state)


@pytest.mark.parametrize(
    "name", ["attn.q_attn.weight", "ln_cross_attn.weight", "ln_1.scale", "h.0.ln_1.weight"]
)
def test_conv1d_unknown_names_are_refused(randn, name):
    state = their_state(randn)
    assert_converted(conv1d_to_linear(state), state)
    state[name] = randn(5)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        conv1d_to_linear(state)


# --- GPT2Block --------------------------------------------------------------------------------

CONFIGS = [
    pytest.param({"d_model": 15, "num_heads": 3, "d_ff": 22}, id="small"),
    pytest.param({"d_model": 14, "num_heads": 7}, id="d_ff_default"),
    pytest.param({"d_model": 12, "num_heads": 1, "d_ff": 5, "eps": 0.3}, id="one_head_large_eps"),
    pytest.param({"d_model": 10, "num_heads": 5, "d_ff": 10, "eps": 1e-3, "dropout": 0.4}, id="dropout"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_gpt2_block_matches_hugging_face(randn, hugging_face, config):
    theirs = hugging_face(**config)
    heads, eps, p = config["num_heads"], config.get("eps", 1e-5), config.get("dropout", 0.0)
    ours = twin(theirs, heads, eps=eps, dropout=p)
    for B, T in ((3, 6), (1, 9), (2, 1)):
        x = randn(B, T, config["d_model"])
        assert_close(
            ours(x), hugging_face.run(theirs, x), atol=1e-12, name=f"the output for {B} x {T} tokens"
        )


@pytest.mark.parametrize("config", CONFIGS)
def test_gpt2_block_gradients_match_hugging_face(randn, hugging_face, config):
    theirs = hugging_face(**config)
    ours = twin(theirs, config["num_heads"], eps=config.get("eps", 1e-5), dropout=config.get("dropout", 0.0))
    x, upstream = randn(2, 5, config["d_model"]), randn(2, 5, config["d_model"])
    expected = by_our_names(results(lambda x: hugging_face.run(theirs, x), theirs, x, upstream))
    assert_same(results(ours, ours, x, upstream), expected)


def test_gpt2_block_has_four_times_d_model_hidden_features_unless_told_otherwise():
    parameters = {name: tuple(p.shape) for name, p in GPT2Block(6, 2).named_parameters()}
    assert parameters["feed_forward.up_proj.weight"] == (24, 6)
    other = {name: tuple(p.shape) for name, p in GPT2Block(6, 2, 7).named_parameters()}
    assert other["feed_forward.down_proj.weight"] == (6, 7)


def test_gpt2_block_is_a_pre_norm_block_of_its_sub_layers(randn):
    block = randomise(GPT2Block(12, 3, 7, eps=0.01).double(), randn).eval()
    assert isinstance(block, PreNormBlock)
    x = randn(2, 5, 12)
    h = x + loop_over_queries(block.attention, normalise(x, block.norm1).detach())
    expected = h + wide_tanh_narrow(block.feed_forward, normalise(h, block.norm2))
    assert_close(block(x), expected, atol=1e-12, name="block(x)")
    assert block.norm1.eps == block.norm2.eps == 0.01, "eps must reach both norms"
    default = GPT2Block(12, 3)
    assert default.norm1.eps == default.norm2.eps == 1e-5, "eps is 1e-5 unless it is given"


@pytest.mark.parametrize(("d_model", "num_heads"), [(10, 3), (3, 6)])
def test_gpt2_block_refuses_heads_that_do_not_divide_d_model(randn, d_model, num_heads):
    GPT2Block(num_heads * d_model, num_heads)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        GPT2Block(d_model, num_heads)


def test_gpt2_block_copies_the_parameters_it_loads(randn):
    state = their_state(randn, 6, 7)
    block = GPT2Block(6, 3, 7).double().eval()
    block.load_conv1d(state)
    x = randn(2, 4, 6)
    before = block(x).detach()
    for tensor in state.values():
        tensor.add_(1.0)
    hint = "the parameters are shared with the source, not copied"
    assert_close(block(x), before, atol=0, name="block(x)", hint=hint)


def test_gpt2_block_does_not_look_ahead(randn, hugging_face):
    theirs = hugging_face(15, 3, 22)
    block, x = twin(theirs, 3), randn(2, 6, 15)
    assert_close(block(x), hugging_face.run(theirs, x), atol=1e-12, name="block(x)")
    leak = leaks(block, x)
    assert leak == 0, f"an output depends on a later token: gradient {leak:.2g}, must be exactly 0"


def test_gpt2_block_of_a_prefix_is_the_prefix_of_the_block(randn, hugging_face):
    theirs = hugging_face(15, 3, 22)
    block, x = twin(theirs, 3), randn(2, 7, 15)
    whole = hugging_face.run(theirs, x)
    for T in (7, 1, 4, 5):
        hint = "what later tokens say, or an earlier call, must not matter"
        assert_close(block(x[:, :T]), whole[:, :T], atol=1e-12, name=f"the first {T} tokens", hint=hint)


def test_gpt2_block_hands_dropout_to_weights_and_sub_layers(randn):
    p, d = 0.4, 4
    block = randomise(GPT2Block(d, 2, 7, dropout=p).double(), randn)
    with torch.no_grad():  # what the sub-layers say is 1 and 10 in every feature
        for projection, value in ((block.attention.out_proj, 1.0), (block.feed_forward.down_proj, 10.0)):
            projection.weight.zero_()
            projection.bias.fill_(value)
    x = randn(20, 9, d)
    added = (block.train()(x) - x).detach() * (1 - p)
    kinds = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64)
    distance, kind = (added[..., None] - kinds).abs().min(-1)
    assert distance.max() < 1e-9, "in training, each sub-layer's output is dropped or divided by (1 - p)"
    shares = torch.bincount(kind.flatten(), minlength=4) / kind.numel()  # of 720
    expected = torch.tensor([p * p, (1 - p) * p, p * (1 - p), (1 - p) ** 2])
    assert_close(shares, expected, atol=0.09, name="how often neither, the first, the second or both stay")

    block.eval()
    assert_close(block(x), x + 11.0, atol=1e-12, name="block(x) in evaluation mode")
    module, tokens, whole = dropping(randn, 0.0, B=8)
    block = GPT2Block(30, 5, 4, dropout=p).double()
    block.attention.load_state_dict(module.state_dict())
    weights = block.train().attention(tokens)
    dropped = (weights == 0) & (whole > 0)
    share = dropped.sum().item() / (whole > 0).sum().item()
    assert abs(share - p) < 0.12, f"{share:.2f} of the attention weights were dropped, expected about {p}"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 0.15)], ids=str)
def test_gpt2_block_in_lower_precision_stays_close_to_float64(randn, hugging_face, dtype, atol):
    theirs = hugging_face(15, 3, 22, dtype=dtype)
    ours, x = twin(theirs, 3), randn(3, 6, 15, dtype=dtype)
    output = ours(x)
    assert output.dtype == dtype, f"the output is {output.dtype} for inputs in {dtype}"
    expected = hugging_face.run(theirs.double(), x.double())
    assert_close(output, expected, atol=atol, name="block(x)")


def test_gpt2_block_of_a_strided_input_which_stays_as_it_is(randn, hugging_face):
    theirs = hugging_face(15, 3, 22)
    ours, x = twin(theirs, 3), randn(5, 30, 2).permute(2, 0, 1)[..., ::2]
    before, state = x.clone(), {name: p.clone() for name, p in ours.state_dict().items()}
    expected = hugging_face.run(theirs, before.contiguous())
    assert_close(ours(x), expected, atol=1e-12, name="block(x)")
    assert torch.equal(x, before), "the input was modified"
    for name, p in ours.state_dict().items():
        assert torch.equal(p, state[name]), f"{name} was modified"


def test_gpt2_block_trains_like_hugging_face(randn, hugging_face):
    theirs = hugging_face(15, 3, 22)
    ours = twin(theirs, 3)
    x, target = randn(2, 5, 15), randn(2, 5, 15)
    for module, run in ((ours, ours), (theirs, lambda x: hugging_face.run(theirs, x))):
        for _ in range(3):
            parameters = list(module.parameters())
            grads = torch.autograd.grad((run(x) - target).square().mean(), parameters)
            with torch.no_grad():
                for p, g in zip(parameters, grads, strict=True):
                    p.sub_(0.3 * g)
    hint = "after three steps of gradient descent the two differ: are all parameters used and registered?"
    assert_close(ours(x), hugging_face.run(theirs, x), atol=1e-11, name="block(x)", hint=hint)


# --- the milestone ----------------------------------------------------------------------------


@pytest.mark.milestone
def test_milestone_outputs_and_gradients_match_hugging_face_in_float32(randn, hugging_face, milestone):
    """The output and the gradients of the input and of all twelve parameters, in float32.

    A block of GPT-2 small's size: 768 features, 12 heads, 3,072 hidden features; 2 sequences of 33 tokens.
    Every parameter is random, those of the norms too; inputs are N(0, 1). The loss is scaled so that the
    largest entry of each gradient lies between 0.01 and 10 (checked); the gradient of the keys' bias
    is zero in exact arithmetic, and is part of one tensor with those of queries and values.
    """
    theirs = hugging_face(768, 12, dtype=torch.float32)
    ours = twin(theirs, 12)
    x = randn(2, 33, 768, dtype=torch.float32)
    upstream = randn(2, 33, 768, dtype=torch.float32) / (4 * math.sqrt(2 * 33))
    expected = by_our_names(results(lambda x: hugging_face.run(theirs, x), theirs, x, upstream))
    found = results(ours, ours, x, upstream)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, f"{name} is {found[name].dtype}, not {value.dtype}"
        assert 0.01 < value.abs().max() < 10, f"the test is broken: {name} reaches {value.abs().max():.2g}"
    errors = [max_error(found[name], value) for name, value in expected.items()]
    worst = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    milestone(
        "largest difference from Hugging Face's GPT2Block",
        worst,
        target=1e-5,
        unit="absolute",
        better="lower",
    )
