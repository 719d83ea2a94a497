"""Tests of ch04/lab01. Oracles: PyTorch in float64, closed forms, and the bytes alive after every operation."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from loss import (
    IGNORE,
    bits_per_character,
    chunked_cross_entropy,
    cross_entropy,
    cross_entropy_gradient,
    log_sum_exp,
    mean_over_batches,
    perplexity,
)
from shared.compare import assert_close
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

WHY = "write the loss out: log-sum-exp minus what the target expects"
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.13])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _write_it_yourself(forbid):
    forbid(
        nn.CrossEntropyLoss,
        nn.NLLLoss,
        nn.LogSoftmax,
        nn.KLDivLoss,
        "*cross_entropy*",
        "*nll_loss*",
        "*log_softmax*",
        "*logsumexp*",
        "*logcumsumexp*",
        "*kl_div*",
        why=WHY,
    )


# --- what the tests are made of ---------------------------------------------------------------


def tokens(randn, *shape, V, ignored=0.0, ignore_index=IGNORE):
    """Random targets in 0 .. V - 1, both ends among them; a share of the others is ignored."""
    targets = (1000 * randn(*shape).abs()).long() % V
    flat = targets.view(-1)
    flat[randn(flat.numel()) < torch.special.ndtri(torch.tensor(ignored)).item()] = ignore_index
    flat[0], flat[-1] = 0, V - 1
    return targets


def oracle(logits, targets, **options):
    """F.cross_entropy in float64, for classes on the last axis."""
    options = {"label_smoothing" if k == "smoothing" else k: v for k, v in options.items()}
    flat = F.cross_entropy(logits.double().reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)
    return flat.reshape(targets.shape) if options.get("reduction") == "none" else flat


def exact(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def gradients(loss, *inputs, upstream=None):
    """The value of a loss, and its gradients by inputs that are made leaves for it."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    value = loss(*leaves)
    assert value.requires_grad, (
        "the loss does not depend on its input: was the graph cut, by detach or .item()?"
    )
    scalar = value if upstream is None else (value * upstream).sum()
    grads = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), *grads


def assert_same(actual, expected, *, atol, rtol=0.0, dtype=None, name, hint=""):
    """Close to the oracle, and of the dtype that was promised."""
    __tracebackhide__ = True
    assert isinstance(actual, torch.Tensor), f"{name} is {actual!r:.80}, not a tensor"
    if dtype is not None:
        assert actual.dtype == dtype, f"{name} is {actual.dtype}, promised is {dtype}"
    assert_close(actual, expected, atol=atol, rtol=rtol, name=name, hint=hint)


def refused(function, *args, why, **kwargs):
    __tracebackhide__ = True
    try:
        result = function(*args, **kwargs)
    except ValueError:
        return
    except NotImplementedError:
        raise  # a RuntimeError too, but it means: not written yet
    except (IndexError, RuntimeError) as error:
        pytest.fail(f"{why}: raise ValueError, not {type(error).__name__} ({error!s:.80})", pytrace=False)
    pytest.fail(f"{why}: raise ValueError. Returned instead: {result!r:.200}", pytrace=False)


class Meter(TorchDispatchMode):
    """Counts the bytes of all tensors that were made since it was switched on and are still alive.

    Views of what was there before count for nothing. It looks after every operation, backward ones too.
    """

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or PyTorch 2.13 imports its whole compiler at the first operation: 3 seconds

    def __init__(self, *given):
        super().__init__()
        self.given = [t.untyped_storage() for t in given]  # kept alive: no address is used again
        self.alive, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if all(storage._cdata != other._cdata for other in self.given):
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.largest = max(self.largest, storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


# --- log_sum_exp ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((3, 5), 0), ((3, 5), -1), ((4, 3, 7), 1), ((4, 3, 7), -3), ((3, 1, 5), -1), ((1, 5), 1)],
)
def test_log_sum_exp_along_any_axis(randn, shape, dim):
    x = 3 * randn(*shape)
    expected = torch.logsumexp(x, dim)
    hint = "log(sum(exp(x))) along `dim`, which goes away"
    assert_same(log_sum_exp(x, dim), expected, atol=1e-13, dtype=torch.float64, name="log_sum_exp", hint=hint)
    if dim in (-1, len(shape) - 1):
        assert_same(log_sum_exp(x), expected, atol=1e-13, name="log_sum_exp without dim", hint="dim is -1")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_log_sum_exp_of_huge_and_tiny_numbers(dtype, device):
    largest = torch.finfo(dtype).max
    rows = [
        [1e4, 1e4, 1e4],
        [-1e4, -1e4, -1e4],
        [1e4, 0.0, -1e4],
        [-1000.0, -1001.0, -1002.0],
        [1000.0, 1001.0, 1002.0],
        [largest, 0.0, -largest],
        [-largest, -largest, -largest],
        [0.0, 0.0, 0.0],
    ]
    tail = math.log(1 + math.exp(-1) + math.exp(-2))
    expected = [1e4 + math.log(3), -1e4 + math.log(3), 1e4, -1000 + tail, 1002 + tail, largest, -largest]
    expected = torch.tensor([*expected, math.log(3)], dtype=dtype)
    result = log_sum_exp(torch.tensor(rows, dtype=dtype, device=device))
    hint = "take the maximum out of every row, its own, before exp, and add it back after log"
    rtol = 4 * torch.finfo(dtype).eps
    assert_same(result, expected, atol=rtol, rtol=rtol, dtype=dtype, name="log_sum_exp", hint=hint)


