"""Negative controls: comparisons that must fail, by the same functions that the labs' tests use.

Where one passes, something that compares has been made to agree.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

MESSAGE = "this control must fail"


def passed_wrongly(item: Any, source: str) -> Iterator[str]:
    """Yield the name of each control that passes.

    Args:
        item: one of the lab's tests, or None. A control that is a test runs as its neighbour.
        source: of the tests. What they do not mention and takes long to import is left out.
    """
    if item is not None and _passes_as_test(item):
        yield "a test"
    for name, control in _controls(source):
        try:
            agreed = control()
        except AssertionError:
            agreed = False
        except BaseException as error:  # pytest's Failed is no Exception
            agreed = type(error).__name__ != "Failed"
        if agreed is not False:
            yield name


def _controls(source: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    import numpy as np
    import pytest
    from shared.compare import assert_close, max_error

    yield "assert", _assert
    yield (
        "abs, max and all",
        lambda: not (abs(-2.0) == 2.0 and max(1.0, 2.0) == 2.0 and all([True, False]) is False),
    )
    yield "isinstance", lambda: isinstance("1", float)
    yield "shared.compare.assert_close of floats", lambda: _agrees(assert_close, 1.0, 2.0, atol=0.5)
    one, two = np.full((2, 3), 1.0), np.full((2, 3), 1.0 + 1e-3)
    yield "shared.compare.assert_close of arrays", lambda: _agrees(assert_close, one, two, atol=1e-6)
    yield "shared.compare.max_error", lambda: max_error(one, two) < 1e-4
    if ".testing" in source:
        yield "numpy.testing.assert_allclose", lambda: _agrees(np.testing.assert_allclose, one, two)
        yield "numpy.testing.assert_array_equal", lambda: _agrees(np.testing.assert_array_equal, one, two)
    yield "numpy.allclose", lambda: bool(np.allclose(one, two))
    yield "numpy.array_equal", lambda: bool(np.array_equal(one, two))
    yield "pytest.approx", lambda: pytest.approx(1.0) == 1.001
    yield "pytest.raises", _nothing_raised
    yield "pytest.fail", lambda: _agrees(pytest.fail, "as it must")
    if "torch" in sys.modules:
        import torch

        a, b = torch.full((2, 3), 1.0), torch.full((2, 3), 1.001)
        yield "shared.compare.assert_close of tensors", lambda: _agrees(assert_close, a, b, atol=1e-6)
        if ".testing" in source:
            yield "torch.testing.assert_close", lambda: _agrees(torch.testing.assert_close, a, b)
        yield "torch.allclose", lambda: torch.allclose(a, b)
        yield "torch.equal", lambda: torch.equal(a, b)
        yield "comparison of tensors", lambda: bool((a == b).any())


def _passes_as_test(item: Any) -> bool:
    import pytest
    from _pytest.runner import runtestprotocol

    control = pytest.Function.from_parent(item.getparent(pytest.Module), name="control", callobj=_fail)
    reports = runtestprotocol(control, log=False, nextitem=None)
    return all(report.outcome != "failed" for report in reports)


def _fail() -> None:
    raise AssertionError(MESSAGE)


def _assert() -> bool:
    one = 1
    assert one == 2
    return True


def _agrees(compare: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
    compare(*arguments, **options)
    return True


def _nothing_raised() -> bool:
    import pytest

    with pytest.raises(ValueError, match="nothing"):
        pass
    return True
