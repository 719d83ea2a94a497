"""Tests of ch04/lab04, model. Oracles: complex numbers, a float64 forward pass written as loops, closed forms."""

import itertools
import math

import pytest
import torch
from model import GPT, CausalSelfAttention, FeedForward, ModelConfig, rotary_tables, rotate
from shared.compare import assert_close
from torch import nn

# All sizes differ: 3 heads of 10, so width 30; 80 hidden features (120 for GELU); 17 characters; context 13.
SMALL = {"vocab_size": 17, "context": 13, "layers": 2, "heads": 3, "width": 30, "rotary_base": 50.0}
GPT2 = {
    "positions": "learned",
    "norm": "layer",
    "qk_norm": False,
    "activation": "gelu",
    "start": "gpt2",
    "tied": True,
}


pytestmark = pytest.mark.usefixtures("one_thread")


# --- what the tests are made of ---------------------------------------------------------------


def randomised(module, randn):
    """Make every parameter random and of a size of its own, so that no norm is without effect."""
    with torch.no_grad():
        for number, p in enumerate(module.parameters()):
            p.copy_(
                (0.5 + 0.3 * (number % 5)) * randn(*p.shape) / math.sqrt(p.shape[-1] if p.dim() > 1 else 1)
            )
    return module.double()


def rms(v):
    return v / (v.square().mean() + torch.finfo(torch.float64).eps).sqrt()


def turned(v, position, base):
    """Rotate a vector by its position: pairs as complex numbers."""
    half = len(v) // 2
    z = torch.complex(v[:half], v[half:])
    angle = position * base ** (-2.0 * torch.arange(half, dtype=torch.float64) / len(v))
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag))


def attention_loop(attention, x):
    """One query after the other, which never sees a later key: x is (T, E), float64."""
    config = attention.config
    D = config.width // config.heads
    q, k, v = (x @ p.weight.T for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    merged = torch.zeros_like(x)
    for h in range(config.heads):
        own = slice(h * D, (h + 1) * D)
        queries, keys = list(q[:, own]), list(k[:, own])
        if config.qk_norm:
            queries, keys = [rms(a) for a in queries], [rms(a) for a in keys]
        if config.positions == "rotary":
            queries, keys = (
                [turned(a, t, config.rotary_base) for t, a in enumerate(each)] for each in (queries, keys)
            )
        for t in range(len(x)):
            scores = torch.stack([queries[t] @ keys[s] for s in range(t + 1)]) / math.sqrt(D)
            weights = (scores - scores.max()).exp()
            merged[t, own] = (weights / weights.sum()) @ v[: t + 1, own]
    return merged @ attention.out_proj.weight.T


def feed_forward_loop(layer, x):
    up = x @ layer.up_proj.weight.T
    if layer.activation == "gelu":
        return (up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))) @ layer.down_proj.weight.T
    gate = x @ layer.gate_proj.weight.T
    return (gate / (1 + torch.exp(-gate)) * up) @ layer.down_proj.weight.T


def normed(norm, x):
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return torch.stack([rms(row) for row in x])


def gpt_loop(model, ids):
    """Logits of one sequence (T,), in float64."""
    x = model.embedding.weight[ids]
    if model.config.positions == "learned":
        x = x + model.positions.weight[: len(ids)]
    if model.config.norm == "rms":
        x = torch.stack([rms(row) for row in x])
    for block in model.blocks:
        x = x + attention_loop(block.attention, normed(block.norm1, x))
        x = x + feed_forward_loop(block.feed_forward, normed(block.norm2, x))
    return normed(model.norm, x) @ model.head.weight.T


# --- rotary positions ---------------------------------------------------------------------------