def test_log_sum_exp_of_infinities():
    inf = math.inf
    x = exact([[-inf, -inf, -inf], [-inf, 2.0, -inf], [inf, 1.0, -inf], [inf, inf, 0.0]])
    hint = "inf - inf is NaN: what should be taken out of a row whose maximum is infinite?"
    expected = exact([-inf, 2.0, inf, inf])
    assert_same(log_sum_exp(x), expected, atol=1e-14, name="log_sum_exp", hint=hint)
    assert_same(log_sum_exp(x.T.contiguous(), 0), expected, atol=1e-14, name="log_sum_exp along 0", hint=hint)


def test_log_sum_exp_passes_back_the_softmax(randn):
    x = 4 * randn(5, 7)
    x[1] += 1e4
    x[2] -= 1e4
    x[3, 2:5] = -math.inf
    x[4] = 1.5  # all are the maximum
    upstream = randn(5)
    _, grad = gradients(log_sum_exp, x, upstream=upstream)
    expected = x.softmax(-1) * upstream[:, None]
    assert_close(grad, expected, atol=1e-14, name="gradient", hint="its gradient is the softmax of x")
    assert (grad[3, 2:5] == 0).all(), "the gradient at -inf must be exactly 0"


@NARROW
def test_log_sum_exp_keeps_narrow_dtypes(randn, dtype):
    x = 2 * randn(5, 33, dtype=dtype)
    expected = torch.logsumexp(x.double(), -1)
    assert_same(log_sum_exp(x), expected, atol=0.05, dtype=dtype, name="log_sum_exp")


def test_log_sum_exp_of_a_strided_input_which_stays_as_it_is(randn):
    x = randn(7, 6, 4).transpose(0, 2)[:, ::2]  # (4, 3, 7)
    before = x.clone()
    assert_close(log_sum_exp(x), torch.logsumexp(before, -1), atol=1e-13, name="log_sum_exp")
    assert torch.equal(x, before), "log_sum_exp changed its input"


# --- cross_entropy ----------------------------------------------------------------------------

SHAPES = pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1,), ()], ids=str)
REDUCTIONS = ["mean", "sum", "none"]


@SMOOTHING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@SHAPES
def test_cross_entropy_matches_pytorch(randn, shape, reduction, smoothing):
    logits = 3 * randn(*shape, 7)
    targets = tokens(randn, *shape, V=7) if shape else torch.tensor(4)
    actual = cross_entropy(logits, targets, reduction=reduction, label_smoothing=smoothing)
    expected = oracle(logits, targets, reduction=reduction, smoothing=smoothing)
    hint = "the loss of a token is log_sum_exp(logits) - sum_v q_v logits_v"
    assert_same(actual, expected, atol=1e-12, dtype=torch.float64, name="loss", hint=hint)


def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary():
    logits, targets = (
        torch.full((2, 3, 65), 0.7, dtype=torch.float64),
        torch.tensor([[0, 1, 64], [30, 31, 32]]),
    )
    expected = exact(math.log(65))
    assert_close(cross_entropy(logits, targets), expected, atol=1e-13, name="loss", hint="in nats, so log 65")


def test_cross_entropy_means_over_all_tokens_by_default(randn):
    logits, targets = randn(4, 3, 7), tokens(randn, 4, 3, V=7)
    targets[0, :2], targets[2] = IGNORE, IGNORE  # 1, 3, 0 and 3 tokens are kept
    hint = "the mean is over kept tokens, each weighing the same, whichever sequence it is from; IGNORE is the default"
    assert_close(cross_entropy(logits, targets), oracle(logits, targets), atol=1e-12, name="loss", hint=hint)


def test_cross_entropy_smooths_over_the_whole_vocabulary():
    # p is uniform but for the target, whose logit is 3: then the loss tells q at the target exactly.
    logits = exact([[0.0, 3.0, 0.0, 0.0, 0.0]])
    q = 0.7 + 0.3 / 5
    expected = exact(math.log(4 + math.exp(3)) - 3 * q)
    actual = cross_entropy(logits, torch.tensor([1]), label_smoothing=0.3)
    hint = "q is (1 - s) + s / V at the target and s / V elsewhere"
    assert_close(actual, expected, atol=1e-13, name="loss", hint=hint)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_cross_entropy_smooths_from_nothing_to_everything(randn, smoothing):
    logits, targets = 2 * randn(4, 7), tokens(randn, 4, V=7)
    expected = oracle(logits, targets, smoothing=smoothing)
    actual = cross_entropy(logits, targets, label_smoothing=smoothing)
    assert_close(actual, expected, atol=1e-12, name=f"loss, smoothed by {smoothing}")


@SMOOTHING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [IGNORE, -1, 0, 3, 99])
def test_cross_entropy_leaves_out_ignored_tokens(randn, ignore_index, reduction, smoothing):
    logits, targets = 2 * randn(4, 5, 7), tokens(randn, 4, 5, V=7)
    targets[1, 1:4], targets[2] = ignore_index, ignore_index
    kept = (targets != ignore_index).sum().item()
    assert kept < targets.numel() - 7
    options = {"reduction": reduction, "ignore_index": ignore_index}
    actual, grad = gradients(
        lambda x: cross_entropy(x, targets, label_smoothing=smoothing, **options),
        logits,
        upstream=torch.ones_like(targets).double() if reduction == "none" else None,
    )
    expected, expected_grad = gradients(
        lambda x: oracle(x, targets, smoothing=smoothing, **options),
        logits,
        upstream=torch.ones_like(targets).double() if reduction == "none" else None,
    )
    hint = f"{targets.numel() - kept} of {targets.numel()} tokens are ignored: they count in neither sum nor mean"
    assert_close(actual, expected, atol=1e-12, name="loss", hint=hint)
    assert_close(grad, expected_grad, atol=1e-13, name="gradient", hint=hint)
    assert (grad[targets == ignore_index] == 0).all(), "ignored tokens pass back gradients of exactly 0"


