"""Tests of ch04/lab03, training. Oracles: PyTorch's schedulers, clipping and AdamW, the big batch, files."""

import io
import itertools
import os
import pickle
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from optimizers import AdamW, Muon
from shared.compare import assert_close
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from torch.optim import lr_scheduler
from training import (
    IGNORED,
    accumulate_gradients,
    clip_gradients_,
    learning_rate,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    set_learning_rates,
    split_parameters,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        lr_scheduler.LRScheduler,
        lr_scheduler.LambdaLR,
        lr_scheduler.LinearLR,
        lr_scheduler.CosineAnnealingLR,
        lr_scheduler.SequentialLR,
        torch.optim.AdamW,
        torch.optim.Muon,
        why="write it yourself; the loop steps the optimizers that it is given",
    )


@pytest.fixture
def clip_it_yourself(forbid):
    # Watching functions of PyTorch takes time, so only the tests that are about clipping do.
    forbid(clip_grad_norm_, clip_grads_with_norm_, get_total_norm, why="write the clipping out")


# --- learning_rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peak", "warmup", "total", "final"),
    [(0.6, 5, 17, 0.06), (3e-4, 2, 30, 0.0), (1.0, 1, 4, 0.5), (0.2, 7, 8, 0.1), (0.5, 0, 9, 0.1)],
)
def test_learning_rate_follows_pytorch_schedulers(peak, warmup, total, final):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=final)
    schedule = cosine
    if warmup:
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = peak
        up = lr_scheduler.LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=final)
        schedule = lr_scheduler.SequentialLR(optimizer, [up, cosine], milestones=[warmup])
    for step in range(total + 1):
        expected = optimizer.param_groups[0]["lr"]
        rate = learning_rate(step, peak=peak, warmup=warmup, total=total, final=final)
        hint = f"a line up to step {warmup}, a cosine down to step {total}"
        assert_close(rate, expected, atol=1e-12, name=f"the rate at step {step}", hint=hint)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("step", "expected", "hint"),
    [
        (0, 0.1, "the first step must not be wasted: (step + 1) / (warmup + 1) of the peak"),
        (1, 0.2, "the line rises by the same amount each step"),
        (3, 0.4, "the last step of the warm-up is one below the peak"),
        (4, 0.5, "step `warmup` has the peak"),
        (8, 0.4, "a third of the way down: 1 + cos(pi / 3) = 1.5"),
        (10, 0.3, "half-way down: the mean of peak and final"),
        (12, 0.2, "two thirds of the way down"),
        (16, 0.1, "step `total` has the final rate"),
        (17, 0.1, "beyond `total` the rate stays: it does not rise again"),
        (28, 0.1, "beyond `total` the rate stays: it does not rise again"),
        (1000, 0.1, "beyond `total` the rate stays: it does not rise again"),
    ],
)
def test_learning_rate_at_marked_steps(step, expected, hint):
    rate = learning_rate(step, peak=0.5, warmup=4, total=16, final=0.1)
    assert_close(rate, expected, atol=1e-12, name=f"the rate at step {step}", hint=hint)


def test_learning_rate_ends_at_zero_unless_told():
    for step, expected in ((0, 0.25), (1, 0.5), (3, 0.25), (5, 0.0), (6, 0.0)):
        rate = learning_rate(step, peak=0.5, warmup=1, total=5)
        assert_close(
            rate, expected, atol=1e-12, name=f"the rate at step {step}", hint="final is 0 by default"
        )


def test_learning_rate_without_warm_up_or_without_cosine():
    for step, expected in ((0, 0.8), (2, 0.4), (4, 0.0)):
        rate = learning_rate(step, peak=0.8, warmup=0, total=4)
        assert_close(rate, expected, atol=1e-12, name=f"warmup=0, step {step}", hint="step 0 is the peak")
    for step, expected in ((0, 0.2), (2, 0.6), (3, 0.1), (4, 0.1)):
        rate = learning_rate(step, peak=0.8, warmup=3, total=3, final=0.1)
        hint = "warmup equal to total leaves no cosine: nothing may be divided by 0"
        assert_close(rate, expected, atol=1e-12, name=f"warmup=total, step {step}", hint=hint)
    rate = learning_rate(0, peak=0.8, warmup=0, total=0, final=0.1)
    assert_close(rate, 0.1, atol=1e-12, name="no steps at all", hint="from step `total` on the rate is final")


@pytest.mark.parametrize(("step", "warmup", "total"), [(-1, 2, 5), (0, -1, 5), (0, 6, 5), (3, 1, -2)])
def test_learning_rate_refuses_impossible_numbers(step, warmup, total):
    assert learning_rate(0, peak=0.1, warmup=0, total=5) == 0.1
    with pytest.raises(ValueError, match=r"\d"):
        learning_rate(step, peak=0.1, warmup=warmup, total=total)


# --- clip_gradients_ --------------------------------------------------------------------------


