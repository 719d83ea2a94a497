"""Tests of ch03/lab03. Oracles: Hugging Face's GPT2LMHeadModel, a list of shapes, softmax and statistics."""

import copy
import math
import sys
from dataclasses import replace

import pytest
import torch
from gpt import GPT, GPT2_SIZES, GPTConfig, parameter_count, sample
from shared.compare import assert_close
from shared.earlier import solution_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WHY = "put the model together from its parts"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, why=WHY)
    forbid(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention, why=WHY)
    if "transformers.models.gpt2.modeling_gpt2" in sys.modules:
        _forbid_hugging_face(forbid)


def _forbid_hugging_face(forbid):
    gpt2 = sys.modules["transformers.models.gpt2.modeling_gpt2"]
    forbid(gpt2.GPT2LMHeadModel, gpt2.GPT2Model, gpt2.GPT2Block, why=WHY)


@pytest.fixture
def hugging_face(forbid, randn):
    """`hugging_face(config)`: a GPT2LMHeadModel in evaluation mode, all of whose parameters are random."""
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    _forbid_hugging_face(forbid)

    def make(config, dtype=torch.float64):
        theirs = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.context,
                n_layer=config.num_layers,
                n_head=config.num_heads,
                n_embd=config.d_model,
                n_inner=config.d_ff,
                layer_norm_epsilon=config.eps,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                resid_pdrop=config.dropout,
                tie_word_embeddings=config.tied,
                bos_token_id=0,
                eos_token_id=0,
                attn_implementation="eager",
            )
        )
        return randomise(theirs.to(dtype).eval(), randn)

    return make


# --- what the tests are made of ---------------------------------------------------------------

# Vocabulary 23, context 11, 3 layers, 2 heads, 14 features, 9 hidden features: all different.
SMALL = GPTConfig(23, 11, 3, 2, 14, 9)
CONFIGS = [
    pytest.param(SMALL, id="tied"),
    pytest.param(replace(SMALL, tied=False), id="untied"),
    pytest.param(GPTConfig(17, 6, 1, 3, 9, eps=0.3), id="one_layer_large_eps"),
    pytest.param(GPTConfig(5, 13, 4, 1, 6, 6, dropout=0.4, tied=False), id="one_head_dropout"),
]
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

# Each linear layer of a block, with the sizes that it maps from and to.
LINEAR = {
    "attention.qkv_proj": lambda E, F: (E, 3 * E),
    "attention.out_proj": lambda E, F: (E, E),
    "feed_forward.up_proj": lambda E, F: (E, F),
    "feed_forward.down_proj": lambda E, F: (F, E),
}