@SMOOTHING
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)], ids=str)
def test_cross_entropy_of_no_tokens_is_zero(randn, shape, reduction, smoothing):
    logits, targets = randn(*shape, 7), torch.full(shape, IGNORE)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = torch.zeros(shape if reduction == "none" else ()).double()
    value, grad = gradients(
        lambda x: cross_entropy(x, targets, **options), logits, upstream=torch.ones_like(expected)
    )
    hint = "no token is kept: 0, and no 0 / 0, also in the gradient"
    assert_close(value, expected, atol=0, name="loss", hint=hint)
    assert_close(grad, torch.zeros_like(logits), atol=0, name="gradient", hint=hint)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_extreme_logits(randn, reduction):
    logits = randn(6, 7)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, 3], logits[3, 3] = 1e4, -1e4
    logits[4] *= 1e5
    targets = torch.tensor([0, 6, 3, 3, 2, IGNORE])
    expected = oracle(logits, targets, reduction=reduction)
    hint = "log(softmax(x)) is -inf where softmax rounds to 0: stay in logs, x - log_sum_exp(x)"
    actual = cross_entropy(logits, targets, reduction=reduction)
    assert_close(actual, expected, atol=1e-10, rtol=1e-14, name="loss", hint=hint)


def test_cross_entropy_of_tokens_that_cannot_come(randn):
    logits, targets = randn(3, 7), torch.tensor([1, 5, 0])
    without = logits[:, [0, 1, 4, 5, 6]]
    logits[:, 2:4] = -math.inf
    expected, expected_grad = gradients(lambda x: oracle(x, torch.tensor([1, 3, 0])), without)
    value, grad = gradients(lambda x: cross_entropy(x, targets), logits)
    hint = "a logit of -inf has probability 0 and changes nothing: 0 * -inf is NaN"
    assert_close(value, expected, atol=1e-13, name="loss", hint=hint)
    assert_close(grad[:, [0, 1, 4, 5, 6]], expected_grad, atol=1e-13, name="gradient", hint=hint)
    assert (grad[:, 2:4] == 0).all(), "the gradient at -inf must be exactly 0"
    # Two ignored rows in which all tokens but the first, or all but the last, cannot come.
    blind = torch.full((2, 7), -math.inf, dtype=torch.float64)
    blind[0, 0] = blind[1, 6] = 1.0
    logits, targets = torch.cat([logits, blind]), torch.cat([targets, torch.tensor([IGNORE, IGNORE])])
    value, grad = gradients(lambda x: cross_entropy(x, targets), logits)
    hint = "an ignored token counts for nothing, whatever you read in its row: inf * 0 is NaN"
    assert_close(value, expected, atol=1e-13, name="loss with ignored tokens", hint=hint)
    assert (grad[3:] == 0).all(), "ignored tokens pass back gradients of exactly 0"
    losses = cross_entropy(logits[:3], torch.tensor([1, 3, 0]), reduction="none")
    assert losses.isinf().tolist() == [False, True, False], f"the target with -inf costs inf, got {losses}"


@SMOOTHING
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_passes_back_the_right_gradients(randn, reduction, smoothing):
    logits, targets = 2 * randn(3, 5, 7), tokens(randn, 3, 5, V=7, ignored=0.3)
    upstream = randn(3, 5) if reduction == "none" else randn(1)[0]
    options = {"reduction": reduction, "label_smoothing": smoothing}
    actual = gradients(lambda x: cross_entropy(x, targets, **options), logits, upstream=upstream)[1]
    expected = gradients(lambda x: oracle(x, targets, **options), logits, upstream=upstream)[1]
    assert_close(actual, expected, atol=1e-13, name="gradient")


@SMOOTHING
@NARROW
def test_cross_entropy_of_narrow_dtypes_is_computed_in_float32(randn, dtype, smoothing):
    logits, targets = 4 * randn(6, 301, dtype=dtype), tokens(randn, 6, V=301)
    value, grad = gradients(lambda x: cross_entropy(x, targets, label_smoothing=smoothing), logits)
    expected, expected_grad = gradients(lambda x: oracle(x, targets, smoothing=smoothing), logits)
    hint = f"convert {dtype} to float32 before anything else"
    assert_same(value, expected, atol=1e-5, dtype=torch.float32, name="loss", hint=hint)
    rtol = torch.finfo(dtype).eps
    assert_same(grad, expected_grad, atol=1e-6, rtol=rtol, dtype=dtype, name="gradient", hint=hint)


@SMOOTHING
def test_cross_entropy_in_float32(randn, device, smoothing):
    logits = 4 * randn(3, 5, 301, dtype=torch.float32, device=device)
    targets = tokens(randn, 3, 5, V=301, ignored=0.3).to(device)
    value, grad = gradients(lambda x: cross_entropy(x, targets, label_smoothing=smoothing), logits)
    expected, expected_grad = gradients(lambda x: oracle(x, targets, smoothing=smoothing), logits)
    assert_same(value, expected, atol=5e-6, dtype=torch.float32, name="loss")
    assert_same(grad, expected_grad, atol=1e-7, dtype=torch.float32, name="gradient")


LOSSES = pytest.mark.parametrize(
    "function", [cross_entropy, cross_entropy_gradient], ids=["loss", "gradient"]
)


