"""Comparison with an oracle, in float64, with messages that say where and by how much."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


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
    nothing; infinities must be equal.

    Args:
        actual: what the code under test returned: a tensor, an array, or (nested lists of) floats.
        expected: the oracle's value, of the same kind. A tensor is expected to be answered by
            a tensor, an array by an array and a list by a list.
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
    a, e = _float64(actual), _float64(expected)
    if a.shape != e.shape:
        raise AssertionError(f"{name} has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
    with np.errstate(invalid="ignore"):
        error = np.where(a == e, 0.0, np.abs(a - e))
        wrong = ~(error <= atol + rtol * np.abs(np.where(np.isfinite(e), e, 0.0)))
    if not wrong.any():
        return
    # The worst element: a NaN before any number.
    at = np.unravel_index(int(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1.0))), a.shape)
    where = f" at index {tuple(int(i) for i in at)}" if a.ndim else ""
    raise AssertionError(
        f"{lead}{name} differs from the expected value in {int(wrong.sum())} of {wrong.size} elements; "
        f"the largest difference is {error[at]:.3g}{where}: got {a[at]:.8g}, expected {e[at]:.8g} "
        f"(allowed: {atol:g}" + (f" + {rtol:g} relative" if rtol else "") + ")"
    )


def max_error(actual: Any, expected: Any) -> float:
    """Return the largest absolute difference of two tensors, arrays or lists of equal shape.

    NaN where either has a NaN, so that a comparison with a bound fails.
    """
    a, e = _float64(actual), _float64(expected)
    if a.shape != e.shape:
        raise AssertionError(f"result has shape {tuple(a.shape)}, expected {tuple(e.shape)}")
    return float(np.abs(a - e).max(initial=0.0))


def _kind(value: Any) -> str:
    # The exact class, not isinstance: a subclass can redefine every operation used to check it.
    cls = type(value)
    if cls.__module__.startswith("torch") and cls.__name__ in ("Tensor", "Parameter"):
        return "torch.Tensor"
    if cls is np.ndarray:
        return "NumPy array"
    if cls in (list, tuple):
        return "list"
    if cls in (float, int) or isinstance(value, np.floating | np.integer):
        return "number"
    return f"{cls.__module__}.{cls.__qualname__}"


def _float64(value: Any) -> Array:
    if _kind(value) == "torch.Tensor":
        value = value.detach().cpu()
        value = value.double().numpy() if not value.is_complex() else value.numpy()
    try:
        array = np.asarray(value)
        return array if np.iscomplexobj(array) else array.astype(np.float64)
    except (TypeError, ValueError):
        raise AssertionError(f"the result is no rectangle of numbers: {value!r:.200}") from None
