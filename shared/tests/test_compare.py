import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from shared.compare import assert_close, max_error


def message_of(actual, expected, **options):
    """What assert_close says; it must fail."""
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, expected, **{"atol": 1e-6, **options})
    return str(caught.value)


KINDS = {
    "tensor": lambda values: torch.tensor(values, dtype=torch.float64),
    "parameter": lambda values: torch.nn.Parameter(torch.tensor(values, dtype=torch.float64)),
    "array": lambda values: np.array(values),
    "list": lambda values: values,
}


# --- values -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_equal_values_of_every_kind_pass(make):
    assert_close(make([[1.0, 2.0], [3.0, -4.0]]), make([[1.0, 2.0], [3.0, -4.0]]), atol=0)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_one_wrong_element_fails_and_the_message_says_where_and_by_how_much(make):
    message = message_of(
        make([[1.0, 2.0], [3.5, -4.0]]), make([[1.0, 2.0], [3.0, -4.0]]), hint="is it scaled?", name="weights"
    )
    assert message == (
        "is it scaled?\n"
        "weights differs from the expected value in 1 of 4 elements; the largest difference is 0.5 "
        "at index (1, 0): got 3.5, expected 3 (allowed: 1e-06)"
    )


def test_the_tolerance_is_atol_plus_rtol_times_the_expected_value():
    assert_close([100.5], [100.0], atol=0.5)
    assert_close([101.5], [100.0], atol=0.5, rtol=0.01)
    assert "(allowed: 0.5 + 0.01 relative)" in message_of([101.75], [100.0], atol=0.5, rtol=0.01)
    # Relative to the expected value, not to a wrong answer that happens to be large.
    message_of([1000.0], [1.0], atol=0, rtol=0.5)


def test_an_error_exactly_at_the_tolerance_passes_and_the_next_float_does_not():
    assert_close([0.5], [0.0], atol=0.5)
    message_of([math.nextafter(0.5, 1.0)], [0.0], atol=0.5)


@pytest.mark.parametrize(
    ("actual", "expected"), [(math.nan, 1.0), (1.0, math.nan), (math.nan, math.nan), (math.nan, math.inf)]
)
@pytest.mark.parametrize("atol", [0.0, 1e300])
def test_nan_equals_nothing_whatever_the_tolerance(actual, expected, atol):
    assert "nan" in message_of([0.0, actual], [0.0, expected], atol=atol)
    message_of(actual, expected, atol=atol)
    message_of(torch.tensor(actual), torch.tensor(expected), atol=atol)


@pytest.mark.parametrize(
    ("actual", "expected"), [(math.inf, 1.0), (1.0, math.inf), (math.inf, -math.inf), (-math.inf, math.inf)]
)
def test_an_infinity_equals_only_itself_whatever_the_tolerance(actual, expected):
    message_of([actual], [expected], atol=1e300, rtol=1e300)
    assert_close([actual, expected], [actual, expected], atol=0)


def test_a_nan_is_reported_before_any_number():
    message = message_of([math.inf, 5.0, math.nan], [0.0, 0.0, 0.0])
    assert "in 3 of 3 elements" in message
    assert "at index (2,): got nan, expected 0" in message


def test_the_largest_of_several_differences_is_reported():
    assert "at index (1,): got 7, expected 0" in message_of([2.0, 7.0, -3.0], [0.0, 0.0, 0.0])


def test_no_warning_is_raised_for_extreme_values():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message_of([1e308, math.inf, math.nan], [-1e308, math.inf, 0.0], rtol=1e308)
        assert_close([math.inf], [math.inf], atol=0, rtol=1.0)


def test_large_integers_are_compared_exactly():
    big = 2**53
    assert_close(np.array([big + 1]), np.array([big + 1]), atol=0)
    assert f"got {big + 1}, expected {big}" in message_of(np.array([big + 1]), np.array([big]), atol=0)
    message_of(torch.tensor([big + 1]), torch.tensor([big]), atol=0)
    message_of(np.array([2**64 - 1], np.uint64), np.array([2**64 - 2], np.uint64), atol=0)


def test_unsigned_integers_do_not_wrap_around():
    assert "the largest difference is 1" in message_of(np.array([0], np.uint8), np.array([1], np.uint8))
    assert_close(np.array([3], np.uint8), np.array([4], np.uint8), atol=1)