@LOSSES
def test_cross_entropy_and_its_gradient_take_strided_inputs_which_stay_as_they_are(randn, function):
    logits = randn(7, 6, 4).transpose(0, 2)[:, ::2]  # (4, 3, 7)
    targets = tokens(randn, 3, 8, V=7, ignored=0.3)[:, ::2].T  # (4, 3)
    before = logits.clone(), targets.clone()
    expected = oracle(logits, targets, smoothing=0.1)
    if function is cross_entropy_gradient:
        expected = gradients(lambda x: oracle(x, targets, smoothing=0.1), logits)[1]
    assert_close(function(logits, targets, label_smoothing=0.1), expected, atol=1e-12)
    assert torch.equal(logits, before[0]), "the logits were changed"
    assert torch.equal(targets, before[1]), "the targets were changed"


@LOSSES
@pytest.mark.parametrize("wrong", [-1, 7, 100, -7, -101])
def test_cross_entropy_and_its_gradient_refuse_targets_outside_the_vocabulary(randn, function, wrong):
    logits, targets = randn(2, 3, 7), torch.tensor([[0, 6, wrong], [1, IGNORE, 2]])
    refused(function, logits, targets, why=f"a target of {wrong} with 7 tokens")
    only_ignored = torch.tensor([[0, 6, 5], [1, IGNORE, 2]])
    refused(function, logits, only_ignored, ignore_index=wrong, why="-100 is no target if another is ignored")
    function(logits, targets.masked_fill(targets == IGNORE, 0), ignore_index=wrong)  # and this is in order


@LOSSES
def test_cross_entropy_and_its_gradient_refuse_what_makes_no_sense(randn, function):
    logits, targets = randn(2, 3, 7), tokens(randn, 2, 3, V=7)
    for shape in ((3, 2), (6,), (2, 1), (1, 3), (3,), (2, 3, 1)):
        wrong = torch.ones(shape, dtype=torch.long)
        refused(function, logits, wrong, why=f"targets {shape} for logits (2, 3, 7)")
    refused(
        function, randn(2, 2, 7), torch.ones(2, dtype=torch.long), why="targets (2,) for logits (2, 2, 7)"
    )
    for smoothing in (-0.1, 1.1, math.nan):
        refused(function, logits, targets, label_smoothing=smoothing, why=f"label smoothing {smoothing}")
    for reduction in ("average", "", None, "none " if function is cross_entropy else "none"):
        refused(function, logits, targets, reduction=reduction, why=f"the reduction {reduction!r}")


def check_contiguous_logits_kept(loss, randn, dtype):
    # Nothing needs to be copied or converted here: what is done in place is done to the caller's tensor.
    logits = 3 + randn(4, 7, dtype=dtype)
    before = logits.clone()
    loss(logits, torch.tensor([0, 6, IGNORE, 3]))
    assert torch.equal(logits, before), "the logits were changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cross_entropy_leaves_contiguous_logits_alone(randn, dtype):
    check_contiguous_logits_kept(cross_entropy, randn, dtype)


def test_cross_entropy_of_the_certain_and_right_is_zero():
    loss = cross_entropy(torch.tensor([[1e4, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert loss.item() == 0.0


# --- cross_entropy_gradient -------------------------------------------------------------------


@pytest.fixture
def no_autograd(forbid):
    why = "the gradient has a formula: p - q, over the number of tokens"
    forbid(torch.autograd.grad, torch.autograd.backward, "backward", torch.func.grad, torch.func.vjp, why=why)
    forbid(torch.func.jacrev, torch.func.grad_and_value, torch.autograd.functional.jacobian, why=why)


@SMOOTHING
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@SHAPES
def test_gradient_matches_autograd(randn, no_autograd, shape, reduction, smoothing):
    logits = 3 * randn(*shape, 7)
    targets = tokens(randn, *shape, V=7) if shape else torch.tensor(4)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    expected = gradients(lambda x: oracle(x, targets, **options), logits)[1]
    actual = cross_entropy_gradient(logits, targets, **options)
    hint = "p - q for the sum; the mean divides by the number of tokens"
    assert_same(actual, expected, atol=1e-13, dtype=torch.float64, name="gradient", hint=hint)


def test_gradient_is_that_of_the_mean_by_default(randn):
    logits, targets = randn(4, 3, 7), tokens(randn, 4, 3, V=7)
    targets[0, :2], targets[2] = IGNORE, IGNORE
    expected = gradients(lambda x: oracle(x, targets), logits)[1]
    hint = "the defaults are those of cross_entropy; the mean is over the tokens that are kept"
    assert_close(cross_entropy_gradient(logits, targets), expected, atol=1e-13, name="gradient", hint=hint)


def test_gradient_of_one_token_by_hand():
    # exp(logits) is 1, 2, 5: p is 1/8, 2/8, 5/8.
    logits = exact([[0.0, math.log(2), math.log(5)]])
    expected = exact([[1 / 8, 2 / 8 - 1, 5 / 8]])
    hint = "at the target p - 1, elsewhere p: every other token is pushed down by what it claimed"
    assert_close(
        cross_entropy_gradient(logits, torch.tensor([1])), expected, atol=1e-14, name="gradient", hint=hint
    )


@SMOOTHING
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [IGNORE, -1, 0, 3, 99])
def test_gradient_of_ignored_tokens_is_zero(randn, ignore_index, reduction, smoothing):
    logits, targets = 2 * randn(4, 5, 7), tokens(randn, 4, 5, V=7)
    targets[1, 1:4], targets[2] = ignore_index, ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing}
    expected = gradients(lambda x: oracle(x, targets, **options), logits)[1]
    actual = cross_entropy_gradient(logits, targets, **options)
    assert_close(actual, expected, atol=1e-13, name="gradient", hint="a row that is ignored is 0, whole")
    assert (actual[targets == ignore_index] == 0).all(), "ignored tokens have gradients of exactly 0"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(2, 3), (0,)], ids=str)