def expected_shapes(config):
    """Every parameter of a GPT by name, with its shape; a tied head is left out."""
    V, C, E = config.vocab_size, config.context, config.d_model
    shapes = {"token_embedding.weight": (V, E), "position_embedding.weight": (C, E)}
    for i in range(config.num_layers):
        for layer, ends in LINEAR.items():
            inputs, outputs = ends(E, config.d_ff or 4 * E)
            shapes[f"blocks.{i}.{layer}.weight"] = (outputs, inputs)
            shapes[f"blocks.{i}.{layer}.bias"] = (outputs,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.{kind}": (E,) for kind in ("weight", "bias")}
    shapes |= {f"final_norm.{kind}": (E,) for kind in ("weight", "bias")}
    return shapes if config.tied else shapes | {"head.weight": (V, E)}


def randomise(module, randn):
    """Make every parameter random: norms start as 1 and 0 and biases as 0, which hides mistakes."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 2:
                embeds = any(part in name for part in ("wte", "wpe", "embedding", "head"))
                p.copy_(randn(*p.shape) / (1 if embeds else math.sqrt(p.shape[0])))
            else:
                p.copy_(0.4 * randn(*p.shape) + (1.0 if name.endswith("weight") else 0.0))
    return module


def by_our_names(theirs, tensors):
    """Rename `tensors`, given by the names of Hugging Face's parameters, and transpose Conv1D's."""
    outside = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm"}
    ours = {f"{o}.weight": tensors[f"transformer.{t}.weight"] for t, o in outside.items()}
    ours["final_norm.bias"] = tensors["transformer.ln_f.bias"]
    if "lm_head.weight" in tensors:
        ours["head.weight"] = tensors["lm_head.weight"]
    for i in range(len(theirs.transformer.h)):
        prefix = f"transformer.h.{i}."
        block = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        converted = solution_of("ch02/lab04").conv1d_to_linear(block)
        ours |= {f"blocks.{i}.{name}": tensor for name, tensor in converted.items()}
    return ours


def twin(theirs, config):
    """A GPT with the parameters of Hugging Face's, in evaluation mode."""
    ours = GPT(config).to(theirs.transformer.wte.weight.dtype)
    found = dict(ours.named_parameters())
    expected = by_our_names(theirs, dict(theirs.named_parameters()))
    assert set(found) == set(expected), (
        f"parameters too many or too few: {sorted(set(found) ^ set(expected))}"
    )
    with torch.no_grad():
        for name, p in expected.items():
            found[name].copy_(p)
    return ours.eval()


def their_states(theirs, ids):
    """The stream before the first block, after each block, and after the last norm.

    By hooks: the list of `output_hidden_states` lacks the stream that goes into the last norm.
    """
    states = []

    def keep(module, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    parts = [theirs.transformer.drop, *theirs.transformer.h, theirs.transformer.ln_f]
    hooks = [part.register_forward_hook(keep) for part in parts]
    theirs(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


def their_logits(theirs, ids):
    with torch.no_grad():
        return theirs(ids, use_cache=False).logits


def draw_ids(rng, config, B, T):
    return torch.from_numpy(rng.integers(0, config.vocab_size, size=(B, T)))


def names_of_states(config):
    L = config.num_layers
    return ["before the first block", *(f"after block {i}" for i in range(L)), "after the last norm"]


def assert_states(states, expected, config, *, atol=1e-12, hint=""):
    assert isinstance(states, list), f"hidden_states returned a {type(states).__name__}, not a list"
    assert len(states) == len(expected), f"{len(states)} states, expected {len(expected)}: L + 2"
    for name, state, right in zip(names_of_states(config), states, expected, strict=True):
        assert_close(state, right, atol=atol, name=f"the stream {name}", hint=hint)


# --- parameter_count --------------------------------------------------------------------------

# Layers, heads, features: table 2 of the paper; the heads are Hugging Face's.
PUBLISHED = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_count_of_the_four_gpt2_is_hugging_faces(name):
    from transformers.models.gpt2.configuration_gpt2 import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

    layers, heads, features = PUBLISHED[name]
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=features))
    config = GPT2_SIZES[name]
    assert config == GPTConfig(50257, 1024, layers, heads, features, None, 0.0, 1e-5, True), (
        f"{name}: {config}"
    )
    count, expected = parameter_count(config), sum(p.numel() for p in theirs.parameters())
    assert count == expected, f"{count:,} parameters for {name}, Hugging Face's has {expected:,}"


@pytest.mark.parametrize("config", CONFIGS)
def test_count_of_unusual_sizes_is_hugging_faces(hugging_face, config):
    count = parameter_count(config)
    expected = sum(p.numel() for p in hugging_face(config).parameters())
    hint = "is a tied head counted twice, an untied one not at all, or d_ff taken to be 4 E?"
    assert count == expected, f"{count:,} parameters, Hugging Face's has {expected:,}: {hint}"


def test_count_is_an_exact_int_for_any_sizes():
    for tied in (True, False):
        config = GPTConfig(2_000_003, 300_007, 601, 7, 7 * 900_001, 5_000_011, tied=tied)
        count = parameter_count(config)
        assert type(count) is int, f"the count is a {type(count).__name__}, not an int"
        expected = sum(math.prod(shape) for shape in expected_shapes(config).values())
        assert count == expected, f"off by {count - expected} of {expected:,}: were floats used?"


def test_count_makes_no_module(forbid):
    why = "count by arithmetic on the sizes"
    forbid(nn.Embedding, nn.Linear, nn.LayerNorm, why=why)
    assert parameter_count(SMALL) == sum(math.prod(shape) for shape in expected_shapes(SMALL).values())


# --- the parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_parts_have_the_documented_names_and_shapes(config):
    model, expected = GPT(config), expected_shapes(config)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == expected, (
        f"wrong or missing or too many: {sorted(set(found.items()) ^ set(expected.items()))}"
    )
    saved = set(model.state_dict())
    expected = {*expected, "head.weight"}
    assert saved == expected, f"in the state dict too much or too little: {sorted(saved ^ expected)}"


@pytest.mark.parametrize("config", CONFIGS)
def test_parts_are_as_many_as_parameter_count_says(config):
    count, found = parameter_count(config), sum(p.numel() for p in GPT(config).parameters())
    assert found == count, f"parameter_count says {count:,}, but the model has {found:,} parameters"


def test_parts_are_of_the_documented_kinds():
    model = GPT(SMALL)
    kinds = {
        "token_embedding": nn.Embedding,
        "position_embedding": nn.Embedding,
        "dropout": nn.Dropout,
        "blocks": nn.ModuleList,
        "final_norm": nn.LayerNorm,
        "head": nn.Linear,
    }
    for name, kind in kinds.items():
        part = getattr(model, name, None)
        assert isinstance(part, kind), f"{name} is a {type(part).__name__}, not nn.{kind.__name__}"
    for block in model.blocks:
        assert isinstance(block, solution_of("ch02/lab04").GPT2Block), f"a block is a {type(block).__name__}"
    assert model.config == SMALL, "`config` must be what the model was made from"


def assert_tied(model, when):
    shared = model.head.weight is model.token_embedding.weight
    assert shared, f"{when}: head.weight and token_embedding.weight are two Parameters, not one"
    assert isinstance(model.head.weight, nn.Parameter)


def test_parts_of_a_tied_head_are_one_parameter_for_good(randn):
    model = GPT(SMALL)
    assert_tied(model, "a new model")
    assert_tied(model.double(), "after .double()")
    clone = copy.deepcopy(model)
    assert_tied(clone, "after copy.deepcopy")
    assert clone.head.weight is not model.head.weight, "the copy shares the original's parameter"
    randomise(clone, randn).load_state_dict(model.state_dict())
    assert_tied(clone, "after load_state_dict")
    assert torch.equal(clone.head.weight, model.head.weight), "load_state_dict loaded something else"


def test_parts_of_an_untied_head_are_two_parameters():
    model = GPT(replace(SMALL, tied=False))
    assert model.head.weight is not model.token_embedding.weight
    hint = "an untied head starts from numbers of its own"
    assert not torch.equal(model.head.weight, model.token_embedding.weight), hint


def test_parts_share_nothing_with_another_model():
    one, other = GPT(SMALL), GPT(SMALL)
    shared = {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert not shared, f"two models share {len(shared)} parameters"


def test_parts_on_the_meta_device_take_no_memory():
    config = GPT2_SIZES["gpt2-xl"]
    with torch.device("meta"):
        model = GPT(config)
    placed = {str(p.device) for p in model.parameters()}
    assert placed == {"meta"}, f"under torch.device('meta') parameters are on {placed}"
    assert_tied(model, "on the meta device")
    assert sum(p.numel() for p in model.parameters()) == 1_557_611_200


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 0},
        {"context": 0},
        {"num_layers": 0},
        {"num_heads": 0},
        {"d_model": 0},
        {"d_ff": 0},
        {"d_ff": -9},
        {"num_heads": 3},
        {"num_heads": 28},
        {"dropout": 1.0},
        {"dropout": -0.1},
    ],
    ids=str,
)
def test_parts_of_an_impossible_configuration_are_refused(wrong):
    GPT(SMALL)
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        GPT(replace(SMALL, **wrong))


# --- the start --------------------------------------------------------------------------------

# Every weight has 500 entries or more.
MIDDLE = GPTConfig(131, 37, 3, 4, 48, 100)


def role(name):
    """What a parameter is for: its name without the number of the block."""
    return ".".join(part for part in name.split(".") if part != "blocks" and not part.isdigit())


