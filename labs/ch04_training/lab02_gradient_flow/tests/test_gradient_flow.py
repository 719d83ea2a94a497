"""Tests of ch04/lab02.

Oracles: sums written out, autograd on networks written out, enumeration of all random signs, Monte-Carlo with its
own standard error, networks that were made to fail, and the artists of the figures.
"""

import gc
import itertools
import math
import weakref
from dataclasses import asdict

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from gradient_flow import (
    Recorder,
    Row,
    backward_moments,
    decades_per_layer,
    diagnose,
    forward_moments,
    init_,
    kept_share,
    parameter_stats,
    plot_study,
    stream_moments,
    study,
    summarize,
    transformer_stack,
    weight_std,
)
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from shared.compare import assert_close
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _headless():
    matplotlib.use("Agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


# --- what the tests are made of ---------------------------------------------------------------


def statistics_of(tensor):
    """The five statistics, in exact sums over a list."""
    values = tensor.detach().double().flatten().tolist()
    n = len(values)
    mean = math.fsum(values) / n
    return {
        "mean": mean,
        "std": math.sqrt(math.fsum((v - mean) ** 2 for v in values) / n),
        "rms": math.sqrt(math.fsum(v * v for v in values) / n),
        "max_abs": max(abs(v) for v in values),
        "zeros": sum(v == 0 for v in values) / n,
    }


def rms_of(tensor):
    return statistics_of(tensor)["rms"]


def assert_statistics(stats, tensor, *, rtol=1e-12, name="the statistics"):
    found, expected = asdict(stats), statistics_of(tensor)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is float, f"{name}: {key} is a {type(found[key]).__name__}, not a float"
        assert_close(found[key], value, atol=1e-14 * expected["max_abs"], rtol=rtol, name=f"{name}: {key}")


def names_of(recorder):
    return [call.name for call in recorder.calls]


def mlp(widths, randn, activation=nn.ReLU, *, bias=True, dtype=torch.float64):
    """Linear layers "0", "2", "4", ... with activations between them, and random parameters."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layer = nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(randn(fan_out, fan_in) / math.sqrt(fan_in))
            if bias:
                layer.bias.copy_(0.3 * randn(fan_out))
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def steps_of(model, x):
    """The output of each module of a Sequential in which nothing works in place."""
    outputs = []
    for module in model:
        x = module(x)
        outputs.append(x)
    return outputs


def hooks_on(model):
    """Every hook on any module of `model`."""
    return [
        (name, registry, list(hooks))
        for name, module in model.named_modules()
        for registry, hooks in sorted(vars(module).items())
        if "hooks" in registry and isinstance(hooks, dict)
    ]


# --- summarize --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 1, 5), (1,), ()], ids=str)
def test_summary_matches_sums_written_out(randn, shape):
    x = (3 * randn(60) - 1.3)[: math.prod(shape)].reshape(shape)
    assert_statistics(summarize(x), x)


def test_summary_of_a_small_tensor():
    stats = summarize(torch.tensor([[3.0, -5.0], [0.0, 4.0]]))
    expected = {"mean": 0.5, "std": 3.5, "rms": math.sqrt(12.5), "max_abs": 5.0, "zeros": 0.25}
    assert asdict(stats) == pytest.approx(expected, rel=1e-12), (
        "of 3, -5, 0, 4: the mean square is 50 / 4, the variance 49 / 4 (divide by n, not by n - 1)"
    )


def test_summary_counts_exact_zeros_only():
    x = torch.tensor([0.0, -0.0, 1e-40, -1e-12, 2.0, 0.0])
    hint = "only elements that are exactly 0 count, and the share is between 0 and 1"
    assert_close(summarize(x).zeros, 0.5, atol=1e-15, name="zeros", hint=hint)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1.0, 1e23, 1e30], ids=str)
def test_summary_of_numbers_whose_squares_leave_float32(randn, scale):
    x = (scale * randn(5, 7)).float()
    assert_statistics(summarize(x), x, name="squares of float32 numbers overflow or vanish: the statistics")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_summary_of_low_precision_is_computed_in_float64(randn, dtype):
    x = (300 + 40 * randn(30, 70)).to(dtype)
    assert_statistics(summarize(x), x)


def test_summary_has_an_accurate_std_beside_a_large_mean(randn):
    x = 1e4 + 1e-2 * randn(500)
    hint = "mean of squares minus square of the mean cancels: square the distances from the mean"
    assert_close(summarize(x).std, statistics_of(x)["std"], atol=0, rtol=1e-8, name="std", hint=hint)


def test_summary_of_a_strided_tensor_with_gradient_which_stays_as_it_is(randn):
    base = randn(4, 6, 5)
    x = base.clone().requires_grad_()
    view = x.permute(2, 0, 1)[::2, :, 1::2]
    version = x._version
    assert_statistics(summarize(view), base.permute(2, 0, 1)[::2, :, 1::2])
    assert torch.equal(x, base), "summarize changed its input"
    assert x._version == version, "summarize worked in place on its input"
    assert x.requires_grad, "summarize switched off the gradient of its input"
    assert x.grad is None, "summarize left a gradient"


def test_summary_runs_on_the_device(randn, device):
    x = randn(3, 5)
    assert_statistics(summarize(x.to(device)), x, rtol=1e-10)


# --- Recorder: outputs ------------------------------------------------------------------------


def test_recorder_has_the_statistics_of_every_output(randn):
    model, x = mlp([5, 7, 3, 4], randn), randn(6, 5)
    expected = steps_of(model, x)
    with Recorder(model) as recorder:
        model(x)
    assert names_of(recorder) == ["0", "1", "2", "3", "4"], "one call per module without children, in order"
    for call, output in zip(recorder.calls, expected, strict=True):
        assert_statistics(call.output, output, name=f"the output of module {call.name}")


class Backwards(nn.Module):
    """Registers its layers in another order than it calls them, one of them twice."""

    def __init__(self, randn):
        super().__init__()
        self.last, self.twice, self.first = (mlp([4, 4], randn)[0] for _ in range(3))
        self.group = nn.ModuleDict({"inner": mlp([4, 4], randn)[0]})

    def forward(self, x):
        a = self.twice(torch.sin(self.first(x)))
        return self.last(a * self.twice(self.group["inner"](a)))

    def steps(self, x):
        """The outputs of the calls, in order, each a tensor of its own."""
        first = self.first(x)
        a = self.twice(torch.sin(first))
        inner = self.group["inner"](a)
        b = self.twice(inner)
        return first, a, inner, b, self.last(a * b)


def test_recorder_lists_calls_in_the_order_they_happen(randn):
    model, x = Backwards(randn).double(), randn(3, 4)
    with Recorder(model) as recorder:
        model(x)
    expected = ["first", "twice", "group.inner", "twice", "last"]
    hint = "each call adds an entry, in the order of the calls: not by name, and nothing is overwritten"
    assert names_of(recorder) == expected, hint
    for call, output in zip(recorder.calls, model.steps(x), strict=True):
        assert_statistics(call.output, output, name=f"the output of {call.name}")


def test_recorder_watches_the_named_modules_only(randn):
    model, x = Backwards(randn).double(), randn(3, 4)
    with Recorder(model, (name for name in ["last", "group.inner"])) as recorder:
        model(x)
    assert names_of(recorder) == ["group.inner", "last"]
    assert_statistics(recorder.calls[1].output, model(x))


def test_recorder_watches_modules_with_children_and_the_model_itself(randn):
    blocks = nn.Sequential(mlp([4, 6, 4], randn), mlp([4, 3, 5], randn))
    x = randn(3, 4)
    with Recorder(blocks, ["", "1", "0.2", "0"]) as recorder:
        blocks(x)
    assert names_of(recorder) == ["0.2", "0", "1", ""], "a module's call ends after those of its children"
    assert_statistics(recorder.calls[1].output, blocks[0](x))
    assert_statistics(recorder.calls[3].output, blocks(x))
    with Recorder(blocks[0][0]) as recorder:
        blocks[0][0](x)
    assert names_of(recorder) == [""], "a model without children is its own only module"


def test_recorder_adds_up_over_forward_passes(randn):
    model = mlp([5, 7, 3], randn)
    x, y = randn(6, 5), 3 * randn(2, 5)
    with Recorder(model, ["0", "2"]) as recorder:
        model(x)
        model(y)
    assert names_of(recorder) == ["0", "2", "0", "2"], "a second forward pass adds calls of its own"
    for call, output in zip(
        recorder.calls, [*steps_of(model, x)[::2], *steps_of(model, y)[::2]], strict=True
    ):
        assert_statistics(call.output, output)


class Returns(nn.Module):
    """Returns what `make` makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize("kind", [tuple, list])
def test_recorder_takes_the_first_element_of_tuples_and_lists(randn, kind):
    inner = Returns(lambda x: kind([2 * x, "weights", 5 * x]))
    model = nn.Sequential(inner, Returns(lambda pair: pair[0] + pair[2]))
    x = randn(3, 4).requires_grad_()
    with Recorder(model) as recorder:
        model(x).sum().backward()
    assert names_of(recorder) == ["0", "1"]
    assert_statistics(recorder.calls[0].output, 2 * x)
    assert_close(recorder.calls[0].grad_rms, 1.0, atol=1e-12, name="the gradient of the first element")
    assert_close(x.grad, torch.full_like(x, 7.0), atol=1e-12, name="the gradient of x")


def test_recorder_of_a_recurrent_layer(randn):
    torch.manual_seed(1)
    model, x = nn.LSTM(4, 3, batch_first=True).double(), randn(2, 5, 4)
    with Recorder(model) as recorder:
        output, (_, _) = model(x)
        output.square().sum().backward()
    assert_statistics(recorder.calls[0].output, output)
    assert_close(recorder.calls[0].grad_rms, rms_of(2 * output), atol=0, rtol=1e-12, name="grad_rms")


@pytest.mark.parametrize(
    "made",
    [None, 3.0, "text", (), [], {"x": torch.ones(2)}, (None, torch.ones(2)), ((torch.ones(2),),),
     torch.arange(3), torch.ones(2, dtype=torch.bool)],
    ids=["None", "float", "str", "empty tuple", "empty list", "dict", "None first", "nested", "ints", "bools"],
)  # fmt: skip
def test_recorder_passes_over_what_is_no_floating_point_tensor(randn, made):
    model = Returns(lambda x: made)
    with Recorder(model) as recorder:
        assert model(randn(2)) is made, "the output was exchanged"
    assert recorder.calls == []


@pytest.mark.parametrize("name", ["2", "0.weight", "layer", "0.", "Linear"])
def test_recorder_refuses_unknown_names(randn, name):
    model = mlp([4, 3], randn)
    with pytest.raises(ValueError, match=r".+"):
        Recorder(model, ["0", name])
    assert all(not hooks for *_, hooks in hooks_on(model)), "a recorder that was refused leaves no hooks"
    with Recorder(model, ["0"]) as recorder:
        model(randn(2, 4))
    assert names_of(recorder) == ["0"]


def test_recorder_watches_nothing_when_no_names_are_given_in_the_list(randn):
    model = mlp([4, 3], randn)
    with Recorder(model, []) as recorder:
        model(randn(2, 4))
    assert recorder.calls == [], "an empty list means no modules; None means all without children"


# --- Recorder: gradients ----------------------------------------------------------------------


def assert_gradients(recorder, loss, outputs):
    """grad_rms of every call against autograd, asked directly."""
    expected = torch.autograd.grad(loss, outputs)
    assert len(recorder.calls) == len(expected)
    for call, grad in zip(recorder.calls, expected, strict=True):
        assert type(call.grad_rms) is float, f"grad_rms of {call.name} is {call.grad_rms}"
        name = f"the gradient at the output of {call.name}"
        assert_close(call.grad_rms, rms_of(grad), atol=0, rtol=1e-11, name=name)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
def test_recorder_has_the_gradient_at_every_output(randn, activation):
    model, x, upstream = mlp([5, 7, 3, 4], randn, activation), randn(6, 5), randn(6, 4)
    with Recorder(model) as recorder:
        (model(x) * upstream).sum().backward()
    outputs = steps_of(model, x)
    assert_gradients(recorder, (outputs[-1] * upstream).sum(), outputs)


def test_recorder_tells_the_gradients_of_two_calls_of_one_module_apart(randn):
    model, x = Backwards(randn).double(), randn(3, 4)
    with Recorder(model) as recorder:
        model(x).square().sum().backward()
    outputs = model.steps(x)
    assert_gradients(recorder, outputs[-1].square().sum(), outputs)


def test_recorder_tells_two_forward_passes_apart(randn):
    model, x, y = mlp([5, 7, 3], randn), randn(6, 5), 3 * randn(2, 5)
    with Recorder(model, ["0", "2"]) as recorder:
        first, second = model(x), model(y)
        second.square().sum().backward()
        assert [call.grad_rms is None for call in recorder.calls] == [True, True, False, False], (
            "a backward pass fills in the calls it reaches, and no others"
        )
        first.square().sum().backward()
    outputs = [*steps_of(model, x)[::2], *steps_of(model, y)[::2]]
    assert_gradients(recorder, outputs[1].square().sum() + outputs[3].square().sum(), outputs)


def test_recorder_keeps_the_gradient_of_the_last_backward_pass(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    with Recorder(model) as recorder:
        y = model(x)
        (9 * y).sum().backward(retain_graph=True)
        y.square().sum().backward()
    outputs = steps_of(model, x)
    assert_gradients(recorder, outputs[-1].square().sum(), outputs)


def test_recorder_knows_no_gradient_before_the_backward_pass(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    with Recorder(model) as recorder:
        loss = model(x).sum()
        assert [call.grad_rms for call in recorder.calls] == [None] * 3
        loss.backward()
        assert all(call.grad_rms is not None for call in recorder.calls), "known as soon as it was computed"


def test_recorder_records_calls_where_no_gradient_is_tracked(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    with Recorder(model) as recorder, torch.no_grad():
        model(x)
    assert names_of(recorder) == ["0", "1", "2"]
    assert [call.grad_rms for call in recorder.calls] == [None] * 3
    model[0].requires_grad_(False)
    with Recorder(model) as recorder:
        model(x).sum().backward()
    assert [call.grad_rms is None for call in recorder.calls] == [True, True, False]
    assert_statistics(recorder.calls[0].output, model[0](x))


def test_recorder_of_in_place_modules_has_what_was_there_at_the_call(randn):
    model, x, upstream = mlp([5, 7, 3, 4], randn), randn(6, 5), randn(6, 4)
    outputs = steps_of(model, x)
    for module in model:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    with Recorder(model) as recorder:
        (model(x) * upstream).sum().backward()
    for call, output in zip(recorder.calls, outputs, strict=True):
        assert_statistics(call.output, output, name=f"the output of module {call.name}, at its call")
    assert_gradients(recorder, (outputs[-1] * upstream).sum(), outputs)


def test_recorder_measures_gradients_too_small_or_large_for_float32_squares():
    layers = [nn.Linear(3, 3, bias=False) for _ in range(5)]
    for layer, factor in zip(layers, (1.0, 1e-15, 1e-15, 1e30, 1e25), strict=True):
        nn.init.eye_(layer.weight).data.mul_(factor)
    model = nn.Sequential(*layers)
    with Recorder(model) as recorder:
        (1e-28 * model(torch.ones(2, 3))).sum().backward()
    expected = [1e-3, 1e12, 1e27, 1e-3, 1e-28]
    for call, value in zip(recorder.calls, expected, strict=True):
        assert_close(call.grad_rms, value, atol=0, rtol=1e-5, name=f"grad_rms of layer {call.name}")


def test_recorder_runs_on_the_device(randn, device):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    outputs = steps_of(model, x)
    expected = torch.autograd.grad(outputs[-1].square().sum(), outputs)
    model.to(device)
    with Recorder(model) as recorder:
        model(x.to(device)).square().sum().backward()
    for call, output, grad in zip(recorder.calls, outputs, expected, strict=True):
        assert_statistics(call.output, output, rtol=1e-9)
        assert_close(call.grad_rms, rms_of(grad), atol=0, rtol=1e-9, name="grad_rms")


# --- Recorder: leaving no trace ---------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_recorder_changes_neither_outputs_nor_gradients(randn, training):
    def passes(model, x, context):
        torch.manual_seed(5)
        with context:
            y = model(x)
            y.square().sum().backward()
        return y.detach(), x.grad, *(p.grad for p in model.parameters())

    def make():
        torch.manual_seed(7)
        layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(6, 3)
        return nn.Sequential(*layers).double().train(training)

    x, again, plain, watched = randn(4, 5), None, make(), make()
    expected = passes(plain, x.clone().requires_grad_(), torch.enable_grad())
    again = x.clone().requires_grad_()
    recorder = Recorder(watched, ["", "0", "1", "2", "3", "4"])
    found = passes(watched, again, recorder)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs), "an output or a gradient is another one under the recorder"
    assert names_of(recorder) == ["0", "1", "2", "3", "4", ""], "recorded in training and in evaluation mode"
    assert all(call.grad_rms is not None for call in recorder.calls)
    assert torch.equal(again, x), "the input was changed"
    assert [m.training for m in watched.modules()] == [training] * 6, "the training mode was changed"
    for mine, theirs in zip(watched.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), "running statistics differ: the model ran more than once?"
    assert all(p.requires_grad for p in watched.parameters())


def test_recorder_sets_no_hook_before_it_is_entered(randn):
    model = mlp([5, 7, 3], randn)
    recorder = Recorder(model)
    model(randn(2, 5)).sum().backward()
    assert recorder.calls == [], "hooks were set by the constructor"
    with recorder:
        assert recorder.calls == []
        model(randn(2, 5))
    assert names_of(recorder) == ["0", "1", "2"]


def test_recorder_returns_itself_and_removes_its_hooks(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    before = hooks_on(model)
    recorder = Recorder(model)
    with recorder as entered:
        assert entered is recorder, "`with Recorder(model) as recorder` should give the recorder"
        model(x).sum().backward()
    recorded = [asdict(call) for call in recorder.calls]
    (7 * model(x + 1)).sum().backward()
    assert [asdict(call) for call in recorder.calls] == recorded, "a pass after the `with` was recorded"
    assert len(recorded) == 3
    assert hooks_on(model) == before, "hooks are left on the model"


def test_recorder_removes_its_hooks_from_tensors(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    with Recorder(model) as recorder:
        loss = model(x).sum()
    loss.backward()
    assert [call.grad_rms for call in recorder.calls] == [None] * 3, (
        "a backward pass after the `with` was recorded: remove the hooks of tensors, too"
    )


def test_recorder_removes_its_hooks_after_an_exception_and_passes_it_on(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    before, recorder = hooks_on(model), Recorder(model)
    error = KeyError("planted")
    losses = []

    def stopped():
        with recorder:
            losses.append(model(x).sum())
            raise error

    with pytest.raises(KeyError) as caught:
        stopped()
    assert caught.value is error, "another exception came out"
    assert hooks_on(model) == before, "hooks are left on the model after an exception"
    losses[0].backward()
    model(x)
    assert names_of(recorder) == ["0", "1", "2"], "what was recorded before the exception stays, and is all"
    assert [call.grad_rms for call in recorder.calls] == [None] * 3


def test_recorder_leaves_other_peoples_hooks_alone(randn):
    model, seen = mlp([5, 7, 3], randn), []
    handles = [
        model[0].register_forward_hook(lambda *_: seen.append("forward")),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    x = randn(6, 5)
    with Recorder(model, ["0"]):
        late = model[2].register_forward_hook(lambda *_: seen.append("late"))
        model(x)
    seen.clear()
    x.requires_grad_()  # or PyTorch warns that the backward hook has no input to speak of
    model(x).sum().backward()
    assert seen == ["forward", "late", "backward"], "the recorder removed hooks that are not its own"
    for handle in (*handles, late):
        handle.remove()


def test_recorder_starts_anew_when_entered_again(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    recorder = Recorder(model)
    with recorder:
        model(x)
        model(x)
    with recorder:
        assert recorder.calls == [], "entering again starts with an empty list"
        model(2 * x).square().sum().backward()
    assert names_of(recorder) == ["0", "1", "2"], "old calls are left, or each call was recorded twice"
    outputs = steps_of(model, 2 * x)
    assert_statistics(recorder.calls[0].output, outputs[0])
    assert_gradients(recorder, outputs[-1].square().sum(), outputs)


def test_recorder_stands_beside_another_one(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    with Recorder(model) as outer:
        with Recorder(model, ["2"]) as inner:
            model(x).sum().backward()
        model(x).sum().backward()
    assert names_of(inner) == ["2"]
    assert names_of(outer) == ["0", "1", "2"] * 2


class Marked(torch.autograd.Function):
    """The identity, as a node of the graph that holds `marker`, which lives as long as the node."""

    @staticmethod
    def forward(ctx, x, marker):
        ctx.marker = marker
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Marker:
    pass


@pytest.mark.parametrize("backward", [True, False], ids=["backward", "no backward"])
@pytest.mark.parametrize("when", ["inside", "after"])
def test_recorder_keeps_no_tensor_and_no_graph_alive(randn, backward, when):
    model, x, living = mlp([5, 7, 3, 4], randn), randn(6, 5).requires_grad_(), []
    for module in model:
        module.register_forward_hook(lambda module, args, output: living.append(weakref.ref(output)))

    def one_pass():
        marker = Marker()
        living.append(weakref.ref(marker))
        loss = model(Marked.apply(x, marker)).square().sum()
        if backward:
            loss.backward()

    recorder = Recorder(model)
    with recorder:
        one_pass()
        gc.collect()
        alive = [ref() is not None for ref in living]
    if when == "after":
        gc.collect()
        alive = [ref() is not None for ref in living]
    assert len(alive) == 6
    assert len(recorder.calls) == 5
    assert not any(alive[1:]), f"{sum(alive[1:])} outputs outlive the pass: keep numbers only"
    assert not alive[0], "the graph outlives the pass: what do your hooks hold?"


def test_recorder_keeps_no_tensor_alive_that_the_graph_would_let_go(randn):
    model, x, living = mlp([5, 7, 3, 4], randn), randn(6, 5), []
    for module in model:
        module.register_forward_hook(lambda module, args, output: living.append(weakref.ref(output)))
    loss = model(x).square().sum()
    plain = [ref() is not None for ref in living]
    assert False in plain, "the test is broken: the graph keeps every output"
    living.clear()
    with Recorder(model) as recorder:
        loss = model(x).square().sum()
        gc.collect()
        watched = [ref() is not None for ref in living]
    assert watched == plain, "an output that nobody needs any more lives as long as the graph"
    loss.backward()
    assert len(recorder.calls) == 5


def test_recorder_hands_on_the_very_tensor_that_the_module_returned(randn):
    made = randn(3, 4).requires_grad_() * 2
    model = Returns(lambda x: made)
    with Recorder(model) as recorder:
        assert model(randn(2)) is made, (
            "the output was exchanged for another tensor: return nothing from a hook"
        )
    assert_statistics(recorder.calls[0].output, made)


# --- parameter_stats --------------------------------------------------------------------------


def test_parameters_have_the_rms_of_weights_and_gradients(randn):
    model, x = mlp([5, 7, 3], randn), randn(6, 5)
    model(x).square().sum().backward()
    before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    found = parameter_stats(model)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for (name, stats), (weight, grad) in zip(found.items(), before, strict=True):
        expected = {
            "weight_rms": rms_of(weight),
            "grad_rms": rms_of(grad),
            "ratio": rms_of(grad) / rms_of(weight),
        }
        assert asdict(stats) == pytest.approx(expected, rel=1e-12), f"the statistics of {name}"
        assert all(type(value) is float for value in asdict(stats).values()), "numbers, not tensors"
    for p, (weight, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, weight), "a parameter was changed"
        assert p.grad is not None, "a gradient was dropped"
        assert torch.equal(p.grad, grad), "a gradient was changed"
        assert p.requires_grad


def test_parameters_without_gradient_have_none(randn):
    model = mlp([5, 7, 3], randn)
    model[0].weight.requires_grad_(False)
    assert {(s.grad_rms, s.ratio) for s in parameter_stats(model).values()} == {(None, None)}
    model(randn(6, 5)).sum().backward()
    found = parameter_stats(model)
    assert list(found) == ["0.weight", "0.bias", "2.weight", "2.bias"], "frozen parameters are listed, too"
    assert [s.grad_rms is None for s in found.values()] == [True, False, False, False]
    assert (found["0.weight"].weight_rms, found["0.weight"].ratio) == (
        pytest.approx(rms_of(model[0].weight), rel=1e-12),
        None,
    )


def test_parameters_that_are_shared_are_listed_once_and_buffers_not_at_all(randn):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    model(randn(5, 4)).square().sum().backward()
    found = parameter_stats(model)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert found["0.weight"].grad_rms == pytest.approx(rms_of(model[0].weight.grad), rel=1e-12)


def test_parameters_that_are_zero_have_an_infinite_ratio(randn):
    model = mlp([5, 3], randn)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[0].weight)
    (model(randn(6, 5)) * 2).sum().backward()
    model[0].weight.grad.zero_()
    found = parameter_stats(model)
    assert found["0.bias"].weight_rms == 0.0
    assert found["0.bias"].grad_rms == pytest.approx(12.0, rel=1e-12)
    assert found["0.bias"].ratio == math.inf, "a bias that starts at 0 has an infinite ratio"
    assert found["0.weight"].ratio == math.inf, "the ratio is infinite if weight_rms is 0"


def test_parameters_with_a_gradient_of_zero_have_a_ratio_of_zero(randn):
    model = mlp([5, 3], randn)
    (0 * model(randn(6, 5))).sum().backward()
    stats = parameter_stats(model)["0.weight"]
    assert (stats.grad_rms, stats.ratio) == (0.0, 0.0), "a gradient of zeros is a gradient; only None is none"


def test_parameters_with_tiny_gradients_are_measured_in_float64(randn):
    model = mlp([5, 3], randn, dtype=torch.float32)
    (1e-28 * model(randn(6, 5, dtype=torch.float32))).sum().backward()
    found = parameter_stats(model)["0.bias"]
    assert_close(found.grad_rms, 6e-28, atol=0, rtol=1e-5, name="grad_rms")


# --- closed forms -----------------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "f"), [("linear", lambda y: y), ("relu", F.relu)])
def test_share_is_an_integral_over_the_gaussian(activation, f):
    y = torch.linspace(-12, 12, 24001, dtype=torch.float64).requires_grad_()
    density = torch.exp(-y.square() / 2).detach()
    z = f(y)
    (slope,) = torch.autograd.grad(z.sum(), y)
    for name, passed in (("f(y)", z.detach() / 1), ("f'(y)", slope)):
        share = (passed.square() * density).sum() / (
            density * (y.detach() ** 2 if name == "f(y)" else 1)
        ).sum()
        assert_close(kept_share(activation), share.item(), atol=1e-3, name=f"the share by {name}")
    assert kept_share(activation) in (0.5, 1.0), "it is known exactly"


@pytest.mark.parametrize("activation", ["tanh", "ReLU", "", None])
def test_share_of_other_activations_is_refused(activation):
    with pytest.raises(ValueError, match=r".+"):
        kept_share(activation)
    for moments in (forward_moments, backward_moments):
        with pytest.raises(ValueError, match=r".+"):
            moments([3, 4], [0.1], activation)


ACTIVATIONS = {"linear": lambda y: y, "relu": F.relu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(3, 2, 1), (1, 3, 2), (2, 1, 2, 1), (6, 1)], ids=str)
def test_forward_is_the_mean_over_all_signs(widths, activation):
    # Weights of ±std: enumerate every network, and the expectation is exact.
    stds = [0.7, 1.9, 0.4][: len(widths) - 1]
    sizes = [a * b for a, b in itertools.pairwise(widths)]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=sum(sizes))), dtype=torch.float64)
    h = torch.arange(1, widths[0] + 1).double().expand(len(signs), -1)
    h = h / h[0].square().mean().sqrt()  # a mean square of 1
    expected = []
    for W, std, (fan_in, fan_out) in zip(
        signs.split(sizes, dim=1), stds, itertools.pairwise(widths), strict=True
    ):
        y = torch.einsum("noi,ni->no", std * W.unflatten(1, (fan_out, fan_in)), h)
        expected.append(y.square().mean().item())
        h = ACTIVATIONS[activation](y)
    found = forward_moments(widths, stds, activation)
    hint = (
        "each layer multiplies by fan_in * std²; what it reads is f of the layer before, the input as it is"
    )
    assert_close(list(found), expected, atol=0, rtol=1e-12, name="E[y_l²]", hint=hint)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_is_the_mean_over_random_networks(randn, activation):
    # Hidden layers are wide enough never to fall silent altogether.
    widths, stds, N = (5, 13, 11, 12, 4), (0.9, 0.35, 0.4, 0.6), 10_000
    f, h, outputs = ACTIVATIONS[activation], randn(5).expand(N, 5), []
    h = h.clone().requires_grad_()
    for (fan_in, fan_out), std in zip(itertools.pairwise(widths), stds, strict=True):
        outputs.append(torch.einsum("noi,ni->no", std * randn(N, fan_out, fan_in), h))
        h = f(outputs[-1])
    grads = torch.autograd.grad((outputs[-1] * randn(N, 4).sign()).sum(), outputs)
    found = list(backward_moments(widths, stds, activation))
    assert len(found) == 4, "one number per layer"
    assert_close(found[-1], 1.0, atol=1e-12, name="the last layer's")
    for layer, (grad, value) in enumerate(zip(grads, found, strict=True), start=1):
        samples = grad.square().mean(1)
        error = samples.std() / math.sqrt(N)
        assert error < 0.04 * samples.mean(), "the test is broken: too few samples"
        hint = "the gradient of y_l comes through W_{l+1}, a sum over its fan_out units, and through f'(y_l)"
        assert_close(
            value, samples.mean().item(), atol=5 * error.item() + 1e-12, name=f"layer {layer}", hint=hint
        )


def test_backward_of_layers_of_unequal_widths_in_closed_form():
    found = backward_moments([3, 5, 2, 8], [9.0, 0.5, 0.25], "relu")
    # Layer 3: 1. Layer 2: 8 units of weight variance 1/16, halved. Layer 1: 2 units of variance 1/4, halved.
    assert_close(list(found), [0.25 * 0.25, 0.25, 1.0], atol=1e-15, name="the gradients' mean squares")
    found = backward_moments([3, 5, 2, 8], [9.0, 0.5, 0.25], "linear")
    assert_close(list(found), [0.5 * 0.5, 0.5, 1.0], atol=1e-15, name="the gradients' mean squares")
    assert_close(list(backward_moments([3, 5], [0.1])), [1.0], atol=1e-15, name="of a single layer")


def test_forward_and_backward_are_relu_by_default():
    widths, stds = [3, 5, 2, 8], [0.3, 0.5, 0.25]
    for moments in (forward_moments, backward_moments):
        assert list(moments(widths, stds)) == list(moments(widths, stds, "relu"))
        assert list(moments(widths, stds)) != list(moments(widths, stds, "linear"))


def test_forward_of_he_is_constant_and_of_deep_networks_a_power():
    widths = [30, 50, 20, 70, 10]
    he = [weight_std("he", fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
    assert_close(list(forward_moments(widths, he)), [2.0] * 4, atol=1e-12, name="E[y²] with He's weights")
    xavier = [weight_std("xavier", 40, 40)] * 60
    expected = [0.5**layer for layer in range(60)]
    found = forward_moments([40] * 61, xavier)
    assert_close(
        list(found), expected, atol=0, rtol=1e-9, name="E[y²] of 60 ReLU layers with Xavier's weights"
    )
    found = backward_moments([40] * 61, xavier)
    assert_close(list(found), expected[::-1], atol=0, rtol=1e-9, name="E[gradient²] of the same")


@pytest.mark.parametrize("moments", [forward_moments, backward_moments], ids=["forward", "backward"])
@pytest.mark.parametrize("stds", [[], [0.1], [0.1, 0.2, 0.3]], ids=str)
def test_forward_and_backward_refuse_lists_that_do_not_fit(moments, stds):
    with pytest.raises(ValueError, match=r".+"):
        moments([3, 4, 5], stds)


@pytest.mark.parametrize("scaled", [False, True])
def test_stream_is_the_mean_over_random_stacks(randn, scaled):
    E, L, N, written = 6, 3, 4_000, 0.8
    x = randn(N, E)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    found = list(stream_moments(L, written, scaled=scaled))
    assert len(found) == 2 * L + 1, "at the start, and after each of two sub-layers per block"
    for n, value in enumerate(found):
        samples = x.square().mean(1)
        error = samples.std().item() / math.sqrt(N)
        assert error < 0.02 * value, "the test is broken: too few samples"
        hint = "independent terms: mean squares add up, and a factor on the weights counts squared"
        assert_close(
            value, samples.mean().item(), atol=5 * error + 1e-12, name=f"after {n} sub-layers", hint=hint
        )
        normalised = x / x.square().mean(1, keepdim=True).sqrt()
        W = randn(N, E, E) * math.sqrt(written / E)
        x = x + torch.einsum("noi,ni->no", W, normalised) * ((2 * L) ** -0.5 if scaled else 1.0)


def test_stream_grows_linearly_and_scaling_makes_its_end_independent_of_depth():
    assert_close(
        list(stream_moments(2)), [1.0, 2.0, 3.0, 4.0, 5.0], atol=1e-12, name="the stream of 2 blocks"
    )
    found = list(stream_moments(2, 0.5, scaled=True))
    assert_close(found, [1.0, 1.125, 1.25, 1.375, 1.5], atol=1e-12, name="the scaled stream of 2 blocks")
    for L in (1, 5, 48):
        end = stream_moments(L, 0.7, scaled=True)[-1]
        assert_close(end, 1.7, atol=1e-9, name=f"the end of a scaled stack of {L} blocks")
    for scaled in (False, True):
        found = list(stream_moments(0, 0.7, scaled=scaled))
        assert_close(found, [1.0], atol=0, name="the stream of no blocks")


# --- initialising -----------------------------------------------------------------------------


def test_std_of_the_three_schemes():
    hint = "the variance: xavier 2 / (fan_in + fan_out), he 2 / fan_in"
    for scheme, fan_in, fan_out, expected in (
        ("xavier", 6, 12, 1 / 3),
        ("xavier", 12, 6, 1 / 3),
        ("he", 8, 50, 0.5),
        ("he", 50, 8, 0.2),
        ("gpt2", 8, 50, 0.02),
        ("gpt2", 768, 3072, 0.02),
    ):
        found = weight_std(scheme, fan_in, fan_out)
        assert_close(
            found, expected, atol=1e-12, name=f"weight_std({scheme!r}, {fan_in}, {fan_out})", hint=hint
        )


@pytest.mark.parametrize("scheme", ["kaiming", "He", "", None])
def test_std_of_other_schemes_is_refused(scheme):
    with pytest.raises(ValueError, match=r".+"):
        weight_std(scheme, 3, 4)
    with pytest.raises(ValueError, match=r".+"):
        init_(nn.Sequential(nn.Linear(3, 4)), scheme)


def assert_normal(weight, std, name):
    """Mean, standard deviation and fourth moment of a large sample from N(0, std²), at 6 standard errors."""
    w, n = weight.detach().double().flatten() / std, weight.numel()
    hint = "is fan_in the number of features it reads, and is this a standard deviation, not a variance?"
    assert_close(
        w.square().mean().sqrt().item(),
        1.0,
        atol=6 / math.sqrt(2 * n),
        name=f"std of {name} / expected",
        hint=hint,
    )
    assert_close(w.mean().item(), 0.0, atol=6 / math.sqrt(n), name=f"mean of {name} / std")
    fourth = w.pow(4).mean().item()
    assert_close(
        fourth, 3.0, atol=6 * math.sqrt(96 / n), name=f"fourth moment of {name}: is it a normal distribution?"
    )


def same_sizes(*shapes, bias=True):
    return nn.Sequential(*(nn.Linear(a, b, bias=bias) for a, b in shapes))


@pytest.mark.parametrize("scheme", ["xavier", "he", "gpt2"])
def test_init_draws_normal_weights_and_sets_biases_to_0(scheme):
    model = nn.Sequential(
        nn.Linear(90, 210), nn.Sequential(nn.ReLU(), nn.Linear(210, 70), nn.Linear(70, 210))
    )
    assert init_(model, scheme) is model, "init_ returns the model itself"
    for name, fan_in, fan_out in (("0", 90, 210), ("1.1", 210, 70), ("1.2", 70, 210)):
        layer = model.get_submodule(name)
        std = {"xavier": math.sqrt(2 / (fan_in + fan_out)), "he": math.sqrt(2 / fan_in), "gpt2": 0.02}[scheme]
        assert_normal(layer.weight, std, f"{name}.weight")
        assert torch.equal(layer.bias, torch.zeros(fan_out)), "biases start at 0"


def test_init_changes_linear_layers_only_and_keeps_what_is_trained(randn):
    class Scaled(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 5),
            "norm": nn.LayerNorm(5),
            "conv": nn.Conv1d(5, 5, 1),
            "frozen": nn.Linear(300, 40, bias=False),
            "derived": Scaled(40, 300),
        }
    )
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(randn(*p.shape))
    model["frozen"].weight.requires_grad_(False)
    kept = {name: p for name, p in model.named_parameters() if not name.startswith(("frozen", "derived"))}
    before = {name: p.detach().clone() for name, p in kept.items()}
    objects = dict(model.named_parameters())
    init_(model, "he")
    for name, p in kept.items():
        assert torch.equal(p, before[name]), f"{name} belongs to no linear layer and was changed"
    for name, p in model.named_parameters():
        assert p is objects[name], f"{name} was exchanged: fill it in place, or optimisers lose it"
        assert p.requires_grad == (name != "frozen.weight"), f"requires_grad of {name} was changed"
        assert p.is_leaf, f"{name} is no leaf any more: draw under torch.no_grad()"
    assert_normal(model["frozen"].weight, math.sqrt(2 / 300), "a layer without bias")
    assert_normal(model["derived"].weight, math.sqrt(2 / 40), "a layer of a class derived from nn.Linear")
    single = nn.Linear(80, 110)
    init_(single, "he")
    assert_normal(single.weight, math.sqrt(2 / 80), "a model that is itself a linear layer")


def test_init_scales_what_writes_to_the_stream_in_gpt2_only():
    def make():
        block = {
            "qkv_proj": nn.Linear(90, 120),
            "out_proj": nn.Linear(120, 90),
            "layout_proj": nn.Linear(90, 90),
        }
        blocks = [nn.ModuleDict({"attention": nn.ModuleDict(block), "down_proj": nn.Linear(200, 90)})]
        blocks += [nn.ModuleDict({"out_proj": nn.ModuleDict({"up": nn.Linear(90, 90)})})]
        return nn.ModuleList([*blocks, nn.ModuleDict({"down_proj": nn.Linear(80, 90)})])

    writers = ["0.attention.out_proj", "0.down_proj", "2.down_proj"]
    others = ["0.attention.qkv_proj", "0.attention.layout_proj", "1.out_proj.up"]
    model = init_(make(), "gpt2")
    for name in writers:
        assert_normal(model.get_submodule(name).weight, 0.02 / math.sqrt(3), name)
    for name in others:
        assert_normal(model.get_submodule(name).weight, 0.02, name)
    model = init_(make(), "he")
    for name in [*writers, *others]:
        layer = model.get_submodule(name)
        assert_normal(layer.weight, math.sqrt(2 / layer.in_features), name)


@pytest.mark.parametrize(("norm", "depth"), [("pre", 4), ("post", 1)])
def test_init_scales_by_the_root_of_twice_the_number_of_blocks(norm, depth):
    model = init_(transformer_stack(norm, depth, 72, 6), "gpt2")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            writes = name.endswith(("out_proj", "down_proj"))
            assert_normal(layer.weight, 0.02 / (math.sqrt(2 * depth) if writes else 1.0), name)


def test_init_draws_from_the_generator_it_is_given():
    shapes = [(4, 5), (4, 5), (5, 3)]
    before = torch.get_rng_state()
    first, again, other = (
        init_(same_sizes(*shapes), "he", generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    torch.set_rng_state(before)
    models = [same_sizes(*shapes) for _ in range(2)]
    state = torch.get_rng_state()
    init_(models[0], "he", generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state), "with a generator, torch's global one is left alone"
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), "equal generators should give equal weights"
        assert a.dim() == 1 or not torch.equal(a, c), "another generator should give other weights"
    assert not torch.equal(first[0].weight, first[1].weight), "two layers have the same weights"


def test_init_draws_from_the_global_generator_without_one():
    models = [same_sizes((4, 5), (5, 3)) for _ in range(3)]
    torch.manual_seed(11)
    init_(models[0], "xavier")
    init_(models[1], "xavier")
    torch.manual_seed(11)
    init_(models[2], "xavier")
    assert torch.equal(models[0][0].weight, models[2][0].weight), (
        "torch.manual_seed should decide the weights"
    )
    assert not torch.equal(models[0][0].weight, models[1][0].weight), "every call draws anew"


def test_init_runs_on_the_device(device):
    generator = torch.Generator(device).manual_seed(3)
    model = init_(same_sizes((150, 220)).to(device=device, dtype=torch.float64), "he", generator=generator)
    assert_normal(model[0].weight.cpu(), math.sqrt(2 / 150), "the weight")
    assert model[0].weight.device.type == device
    assert model[0].weight.dtype == torch.float64


# --- decades_per_layer ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 8])
@pytest.mark.parametrize("factor", [0.1, 0.8, 1.0, 3.0])
def test_decades_of_a_gradient_that_changes_by_a_factor(layers, factor):
    g = [5e-3 * factor ** (layers - 1 - i) for i in range(layers)]  # the last one comes first in backward
    hint = "a gradient that shrinks on its way back, towards the first layer, has negative decades"
    assert_close(decades_per_layer(g), math.log10(factor), atol=1e-12, name="decades", hint=hint)


def test_decades_are_the_median_over_all_pairs():
    # Slopes of these logarithms: 1, 1/2, 4/3, 0, 3/2, 3. Their median lies between 1 and 4/3.
    found = decades_per_layer([10.0**k for k in (0, 1, 1, 4)])
    assert_close(found, -7 / 6, atol=1e-12, name="decades of 1, 10, 10, 10000")
    found = decades_per_layer([10.0**k for k in (0, 1, 3)])  # 1, 3/2, 2
    assert_close(found, -1.5, atol=1e-12, name="decades of 1, 10, 1000")
    found = decades_per_layer((1e3, 1e3, 1e2, 1e5, 1e0))  # 0, -1/2, 2/3, -3/4, -1, 1, -1, 3, -1, -5
    assert_close(found, 0.625, atol=1e-12, name="decades of 1e3, 1e3, 1e2, 1e5, 1")


@pytest.mark.parametrize("odd", [1e-12, 1e12])
@pytest.mark.parametrize("at", [0, 4, 8])
def test_decades_are_not_moved_by_one_odd_layer(odd, at):
    g = [10 ** (0.25 * i) for i in range(9)]
    g[at] = odd
    assert_close(decades_per_layer(g), -0.25, atol=1e-9, name="decades")


def test_decades_leave_zeros_out_and_keep_positions():
    for g in ([0.0, 1.0, 0.0, 0.0, 1e-3, 0.0], [1.0, 0.0, 0.0, 1e-3], [0.0, 1e3, 1e2, 0.0, 1.0]):
        hint = "layers with a gradient of 0 are left out, but the distance between the others stays"
        assert_close(decades_per_layer(g), 1.0, atol=1e-12, name=f"decades of {g}", hint=hint)
    for g in ([0.0, 0.0, 0.0], [0.0, 2.0], [3.0], [0.0]):
        assert_close(decades_per_layer(g), 0.0, atol=0, name=f"decades of {g}")


def test_decades_of_the_closed_form():
    widths, stds = [40] * 13, [weight_std("xavier", 40, 40)] * 12
    g = [math.sqrt(m) for m in backward_moments(widths, stds, "relu")]
    assert_close(
        decades_per_layer(g), math.log10(math.sqrt(0.5)), atol=1e-12, name="decades, Xavier with ReLU"
    )


def test_decades_of_numbers_at_the_ends_of_float64():
    assert_close(decades_per_layer([1e-300, 1e300]), -600.0, atol=1e-9, name="decades")


# --- diagnose ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3, 11, 60])
@pytest.mark.parametrize(
    ("decades", "expected"),
    [(-9, "vanishing"), (-2.02, "vanishing"), (-1.98, "healthy"), (0, "healthy"), (1.98, "healthy"),
     (2.02, "exploding"), (9, "exploding")],
)  # fmt: skip
def test_diagnosis_turns_at_two_decades_over_the_whole_way(layers, decades, expected):
    g = [3e-4 * 10 ** (decades * (layers - 1 - i) / (layers - 1)) for i in range(layers)]
    found = diagnose(g)
    assert found == expected, (
        f"{layers} layers, {decades} decades on the way back: {found}, expected {expected}"
    )
    assert diagnose(tuple(g)) == expected


@pytest.mark.parametrize(
    ("g", "expected"),
    [
        ([0.0, 0.0, 0.5, 0.4, 0.5], "dead"),
        ([0.5, 0.0, 0.4], "dead"),
        ([0.5, 0.5, 0.0], "dead"),
        ([0.0], "dead"),
        ([0.0, 0.0], "dead"),
        ([0.0, 0.0, 1e-40, 1e-20, 1.0], "vanishing"),
        ([1e8, 0.0, 1.0], "exploding"),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.3, 0.9], "vanishing"),
        ([1.0, math.inf, 1.0], "exploding"),
        ([math.nan, 1.0, 1.0], "exploding"),
        ([0.0, 1.0, math.nan], "exploding"),
        ([math.inf, math.inf], "exploding"),
        ([math.inf], "exploding"),
        ([0.0, math.inf, 0.0], "exploding"),
        ([1e-30, 1e-30, 1e-30], "healthy"),
        ([7.0], "healthy"),
        ([1.0, 1.0, 1e-9, 1.0, 1.0, 1.0], "healthy"),
        ([1e-3, 1.0, 1.0, 1.0, 1.0, 1.0], "healthy"),
        ([1e-300, 1e-100, 1e100, 1e300], "vanishing"),
        ([1e300, 1e100, 1e-100, 1e-300], "exploding"),
    ],
    ids=str,
)
def test_diagnosis_takes_the_first_line_that_holds(g, expected):
    before = list(g)
    assert diagnose(g) == expected, f"{g} is {diagnose(g)}, expected {expected}"
    assert str(g) == str(before), "diagnose changed its argument"


def test_diagnosis_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r".+"):
        diagnose([])


def planted(activation, gain, depth=16, width=48):
    """A network of `depth` linear layers with weights of standard deviation gain / sqrt(width)."""
    generator = torch.Generator().manual_seed(depth)
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width)
        with torch.no_grad():
            layer.weight.normal_(0, gain / math.sqrt(width), generator=generator)
            layer.bias.zero_()
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


def gradients_at_linear_layers(model, randn):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    x = randn(32, 48, dtype=torch.float32)
    with Recorder(model, names) as recorder:
        y = model(x)
        (y * randn(*y.shape, dtype=torch.float32)).mean().backward()
    return [call.grad_rms for call in recorder.calls]


@pytest.mark.parametrize(
    ("activation", "gain", "expected"),
    [
        (nn.Sigmoid, 1.0, "vanishing"),
        (nn.ReLU, 0.7, "vanishing"),
        (nn.Tanh, 0.5, "vanishing"),
        (nn.ReLU, 2.8, "exploding"),
        (nn.Identity, 2.0, "exploding"),
        (nn.ReLU, math.sqrt(2), "healthy"),
        (nn.Identity, 1.0, "healthy"),
    ],
)
def test_diagnosis_of_planted_networks(randn, activation, gain, expected):
    g = gradients_at_linear_layers(planted(activation, gain), randn)
    assert diagnose(g) == expected, f"{activation.__name__} with gain {gain}: gradients {g}"


def test_diagnosis_of_a_network_with_a_dead_layer(randn):
    model = planted(nn.ReLU, math.sqrt(2))
    nn.init.constant_(model[12].bias, -1e3)  # its ReLU answers 0 to everything
    nn.init.normal_(model[14].bias)  # or the layers behind it would have nothing but zeros to read
    g = gradients_at_linear_layers(model, randn)
    assert diagnose(g) == "dead"
    assert [value == 0 for value in g] == [True] * 7 + [False] * 9
    with Recorder(model, ["11", "13"]) as recorder:
        model(randn(32, 48, dtype=torch.float32))
    assert recorder.calls[1].output.zeros == 1.0, "a dead layer's output is all zeros"
    assert 0.2 < recorder.calls[0].output.zeros < 0.8


# --- study ------------------------------------------------------------------------------------


class Block(nn.Module):
    """A block with children of its own, which it calls more than once."""

    def __init__(self, randn, gain):
        super().__init__()
        self.inner = mlp([4, 4], randn)[0]
        with torch.no_grad():
            self.inner.weight.mul_(gain)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def test_study_measures_every_block_of_every_network(randn):
    x, upstream, built = randn(3, 5, 4), randn(3, 5, 4), []

    def builder(label, gain):
        def build(depth):
            built.append((label, depth, nn.Sequential(*(Block(randn, gain) for _ in range(depth)))))
            return built[-1][2]

        return build

    before = x.clone(), upstream.clone()
    rows = study({"small": builder("small", 0.3), "big": builder("big", 1.2)}, (4, 1, 3), x, upstream)
    order = [("small", 4), ("small", 1), ("small", 3), ("big", 4), ("big", 1), ("big", 3)]
    assert [(row.label, row.depth) for row in rows] == order, "all depths of the first label, then the second"
    assert sorted((label, depth) for label, depth, _ in built) == sorted(order), "one network per row"
    networks = {(label, depth): model for label, depth, model in built}
    for row in rows:
        assert isinstance(row, Row)
        outputs = steps_of(networks[row.label, row.depth], x)
        grads = torch.autograd.grad((outputs[-1] * upstream).sum(), outputs)
        for name, found, tensors in (("output", row.output_rms, outputs), ("grad", row.grad_rms, grads)):
            assert len(found) == row.depth, f"{name}_rms has {len(found)} numbers for {row.depth} blocks"
            expected = [rms_of(t) for t in tensors]
            assert_close(
                list(found), expected, atol=0, rtol=1e-11, name=f"{name}_rms of {row.label}, {row.depth}"
            )
    assert torch.equal(x, before[0]), "x was changed"
    assert torch.equal(upstream, before[1]), "upstream was changed"
    assert not x.requires_grad, "x was made to require a gradient"
    for *_, model in built:
        assert all(not hooks for *_, hooks in hooks_on(model)), "hooks are left on a model"


def test_study_has_a_verdict_for_every_network(randn):
    def scaled(factor):
        def build(depth):
            layers = [nn.Linear(3, 3, bias=False) for _ in range(depth)]
            for layer in layers:
                nn.init.eye_(layer.weight).data.mul_(factor)
            return nn.Sequential(*layers)

        return build

    x, upstream = torch.ones(2, 3), torch.ones(2, 3)
    builders = {"tenth": scaled(0.1), "same": scaled(1.0), "double": scaled(2.0), "nothing": scaled(0.0)}
    rows = study(builders, [2, 9], x, upstream)
    verdicts = [row.verdict for row in rows]
    expected = ["healthy", "vanishing", "healthy", "healthy", "healthy", "exploding", "dead", "dead"]
    assert verdicts == expected
    assert rows[1].grad_rms == pytest.approx([10.0**-k for k in range(8, -1, -1)], rel=1e-5)
    assert rows[5].output_rms == pytest.approx([2.0**k for k in range(1, 10)], rel=1e-5)


def test_study_of_transformers_shows_what_the_norm_does(randn):
    x, upstream = randn(2, 8, 24, dtype=torch.float32), randn(2, 8, 24, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = study(
        {
            norm: lambda depth, norm=norm: init_(
                transformer_stack(norm, depth, 24, 3), "he", generator=generator
            )
            for norm in ("pre", "post")
        },
        [1, 8],
        x,
        upstream,
    )
    pre, post = rows[1], rows[3]
    assert [(row.label, row.depth) for row in rows] == [("pre", 1), ("pre", 8), ("post", 1), ("post", 8)]
    assert all(abs(rms - 1) < 1e-2 for rms in post.output_rms), (
        "a post-norm stream is normalised by every block"
    )
    assert 3 < pre.output_rms[-1] / rms_of(x) < 30, "a pre-norm stream grows with depth"
    assert pre.grad_rms[0] > 1.5 * pre.grad_rms[-1], "and its gradient grows on the way back"
    assert_close(post.grad_rms[-1], rms_of(upstream), atol=0, rtol=1e-5, name="the gradient at the output")


# --- plot_study -------------------------------------------------------------------------------

ROWS = [
    Row("pre-norm", 3, (1.0, 2.0, 4.5), (0.25, 0.125, 0.5), "healthy"),
    Row("pre-norm", 5, (1.5, 2.5, 3.5, 4.0, 5.0), (1e-6, 1e-4, 3e-3, 0.2, 1.0), "vanishing"),
    Row("post-norm", 3, (1.0, 1.01, 0.99), (0.7, 0.8, 0.9), "healthy"),
    Row("bare", 1, (6.0,), (0.3,), "healthy"),
]
LABELS = ["pre-norm, 3 blocks", "pre-norm, 5 blocks", "post-norm, 3 blocks", "bare, 1 blocks"]


def axes_named(figure, name):
    found = [ax for ax in figure.axes if ax.get_ylabel() == name]
    assert len(found) == 1, f"{len(found)} Axes have the y label {name!r}, expected 1"
    return found[0]


@pytest.mark.parametrize(("name", "field"), [("output rms", "output_rms"), ("gradient rms", "grad_rms")])
def test_plot_has_a_line_with_the_values_of_every_row(name, field):
    ax = axes_named(plot_study(ROWS), name)
    lines = {line.get_label(): line for line in ax.lines}
    assert sorted(lines) == sorted(LABELS), f"labels of the lines: {sorted(lines)}"
    assert len(ax.lines) == len(ROWS), "one line per row and nothing else"
    assert not ax.patches, "nothing else is drawn"
    assert not ax.collections, "nothing else is drawn"
    for row, label in zip(ROWS, LABELS, strict=True):
        x, y = (torch.as_tensor(data).double() for data in lines[label].get_data(orig=False))
        hint = "blocks are counted from 1"
        assert_close(x, torch.arange(1, row.depth + 1).double(), atol=0, name=f"x of {label}", hint=hint)
        assert_close(
            y, torch.tensor(getattr(row, field)).double(), atol=1e-6, rtol=1e-6, name=f"y of {label}"
        )
        assert lines[label].get_linestyle() not in ("None", "", " "), "points without a line between them"
        assert lines[label].get_visible()


def test_plot_has_logarithmic_y_axes_and_says_what_they_show():
    figure = plot_study(ROWS)
    assert len(figure.axes) == 2, f"the figure has {len(figure.axes)} Axes, expected 2"
    for name in ("output rms", "gradient rms"):
        ax = axes_named(figure, name)
        assert ax.get_yscale() == "log", f"the y axis of {name} is {ax.get_yscale()}"
        assert ax.get_xscale() == "linear"
        assert ax.get_xlabel() == "block"


def test_plot_gives_a_row_one_colour_and_a_name_in_the_legend():
    figure = plot_study(ROWS)
    colours = [
        {line.get_label(): to_rgba(line.get_color()) for line in axes_named(figure, name).lines}
        for name in ("output rms", "gradient rms")
    ]
    assert colours[0] == colours[1], "a row has two colours"
    assert len(set(colours[0].values())) == len(ROWS), "two rows have the same colour"
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    texts = {text.get_text() for legend in legends for text in legend.get_texts()}
    assert texts == set(LABELS), f"the legend names {sorted(texts)}"


def test_plot_of_a_single_row_and_its_file(tmp_path):
    figure = plot_study(ROWS[1:2])
    figure.savefig(tmp_path / "study.png", dpi=20)
    assert [len(ax.lines) for ax in figure.axes] == [1, 1]


def test_plot_leaves_pyplot_and_settings_alone():
    _, ax = plt.subplots()
    open_figures, settings, rows = plt.get_fignums(), dict(matplotlib.rcParams), list(ROWS)
    first, second = plot_study(rows), plot_study(rows)
    assert first is not second, "each call makes a new Figure"
    assert len(first.axes) == len(second.axes) == 2
    assert rows == ROWS, "the rows were changed"
    assert plt.get_fignums() == open_figures, "a figure stays open in pyplot: use matplotlib.figure.Figure"
    assert not ax.lines, "drew on the current figure of pyplot"
    changed = [name for name, value in settings.items() if matplotlib.rcParams[name] != value]
    assert not changed, f"rcParams changed: {changed}"