def with_gradients(randn, dtype=torch.float64, device="cpu", scale=1.0):
    """Two equal lists of parameters with equal gradients, one of which is strided and one None."""
    lists = [], []
    for i, shape in enumerate([(5, 3), (7,), (2, 3, 4), (6,)]):
        value, gradient = randn(*shape, dtype=dtype, device=device), randn(*shape, dtype=dtype, device=device)
        for params in lists:
            p = nn.Parameter(value.clone())
            p.grad = None if i == 1 else (scale * gradient).clone()
            if i == 2:
                p.grad = torch.stack([p.grad, p.grad + 9], dim=-1)[..., 0]
            params.append(p)
    for params in lists:  # a parameter without axes
        p = nn.Parameter(torch.tensor(2.0, dtype=dtype, device=device))
        p.grad = torch.tensor(-scale, dtype=dtype, device=device)
        params.append(p)
    return lists


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("max_norm", [0.3, 2.0, 6.0, 1000.0])
def test_clip_matches_pytorch(clip_it_yourself, randn, device, dtype, atol, max_norm):
    ours, theirs = with_gradients(randn, dtype, device)
    norm, expected = clip_gradients_(ours, max_norm), clip_grad_norm_(theirs, max_norm)
    hint = "the norm is that of all gradients together, before clipping"
    assert_close(norm, expected, atol=10 * atol, name="the norm", hint=hint)
    for p, q in zip(ours, theirs, strict=True):
        assert (p.grad is None) == (q.grad is None), "a gradient that was None must stay None"
        if p.grad is not None:
            hint = "all gradients are multiplied by the same factor, at most 1"
            assert_close(p.grad, q.grad, atol=atol, name="a gradient", hint=hint)


def test_clip_of_a_known_norm(clip_it_yourself):
    # 1 + 4 + 4 + 16 + 144 = 13 * 13
    params = [nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.zeros(1, 3).double())]
    params[0].grad = torch.tensor([1.0, -2.0]).double()
    params[1].grad = torch.tensor([[2.0, 4.0, 12.0]]).double()
    norm = clip_gradients_(params, 6.5)
    hint = "the norm is that of all gradients together, before clipping"
    assert_close(norm, torch.tensor(13.0).double(), atol=1e-12, name="the norm", hint=hint)
    for p, expected in zip(params, ([0.5, -1.0], [[1.0, 2.0, 6.0]]), strict=True):
        assert_close(p.grad, torch.tensor(expected).double(), atol=1e-6, name="a gradient")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_leaves_short_gradients_as_they_are(clip_it_yourself, randn, dtype):
    ours, before = with_gradients(randn, dtype, scale=0.01)
    clip_gradients_(ours, 1.0)
    for p, q in zip(ours, before, strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), "the factor is 1 when the norm is below max_norm"


def test_clip_works_in_place_on_gradients_only(clip_it_yourself, randn):
    ours, before = with_gradients(randn)
    held = [p.grad for p in ours]
    norm = clip_gradients_(ours, 0.5)
    assert not norm.requires_grad, "the norm must not carry a graph"
    for p, q, grad in zip(ours, before, held, strict=True):
        assert p.grad is grad, "multiply the gradient in place: others may hold the same tensor"
        assert torch.equal(p, q), "the parameters themselves must stay"


def test_clip_reads_the_parameters_once(clip_it_yourself, randn):
    ours, theirs = with_gradients(randn)
    norm, expected = clip_gradients_((p for p in ours), 0.5), clip_grad_norm_(theirs, 0.5)
    assert_close(norm, expected, atol=1e-12, name="the norm of a generator's gradients")
    for p, q in zip(ours, theirs, strict=True):
        if p.grad is not None:
            hint = "model.parameters() is a generator: after one loop it is empty"
            assert_close(p.grad, q.grad, atol=1e-13, name="a gradient", hint=hint)


def test_clip_of_nothing_is_zero(clip_it_yourself, randn):
    for params in ([], [nn.Parameter(randn(3)), nn.Parameter(randn(2, 2))]):
        norm = clip_gradients_(params, 1.0)
        assert isinstance(norm, torch.Tensor), "the norm is a tensor, also when there is no gradient"
        assert_close(norm.double(), torch.tensor(0.0).double(), atol=0, name="the norm of no gradient")


def test_clip_multiplies_at_the_norm_itself(clip_it_yourself):
    # The factor has its 1e-6 below the bar, too: it shows in gradients this short.
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([3e-6, 4e-6], dtype=torch.float64)
    clip_gradients_([parameter], 5e-6)
    assert_close(parameter.grad.norm().item(), 5e-6 * 5 / 6, atol=1e-12, name="the norm after clipping")


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_clip_refuses_a_norm_that_is_not_finite(clip_it_yourself, randn, bad):
    ours, before = with_gradients(randn)
    clip_gradients_(ours, 1e6)  # for a norm that is finite it does not raise
    ours[3].grad[2] = before[3].grad[2] = bad
    with pytest.raises(RuntimeError):
        clip_gradients_(ours, 1.0)
    for p, q in zip(ours, before, strict=True):
        if p.grad is not None:
            same = torch.equal(p.grad.nan_to_num(nan=7.0), q.grad.nan_to_num(nan=7.0))
            assert same, "when it raises, clip_gradients_ must leave the gradients as they were"


# --- split_parameters -------------------------------------------------------------------------


class Tied(nn.Module):
    """A small language model whose output layer is its embedding; the order of the two is given."""

    def __init__(self, *, head_first=False):
        super().__init__()
        embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11)
        head.weight = embedding.weight
        if head_first:
            self.head, self.norm, self.embedding = head, nn.LayerNorm(6), embedding
        else:
            self.embedding, self.norm, self.head = embedding, nn.LayerNorm(6), head
        self.hidden = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6, bias=False))
        self.gain = nn.Parameter(torch.ones(()))


def names(model, parameters):
    found = {id(p): name for name, p in model.named_parameters()}
    return [found.get(id(p), f"a stranger of shape {tuple(p.shape)}") for p in parameters]