def assert_start(model, config):
    """Every parameter has its first value: means and deviations within 6 standard errors."""
    L = config.num_layers
    for name, p in model.named_parameters():
        value = p.detach().double()
        if "norm" in name or name.endswith("bias"):
            first = 1.0 if name.endswith("weight") else 0.0
            assert (value == first).all(), (
                f"{name} must start as {first:g} everywhere: got {value[:3].tolist()} ..."
            )
            continue
        writes = role(name) in ("attention.out_proj.weight", "feed_forward.down_proj.weight")
        std = 0.02 / math.sqrt(2 * L) if writes else 0.02
        n = value.numel()
        found, mean = value.std().item(), value.mean().item()
        assert abs(found / std - 1) < 6 / math.sqrt(2 * n), (
            f"{name} has a standard deviation of {found:.4f}, expected {std:.4f}"
            + (f" = 0.02 / sqrt(2 L), L = {L}" if writes else "")
        )
        assert abs(mean) < 6 * std / math.sqrt(n), f"{name} has a mean of {mean:.2g}, expected 0"


def weights(model):
    return {n: p.detach() for n, p in model.named_parameters() if p.dim() == 2}


@TIED
@pytest.mark.parametrize("num_layers", [3, 1, 8])
def test_start_has_the_standard_deviation_of_its_role(tied, num_layers):
    config = replace(MIDDLE, tied=tied, num_layers=num_layers)
    assert_start(GPT(config), config)


def test_start_is_normal():
    # The fourth moment: 3 of a normal distribution, 1.8 of a uniform one, and of a mixture more.
    for name, w in weights(GPT(replace(MIDDLE, tied=False))).items():
        z = (w.double() / w.double().std()).flatten()
        fourth, n = z.pow(4).mean().item(), z.numel()
        assert abs(fourth - 3) < 7 * math.sqrt(24 / n), (
            f"{name} is not normal: fourth moment {fourth:.2f}, not 3"
        )


def test_start_draws_every_number_on_its_own():
    every = weights(GPT(replace(MIDDLE, tied=False)))
    numbers = torch.cat([(w / w.std()).flatten() for w in every.values()])
    distinct = len(numbers.unique()) / len(numbers)
    assert distinct > 0.95, f"only {distinct:.0%} of the numbers differ: do blocks or rows share their draws?"


def test_start_of_a_tied_head_is_the_start_of_the_embedding():
    model = GPT(SMALL)
    assert torch.equal(model.head.weight, model.token_embedding.weight), "the head has numbers of its own"


def test_start_follows_from_the_seed():
    models = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        models.append(weights(GPT(SMALL)))
    second = weights(GPT(SMALL))  # without a new seed
    for name, w in models[0].items():
        assert torch.equal(models[2][name], w), f"{name} differs between two models of one seed"
        assert not torch.equal(models[1][name], w), f"{name} is the same for seeds 0 and 1"
        assert not torch.equal(second[name], w), f"{name} is the same in the next model: was a seed set?"


@TIED
def test_start_can_be_made_again_in_place(randn, tied):
    config = replace(MIDDLE, tied=tied)
    model = randomise(GPT(config).double(), randn)
    model.requires_grad_(True)
    before = dict(model.named_parameters())
    model.reset_parameters()
    assert_start(model, config)
    after = dict(model.named_parameters())
    assert set(after) == set(before), "reset_parameters changed which parameters there are"
    for name, p in after.items():
        assert p is before[name], f"{name} is another Parameter now: an optimizer would train the old one"
        assert p.dtype == torch.float64, f"{name} became {p.dtype}"
        assert p.requires_grad, f"{name} no longer requires a gradient"
        assert p.is_leaf, f"{name} remembers how it was drawn"
    first = weights(copy.deepcopy(model))
    model.reset_parameters()
    for name, w in weights(model).items():
        assert not torch.equal(w, first[name]), f"{name} has the same numbers again"


# --- hidden_states ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_states_match_hugging_face_layer_by_layer(rng, hugging_face, config):
    theirs = hugging_face(config)
    ours = twin(theirs, config)
    for B, T in ((4, 5), (1, config.context), (3, 1), (2, 4)):
        ids = draw_ids(rng, config, B, T)
        states = ours.hidden_states(ids)
        hint = f"{B} sequences of {T} tokens: the first stream that differs is named below"
        assert_states(states, their_states(theirs, ids), config, hint=hint)


def test_states_know_positions_that_start_at_zero(rng, hugging_face):
    # The same token everywhere: without positions all streams would be equal.
    theirs = hugging_face(SMALL)
    ours, ids = twin(theirs, SMALL), torch.full((2, 6), 7)
    hint = "token t of every sequence gets row t of the position embedding, whatever was called before"
    for T in (6, 2, 1, 4):
        expected = their_states(theirs, ids[:, :T])
        assert_states(ours.hidden_states(ids[:, :T]), expected, SMALL, hint=hint)


def test_states_depend_on_no_later_token_and_on_no_other_sequence(rng, hugging_face):
    config, B, T = replace(SMALL, tied=False), 2, 6
    ours = twin(hugging_face(config), config)
    ids = torch.from_numpy(rng.permutation(config.vocab_size)[: B * T].reshape(B, T))  # no id twice
    tables = ours.token_embedding.weight, ours.position_embedding.weight
    for b, i in ((0, 0), (1, 0), (0, 3), (1, 4), (0, T - 1)):
        reads = [state[b, i].sin().sum() for state in ours.hidden_states(ids)] + [ours(ids)[b, i].sin().sum()]
        for where, read in zip([*names_of_states(config), "of logits"], reads, strict=True):
            token, position = (
                g.abs().sum(dim=1) for g in torch.autograd.grad(read, tables, retain_graph=True)
            )
            past = range(i, i + 1) if where == "before the first block" else range(i + 1)
            visible = {int(ids[b, j]) for j in past}
            found = {v for v in range(config.vocab_size) if token[v] != 0}
            assert found <= visible, f"{where}, token {i} depends on a later token or on another sequence"
            assert found == visible, f"{where}, token {i} does not depend on itself and all tokens before it"
            assert {j for j in range(config.context) if position[j] != 0} == set(past), (
                f"{where}, token {i} depends on the wrong positions"
            )


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_states_start_with_dropout_on_the_sum_in_training(randn, rng, p):
    config = replace(SMALL, dropout=p)
    model = randomise(GPT(config).double(), randn)
    ids = draw_ids(rng, config, 6, 9)
    whole = model.eval().hidden_states(ids)[0].detach()
    model.train()
    first, second = (model.hidden_states(ids)[0].detach() for _ in range(2))
    kept = first != 0
    hint = "in training each entry of token + position embedding is 0, or what it was divided by 1 - p"
    assert_close(
        first, torch.where(kept, whole / (1 - p), 0.0), atol=1e-12, name="the first stream", hint=hint
    )
    share = 1 - kept.double().mean().item()
    assert abs(share - p) < 0.11, f"{share:.2f} of the first stream was dropped, expected about {p}"  # of 756
    assert not torch.equal(first, second), "two calls share one draw"
    assert len({tuple(row) for row in kept.flatten(0, 1).tolist()}) > 20, "tokens share one draw"
    assert len({tuple(row) for row in kept.flatten(1).tolist()}) == 6, "sequences share one draw"