def test_gradient_of_no_tokens_is_zero(randn, shape, reduction):
    logits, targets = randn(*shape, 7), torch.full(shape, IGNORE)
    actual = cross_entropy_gradient(logits, targets, reduction=reduction, label_smoothing=0.1)
    assert_close(
        actual, torch.zeros_like(logits), atol=0, name="gradient", hint="no token is kept: all 0, not 0 / 0"
    )


def test_gradient_of_extreme_logits(randn):
    logits = randn(6, 7)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2, 3], logits[3, 3] = 1e4, -1e4
    logits[4, 1:3] = -math.inf
    targets = torch.tensor([0, 6, 3, 3, 4, IGNORE])
    p = logits.softmax(-1)
    expected = (p - F.one_hot(targets.clamp(min=0), 7)) / 5
    expected[5] = 0
    hint = "p = exp(x - log_sum_exp(x))"
    assert_close(cross_entropy_gradient(logits, targets), expected, atol=1e-11, name="gradient", hint=hint)


@SMOOTHING
@NARROW
def test_gradient_of_narrow_dtypes_is_computed_in_float32(randn, dtype, smoothing):
    logits, targets = 4 * randn(6, 301, dtype=dtype), tokens(randn, 6, V=301)
    expected = gradients(lambda x: oracle(x, targets, smoothing=smoothing), logits)[1]
    actual = cross_entropy_gradient(logits, targets, label_smoothing=smoothing)
    hint = f"convert {dtype} to float32 first, and back at the end: one rounding, not many"
    rtol = torch.finfo(dtype).eps
    assert_same(actual, expected, atol=1e-6, rtol=rtol, dtype=dtype, name="gradient", hint=hint)