@pytest.mark.parametrize("head_first", [False, True], ids=["embedding_first", "head_first"])
def test_split_puts_a_tied_embedding_once_among_the_embeddings(head_first):
    model = Tied(head_first=head_first)
    split = split_parameters(model)
    tied = "head.weight" if head_first else "embedding.weight"
    assert names(model, split.embeddings) == [tied], "a tensor that is an embedding anywhere is an embedding"
    matrices = ["hidden.0.weight", "hidden.2.weight"]
    assert names(model, split.matrices) == matrices, "matrices: two or more axes and no embedding"
    vectors = {"gain", "norm.weight", "norm.bias", "hidden.0.bias", "head.bias"}
    assert set(names(model, split.vectors)) == vectors, "vectors: fewer than two axes"
    assert len(split.vectors) == len(vectors), "a parameter is listed twice"


def test_split_takes_every_parameter_once_and_in_order():
    model = nn.ModuleDict({"a": Tied(), "b": Tied(head_first=True), "c": nn.Conv1d(3, 5, 2)})
    model["d"] = model["a"].hidden  # a module that is used twice
    model["e"] = nn.Embedding(3, 2)
    split = split_parameters(model)
    wanted = [name for name, _ in model.named_parameters()]
    found = names(model, [*split.matrices, *split.embeddings, *split.vectors])
    assert sorted(found) == sorted(wanted), "every parameter belongs to exactly one list"
    for kind, params in split._asdict().items():
        listed = names(model, params)
        assert listed == sorted(listed, key=wanted.index), (
            f"{kind} are not in the order of model.parameters()"
        )
    assert "c.weight" in names(model, split.matrices), "a convolution's weight has three axes, so it decays"
    assert len(split.embeddings) == 3


def test_split_leaves_out_frozen_parameters():
    model = Tied()
    for frozen in (model.embedding.weight, model.hidden[0].weight, model.norm.bias):
        frozen.requires_grad_(False)
    split = split_parameters(model)
    assert names(model, split.embeddings) == [], "a frozen parameter has no gradient to step along"
    assert names(model, split.matrices) == ["hidden.2.weight"]
    assert len(split.vectors) == 4


def test_split_knows_embeddings_of_a_class_of_their_own():
    class Mine(nn.Embedding):
        pass

    assert len(split_parameters(nn.Sequential(Mine(3, 2))).embeddings) == 1


def test_split_goes_by_identity_not_by_value():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    split = split_parameters(model)
    assert names(model, split.embeddings) == ["0.weight"], "equal numbers do not make two tensors the same"
    assert names(model, split.matrices) == ["1.weight", "2.weight"]


# --- accumulate_gradients ---------------------------------------------------------------------

VOCABULARY = 11


class Model(nn.Module):
    """Logits for every token; it calls `on_forward` first."""

    def __init__(self, seed=0, *, dropout=0.0, on_forward=None):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.hidden, self.norm = nn.Linear(6, 9), nn.LayerNorm(9)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(9, VOCABULARY)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.on_forward = on_forward
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
        self.double()

    def forward(self, inputs):
        if self.on_forward is not None:
            self.on_forward(inputs)
        self.calls += 1
        return self.head(self.dropout(self.norm(torch.tanh(self.hidden(self.embedding(inputs))))))