def test_states_are_dropped_in_every_block_in_training(randn, rng):
    p, config = 0.4, replace(SMALL, dropout=0.4)
    model = randomise(GPT(config).double(), randn)
    with torch.no_grad():  # what the sub-layers say is 1 and 10 in every feature
        for block in model.blocks:
            for projection, value in ((block.attention.out_proj, 1.0), (block.feed_forward.down_proj, 10.0)):
                projection.weight.zero_()
                projection.bias.fill_(value)
    ids = draw_ids(rng, config, 6, 9)
    states = model.train().hidden_states(ids)
    kinds = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64)
    for i in range(config.num_layers):
        added = (states[i + 1] - states[i]).detach() * (1 - p)
        distance, kind = (added[..., None] - kinds).abs().min(-1)
        assert distance.max() < 1e-9, f"block {i} gets no dropout, or its output is dropped once more"
        shares = torch.bincount(kind.flatten(), minlength=4) / kind.numel()  # of 756
        expected = torch.tensor([p * p, (1 - p) * p, p * (1 - p), (1 - p) ** 2])
        assert_close(
            shares, expected, atol=0.11, name=f"block {i}: how often neither, first, second, both stay"
        )
    hint = "nothing is dropped between the last block and the last norm"
    assert_close(states[-1], model.final_norm(states[-2]), atol=1e-12, name="the last state", hint=hint)


def test_states_of_evaluation_mode_drop_nothing(rng, hugging_face):
    config = replace(SMALL, dropout=0.5)
    theirs = hugging_face(config)
    ours, ids = twin(theirs, config), draw_ids(rng, config, 3, 5)
    ours.train()(ids)
    ours.eval()
    hint = "in evaluation mode nothing is dropped or scaled"
    assert_states(ours.hidden_states(ids), their_states(theirs, ids), config, hint=hint)
    assert_close(ours(ids), their_logits(theirs, ids), atol=1e-12, name="logits", hint=hint)


def test_states_of_a_full_context_are_the_longest(hugging_face, rng):
    theirs = hugging_face(SMALL)
    ours, C = twin(theirs, SMALL), SMALL.context
    ids = draw_ids(rng, SMALL, 2, C)
    assert_states(ours.hidden_states(ids), their_states(theirs, ids), SMALL)
    for T in (C + 1, C + 5):
        for call in (ours.hidden_states, ours):
            try:
                call(draw_ids(rng, SMALL, 2, T))
            except ValueError:
                continue
            except IndexError:
                pytest.fail(
                    f"{T} tokens, context {C}: raise ValueError before looking positions up", pytrace=False
                )
            pytest.fail(f"{T} tokens do not fit a context of {C}: raise ValueError", pytrace=False)


def test_states_of_strided_ids_which_stay_as_they_are(rng, hugging_face):
    theirs = hugging_face(SMALL)
    ours, ids = twin(theirs, SMALL), draw_ids(rng, SMALL, 7, 6).T[::2]  # 3 sequences of 7 tokens
    before, state = ids.clone(), {name: p.clone() for name, p in ours.state_dict().items()}
    assert_states(ours.hidden_states(ids), their_states(theirs, before.contiguous()), SMALL)
    assert_close(ours(ids), their_logits(theirs, before.contiguous()), atol=1e-12, name="logits")
    assert torch.equal(ids, before), "the ids were modified"
    for name, p in ours.state_dict().items():
        assert torch.equal(p, state[name]), f"{name} was modified"


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-5), (torch.bfloat16, 0.5)], ids=str)
def test_states_and_logits_in_lower_precision_stay_close_to_float64(rng, hugging_face, dtype, atol):
    theirs = hugging_face(SMALL, dtype=dtype)
    ours, ids = twin(theirs, SMALL), draw_ids(rng, SMALL, 3, 7)
    found = [*ours.hidden_states(ids), ours(ids)]
    theirs.double()
    expected = [*their_states(theirs, ids), their_logits(theirs, ids)]
    names = [f"the stream {name}" for name in names_of_states(SMALL)] + ["logits"]
    for name, tensor, right in zip(names, found, expected, strict=True):
        assert tensor.dtype == dtype, f"{name}: {tensor.dtype} for parameters in {dtype}"
        assert_close(tensor, right, atol=atol, name=name)


class MixedDevices(TorchDispatchMode):
    """Notes operations that mix tensors of two devices: as a GPU sees a tensor left on the CPU.

    Copies between devices are fine, and so are indices in square brackets.
    """

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim() > 0]
        if len({t.device for t in tensors}) > 1 and "copy" not in str(func) and "aten.index" not in str(func):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_states_are_made_on_the_device_of_ids(device, rng, hugging_face):
    theirs = hugging_face(SMALL)
    ours, ids = twin(theirs, SMALL).to(device), draw_ids(rng, SMALL, 3, 7)
    for state, expected in zip(ours.hidden_states(ids.to(device)), their_states(theirs, ids), strict=True):
        assert state.device.type == device
        assert_close(state, expected, atol=1e-11, name="a stream")
    # Where there is no GPU, the meta device is the other device.
    ours.to("meta")
    with MixedDevices() as mixed:
        ours(ids.to("meta"))
    assert not mixed.found, (
        f"a tensor was made on the CPU, not on the device of ids: {mixed.found[0]} mixes them"
    )