def test_gradient_in_float32(randn, device):
    logits = 4 * randn(3, 5, 301, dtype=torch.float32, device=device)
    targets = tokens(randn, 3, 5, V=301, ignored=0.3).to(device)
    expected = gradients(lambda x: oracle(x, targets, smoothing=0.1), logits)[1]
    actual = cross_entropy_gradient(logits, targets, label_smoothing=0.1)
    assert_same(actual, expected, atol=1e-7, dtype=torch.float32, name="gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_leaves_contiguous_logits_alone(randn, dtype):
    check_contiguous_logits_kept(cross_entropy_gradient, randn, dtype)


def test_gradient_by_formula_makes_no_graph(randn):
    gradient = cross_entropy_gradient(randn(2, 3).requires_grad_(), torch.tensor([0, 1]))
    assert not gradient.requires_grad, "the gradient needs no graph: without autograd"


# --- what the number means --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 2.5, 65, 50257])
def test_perplexity_of_a_fair_choice_is_the_number_of_choices(n):
    assert_close(perplexity(math.log(n)), float(n), atol=0, rtol=1e-13, name="perplexity", hint="nats: exp")


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert perplexity(1e4) == math.inf, "exp overflows above 709: the perplexity is inf, and no error"
    assert_close(perplexity(700.0), math.exp(700), atol=0, rtol=1e-12, name="perplexity of 700 nats")


@pytest.mark.parametrize(
    ("nats", "count", "characters", "expected"),
    [
        (math.log(2), 10, 10, 1.0),
        (math.log(2), 10, 40, 0.25),
        (3 * math.log(2), 40, 10, 12.0),
        (math.log(256), 1, 1, 8.0),
        (0.0, 3, 7, 0.0),
        (2 * math.log(2), 300, 400, 1.5),
    ],
)
def test_bits_per_character_shares_out_all_bits_of_the_text(nats, count, characters, expected):
    actual = bits_per_character(nats, count, characters)
    hint = "all nats of the text, divided by log(2), divided by its characters"
    assert_close(actual, expected, atol=1e-14, name="bits per character", hint=hint)


def test_bits_per_character_refuses_an_empty_text():
    for count, characters in ((0, 5), (5, 0), (-1, 5), (5, -1)):
        refused(bits_per_character, 1.0, count, characters, why=f"{count} tokens, {characters} characters")


def test_mean_over_batches_weighs_tokens_the_same():
    hint = "weigh every batch by its tokens: the mean of means is wrong as soon as batches differ"
    assert_close(mean_over_batches([(2.0, 300), (5.0, 100)]), 2.75, atol=1e-14, hint=hint)
    for count in (1, 7):
        assert_close(mean_over_batches([(1.5, count)]), 1.5, atol=1e-14, hint=hint)
    assert_close(mean_over_batches(((m, n) for m, n in [(1.0, 1), (2.0, 2), (3.0, 3)])), 14 / 6, atol=1e-14)


def test_mean_over_batches_is_the_loss_of_one_big_batch(randn):
    logits, targets = randn(11, 7), tokens(randn, 11, V=7, ignored=0.3)
    parts = [slice(0, 5), slice(5, 10), slice(10, 11)]
    batches = [
        (oracle(logits[part], targets[part]).item(), (targets[part] != IGNORE).sum().item()) for part in parts
    ]
    assert_close(
        mean_over_batches(batches), oracle(logits, targets).item(), atol=1e-12, name="mean over batches"
    )


def test_mean_over_batches_passes_over_empty_ones():
    batches = [(2.0, 3), (math.nan, 0), (5.0, 1), (math.inf, 0), (9.0, 0)]
    hint = "a batch of 0 tokens counts for nothing: 0 * nan is nan"
    assert_close(mean_over_batches(batches), 11 / 4, atol=1e-14, name="mean over batches", hint=hint)


def test_mean_over_batches_refuses_to_mean_over_nothing():
    for batches in ([], [(1.0, 0)], [(math.nan, 0), (0.0, 0)]):
        refused(mean_over_batches, batches, why="there is no token")
        refused(mean_over_batches, iter(batches), why="there is no token")
    refused(mean_over_batches, [(1.0, 5), (1.0, -2)], why="a negative number of tokens")
    refused(mean_over_batches, [(1.0, -2)], why="a negative number of tokens")


def test_perplexity_is_finite_up_to_the_largest_float():
    assert_close(perplexity(705.0) / math.exp(705.0), 1.0, atol=1e-9, name="perplexity(705) / exp(705)")


def test_bits_per_character_of_a_hopeless_model():
    assert_close(bits_per_character(1000.0, 1, 1), 1000.0 / math.log(2), atol=1e-9, hint="without exp")


def test_mean_over_batches_does_not_pass_over_a_loss_of_nan():
    assert math.isnan(mean_over_batches([(1.0, 2), (math.nan, 3)]))


# --- chunked_cross_entropy: the same numbers --------------------------------------------------


def problem(randn, N=11, V=13, E=5, *, dtype=torch.float64, device="cpu", ignored=0.3, scale=1.0):
    return SimpleNamespace(
        hidden=(scale * randn(N, E)).to(dtype=dtype, device=device),
        weight=randn(V, E).to(dtype=dtype, device=device),
        targets=tokens(randn, N, V=V, ignored=ignored).to(device),
    )


def chunked(p, chunk_size, **options):
    return lambda hidden, weight: chunked_cross_entropy(
        hidden, weight, p.targets, chunk_size=chunk_size, **options
    )


def at_once(p, **options):
    return lambda hidden, weight: oracle(hidden.double() @ weight.double().T, p.targets, **options)


def assert_same_as_at_once(actual, expected, *, atol, rtol=0.0, hint="", dtype=torch.float64):
    __tracebackhide__ = True
    for name, a, e in zip(
        ("loss", "gradient of hidden", "gradient of weight"), actual, expected, strict=True
    ):
        assert_same(a, e, atol=atol, rtol=rtol, dtype=dtype, name=name, hint=hint)


@SMOOTHING
@pytest.mark.parametrize("chunk_size", [1, 2, 4, 10, 11, 12, 1000])
def test_chunked_loss_and_gradients_match_pytorch(randn, chunk_size, smoothing):
    p = problem(randn)
    actual = gradients(chunked(p, chunk_size, label_smoothing=smoothing), p.hidden, p.weight)
    expected = gradients(at_once(p, smoothing=smoothing), p.hidden, p.weight)
    hint = "every chunk size gives the same, also one that does not divide N: the mean is over the tokens of all chunks"
    assert_same_as_at_once(actual, expected, atol=1e-12, hint=hint)


@pytest.mark.parametrize("ignore_index", [IGNORE, -1, 0, 3, 99])
def test_chunked_loss_leaves_out_ignored_tokens(randn, ignore_index):
    # With chunks of 3: one has no token, one has one, the last one is short.
    p = problem(randn, ignored=0.0)
    p.targets[3:6], p.targets[7:9] = ignore_index, ignore_index
    actual = gradients(chunked(p, 3, ignore_index=ignore_index), p.hidden, p.weight)
    expected = gradients(at_once(p, ignore_index=ignore_index), p.hidden, p.weight)
    hint = "add up the sums of the chunks and divide once, by all kept tokens: chunks differ in how many they keep"
    assert_same_as_at_once(actual, expected, atol=1e-12, hint=hint)
    assert (actual[1][p.targets == ignore_index] == 0).all(), "ignored rows have gradients of exactly 0"


@pytest.mark.parametrize("N", [0, 5])
def test_chunked_loss_of_no_tokens_is_zero(randn, N):
    hidden, weight, targets = randn(N, 3), randn(7, 3), torch.full((N,), IGNORE)
    actual = gradients(lambda h, w: chunked_cross_entropy(h, w, targets, chunk_size=2), hidden, weight)
    expected = torch.zeros(()).double(), torch.zeros(N, 3).double(), torch.zeros(7, 3).double()
    assert_same_as_at_once(actual, expected, atol=0, hint="no token is kept: 0, and no 0 / 0")


def test_chunked_gradients_are_multiplied_by_the_one_from_above(randn):
    p = problem(randn)
    loss = chunked(p, 4)
    actual = gradients(lambda h, w: -(3 * loss(h, w)).square(), p.hidden, p.weight)
    expected = gradients(lambda h, w: -(3 * at_once(p)(h, w)).square(), p.hidden, p.weight)
    hint = "the loss is not the end: it may be scaled, or be one term of many. Multiply by the gradient that comes in"
    assert_same_as_at_once(actual, expected, atol=1e-11, hint=hint)


def test_chunked_gradients_can_be_asked_for_twice(randn):
    p = problem(randn)
    leaves = p.hidden.requires_grad_(), p.weight.requires_grad_()
    expected = torch.autograd.grad(at_once(p)(*leaves), leaves)
    loss = 3 * chunked(p, 4)(*leaves)
    hint = "with retain_graph=True a second backward pass must find the same: do not scale in place what is saved"
    for turn in ("first", "second"):
        found = torch.autograd.grad(loss, leaves, retain_graph=True)
        for name, a, e in zip(("hidden", "weight"), found, expected, strict=True):
            assert_close(a, 3 * e, atol=1e-12, name=f"{turn} gradient of {name}", hint=hint)


def test_chunked_losses_do_not_disturb_each_other(randn):
    p, q = problem(randn), problem(randn, N=7, V=13)
    weight = p.weight.requires_grad_()
    hidden = p.hidden.requires_grad_(), q.hidden.requires_grad_()
    ours = chunked(p, 4)(hidden[0], weight) - 2 * chunked(q, 3, label_smoothing=0.2)(hidden[1], weight)
    theirs = at_once(p)(hidden[0], weight) - 2 * at_once(q, smoothing=0.2)(hidden[1], weight)
    actual, expected = (torch.autograd.grad(loss, (*hidden, weight)) for loss in (ours, theirs))
    hint = "two losses before one backward pass: each keeps what is its own"
    for name, a, e in zip(("first hidden", "second hidden", "weight"), actual, expected, strict=True):
        assert_close(a, e, atol=1e-12, name=f"gradient of {name}", hint=hint)


@pytest.mark.parametrize("which", ["hidden", "weight"])
def test_chunked_gradients_of_one_input_alone(randn, which):
    p = problem(randn)
    leaf = getattr(p, which).requires_grad_()
    actual = torch.autograd.grad(chunked(p, 4, label_smoothing=0.1)(p.hidden, p.weight), leaf)[0]
    expected = torch.autograd.grad(at_once(p, smoothing=0.1)(p.hidden, p.weight), leaf)[0]
    assert_close(actual, expected, atol=1e-12, name=f"gradient of {which}, the other one needs none")


def test_chunked_loss_without_any_gradient(randn):
    p = problem(randn)
    expected = at_once(p)(p.hidden, p.weight)
    assert_close(chunked(p, 4)(p.hidden, p.weight), expected, atol=1e-12, name="loss of plain tensors")
    with torch.no_grad():
        value = chunked(p, 4)(p.hidden.requires_grad_(), p.weight.requires_grad_())
    assert_close(value, expected, atol=1e-12, name="loss under no_grad")
    assert not value.requires_grad, "under no_grad nothing requires grad"


def test_chunked_loss_of_a_tied_head(randn):
    # The embedding is the head: its gradient comes from both ends, and only autograd knows when to add.
    p, ids = problem(randn, N=6), torch.tensor([3, 1, 3, 0, 12, 7])
    embedding = randn(13, 5).requires_grad_()

    def run(loss):
        table = 2 * embedding  # so that the head is no leaf
        value = loss(table[ids].tanh(), table)
        return value, torch.autograd.grad(value, embedding)[0]

    hint = "return the gradient to autograd; do not add it to weight.grad yourself"
    for name, a, e in zip(("loss", "gradient"), run(chunked(p, 4)), run(at_once(p)), strict=True):
        assert_close(a, e, atol=1e-12, name=f"{name} with a tied head", hint=hint)
    assert embedding.grad is None, "a gradient was left on a tensor: nobody called backward()"


def test_chunked_gradients_accumulate_over_backward_calls(randn):
    p = problem(randn)
    hidden, weight = p.hidden.requires_grad_(), p.weight.requires_grad_()
    expected = torch.autograd.grad(at_once(p)(hidden, weight), (hidden, weight))
    for _ in range(2):
        chunked(p, 4)(hidden, weight).backward()
    for name, leaf, e in (("hidden", hidden, expected[0]), ("weight", weight, expected[1])):
        assert_close(leaf.grad, 2 * e, atol=1e-12, name=f"{name}.grad after two backward calls")


def test_chunked_loss_of_strided_inputs_which_stay_as_they_are(randn):
    p = problem(randn)
    p.hidden = randn(5, 22)[:, ::2].T  # (11, 5)
    p.weight = randn(5, 26)[:, ::2].T  # (13, 5)
    p.targets = torch.stack([p.targets, p.targets + 77], dim=-1)[:, 0]
    before = p.hidden.clone(), p.weight.clone(), p.targets.clone()
    hidden, weight = p.hidden.detach().requires_grad_(), p.weight.detach().requires_grad_()
    value = chunked(p, 4)(hidden, weight)
    actual = value.detach(), *torch.autograd.grad(value, (hidden, weight))
    assert_same_as_at_once(actual, gradients(at_once(p), p.hidden, p.weight), atol=1e-12)
    for name, old in zip(("hidden", "weight", "targets"), before, strict=True):
        assert torch.equal(getattr(p, name), old), f"{name} was changed"


def test_chunked_loss_of_extreme_logits(randn):
    p = problem(randn, scale=1e4)
    actual = gradients(chunked(p, 4), p.hidden, p.weight)
    expected = gradients(at_once(p), p.hidden, p.weight)
    assert_same_as_at_once(actual, expected, atol=1e-7, rtol=1e-12, hint="stay in logs")


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_chunked_loss_in_float32(randn, device, chunk_size):
    p = problem(randn, 37, 129, 6, dtype=torch.float32, device=device)
    actual = gradients(chunked(p, chunk_size, label_smoothing=0.1), p.hidden, p.weight)
    expected = gradients(at_once(p, smoothing=0.1), p.hidden, p.weight)
    assert_same_as_at_once(actual, expected, atol=5e-6, dtype=torch.float32)


@NARROW
def test_chunked_loss_of_narrow_dtypes(randn, dtype):
    p = problem(randn, 37, 129, 6, dtype=dtype, scale=0.5)
    actual = gradients(chunked(p, 5, label_smoothing=0.1), p.hidden, p.weight)
    expected = gradients(at_once(p, smoothing=0.1), p.hidden, p.weight)
    assert_same(
        actual[0], expected[0], atol=2e-3, dtype=torch.float32, name="loss", hint="the loss is float32"
    )
    for name, a, e in zip(("hidden", "weight"), actual[1:], expected[1:], strict=True):
        assert_same(a, e, atol=2e-3, rtol=0.02, dtype=dtype, name=f"gradient of {name}")


def test_chunked_sums_do_not_stop_growing_in_bfloat16(randn):
    # 700 equal rows: every chunk adds the same. In bfloat16 a sum of 256 equal numbers no longer grows.
    N, V, E = 700, 5, 3
    p = problem(randn, N, V, E, dtype=torch.bfloat16, ignored=0.0)
    p.hidden[:], p.targets[:] = p.hidden[0].clone(), 2
    actual = gradients(chunked(p, 1), p.hidden, p.weight)
    expected = gradients(at_once(p), p.hidden, p.weight)
    hint = (
        "summed over chunks in bfloat16, small summands vanish: sum in float32 and convert once, at the end"
    )
    assert_same(actual[0], expected[0], atol=0, rtol=0.02, dtype=torch.float32, name="loss", hint=hint)
    size = expected[2].abs().max().item()
    assert_same(actual[2], expected[2], atol=0.02 * size, name="gradient of weight", hint=hint)


def test_chunked_loss_refuses_what_makes_no_sense(randn):
    hidden, weight, targets = randn(6, 3), randn(7, 3), tokens(randn, 6, V=7)

    def call(hidden=hidden, weight=weight, targets=targets, chunk_size=2, **options):
        return chunked_cross_entropy(hidden, weight, targets, chunk_size=chunk_size, **options)

    for chunk_size in (0, -1):
        refused(call, chunk_size=chunk_size, why=f"chunks of {chunk_size} rows")
    for wrong in (-1, 7, -101):
        bad = targets.clone()
        bad[4] = wrong
        refused(call, targets=bad, why=f"a target of {wrong} with 7 tokens")
        call(targets=bad, ignore_index=wrong)
    for shape in ((5,), (7,), (1,), (6, 1), (2, 3)):
        refused(call, targets=torch.ones(shape, dtype=torch.long), why=f"targets {shape} for 6 rows")
    for smoothing in (-0.1, 1.1):
        refused(call, label_smoothing=smoothing, why=f"label smoothing {smoothing}")


def test_chunked_loss_counts_exactly_in_bfloat16():
    # bfloat16 has no 257. Zero weights make every token equally likely.
    hidden, weight = torch.ones(257, 3, dtype=torch.bfloat16), torch.zeros(5, 3, dtype=torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, torch.ones(257, dtype=torch.int64), chunk_size=50)
    hint = "in which dtype are the tokens counted?"
    assert_close(loss.double(), torch.tensor(math.log(5), dtype=torch.float64), atol=1e-4, hint=hint)


# --- chunked_cross_entropy: the memory --------------------------------------------------------


def measure(p, chunk_size, *, wanted=("hidden", "weight"), **options):
    """Run forward and backward under the meter; return it."""
    leaves = [getattr(p, name).requires_grad_() for name in wanted]
    with Meter(p.hidden, p.weight, p.targets) as meter:
        loss = chunked(p, chunk_size, **options)(p.hidden, p.weight)
        if leaves:
            grads = torch.autograd.grad(loss, leaves)
            assert len(grads) == len(leaves)
    return meter


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


WANTED = [("hidden", "weight"), ("hidden",), ("weight",), ()]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda names: "_".join(names) or "nothing")
def test_chunked_peak_memory_is_that_of_some_chunks(randn, wanted):
    N, V, E, C = 1040, 311, 3, 8
    p = problem(randn, N, V, E, dtype=torch.float32, ignored=0.1)
    meter = measure(p, C, wanted=wanted, label_smoothing=0.1)
    allowed = 16 * C * V * 4 + 8 * nbytes(p.hidden, p.weight, p.targets)
    assert meter.peak <= allowed < N * V * 4 / 3, (
        f"{meter.peak:,} bytes were alive at the same time, in tensors made on the way forward and back; "
        f"promised are {allowed:,}. All logits would be {N * V * 4:,}: who keeps those of finished chunks?"
    )


