"""Comparison with an oracle, in float64, with messages that say where and by how much."""

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NUMPY_NUMBERS = tuple(t for t in set(np.sctypeDict.values()) if issubclass(t, np.number))


def assert_close(
    actual: Any,
    expected: Any,
    *,
    atol: float,
    rtol: float = 0.0,
    hint: str = "",
    name: str = "result",
) -> None:
    """Fail unless `actual` equals `expected` in shape, kind and, within tolerance, value.

    An element passes when |actual - expected| <= atol + rtol * |expected|. NaN equals
    nothing; infinities must be equal. Integers are compared exactly, also beyond 2**53.

    Args:
        actual: what the code under test returned: a tensor, an array, or (nested lists of) floats.
        expected: the oracle's value, of the same kind. A tensor is expected to be answered by
            a tensor, an array by an array and a list by a list. Subclasses of these are other kinds.
        atol: absolute tolerance.
        rtol: relative tolerance.
        hint: what is probably wrong when the values differ; the first line of the failure.
        name: what to call `actual` in the message.
    """
    __tracebackhide__ = True
    lead = f"{hint}\n" if hint else ""
    kinds = _kind(actual), _kind(expected)
    if kinds[0] != kinds[1]:
        raise AssertionError(f"{name} should be a {kinds[1]}, but is a {kinds[0]}")
    a, e = _numbers(actual, name), _numbers(expected, "the expected value")
    if a.shape != e.shape:
        raise AssertionError(f"{name} has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
    error = _errors(a, e)
    with np.errstate(over="ignore"):
        magnitude = np.abs(_float64(e))
        wrong = ~(error <= atol + rtol * np.where(np.isfinite(magnitude), magnitude, 0.0))
    if not wrong.any():
        return
    # The worst element: a NaN before any number.
    at = np.unravel_index(int(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1.0))), a.shape)
    where = f" at index {tuple(int(i) for i in at)}" if a.ndim else ""
    raise AssertionError(
        f"{lead}{name} differs from the expected value in {int(wrong.sum())} of {wrong.size} elements; "
        f"the largest difference is {error[at]:.3g}{where}: got {_shown(a[at])}, expected {_shown(e[at])} "
        f"(allowed: {atol:g}" + (f" + {rtol:g} relative" if rtol else "") + ")"
    )


def max_error(actual: Any, expected: Any) -> float:
    """Return the largest absolute difference of two tensors, arrays or lists of equal shape.

    NaN where either has a NaN, so that a comparison with a bound fails. Equal infinities
    differ by 0.
    """
    a, e = _numbers(actual, "the result"), _numbers(expected, "the expected value")
    if a.shape != e.shape:
        raise AssertionError(f"result has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
    return float(_errors(a, e).max(initial=0.0))


def _errors(a: Array, e: Array) -> Array:
    """Return |a - e| in float64: NaN where either is NaN, 0 where both are the same infinity."""
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(_float64(a) - _float64(e))
        if a.dtype.kind in "biu" and e.dtype.kind in "biu":
            # Different integers differ by 1 or more, whatever float64 makes of them.
            return np.where(a == e, 0.0, np.maximum(error, 1.0))
        return np.where(_float64(a) == _float64(e), 0.0, error)


def _kind(value: Any) -> str:
    # The exact class by identity, not isinstance or ==: a subclass can redefine every operation
    # used to check it, and a metaclass the comparison of classes.
    cls = type(value)
    torch = sys.modules.get("torch")
    if torch is not None and (cls is torch.Tensor or cls is torch.nn.Parameter):
        return "torch.Tensor"
    if cls is np.ndarray:
        return "NumPy array"
    if cls is list or cls is tuple:
        return "list"
    if cls is bool or cls is np.bool_:
        return "boolean"
    if cls is float or cls is int or cls is complex or any(cls is number for number in _NUMPY_NUMBERS):
        return "number"
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name if name != "torch.Tensor" else "class that calls itself torch.Tensor"


def _numbers(value: Any, name: str) -> Array:
    """Return `value` as an array of booleans, integers, float64 or complex128."""
    try:
        array = _of_tensor(value) if _kind(value) == "torch.Tensor" else np.asarray(value)
        if array.dtype.kind == "O":  # such as integers too large for int64
            array = np.array([float(x) for x in array.flat], dtype=np.float64).reshape(array.shape)
        if array.dtype.kind in "biu":
            return array
        if array.dtype.kind in "fc":
            return _float64(array)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass  # the sentence below says it better
    raise AssertionError(f"{name} is no rectangle of numbers: {_repr(value)}")


def _of_tensor(tensor: Any) -> Array:
    import torch

    # Unbound methods outside every mode: neither attributes set on this tensor nor a mode
    # that was left switched on have a say.
    with torch._C.DisableTorchFunction():
        plain = torch.Tensor.resolve_neg(torch.Tensor.resolve_conj(torch.Tensor.detach(tensor)))
        plain = torch.Tensor.cpu(plain)
        if plain.dtype.is_floating_point:
            plain = torch.Tensor.double(plain)  # NumPy has no bfloat16
        return np.asarray(torch.Tensor.numpy(plain))


def _float64(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)


def _shown(number: Any) -> str:
    return str(number) if number.dtype.kind in "biu" else f"{number:.8g}"


def _repr(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except Exception as error:
        return f"a {type(value).__name__} whose repr raises {type(error).__name__}"