def test_integers_too_large_for_an_array_are_numbers_all_the_same():
    assert_close([10**30], [10**30], atol=0)
    message_of([10**30], [10**30 + 10**20], atol=0)


def test_booleans_are_compared_by_value():
    assert_close(np.array([True, False]), np.array([True, False]), atol=0)
    assert "got True, expected False" in message_of(torch.tensor([True]), torch.tensor([False]), atol=0)


def test_complex_values_are_compared_in_both_parts():
    assert_close(np.array([1 + 2j]), np.array([1 + 2j]), atol=0)
    assert "the largest difference is 4" in message_of(torch.tensor([1 + 2j]), torch.tensor([1 - 2j]))
    message_of(np.array([1 + 2j]), np.array([1.0]))
    message_of(np.array([complex(1, math.nan)]), np.array([1 + 0j]), atol=1e300)
    assert_close(np.array([complex(math.inf, 1)]), np.array([complex(math.inf, 1)]), atol=0)
    # complex64 in, but the difference is not rounded to complex64
    assert_close(np.array([0.1 + 0j], np.complex64), np.array([0.1 + 0j], np.complex64), atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_low_precision_tensors_are_compared_in_float64(dtype):
    value = torch.tensor([1.0, 0.5, -2.0]).to(dtype)
    assert_close(value, value.double(), atol=0)
    assert_close(value, value.clone(), atol=0)
    assert "in 3 of 3 elements; the largest difference is 0.001" in message_of(
        value, value.double() + 1e-3, atol=1e-4
    )


# --- shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ((2, 3), (3, 2)),
        ((3,), (1, 3)),
        ((3, 1), (3,)),
        ((), (1,)),
        ((0,), (1,)),
        ((0, 3), (0, 2)),
        ((1,), (3,)),
    ],
)
def test_shapes_must_be_equal_and_are_never_broadcast(actual, expected):
    message = message_of(np.zeros(actual), np.zeros(expected), name="output")
    assert message == f"output has shape {actual}, expected {expected}"
    message_of(torch.zeros(actual), torch.zeros(expected))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (1, 1, 1)])
def test_scalars_and_empty_arrays_can_be_equal(shape):
    assert_close(np.ones(shape), np.ones(shape), atol=0)
    assert_close(torch.ones(shape), torch.ones(shape), atol=0)


def test_the_message_about_a_scalar_names_no_index():
    message = message_of(torch.tensor(1.5), torch.tensor(1.0))
    assert "in 1 of 1 elements; the largest difference is 0.5: got 1.5, expected 1" in message


def test_empty_lists_are_equal():
    assert_close([], [], atol=0)
    assert_close([[], []], [[], []], atol=0)


# --- kinds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (np.ones(2), torch.ones(2), "result should be a torch.Tensor, but is a NumPy array"),
        (torch.ones(2), np.ones(2), "result should be a NumPy array, but is a torch.Tensor"),
        ([1.0, 1.0], np.ones(2), "result should be a NumPy array, but is a list"),
        (np.ones(2), [1.0, 1.0], "result should be a list, but is a NumPy array"),
        (torch.tensor(1.0), 1.0, "result should be a number, but is a torch.Tensor"),
        (np.array(1.0), 1.0, "result should be a number, but is a NumPy array"),
        (1.0, np.array(1.0), "result should be a NumPy array, but is a number"),
        (None, torch.ones(2), "result should be a torch.Tensor, but is a builtins.NoneType"),
        (1, True, "result should be a boolean, but is a number"),
        ("1.0", 1.0, "result should be a number, but is a builtins.str"),
    ],
)
def test_kinds_must_be_equal(actual, expected, message):
    assert message_of(actual, expected) == message


def test_a_tuple_may_answer_a_list_and_any_real_number_another():
    assert_close((1.0, 2.0), [1.0, 2.0], atol=0)
    for number in (np.float64(2.0), np.float32(2.0), np.int64(2), 2, 2 + 0j):
        assert_close(number, 2.0, atol=0)
    assert_close(np.bool_(True), True, atol=0)


@pytest.mark.parametrize(
    "value",
    [
        ["1.5"],
        [None],
        [[1.0], [1.0, 2.0]],
        [object()],
        [{}],
        np.array(["1.5"]),
        np.array(["2020"], "datetime64[Y]"),
    ],
    ids=["text", "none", "ragged", "object", "dictionary", "array of text", "array of dates"],
)
def test_what_is_no_rectangle_of_numbers_fails_and_is_shown(value):
    expected = [1.5] if isinstance(value, list) else np.array([1.5])
    assert message_of(value, expected).startswith("result is no rectangle of numbers: ")