def test_chunked_peak_memory_in_bfloat16(randn):
    N, V, E, C = 1040, 311, 3, 8
    p = problem(randn, N, V, E, dtype=torch.bfloat16, ignored=0.1)
    meter = measure(p, C)
    allowed = 16 * C * V * 4 + 8 * nbytes(p.hidden, p.weight, p.targets)
    assert meter.peak <= allowed, (
        f"{meter.peak:,} bytes were alive at the same time, promised are {allowed:,}"
    )


def test_chunked_loss_takes_chunk_size_rows_at_a_time(randn):
    # From the other side: memory that the caller grants is used, or the loop is needlessly long.
    N, V, E = 96, 61, 3
    p = problem(randn, N, V, E, dtype=torch.float32, ignored=0.0)
    for C in (1, 8, 48, 96, 500):
        rows = measure(p, C).largest / (V * 4)
        assert rows >= min(C, N), f"chunk_size={C}, but at most {rows:.3g} rows of logits were made at a time"


def test_chunked_peak_memory_is_below_that_of_a_loop_under_autograd(randn):
    # What the meter says of all logits at once, and of a loop that leaves every chunk's logits to autograd.
    N, V = 256, 61
    p = problem(randn, N, V, 3, dtype=torch.float32, ignored=0.0)
    p.hidden.requires_grad_()

    def at_once():
        return F.cross_entropy(p.hidden @ p.weight.T, p.targets)

    def loop():
        rows = [slice(start, start + 8) for start in range(0, N, 8)]
        return sum(F.cross_entropy(p.hidden[r] @ p.weight.T, p.targets[r], reduction="sum") for r in rows) / N

    ours = measure(p, 8, wanted=("hidden",)).peak
    for name, run in (("all logits at once", at_once), ("a loop under autograd", loop)):
        with Meter(p.hidden, p.weight, p.targets) as meter:
            torch.autograd.grad(run(), p.hidden)
        assert meter.peak >= N * V * 4, f"the meter missed the logits of {name}"
        assert ours < meter.peak / 2, (
            f"{ours:,} bytes were alive at the same time, with {name} {meter.peak:,}"
        )