# --- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_match_hugging_face(rng, hugging_face, config):
    theirs = hugging_face(config)
    ours = twin(theirs, config)
    for B, T in ((4, 5), (1, config.context), (3, 1)):
        ids = draw_ids(rng, config, B, T)
        hint = f"{B} sequences of {T} tokens"
        assert_close(ours(ids), their_logits(theirs, ids), atol=1e-11, name="logits", hint=hint)


@pytest.mark.parametrize("config", CONFIGS[:2])
def test_logits_pass_gradients_to_every_parameter_like_hugging_face(rng, randn, hugging_face, config):
    theirs = hugging_face(config)
    ours, ids = twin(theirs, config).train(), draw_ids(rng, config, 4, 7)
    upstream = randn(4, 7, config.vocab_size)

    def gradients(module, logits):
        names, leaves = zip(*module.named_parameters(), strict=True)
        options = {"allow_unused": True, "materialize_grads": True}
        return dict(
            zip(names, torch.autograd.grad((logits * upstream).sum(), leaves, **options), strict=True)
        )

    found = gradients(ours, ours(ids))
    expected = by_our_names(theirs, gradients(theirs, theirs(ids, use_cache=False).logits))
    for name, gradient in expected.items():
        hint = "a tied weight has a gradient from both ends" if name == "token_embedding.weight" else ""
        assert_close(found[name], gradient, atol=1e-10, name=f"gradient of {name}", hint=hint)


@TIED
def test_logits_learn_like_hugging_faces(rng, hugging_face, tied):
    config = replace(SMALL, tied=tied)
    theirs = hugging_face(config)
    ours = twin(theirs, config)
    ids, target = draw_ids(rng, config, 3, 8), draw_ids(rng, config, 3, 8)
    for module, run in ((ours, ours), (theirs, lambda ids: theirs(ids, use_cache=False).logits)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(run(ids).flatten(0, 1), target.flatten()).backward()
            optimizer.step()
    hint = "after three steps of gradient descent the two differ"
    assert_close(ours(ids), their_logits(theirs, ids), atol=1e-10, name="logits", hint=hint)


def test_logits_of_a_tied_head_follow_the_embedding(randn, rng):
    model, ids = randomise(GPT(SMALL).double(), randn).eval(), draw_ids(rng, SMALL, 2, 5)
    for change in (lambda w: w.mul_(2), lambda w: w.copy_(randn(*w.shape))):
        with torch.no_grad():
            change(model.token_embedding.weight)
            x = model.hidden_states(ids)[-1]
            expected = x @ model.token_embedding.weight.T
            assert_close(model(ids), expected, atol=1e-11, name="logits after the embedding has changed")


def test_logits_of_an_untied_head_are_its_own(randn, rng):
    config = replace(SMALL, tied=False)
    model, ids = randomise(GPT(config).double(), randn).eval(), draw_ids(rng, SMALL, 2, 5)
    with torch.no_grad():
        before, states = model(ids), model.hidden_states(ids)
        model.head.weight.mul_(2)
        assert_close(model(ids), 2 * before, atol=1e-11, name="logits of the doubled head")
        assert_states(model.hidden_states(ids), states, SMALL, atol=0, hint="this head is no embedding")


def test_logits_are_not_dropped_after_the_last_norm(randn, rng):
    config = replace(SMALL, dropout=0.4, tied=False)
    model = randomise(GPT(config).double(), randn)
    with torch.no_grad():
        for name, p in model.named_parameters():  # the stream is 0, and its norm is the last norm's bias
            if "embedding" in name or "out_proj" in name or "down_proj" in name:
                p.zero_()
    model.train()
    ids = draw_ids(rng, config, 3, 5)
    bias = model.final_norm.bias.detach()
    hint = "dropout acts before the blocks and inside them; nothing is dropped after them"
    assert_close(
        model.hidden_states(ids)[-1], bias.expand(3, 5, -1), atol=1e-12, name="the last state", hint=hint
    )
    expected = (model.head.weight @ bias).expand(3, 5, -1)
    assert_close(model(ids), expected, atol=1e-12, name="logits", hint=hint)


# --- sample -----------------------------------------------------------------------------------


def assert_frequencies(tokens, p, name):
    """`tokens` (N,) were drawn with probabilities p (V,): counts within 6 standard deviations and 8."""
    N = tokens.numel()
    found = torch.bincount(tokens.flatten().cpu(), minlength=len(p)).double() / N
    assert len(found) == len(p), f"{name}: token {int(tokens.max())} of {len(p)}"
    margin = 6 * (p * (1 - p) / N).sqrt() + 8 / N  # the last term is for rare tokens
    v = int(((found - p).abs() / margin).argmax())
    assert (found - p).abs()[v] <= margin[v], (
        f"{name}: token {v} was drawn {found[v]:.3f} of {N} times, expected {p[v]:.3f}"
    )
    assert (found[p == 0] == 0).all(), f"{name}: a token of probability 0 was drawn"


N = 20_000
LOGITS = torch.tensor([0.3, -1.2, 1.9, 0.0, 2.3, -3.0, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_sample_draws_with_the_probabilities_of_the_softmax(device, temperature):
    p = torch.softmax(LOGITS / temperature, dim=0)
    tokens = sample(LOGITS.to(device).expand(N, -1), temperature=temperature)
    assert tokens.shape == (N,), f"shape {tuple(tokens.shape)}, expected ({N},): one token for each row"
    assert tokens.dtype == torch.int64, f"the tokens are {tokens.dtype}, not int64"
    assert tokens.device.type == device
    assert_frequencies(tokens, p, f"temperature {temperature}")
    pairs = tokens[::2] * 7 + tokens[1::2]
    assert_frequencies(pairs, torch.outer(p, p).flatten(), "two rows one after the other: are draws shared?")


def test_sample_has_temperature_one_and_every_token_unless_told_otherwise():
    tokens = sample(LOGITS.expand(N, -1))
    assert_frequencies(tokens, LOGITS.softmax(0), "no arguments")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0, 0.0])
def test_sample_at_temperature_zero_takes_the_largest_logit(randn, dtype, temperature):
    logits = randn(60, 13, dtype=dtype).clamp(-4, 4)
    winners = torch.arange(60) % 13
    logits[torch.arange(60), winners] = 5.0
    tokens = sample(logits, temperature=temperature)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == winners.tolist(), "temperature 0 takes the token of the largest logit"
    assert sample(logits, temperature=temperature, top_k=4).tolist() == winners.tolist()


def test_sample_at_temperature_zero_tells_nearly_equal_logits_apart():
    logits = torch.full((200, 9), 3.0, dtype=torch.float64)
    winners = torch.arange(200) % 9
    logits[torch.arange(200), winners] += 1e-12
    hint = "temperature 0 is no small temperature: nothing is drawn"
    assert sample(logits, temperature=0.0).tolist() == winners.tolist(), hint


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sample_from_the_top_k_draws_from_no_other_token(device, k, temperature):
    # Rows with different largest logits, and of very different size.
    flipped = 40 - 3 * LOGITS
    for logits, name in ((LOGITS, "even rows"), (flipped, "odd rows")):
        rows = torch.stack([LOGITS, flipped]).to(device).repeat(N // 2, 1)  # (N, V)
        tokens = sample(rows, temperature=temperature, top_k=k)[name == "odd rows" :: 2]
        largest = sorted(range(7), key=lambda v: -logits[v])[:k]
        p = torch.zeros(7, dtype=torch.float64)
        p[largest] = (logits[largest] / temperature).softmax(0)
        assert_frequencies(tokens, p, f"{name}, top {k} at temperature {temperature}")


@pytest.mark.parametrize("k", [7, 8, 1000])
def test_sample_from_at_least_all_tokens_is_no_restriction(k):
    logits = LOGITS / 10  # no token is rare
    assert_frequencies(sample(logits.expand(N, -1), top_k=k), logits.softmax(0), f"top {k} of 7")


def test_sample_of_one_row_is_one_token():
    for options in ({}, {"temperature": 0.0}, {"top_k": 1}):
        tokens = sample(100 * LOGITS[None], **options)
        assert tokens.shape == (1,), f"{options}: shape {tuple(tokens.shape)} for one row, expected (1,)"
        assert tokens.tolist() == [4]


def test_sample_of_hidden_tokens_draws_none_of_them():
    logits = LOGITS.clone()
    logits[[2, 4]] = -torch.inf
    for k in (None, 3, 6):
        p = logits.clone()
        if k == 3:
            p[[1, 5]] = -torch.inf
        assert_frequencies(sample(logits.expand(N, -1), top_k=k), p.softmax(0), f"-inf at 2 and 4, top {k}")


def test_sample_of_large_logits_at_a_low_temperature_stays_finite():
    logits = 1000 * torch.eye(5, dtype=torch.float32) + 300
    for rows in (logits, -logits):
        expected = sample(rows, temperature=0.0)
        if rows is logits:
            assert expected.tolist() == [0, 1, 2, 3, 4]
            assert sample(rows, temperature=1e-3).tolist() == [0, 1, 2, 3, 4]
        for _ in range(10):
            drawn = sample(rows, temperature=1e-3)
            assert (rows[torch.arange(5), drawn] == rows.max(dim=1).values).all(), "not a largest logit"


def test_sample_draws_from_the_generator_it_is_given(device):
    logits = LOGITS.to(device).expand(300, -1)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [sample(logits, top_k=k, generator=generator).tolist() for k in (None, None, 5)]

    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), before), "torch's default generator was used, too, or instead"
    torch.manual_seed(123)
    assert draw(0) == first, "one seed of the generator gave two results"
    assert draw(1) != first, "two seeds of the generator gave one result"
    assert first[0] != first[1], "two calls with one generator gave the same tokens: was it copied or reset?"