def test_a_list_of_tensors_with_gradients_is_no_list_of_numbers():
    message = message_of([torch.tensor([1.0], requires_grad=True)], [[1.0]])
    assert "no rectangle of numbers" in message


def test_tensors_without_readable_values_fail_with_a_sentence():
    assert "no rectangle of numbers" in message_of(torch.ones(2, device="meta"), torch.ones(2))
    assert "no rectangle of numbers" in message_of(torch.eye(2).to_sparse(), torch.eye(2))


def test_an_unreadable_expected_value_is_not_blamed_on_the_result():
    assert "the expected value is no rectangle" in message_of([1.0], [None])


# --- tensors in every state -------------------------------------------------------------


def test_tensors_with_gradients_transposed_strided_or_conjugated_are_compared_by_value():
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    assert_close(x * 1, x.detach(), atol=0)
    assert_close(x.t(), x.detach().t().contiguous(), atol=0)
    assert_close(x[:, ::2], torch.tensor([[0.0, 2.0], [3.0, 5.0]]), atol=0)
    assert_close(x[:1].expand(4, 3), x.detach()[:1].repeat(4, 1), atol=0)
    z = torch.tensor([1 + 2j])
    assert_close(z.conj(), torch.tensor([1 - 2j]), atol=0)
    assert_close(z.conj().imag, torch.tensor([-2.0]), atol=0)
    message_of(x.t(), x.detach().t() + 1)


def test_strided_and_reversed_arrays_are_compared_by_value():
    x = np.arange(12.0).reshape(3, 4)
    assert_close(x[::-1, ::2], x[::-1, ::2].copy(), atol=0)
    assert_close(np.asfortranarray(x), x, atol=0)


def test_neither_argument_is_modified():
    x, y = torch.ones(3, requires_grad=True), np.ones(3, np.float32)
    assert_close(x, torch.ones(3), atol=0)
    assert_close(y, np.ones(3), atol=0)
    assert x.requires_grad
    assert x.grad is None
    assert y.dtype == np.float32


# --- liars --------------------------------------------------------------------------------


class LyingTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return True

    def __eq__(self, other):
        return True

    __hash__ = torch.Tensor.__hash__


class LyingArray(np.ndarray):
    def __array_ufunc__(self, *args, **kwargs):
        return np.zeros(())

    def __eq__(self, other):
        return np.ones(self.shape, bool)

    __hash__ = None


class AlwaysEqual(type):
    def __eq__(cls, other):
        return True

    def __hash__(cls):
        return hash(torch.Tensor)


def test_a_tensor_subclass_that_always_agrees_is_refused():
    liar = torch.zeros(3).as_subclass(LyingTensor)
    assert "LyingTensor" in message_of(liar, torch.ones(3))


def test_a_tensor_subclass_that_calls_itself_torch_tensor_is_refused():
    fake = type("Tensor", (LyingTensor,), {"__module__": "torch"})
    message = message_of(torch.zeros(3).as_subclass(fake), torch.ones(3))
    assert message == "result should be a torch.Tensor, but is a class that calls itself torch.Tensor"


def test_a_parameter_subclass_and_an_array_subclass_are_refused():
    class Weights(torch.nn.Parameter):
        pass

    assert "Weights" in message_of(Weights(torch.zeros(3)), torch.ones(3))
    assert "LyingArray" in message_of(np.zeros(3).view(LyingArray), np.ones(3))
    assert "MaskedArray" in message_of(np.ma.masked_all(3), np.ones(3))


def test_a_class_that_claims_to_be_every_class_is_refused():
    class Chameleon(metaclass=AlwaysEqual):
        def __array__(self, dtype=None, copy=None):
            return np.ones(3)

        @property
        def __class__(self):
            return torch.Tensor

    assert "Chameleon" in message_of(Chameleon(), torch.ones(3))
    assert "Chameleon" in message_of(Chameleon(), np.ones(3))


def test_number_and_list_subclasses_are_refused():
    class Float(float):
        def __sub__(self, other):
            return 0.0

    class List(list):
        pass

    assert "Float" in message_of(Float(0.0), 1.0)
    assert "List" in message_of(List([0.0]), [1.0])