def loss_sum(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def micro_batch(generator, B, T, ignored=0):
    """Random tokens, (B, T), of whose targets `ignored` do not count."""
    inputs = torch.randint(VOCABULARY, (B, T), generator=generator)
    targets = torch.randint(VOCABULARY, (B, T), generator=generator)
    targets.view(-1)[torch.randperm(B * T, generator=generator)[:ignored]] = IGNORED
    return inputs, targets


def micro_batches(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [micro_batch(generator, *size) for size in sizes]


def big_batch(model, batches):
    """The mean loss over all targets that count, in one graph, and its gradients by name."""
    total = sum(loss_sum(model(inputs), targets) for inputs, targets in batches)
    mean = total / sum((targets != IGNORED).sum() for _, targets in batches)
    params = dict(model.named_parameters())
    gradients = torch.autograd.grad(mean, list(params.values()))
    return mean.detach(), dict(zip(params, gradients, strict=True))


CASES = {
    "one": [(3, 5)],
    "equal": [(2, 4), (2, 4), (2, 4)],
    "unequal_sizes": [(4, 5), (1, 2), (3, 1)],
    "unequal_counts": [(2, 5, 0), (2, 5, 9), (2, 5, 4)],
    "nothing_counts_in_one": [(2, 3, 6), (2, 4, 1), (1, 5, 5)],
}


@pytest.mark.parametrize("case", CASES)
def test_accumulated_gradients_are_those_of_the_big_batch(case):
    batches, model = micro_batches(*CASES[case]), Model()
    expected_loss, expected = big_batch(model, batches)
    loss = accumulate_gradients(model, loss_sum, batches)
    hint = "the mean is over all targets that count: divide every sum by the count of all micro-batches"
    assert_close(loss, expected_loss, atol=1e-13, name="the mean loss", hint=hint)
    assert not loss.requires_grad, "the loss that is returned must be detached"
    for name, p in model.named_parameters():
        assert_close(p.grad, expected[name], atol=1e-13, name=f"the gradient of {name}", hint=hint)


def test_accumulated_gradients_are_the_same_however_the_batch_is_cut():
    (inputs, targets), gradients = micro_batches((6, 5, 11))[0], []
    for cuts in ([6], [1, 5], [2, 3, 1], [1] * 6):
        model = Model()
        accumulate_gradients(model, loss_sum, list(zip(inputs.split(cuts), targets.split(cuts), strict=True)))
        gradients.append(model.hidden.weight.grad)
    for gradient in gradients[1:]:
        hint = "a batch must give the same gradients in one piece and in six"
        assert_close(gradient, gradients[0], atol=1e-13, name="the gradient", hint=hint)


def test_accumulation_adds_to_the_gradients_that_are_there(randn):
    batches, model = micro_batches((2, 3), (1, 4)), Model()
    _, expected = big_batch(model, batches)
    before = {name: randn(*p.shape) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = before[name].clone()
    accumulate_gradients(model, loss_sum, batches)
    for name, p in model.named_parameters():
        hint = "like backward, it adds; what was there before is neither dropped nor scaled"
        assert_close(p.grad, before[name] + expected[name], atol=1e-13, name=f"gradient of {name}", hint=hint)


@pytest.mark.parametrize(
    "sizes", [[(2, 3), (1, 4), (3, 2)], [(2, 3), (1, 3), (2, 3)]], ids=["unequal", "equal"]
)
def test_accumulation_takes_micro_batches_one_by_one_and_in_order(sizes):
    batches, seen = micro_batches(*sizes), []
    model = Model(on_forward=seen.append)
    accumulate_gradients(model, loss_sum, batches)
    assert len(seen) == 3, f"the model was called {len(seen)} times for 3 micro-batches"
    for inputs, (expected, _) in zip(seen, batches, strict=True):
        assert torch.equal(inputs, expected), "the model gets the inputs of each micro-batch, in order"


def test_accumulation_frees_each_graph_before_the_next():
    class Saved:
        """What autograd keeps for the backward pass."""

        def __init__(self, tensor):
            self.tensor = tensor

    alive, counts = weakref.WeakSet(), []

    def pack(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    model = Model(on_forward=lambda _: counts.append(len(alive)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = accumulate_gradients(model, loss_sum, micro_batches((2, 3), (1, 4), (3, 2)))
    counts.append(len(alive))
    assert loss is not None
    assert counts == [0] * 4, (
        f"tensors saved for backward that are alive before each micro-batch and at the end: {counts}. "
        "Each micro-batch has its own backward, and nothing keeps its graph"
    )


class Token:
    """Lives as long as the graph it was put into."""


class Marked(torch.autograd.Function):
    """The identity, with a `Token` in its graph."""

    @staticmethod
    def forward(ctx, x, tokens):
        ctx.token = Token()
        tokens.add(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_accumulation_keeps_no_graph():
    tokens, counts = weakref.WeakSet(), []

    def marked_loss(logits, targets):
        counts.append(len(tokens))
        return loss_sum(Marked.apply(logits, tokens), targets)

    accumulate_gradients(Model(), marked_loss, micro_batches((2, 3), (1, 4), (3, 2), (1, 2), (2, 2)))
    assert max(counts) <= 1, (
        f"graphs alive before the loss of each micro-batch: {counts}. Whatever you keep of a loss, detach it"
    )


@pytest.mark.parametrize("sizes", [[], [(2, 3, 6)], [(1, 2, 2), (2, 2, 4)]], ids=["none", "one", "two"])
def test_accumulation_refuses_batches_without_targets(sizes):
    model = Model()
    with pytest.raises(ValueError, match=r"\w"):
        accumulate_gradients(model, loss_sum, micro_batches(*sizes))
    assert all(p.grad is None for p in model.parameters()), "when it raises, gradients stay as they were"


def test_accumulation_uses_the_loss_it_is_given():
    # Another loss, over targets that are numbers with one axis.
    def squares(logits, targets):
        return (logits.sum(-1) - targets).square()[targets != IGNORED].sum()

    batches, model = micro_batches((2, 3, 1), (1, 4)), Model()
    total = sum(squares(model(inputs), targets) for inputs, targets in batches)
    expected = torch.autograd.grad(total / 9, model.head.weight)[0]
    accumulate_gradients(model, squares, batches)
    assert_close(model.head.weight.grad, expected, atol=1e-11, name="the gradient")


# --- random states ----------------------------------------------------------------------------


def draws():
    """One number and more from every generator, of a kind that leaves a second one in reserve."""
    numbers = [random.random(), random.gauss(0, 1), random.gauss(0, 1)]
    numbers += [*np.random.rand(2), *np.random.randn(3)]
    numbers += torch.rand(3).tolist() + torch.randn(3).tolist()
    if torch.cuda.is_available():
        numbers += torch.rand(3, device="cuda").tolist()
    return numbers


def written_and_read(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("through_a_file", [False, True])
def test_random_state_brings_every_generator_back(through_a_file):
    random.gauss(0, 1), np.random.randn()  # the second of a pair is now in reserve
    state = random_state()
    if through_a_file:
        try:
            state = written_and_read(state)
        except pickle.UnpicklingError as error:
            pytest.fail(f"weights_only=True refuses the random state: {error!s:.200}", pytrace=False)
    expected = draws()
    draws()
    restore_random_state(state)
    found = draws()
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    kinds = ["Python's random"] * 3 + ["NumPy's"] * 5 + ["torch's on the CPU"] * 6 + ["CUDA's"] * 3
    assert not wrong, f"not restored: {', '.join(sorted({kinds[i] for i in wrong}))} generator"
    draws()
    restore_random_state(state)
    assert draws() == expected, "the same state must do for a second time"


def test_random_state_draws_nothing():
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = draws()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    random_state()
    assert draws() == expected, "random_state must not change any generator"


def test_random_state_of_a_machine_with_more_devices(monkeypatch):
    # As if saved on a machine with nine CUDA devices.
    real = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = real + [torch.get_rng_state()] * (9 - len(real))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
        patch.setattr(torch.cuda.random, "get_rng_state_all", lambda: states)
        patch.setattr(torch.cuda, "device_count", lambda: 9)
        patch.setattr(
            torch.cuda, "get_rng_state", lambda device="cuda": states[torch.device(device).index or 0]
        )
        state = random_state()
    expected = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(torch.rand(3), expected), "the devices that are here must be restored"


# --- checkpoints ------------------------------------------------------------------------------


class RandomBatches:
    """Data of the tests: batches drawn by a generator of its own, cut unequally."""

    def __init__(self, seed=3, on_batch=None):
        self.generator, self.drawn, self.on_batch = torch.Generator().manual_seed(seed), 0, on_batch

    def next_batch(self):
        if self.on_batch is not None:
            self.on_batch(self.drawn)
        self.drawn += 1
        return [micro_batch(self.generator, *size) for size in ((3, 4, 5), (1, 4, 0), (2, 2, 1))]

    def state_dict(self):
        return {"generator": self.generator.get_state(), "drawn": self.drawn}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.drawn = state["drawn"]


def torch_optimizers(model):
    """PyTorch's own, so that mistakes in ours do not matter here."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [
        torch.optim.AdamW([{"params": matrices[:1], "lr": 0.02}, {"params": matrices[1:]}], lr=0.05),
        torch.optim.SGD(vectors, lr=0.1, momentum=0.9),
    ]


def our_optimizers(model):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [Muon(matrices, lr=0.2), AdamW(vectors, lr=0.05)]


class Run:
    """Everything a training run consists of, as keyword arguments for the functions under test."""

    def __init__(self, seed=0, *, dropout=0.2, optimizers=torch_optimizers, on_batch=None):
        self.model = Model(seed, dropout=dropout)
        self.optimizers = optimizers(self.model)
        self.data = RandomBatches(3 + seed, on_batch)

    @property
    def parts(self):
        return {"model": self.model, "optimizers": self.optimizers, "data": self.data}

    def train(self, steps, **options):
        options = {"schedule": lambda step: 1 / (1 + step), "max_norm": 0.5, "steps": steps} | options
        return train(self.model, self.optimizers, loss_sum, self.data, **options)

    def warm(self):
        """Take two steps, in the plainest way, so that every state has something in it."""
        for _ in range(2):
            for inputs, targets in self.data.next_batch():
                loss_sum(self.model(inputs), targets).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return self

    def state(self):
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "data": self.data.state_dict(),
        }
        return flat(state)


def flat(value, name=""):
    """All leaves of nested dictionaries and lists, by their path; tensors copied."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, part in enumerate(value) for k, v in flat(part, f"{name}/{i}").items()}
    return {name: value.detach().clone() if isinstance(value, torch.Tensor) else value}


def differences(a, b):
    def same(x, y):
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return sorted(
        key for key in a.keys() | b.keys() if key not in a or key not in b or not same(a[key], b[key])
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_checkpoint_brings_everything_back(tmp_path, kind):
    path, run, other = kind(tmp_path / "run.pt"), Run().warm(), Run(1)
    save_checkpoint(path, step=17, **run.parts)
    expected, expected_draws = run.state(), draws()
    run.warm()
    step = load_checkpoint(path, **other.parts)
    assert step == 17, f"load_checkpoint returned {step!r}; 17 steps had been taken"
    wrong = differences(other.state(), expected)
    assert not wrong, f"not the same after loading: {', '.join(wrong[:5])}"
    assert draws() == expected_draws, "the random generators must go on where they were when it was saved"


def test_checkpoint_is_loaded_over_a_run_that_went_on(tmp_path):
    path, run = tmp_path / "run.pt", Run().warm()
    save_checkpoint(path, step=2, **run.parts)
    expected = run.state()
    run.warm()
    assert load_checkpoint(path, **run.parts) == 2
    assert not differences(run.state(), expected), "going back to a checkpoint must undo later steps"


def test_checkpoint_has_the_documented_entries(tmp_path):
    path, run = tmp_path / "run.pt", Run().warm()
    save_checkpoint(path, step=5, **run.parts)
    try:
        state = torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        pytest.fail(f"weights_only=True refuses the checkpoint: {error!s:.200}", pytrace=False)
    assert {"step", "model", "optimizers", "data", "random"} <= set(state), f"entries: {sorted(state)}"
    assert state["step"] == 5
    found = flat({name: state[name] for name in ("model", "optimizers", "data")})
    assert not differences(found, run.state()), "the entries are the state dicts"


def test_checkpoint_saving_leaves_the_run_alone(tmp_path):
    run = Run().warm()
    run.model.train()
    before, random_before = run.state(), flat(random_state())
    save_checkpoint(tmp_path / "run.pt", step=5, **run.parts)
    assert not differences(run.state(), before), "saving must not change what it saves"
    assert not differences(flat(random_state()), random_before), "saving must not draw random numbers"
    assert run.model.training, "saving must not change the mode of the model"
    assert listed(tmp_path) == ["run.pt"], f"only the checkpoint belongs here: {listed(tmp_path)}"


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


class CannotBeWritten(Exception):
    """What a `Poison` raises."""


class Poison:
    """Raises while it is being written."""

    def __reduce__(self):
        raise CannotBeWritten


class Probe:
    """Calls back while it is being written."""

    def __init__(self, callback):
        self.callback = callback

    def __reduce__(self):
        self.callback()
        return int, (5,)


def old_checkpoint(tmp_path):
    """A run, the path of a checkpoint of it, and the bytes of that file."""
    run, path = Run().warm(), tmp_path / "run.pt"
    save_checkpoint(path, step=2, **run.parts)
    return run.warm(), path, path.read_bytes()


def assert_untouched(path, old):
    assert path.exists(), "the old checkpoint is gone"
    assert path.read_bytes() == old, "the old checkpoint was damaged"
    left = [name for name in listed(path.parent) if name != path.name]
    assert not left, f"a failed save must leave nothing behind, but left {left}"


def test_checkpoint_survives_a_state_that_cannot_be_written(tmp_path, monkeypatch):
    run, path, old = old_checkpoint(tmp_path)
    monkeypatch.setattr(run.data, "state_dict", lambda: {"a": torch.zeros(1000), "b": Poison()})
    with pytest.raises(CannotBeWritten):
        save_checkpoint(path, step=4, **run.parts)
    assert_untouched(path, old)


def test_checkpoint_survives_a_full_disk(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")  # not on Windows
    run, path, old = old_checkpoint(tmp_path)
    monkeypatch.setattr(run.data, "state_dict", lambda: {"much": torch.zeros(100_000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow longer, a quarter of it
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(path, step=4, **run.parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_untouched(path, old)


def test_checkpoint_survives_a_rename_that_fails(tmp_path, monkeypatch):
    run, path, old = old_checkpoint(tmp_path)

    def refuse(source, target, **kwargs):
        raise OSError("this file cannot be renamed")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    try:
        save_checkpoint(path, step=4, **run.parts)
    except OSError:
        pass
    else:  # it found another way
        assert torch.load(path, weights_only=True)["step"] == 4, "saving failed without an error"
        old = path.read_bytes()
    assert_untouched(path, old)


def test_checkpoint_that_cannot_be_written_is_not_there_at_all(tmp_path, monkeypatch):
    run = Run().warm()
    monkeypatch.setattr(run.data, "state_dict", lambda: {"b": Poison()})
    with pytest.raises(CannotBeWritten):
        save_checkpoint(tmp_path / "run.pt", step=4, **run.parts)
    assert listed(tmp_path) == [], f"a failed save left {listed(tmp_path)}"


def test_checkpoint_old_one_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    run, path, old = old_checkpoint(tmp_path)
    other_name = tmp_path / "the same file"
    os.link(path, other_name)
    seen = []
    probe = Probe(lambda: seen.append(path.exists() and path.read_bytes() == old))
    monkeypatch.setattr(run.data, "state_dict", lambda: {"probe": probe, "much": torch.zeros(10_000)})
    save_checkpoint(path, step=4, **run.parts)
    assert seen, "the data's state was not saved"
    assert all(seen), "while the new checkpoint is being written, the old one must still be there, whole"
    assert other_name.read_bytes() == old, "the new checkpoint was written into the old file: rename instead"
    assert path.read_bytes() != old, "there is no new checkpoint"


def test_checkpoint_is_written_in_its_own_folder(tmp_path, monkeypatch):
    # A rename is one stroke within a folder; from another disk it is a slow copy.
    run, path, _ = old_checkpoint(tmp_path)
    moves = []
    for name in ("replace", "rename"):
        original = getattr(os, name)

        def watch(source, target, *, original=original, **kwargs):
            moves.append((Path(source).resolve(), Path(target).resolve()))
            return original(source, target, **kwargs)

        monkeypatch.setattr(os, name, watch)
    save_checkpoint(path, step=4, **run.parts)
    assert moves, "the new checkpoint did not come by a rename"
    for source, target in moves:
        assert target.parent in source.parents, (
            f"the partial file was in {source.parent}, not beside the old one"
        )


def test_checkpoint_of_another_number_of_optimizers_is_refused(tmp_path):
    run, path, _ = old_checkpoint(tmp_path)
    for optimizers in (run.optimizers[:1], [*run.optimizers, torch.optim.SGD(run.model.parameters(), lr=1)]):
        before, random_before = run.state(), flat(random_state())
        with pytest.raises(ValueError, match="optimizers"):
            load_checkpoint(path, model=run.model, optimizers=optimizers, data=run.data)
        assert not differences(run.state(), before), "refuse before anything has changed"
        assert not differences(flat(random_state()), random_before), "refuse before anything has changed"


class Trap:
    """Notes that it was rebuilt from a file."""

    sprung = False

    def __getstate__(self):
        return {"a": 1}

    def __setstate__(self, state):
        Trap.sprung = True


def test_checkpoint_from_elsewhere_runs_no_code(tmp_path):
    run, path, _ = old_checkpoint(tmp_path)
    Trap.sprung = False
    torch.save(torch.load(path, weights_only=True) | {"extra": Trap()}, path)
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path, **run.parts)
    assert not Trap.sprung, "load_checkpoint ran code from the file: weights_only=True"


def test_checkpoint_of_a_device_that_is_not_here(tmp_path, monkeypatch):
    run, other, path = Run().warm(), Run(1), tmp_path / "run.pt"
    with monkeypatch.context() as patch:  # as if every tensor had been on the 100th GPU
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
        save_checkpoint(path, step=2, **run.parts)
    try:
        load_checkpoint(path, **other.parts)
    except RuntimeError as error:
        pytest.fail(f'load with map_location="cpu": {error!s:.150}', pytrace=False)
    assert not differences(other.state(), run.state())


def test_checkpoint_goes_between_devices(tmp_path, device):
    # On a machine without an accelerator both sides are the CPU.
    path, run, other = tmp_path / "run.pt", Run().warm(), Run(1)
    other.model.to(device)
    other.optimizers = torch_optimizers(other.model)
    save_checkpoint(path, step=2, **run.parts)
    load_checkpoint(path, **other.parts)
    expected = draws()
    assert all(p.device.type == device for p in other.model.parameters())
    save_checkpoint(path, step=2, **other.parts)
    load_checkpoint(path, **run.parts)
    load_checkpoint(path, **other.parts)
    draws()
    load_checkpoint(path, **other.parts)
    assert len(expected) == len(draws())
    assert not differences(flat(run.model.state_dict()), flat(other.model.cpu().state_dict()))


# --- train ------------------------------------------------------------------------------------


def by_hand(run, steps, schedule, max_norm):
    """The loop with PyTorch's parts, one graph for each batch; `run` has PyTorch's optimizers."""
    losses, rates = [], [[g["lr"] for g in o.param_groups] for o in run.optimizers]
    run.model.train()
    for step in range(steps):
        for optimizer, peaks in zip(run.optimizers, rates, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step)
        batch = run.data.next_batch()
        total = sum(loss_sum(run.model(inputs), targets) for inputs, targets in batch)
        loss = total / sum((targets != IGNORED).sum() for _, targets in batch)
        run.model.zero_grad()
        loss.backward()
        if max_norm is not None:
            clip_grad_norm_(run.model.parameters(), max_norm)
        for optimizer in run.optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("max_norm", [0.05, None])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_train_does_what_the_plain_loop_does(clip_it_yourself, max_norm, dropout):
    ours, theirs = Run(dropout=dropout), Run(dropout=dropout)
    torch.manual_seed(5)
    expected = by_hand(theirs, 7, lambda step: 1 / (1 + step), max_norm)
    torch.manual_seed(5)
    losses = ours.train(7, max_norm=max_norm)
    hint = "each step: rates, batch, gradients, clip, all optimizers; the loss before the change"
    assert_close(losses, expected, atol=1e-11, name="the losses", hint=hint)
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert_close(p, q, atol=1e-11, name=name, hint=hint)
    for optimizer, reference in zip(ours.optimizers, theirs.optimizers, strict=True):
        for group, expected_group in zip(optimizer.param_groups, reference.param_groups, strict=True):
            hint = "the rate of a group is schedule(step) times the one it was made with"
            assert_close(group["lr"], expected_group["lr"], atol=1e-15, name="a rate", hint=hint)


def test_train_ignores_gradients_from_before(randn):
    ours, theirs = Run(dropout=0.0), Run(dropout=0.0)
    for p in ours.model.parameters():
        p.grad = 100 * randn(*p.shape)
    assert_close(ours.train(2), theirs.train(2), atol=1e-13, name="the losses")
    for (name, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        hint = "the gradients of each step start at zero, those of the first one too"
        assert_close(p, q, atol=1e-13, name=name, hint=hint)


def test_train_sets_the_rates_before_the_step():
    # A factor of 0 in steps 0 and 2: the parameters must not move in them.
    losses, asked, run = [], [], Run(dropout=0.0)
    run.optimizers = [torch.optim.SGD(run.model.parameters(), lr=0.1)]
    snapshots = []
    run.data.on_batch = lambda _: snapshots.append(flat(dict(run.model.named_parameters())))

    def schedule(step):
        asked.append(step)
        return [0.0, 1.0, 0.0, 1.0][step]

    losses = run.train(4, schedule=schedule)
    snapshots.append(flat(dict(run.model.named_parameters())))
    assert set(asked) == {0, 1, 2, 3}, f"the schedule was asked for steps {asked}, expected 0, 1, 2, 3"
    moved = [bool(differences(a, b)) for a, b in itertools.pairwise(snapshots)]
    assert moved == [False, True, False, True], f"steps that moved: {moved}; the factors were 0, 1, 0, 1"
    assert len(losses) == 4


def test_train_puts_the_model_into_training_mode():
    run, seen = Run(), []
    run.model.eval()
    run.model.on_forward = lambda _: seen.append(run.model.training)
    run.train(2)
    assert all(seen), "dropout must be on: model.train()"
    assert run.model.training


def test_train_draws_one_batch_for_each_step():
    run = Run()
    losses = run.train(5)
    assert run.data.drawn == 5, f"{run.data.drawn} batches were drawn in 5 steps"
    assert len(losses) == 5, f"{len(losses)} losses for 5 steps"
    assert all(type(loss) is float for loss in losses), "losses are Python floats: a tensor keeps its graph"


def test_train_saves_nothing_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Run().train(2)
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        (7, 3, [None, None, None, 3, 3, 3, 6]),
        (6, 2, [None, None, 2, 2, 4, 4]),
        (4, None, [None] * 4),
        (3, 1, [None, 1, 2]),
        (3, 5, [None] * 3),
    ],
)
def test_train_saves_when_it_is_time(tmp_path, steps, every, expected):
    path, found = tmp_path / "run.pt", []

    def saved_step(_=None):
        found.append(torch.load(path, weights_only=True)["step"] if path.exists() else None)

    Run(on_batch=saved_step).train(steps, checkpoint=path, save_every=every)
    assert found == expected, (
        f"steps in the checkpoint as each batch was drawn: {found}, expected {expected}. "
        "`step` is the number of steps taken; multiples of save_every are saved"
    )
    found.clear()
    saved_step()
    assert found == [steps], "the last step is always saved"


@pytest.mark.parametrize("save_every", [None, 1, 4])
def test_train_is_not_disturbed_by_saving(tmp_path, save_every):
    plain, saving = Run(), Run()
    torch.manual_seed(5)
    expected = plain.train(6)
    torch.manual_seed(5)
    assert saving.train(6, checkpoint=tmp_path / "run.pt", save_every=save_every) == expected
    assert not differences(saving.state(), plain.state()), "a run must not depend on when it is saved"


@pytest.mark.parametrize("optimizers", [torch_optimizers, our_optimizers], ids=["pytorchs", "ours"])
def test_train_resumed_is_bit_for_bit_the_same(tmp_path, optimizers):
    path, straight = tmp_path / "run.pt", Run(optimizers=optimizers)
    torch.manual_seed(5)
    expected = straight.train(10)
    first = Run(optimizers=optimizers)
    torch.manual_seed(5)
    losses = first.train(6, checkpoint=path)
    torch.manual_seed(99)
    second = Run(1, optimizers=optimizers)  # new objects with other numbers in them
    losses += second.train(10, checkpoint=path, resume=True)
    assert losses == expected, (
        f"losses differ first at step {[a == b for a, b in zip(losses, expected, strict=False)].index(False)} "
        f"of {len(losses)} (10 expected); the checkpoint was saved after step 5"
        if len(losses) == 10
        else f"{len(losses)} losses, expected 6 from the first run and 4 from the resumed one"
    )
    wrong = differences(second.state(), straight.state())
    assert not wrong, f"not bit for bit the same: {', '.join(wrong[:5])}"


def test_train_resumed_after_a_crash_is_bit_for_bit_the_same(tmp_path):
    path, straight = tmp_path / "run.pt", Run()
    torch.manual_seed(5)
    expected = straight.train(10)

    def crash(drawn):
        if drawn == 8:
            raise KeyboardInterrupt

    crashed = Run(on_batch=crash)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        crashed.train(10, checkpoint=path, save_every=3)
    second = Run(1)
    losses = second.train(10, checkpoint=path, save_every=3, resume=True)
    assert losses == expected[6:], "steps 6 to 9 are done again from the checkpoint of six steps"
    assert not differences(second.state(), straight.state())
    assert torch.load(path, weights_only=True)["step"] == 10


def test_train_resumed_counts_its_saves_from_the_very_first_step(tmp_path):
    path, found = tmp_path / "run.pt", []
    Run().train(4, checkpoint=path)
    second = Run(on_batch=lambda _: found.append(torch.load(path, weights_only=True)["step"]))
    second.train(8, checkpoint=path, save_every=3, resume=True)
    assert found == [4, 4, 6, 6], f"steps in the checkpoint as each batch was drawn: {found}"


def test_train_starts_anew_unless_told_to_resume(tmp_path):
    path, run, again = tmp_path / "run.pt", Run(dropout=0.0), Run(dropout=0.0)
    expected = run.train(3, checkpoint=path)
    losses = again.train(3, checkpoint=path)
    assert losses == expected, "without resume=True an old checkpoint is not read, only replaced"


def test_train_resumed_keeps_the_rates_it_was_made_with(tmp_path):
    # The rate in a saved group is already multiplied by the schedule: it must not be taken for the peak.
    path, run, second = tmp_path / "run.pt", Run(), Run(1)
    run.train(3, checkpoint=path)
    second.train(5, checkpoint=path, resume=True)
    rates = [group["lr"] for optimizer in second.optimizers for group in optimizer.param_groups]
    expected = [0.02 / 5, 0.05 / 5, 0.1 / 5]
    assert_close(rates, expected, atol=1e-15, name="the rates", hint="use set_learning_rates, after loading")


def test_train_can_be_continued_without_a_file():
    # With the same objects; steps are numbered from 0 again.
    run = Run(dropout=0.0)
    run.train(3)
    run.train(2)
    rates = [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
    assert_close(rates, [0.01, 0.025, 0.05], atol=1e-15, name="the rates")


def test_train_refuses_to_resume_or_save_without_a_checkpoint():
    for options in ({"resume": True}, {"save_every": 2}):
        run = Run()
        with pytest.raises(ValueError, match="checkpoint"):
            run.train(2, **options)
        assert run.data.drawn == 0
        assert len(run.train(1)) == 1


def test_train_resume_needs_a_file(tmp_path):
    run = Run()
    with pytest.raises(FileNotFoundError):
        run.train(2, checkpoint=tmp_path / "missing.pt", resume=True)
    assert run.data.drawn == 0


def test_learning_rates_are_set_from_the_peak():
    run = Run()
    run.train(2)
    for factor in (0.5, 0.0, 2.0):
        set_learning_rates(run.optimizers, factor)
        groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
        assert_close(
            [g["lr"] for g in groups], [f * factor for f in (0.02, 0.05, 0.1)], atol=1e-15, name="lr"
        )
        assert_close([g["peak_lr"] for g in groups], [0.02, 0.05, 0.1], atol=0, name="peak_lr")


def test_everything_together_learns():
    # The target follows from the input: with Muon and AdamW, warm-up and cosine, that is learned at once.
    run = Run(dropout=0.0, optimizers=our_optimizers)
    run.data.next_batch = lambda: [
        (inputs, (3 * inputs + 1) % VOCABULARY) for inputs, _ in RandomBatches.next_batch(run.data)
    ]
    losses = run.train(40, schedule=lambda step: learning_rate(step, peak=1.0, warmup=5, total=40))
    assert losses[-1] < 0.3 * losses[0], f"the loss went from {losses[0]:.2f} to {losses[-1]:.2f} only"