def test_sample_draws_from_the_default_generator_otherwise():
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        results.append([sample(LOGITS.expand(300, -1)).tolist() for _ in range(2)])
    assert results[0] == results[2], "torch.manual_seed does not determine the tokens"
    assert results[0] != results[1], "two seeds gave the same tokens"
    assert results[0][0] != results[0][1], "two calls gave the same tokens: was a seed set?"


def test_sample_of_strided_logits_which_stay_as_they_are(randn):
    logits = randn(11, 2 * 50).T[::2]  # (50, 11), of a strided view
    logits[:, 3] += 20
    before = logits.clone()
    for options in (
        {},
        {"temperature": 0.1},
        {"top_k": 2},
        {"temperature": 0.0},
        {"temperature": 0.3, "top_k": 1},
    ):
        tokens = sample(logits, **options)
        assert (tokens == 3).all(), f"{options}: token 3 has nearly all the probability"
        assert torch.equal(logits, before), f"{options}: the logits were modified"


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": -1e-9},
        {"top_k": 0},
        {"top_k": -2},
        {"top_k": 0, "temperature": 0.0},
    ],
    ids=str,
)
def test_sample_refuses(wrong):
    logits = LOGITS.expand(3, -1)
    sample(logits, temperature=0.0, top_k=1)
    try:
        tokens = sample(logits, **wrong)
    except ValueError:
        return
    except RuntimeError as error:
        pytest.fail(f"{wrong}: raise ValueError yourself, not: {error}", pytrace=False)
    pytest.fail(f"{wrong} must raise ValueError, but sample returned {tokens.tolist()}", pytrace=False)


# --- generate ---------------------------------------------------------------------------------


# With a head of its own: a tied one, of random weights, mostly repeats the last token.
WRITER = replace(SMALL, tied=False)


def their_greedy(theirs, ids, num_tokens, context):
    """One sequence and one token at a time, from all logits anew."""
    rows = []
    for row in ids.tolist():
        for _ in range(num_tokens):
            row = [*row, int(their_logits(theirs, torch.tensor([row[-context:]]))[0, -1].argmax())]
        rows.append(row)
    return torch.tensor(rows)