def test_methods_hung_on_a_tensor_have_no_say():
    liar, truth = torch.zeros(3), torch.ones(3)
    for method in ("detach", "cpu", "double", "numpy", "is_complex", "resolve_conj", "resolve_neg"):
        setattr(liar, method, lambda *args: truth)
    assert "got 0, expected 1" in message_of(liar, truth)


def test_a_mode_that_was_left_on_has_no_say():
    class Liar(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return torch.ones(3)

    actual, expected = torch.zeros(3), torch.ones(3)
    with Liar():
        assert "got 0, expected 1" in message_of(actual, expected)


def test_an_object_whose_repr_raises_gets_a_sentence():
    class Shy:
        def __repr__(self):
            raise RuntimeError("no")

    assert "result is no rectangle of numbers" in message_of([Shy()], [1.0])


# --- max_error ----------------------------------------------------------------------------


def test_max_error_is_the_largest_absolute_difference():
    assert max_error([1.0, 5.0, -3.0], [1.0, 4.0, -1.0]) == 2.0
    assert max_error(torch.tensor([1 + 1j]), torch.tensor([1 - 1j])) == 2.0
    assert max_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
    assert max_error(torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(1.0)) == 2.0


@pytest.mark.parametrize(
    ("actual", "expected"), [([math.nan], [1.0]), ([1.0], [math.nan]), ([math.nan, 5], [1, 0])]
)
def test_max_error_of_a_nan_is_nan(actual, expected):
    assert math.isnan(max_error(actual, expected))


def test_max_error_of_infinities():
    assert max_error([math.inf, 1.0], [math.inf, 1.5]) == 0.5
    assert max_error([math.inf], [-math.inf]) == math.inf


def test_max_error_needs_equal_shapes():
    with pytest.raises(AssertionError, match=r"shape \(2,\), expected \(1, 2\)"):
        max_error([1.0, 2.0], [[1.0, 2.0]])


# --- properties ---------------------------------------------------------------------------

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
NUMBERS = st.floats(allow_nan=False, width=64)
ARRAYS = SHAPES.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=NUMBERS))
NOT_EMPTY = ARRAYS.filter(lambda array: array.size > 0)
AS = st.sampled_from([np.array, torch.tensor, lambda array: array.tolist()])


@PROPERTY
@given(array=ARRAYS, make=AS)
def test_whatever_holds_no_nan_equals_its_copy_exactly(array, make):
    assert_close(make(array), make(array.copy()), atol=0)
    assert max_error(make(array), make(array.copy())) == 0.0


@PROPERTY
@given(array=NOT_EMPTY, make=AS, data=st.data())
def test_a_nan_anywhere_fails(array, make, data):
    broken = array.copy()
    broken.flat[data.draw(st.integers(0, array.size - 1))] = math.nan
    message_of(make(broken), make(array), atol=math.inf if np.isfinite(array).all() else 1e300)


@PROPERTY
@given(array=NOT_EMPTY, make=AS, data=st.data())
def test_any_single_difference_beyond_the_tolerance_fails_and_its_index_is_named(array, make, data):
    array = np.asarray(np.clip(array, -1e6, 1e6))
    at = np.unravel_index(data.draw(st.integers(0, array.size - 1)), array.shape)
    wrong = array.copy()
    wrong[at] += data.draw(st.sampled_from([-1.0, 1.0])) * data.draw(st.floats(1e-3, 1e6))
    message = message_of(make(wrong), make(array), atol=1e-4)
    assert "in 1 of" in message
    assert array.ndim == 0 or f"at index {tuple(int(i) for i in at)}" in message
    assert_close(make(wrong), make(array), atol=1.1e6)


@PROPERTY
@given(
    actual=hnp.arrays(np.float64, 4, elements=st.floats(-1e3, 1e3)),
    expected=hnp.arrays(np.float64, 4, elements=st.floats(-1e3, 1e3)),
    atol=st.floats(0, 1e3),
    rtol=st.floats(0, 2),
)
def test_it_agrees_with_a_loop_over_the_elements(actual, expected, atol, rtol):
    close = all(
        abs(a - e) <= atol + rtol * abs(e) for a, e in zip(actual.tolist(), expected.tolist(), strict=True)
    )
    if close:
        assert_close(actual, expected, atol=atol, rtol=rtol)
    else:
        message_of(actual, expected, atol=atol, rtol=rtol)