def test_rotate_turns_pairs_like_complex_numbers(randn):
    B, H, T, D = 2, 3, 5, 14
    x, angle = randn(B, H, T, D), 3 * randn(T, D // 2)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    hint = "feature i goes with feature i + D/2: (a, b) becomes (a cos - b sin, a sin + b cos)"
    result = rotate(x, angle.cos(), angle.sin())
    assert_close(result, torch.cat((z.real, z.imag), dim=-1), atol=1e-12, hint=hint)


def test_rotate_of_a_strided_input_which_stays_as_it_is(randn):
    B, H, T, D = 2, 5, 3, 6
    x, angle = randn(B, T, H, D).transpose(1, 2), randn(T, D // 2)
    before = x.clone()
    result = rotate(x, angle.cos(), angle.sin())
    z = torch.complex(before[..., : D // 2], before[..., D // 2 :]) * torch.exp(1j * angle)
    assert_close(x, before, atol=0, name="x", hint="rotate changed its input")
    assert_close(result, torch.cat((z.real, z.imag), dim=-1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rotate_keeps_the_dtype(dtype, randn):
    x = randn(2, 2, 3, 8, dtype=dtype)
    cos, sin = rotary_tables(3, 8, 100.0, torch.device("cpu"))
    result = rotate(x, cos, sin)
    assert result.dtype == dtype, f"x is {dtype}, the result {result.dtype}: the tables are float32"
    z = torch.complex(x.double()[..., :4], x.double()[..., 4:]) * torch.complex(cos.double(), sin.double())
    error = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    assert_close(result.double(), torch.cat((z.real, z.imag), dim=-1), atol=error)


# --- attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "no_qk_norm"])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_attention_matches_a_loop(positions, qk_norm, randn):
    config = ModelConfig(**SMALL | {"positions": positions, "qk_norm": qk_norm})
    attention = randomised(CausalSelfAttention(config), randn)
    x = 2 * randn(2, 11, 30)
    expected = torch.stack([attention_loop(attention, row) for row in x])
    hint = "heads, norm of queries and keys per head, rotation, scale 1 / sqrt(D), causal mask: which is it?"
    assert_close(attention(x), expected.detach(), atol=1e-5, hint=hint)


def test_attention_rotates_by_the_base_of_the_config(randn):
    attention = randomised(CausalSelfAttention(ModelConfig(**SMALL)), randn)
    x, results = randn(1, 9, 30), []
    for base in (10.0, 1000.0):
        other = CausalSelfAttention(ModelConfig(**SMALL | {"rotary_base": base})).double()
        other.load_state_dict(attention.state_dict())
        results.append(other(x).detach())
        assert_close(results[-1][0], attention_loop(other, x[0]).detach(), atol=1e-5)
    assert (results[0] - results[1]).abs().max() > 1e-3, "rotary_base has no effect"


def test_attention_does_not_look_ahead(randn):
    attention = randomised(CausalSelfAttention(ModelConfig(**SMALL)), randn)
    x = (4 * randn(2, 7, 30)).requires_grad_()
    for t in range(7):
        grad = torch.autograd.grad(attention(x)[:, t].square().sum(), x)[0]
        assert (grad[:, t + 1 :] == 0).all(), f"character {t} reads a later one"
        assert (grad[:, : t + 1].abs().sum(dim=(0, 2)) > 0).all(), (
            f"character {t} does not read all before it"
        )


def test_attention_depends_on_distance_only(randn):
    """Rotated queries and keys: moving a text by some characters changes nothing (RoFormer, 3.1)."""
    attention = randomised(CausalSelfAttention(ModelConfig(**SMALL)), randn)
    x = randn(1, 6, 30)
    padded = torch.cat((torch.zeros(1, 4, 30, dtype=torch.float64), x), dim=1)
    cos, sin = rotary_tables(10, 10, 50.0, torch.device("cpu"))
    q, k = (p(padded).unflatten(-1, (3, 10)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    late = rotate(q, cos, sin)[:, :, 4:] @ rotate(k, cos, sin)[:, :, 4:].mT
    early = rotate(q[:, :, 4:], cos[:6], sin[:6]) @ rotate(k[:, :, 4:], cos[:6], sin[:6]).mT
    assert_close(
        late, early.detach(), atol=1e-5, hint="a pair of one query and one key must see only their distance"
    )


# --- feed-forward -------------------------------------------------------------------------------


def test_feed_forward_matches_its_formula(randn):
    for activation in ("swiglu", "gelu"):
        layer = randomised(FeedForward(ModelConfig(**SMALL | {"activation": activation})), randn)
        x = 2 * randn(5, 2, 30).transpose(0, 1)
        before = x.clone()
        hint = "down(silu(gate(x)) * up(x)): silu is on the gate, and only there"
        assert_close(layer(x), feed_forward_loop(layer, before).detach(), atol=1e-12, hint=hint)
        assert_close(x, before, atol=0, name="x", hint="the layer changed its input")


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, GPT2, {"norm": "layer"}, {"positions": "learned"}, {"activation": "gelu", "qk_norm": False}],
    ids=["ours", "gpt2", "layer_norm", "learned", "gelu"],
)
def test_gpt_matches_a_loop(change, randn, rng):
    model = randomised(GPT(ModelConfig(**SMALL | change)), randn)
    ids = torch.from_numpy(rng.integers(0, 17, size=(3, 11)))
    expected = torch.stack([gpt_loop(model, row) for row in ids])
    hint = "embeddings, their norm, the blocks in order, the last norm, the head: which is missing?"
    assert_close(model(ids), expected.detach(), atol=2e-5, hint=hint)


def test_gpt_does_not_look_ahead(randn, rng):
    model = randomised(GPT(ModelConfig(**SMALL)), randn)
    ids = torch.from_numpy(rng.integers(0, 17, size=(2, 12)))
    full = model(ids)
    for t in (1, 5, 11):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 3) % 17
        assert_close(
            model(changed)[:, :t],
            full[:, :t].detach(),
            atol=1e-12,
            hint="a logit depends on later characters",
        )
        assert (model(changed)[:, t] - full[:, t]).abs().max() > 1e-3, "a logit ignores its own character"


def test_gpt_reads_texts_longer_than_its_context(randn, rng):
    model = randomised(GPT(ModelConfig(**SMALL)), randn)
    ids = torch.from_numpy(rng.integers(0, 17, size=20))
    assert_close(
        model(ids[None])[0],
        gpt_loop(model, ids).detach(),
        atol=2e-5,
        hint="with rotary positions T may exceed context",
    )


def test_gpt_in_bfloat16_is_close_to_float32(randn, rng):
    model = randomised(GPT(ModelConfig(**SMALL)), randn)
    ids = torch.from_numpy(rng.integers(0, 17, size=(2, 12)))
    expected = model(ids)
    result = model.bfloat16()(ids)
    assert result.dtype == torch.bfloat16
    assert_close(result.double(), expected.detach(), atol=0.15)


def test_gpt_on_the_device_equals_the_cpu(device, randn, rng):
    model = randomised(GPT(ModelConfig(**SMALL)), randn).float()
    ids = torch.from_numpy(rng.integers(0, 17, size=(2, 12)))
    expected = model(ids).detach()
    result = model.to(device)(ids.to(device))
    assert result.device.type == device
    assert_close(result.detach(), expected, atol=1e-3 if device == "cuda" else 1e-6)


def test_gpt_of_the_recipe_has_802_560_parameters():
    """2 V E for embedding and head, and in each block 4 E^2 for attention and 3 E F with F = 8 E / 3, rounded down."""
    model = GPT(ModelConfig())
    V, E, F = 65, 128, 341
    assert sum(p.numel() for p in model.parameters()) == 2 * V * E + 4 * (4 * E * E + 3 * E * F) == 802_560
    assert sum(p.numel() for p in GPT(ModelConfig(**GPT2, context=64)).parameters()) == 804_096, (
        "nanoGPT's size"
    )


# --- the start ----------------------------------------------------------------------------------

WRITERS = ("out_proj", "down_proj", "head")


def test_start_what_writes_to_the_stream_is_zero():
    for name, module in GPT(ModelConfig(**SMALL)).named_modules():
        if name.endswith(WRITERS):
            assert (module.weight == 0).all(), f"{name} does not start at zero"


def test_start_of_every_other_weight_is_normal_with_its_own_size():
    config = ModelConfig(vocab_size=90, context=8, layers=3, heads=2, width=72)
    drawn = {}
    for name, module in GPT(config).named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or name.endswith(WRITERS):
            continue
        std = 1.0 if isinstance(module, nn.Embedding) else math.sqrt(3 / (4 * module.in_features))
        w = module.weight.detach().double() / std
        n = w.numel()  # 5,184 or more: the bounds below are at least five standard errors away
        assert abs(w.mean()) < 5 / math.sqrt(n), f"{name} has the mean {w.mean() * std:.3g}, not 0"
        assert abs(w.std() - 1) < 5 / math.sqrt(2 * n), (
            f"{name} has the deviation {w.std() * std:.4g}, not {std:.4g}"
        )
        beyond = (w.abs() > 2).double().mean()
        assert abs(beyond - 0.0455) < 5 * math.sqrt(0.0434 / n), (
            f"{name} is not drawn from a normal distribution"
        )
        drawn[name] = w
    assert len(drawn) == 1 + 3 * 5, f"weights without a start of their own: {sorted(drawn)}"
    names = sorted(drawn)
    for a, b in itertools.pairwise(names):
        assert not (drawn[a].shape == drawn[b].shape and torch.equal(drawn[a], drawn[b])), (
            f"{a} and {b} are equal"
        )


def test_start_predicts_every_character_equally():
    """All logits 0: the loss of the first step is exactly log V."""
    model = GPT(ModelConfig(**SMALL))
    assert (model(torch.arange(12).view(2, 6)) == 0).all()


def test_start_again_draws_new_weights(randn):
    model = randomised(GPT(ModelConfig(**SMALL | {"norm": "layer"})), randn).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.fill_(1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.reset_parameters()
    for name, p in model.named_parameters():
        assert p.requires_grad, f"{name} cannot be trained any more"
        if "norm" in name:
            assert (p == 1).all(), f"{name}: reset_parameters is about weights of nn.Linear and nn.Embedding"
        elif name.removesuffix(".weight").endswith(WRITERS):
            assert (p == 0).all(), f"{name} is not zero after reset_parameters()"
        else:
            assert not torch.equal(p, before[name]), f"{name} was not drawn anew"
    torch.manual_seed(3)
    one = GPT(ModelConfig(**SMALL)).state_dict()
    torch.manual_seed(3)
    two = GPT(ModelConfig(**SMALL)).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one), "an equal seed must give equal weights"
    model = GPT(ModelConfig(**SMALL))
    first = model.embedding.weight.detach().clone()
    model.reset_parameters()
    assert not torch.equal(model.embedding.weight, first), (
        "PyTorch's generator decides, and goes on from draw to draw"
    )


def test_start_of_a_tied_head_is_gpt2s():
    with pytest.raises(ValueError, match="tied"):
        ModelConfig(tied=True)
    with pytest.raises(ValueError, match="heads"):
        ModelConfig(width=36, heads=4)
    model = GPT(ModelConfig(**SMALL | GPT2))
    assert model.head.weight is model.embedding.weight
    assert 0.015 < model.embedding.weight.std() < 0.025
    model(torch.zeros(1, 3, dtype=torch.int64))