def assert_tokens(found, expected, hint=""):
    assert isinstance(found, torch.Tensor), f"generate returned a {type(found).__name__}"
    assert found.dtype == torch.int64, f"generate returned {found.dtype}, not int64"
    assert found.tolist() == expected.tolist(), (
        f"{hint}\ngot      {found.tolist()}\nexpected {expected.tolist()}"
    )


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_generate_greedily_matches_hugging_face(rng, hugging_face, config):
    theirs = hugging_face(config)
    ours, C = twin(theirs, config), config.context
    for B, T, num_tokens in ((3, 2, C - 2), (2, 1, 3), (1, 4, 1)):
        ids = draw_ids(rng, config, B, T)
        found = ours.generate(ids, num_tokens, temperature=0.0)
        hint = "each new token is the most likely one after all before it"
        assert_tokens(found, their_greedy(theirs, ids, num_tokens, C), hint)


def test_generate_beyond_the_context_sees_the_last_tokens(rng, hugging_face):
    theirs = hugging_face(WRITER)
    ours, C = twin(theirs, WRITER), WRITER.context
    for T, num_tokens in ((C - 2, 7), (C, 2), (C + 4, 3), (C + 1, 1), (3, 2 * C)):
        ids = draw_ids(rng, WRITER, 3, T)
        found = ours.generate(ids, num_tokens, temperature=0.0)
        hint = f"{T} tokens and {num_tokens} more, context {C}: all are returned, the model sees the last {C}"
        expected = their_greedy(theirs, ids, num_tokens, C)
        assert_tokens(found, expected, hint)


@pytest.mark.parametrize("token", [0, 1, SMALL.vocab_size - 1])
def test_generate_goes_on_whatever_the_token_is(rng, token):
    config = replace(SMALL, tied=False)
    model, V, C = GPT(config), config.vocab_size, config.context
    with torch.no_grad():  # the logit of `token` is 1, the others are 0, whatever was said before
        model.final_norm.weight.zero_()
        model.final_norm.bias.fill_(1.0)
        model.head.weight.copy_((torch.arange(V) == token)[:, None] / config.d_model)
    ids = draw_ids(rng, config, 2, 3)
    found = model.generate(ids, 6 * C, temperature=0.0)
    expected = torch.cat([ids, torch.full((2, 6 * C), token)], dim=1)
    assert_tokens(
        found, expected, f"{6 * C} times token {token}: no token ends a text here, and none is left out"
    )


def test_generate_draws_given_the_last_tokens_beyond_the_context(rng, hugging_face):
    # Greedy text of a random model soon repeats itself, and hides which tokens the model saw.
    config = GPTConfig(7, 4, 2, 2, 6, tied=False)
    theirs = hugging_face(config)
    ours, C = twin(theirs, config), config.context
    found = ours.generate(draw_ids(rng, config, 3000, 3), 9)
    for t in range(3, 12):
        log_p = their_logits(theirs, found[:, max(0, t - C) : t])[:, -1].log_softmax(-1)  # (3000, 7)
        mean = (log_p.exp() * log_p).sum(-1)
        variance = (log_p.exp() * log_p.square()).sum(-1) - mean.square()
        z = ((log_p.gather(1, found[:, t, None]).squeeze(1) - mean).sum() / variance.sum().sqrt()).item()
        assert abs(z) < 6, (
            f"new token {t - 3}, number {t} of the text, is not drawn given the {min(t, C)} tokens before it: "
            f"its mean log-probability is off by {z:.1f} standard errors"
        )


def test_generate_draws_each_token_given_those_before_it(rng, hugging_face):
    config = GPTConfig(4, 7, 1, 2, 6)
    theirs = hugging_face(config)
    ours, ids = twin(theirs, config), draw_ids(rng, config, 1, 3)
    options = {"temperature": 2.5}
    tokens = ours.generate(ids.expand(N // 2, -1), 2, **options)
    assert (tokens[:, :3] == ids).all(), "the given ids must come first in what generate returns"
    first = (their_logits(theirs, ids)[0, -1] / 2.5).softmax(0)  # (4,)
    longer = torch.cat([ids.expand(4, -1), torch.arange(4)[:, None]], dim=1)
    second = (their_logits(theirs, longer)[:, -1] / 2.5).softmax(1)  # (4, 4), given the first
    pairs = tokens[:, 3] * 4 + tokens[:, 4]
    assert_frequencies(pairs, (first[:, None] * second).flatten(), "pairs of new tokens, 4 * first + second")


def test_generate_hands_on_what_sample_takes(rng, hugging_face):
    config = GPTConfig(6, 7, 1, 2, 6)
    theirs = hugging_face(config)
    ours, ids = twin(theirs, config), draw_ids(rng, config, 1, 3)
    logits = their_logits(theirs, ids)[0, -1]
    every = ids.expand(N // 2, -1)
    assert_frequencies(ours.generate(every, 1)[:, -1], logits.softmax(0), "no options")
    hot = (logits / 4).softmax(0)
    assert_frequencies(ours.generate(every, 1, temperature=4.0)[:, -1], hot, "temperature 4")
    hidden = logits < logits.topk(3).values[-1]
    three = (logits / 4).masked_fill(hidden, -torch.inf).softmax(0)
    found = ours.generate(every, 1, temperature=4.0, top_k=3)[:, -1]
    assert_frequencies(found, three, "temperature 4, top 3")
    assert_tokens(
        ours.generate(ids, 6, temperature=9.0, top_k=1),
        their_greedy(theirs, ids, 6, 7),
        "the top 1 is the largest",
    )


def test_generate_draws_from_the_generator_it_is_given(device, rng, randn):
    model, ids = randomise(GPT(SMALL).double(), randn).to(device), draw_ids(rng, SMALL, 20, 3).to(device)

    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [model.generate(ids, 4, temperature=9.0, generator=generator).tolist() for _ in range(2)]

    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), before), "torch's default generator was used, too, or instead"
    torch.manual_seed(123)
    assert draw(0) == first, "one seed of the generator gave two results"
    assert draw(1) != first, "two seeds of the generator gave one result"
    assert first[0] != first[1], "two calls with one generator gave the same tokens: was it copied or reset?"


def test_generate_draws_from_the_default_generator_otherwise(rng, randn):
    model, ids = randomise(GPT(SMALL).double(), randn), draw_ids(rng, SMALL, 20, 3)
    results = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        results.append([model.generate(ids, 4, temperature=9.0).tolist() for _ in range(2)])
    assert results[0] == results[2], "torch.manual_seed does not determine the tokens"
    assert results[0] != results[1], "two seeds gave the same tokens"
    assert results[0][0] != results[0][1], "two calls gave the same tokens: was a seed set?"


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_generate_drops_nothing_and_restores_the_mode(rng, hugging_face, training):
    config = replace(WRITER, dropout=0.5)
    theirs = hugging_face(config)
    ours, ids = twin(theirs, config).train(training), draw_ids(rng, config, 3, 4)
    before = modes(ours)
    found = ours.generate(ids, 5, temperature=0.0)
    assert_tokens(
        found, their_greedy(theirs, ids, 5, config.context), "generate in evaluation mode: no dropout"
    )
    wrong = [name or "the model" for name, mode in modes(ours).items() if mode != before[name]]
    assert not wrong, f"after generate these are in another mode than before: {wrong}"
    ours.generate(ids, 0)
    assert modes(ours) == before, "after generate of no tokens the mode is another one"


def test_generate_restores_the_mode_after_an_error(rng, hugging_face):
    ours = twin(hugging_face(SMALL), SMALL).train()
    ids = draw_ids(rng, SMALL, 2, 4)
    before = modes(ours)
    for wrong in ({"temperature": -1.0}, {"top_k": 0}):
        with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
            ours.generate(ids, 3, **wrong)
        assert modes(ours) == before, f"after {wrong} was refused the model stayed in evaluation mode"


def test_generate_restores_the_mode_after_an_error_of_the_model(rng, hugging_face):
    ours = twin(hugging_face(SMALL), SMALL).train()
    before = modes(ours)
    with pytest.raises(IndexError):
        ours.generate(torch.full((1, 2), SMALL.vocab_size), 1)  # no such token
    assert modes(ours) == before, "the mode comes back whatever the error: finally"


def test_generate_keeps_nothing_for_a_backward_pass(rng, hugging_face):
    theirs = hugging_face(WRITER)
    ours, ids = twin(theirs, WRITER), draw_ids(rng, WRITER, 2, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)), lambda t: t):
        found = ours.generate(ids, 3, temperature=0.0)
    assert_tokens(found, their_greedy(theirs, ids, 3, WRITER.context))
    assert not saved, f"{len(saved)} tensors were kept for a backward pass: torch.no_grad"
    assert torch.is_grad_enabled(), "gradients are switched off after generate"
    assert ours(ids).requires_grad, "after generate the model no longer passes gradients"


def test_generate_of_strided_ids_which_stay_as_they_are(rng, hugging_face):
    theirs = hugging_face(WRITER)
    ours, ids = twin(theirs, WRITER), draw_ids(rng, WRITER, 5, 6).T[::2]  # 3 sequences of 5 tokens
    before = ids.clone()
    found = ours.generate(ids, 4, temperature=0.0)
    assert_tokens(found, their_greedy(theirs, before, 4, WRITER.context))
    assert torch.equal(ids, before), "the ids were modified"


def test_generate_of_no_tokens_returns_the_ids(rng, hugging_face):
    theirs = hugging_face(WRITER)
    ours = twin(theirs, WRITER)
    for T in (4, WRITER.context + 3):
        ids = draw_ids(rng, WRITER, 2, T)
        assert_tokens(ours.generate(ids, 0), ids, "num_tokens=0 returns the ids as they are")
    assert_tokens(ours.generate(ids, 1, temperature=0.0), their_greedy(theirs, ids, 1, WRITER.context))


@pytest.mark.parametrize(("logits", "temperature"), [((2.0, 1.0, 0.0), 1e10), ((-2e9, -4e9, -6e9), 1.0)])
def test_sample_hides_the_others_by_no_finite_number(logits, temperature):
    tokens = sample(torch.tensor([logits]).repeat(500, 1), temperature=temperature, top_k=1)
    assert (tokens == 0).all(), "with top_k=1 only the best token takes part: hide the others with -inf"


def test_sample_leaves_contiguous_logits_alone(randn):
    logits = randn(50, 11)
    before = logits.clone()
    sample(logits, temperature=0.7, top_k=2)
    assert torch.equal(logits, before)


def test_start_replaces_whatever_was_there():
    model = GPT(SMALL).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.reset_parameters()
    left = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    assert not left, f"{left} still hold NaN, which nothing multiplied by 0 takes away"


@pytest.mark.parametrize(
    "wrong",
    [{"num_tokens": -1}, {"temperature": -0.5}, {"top_k": 0}, {"T": 0}, {"T": 0, "num_tokens": 0}],
    ids=str,
)
def test_generate_refuses(rng, randn, wrong):
    model = randomise(GPT(SMALL).double(), randn)
    model.generate(draw_ids(rng, SMALL, 2, 3), 2, temperature=0.5, top_k=3)
    options = {"num_tokens": 2, "T": 3, **wrong}
    ids = draw_ids(rng, SMALL, 2, options.pop("T"))
    with pytest.raises(ValueError):  # noqa: PT011 (the text is free)
        model.generate(ids, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate_in_lower_precision_and_on_the_device(device, rng, hugging_face, dtype):
    theirs = hugging_face(WRITER, dtype=dtype)
    ours, ids = twin(theirs, WRITER).to(device), draw_ids(rng, WRITER, 3, 4)
    found = ours.generate(ids.to(device), 9, temperature=0.0)
    assert found.device.type == device
    # Each choice is, up to rounding, the best one after the tokens that the model chose before.
    theirs.double()
    atol = 1e-4 if dtype == torch.float32 else 0.5
    for t in range(4, 13):
        logits = their_logits(theirs, found[:, max(0, t - WRITER.context) : t].cpu())[:, -1]
        loss = logits.max(dim=1).values - logits.gather(1, found[:, t, None].cpu()).squeeze(1)
        assert loss.max() < 2 * atol, (
            f"new token {t - 4} is not the most likely one: its logit is {loss.max():.2g} lower"
        )
    drawn = ours.generate(ids.to(device), 3, temperature=1.0, top_k=5)
    assert drawn.shape == (3, 7)
    assert ((drawn >= 0) & (drawn < WRITER.vocab_size)).all()
