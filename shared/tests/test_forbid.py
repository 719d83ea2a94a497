import functools
import importlib
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shared.code_under_test import CodeUnderTest
from shared.compare import assert_close
from shared.course import LabFolder
from shared.forbid import Forbidden
from torch import nn

HEADER = """
import contextlib, functools, threading
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
"""


class Lab:
    """A lab whose `attention.py` is the given source, watched by a `Forbidden`."""

    def __init__(self, folder):
        self._folder = folder
        self._open = []
        self.forbidden = None

    def code(self, source):
        """Import the source as the code under test and return its module."""
        (self._folder / "src").mkdir(exist_ok=True)
        (self._folder / "src" / "attention.py").write_text(HEADER + source)
        self._code = CodeUnderTest(
            LabFolder("ch01/lab01", self._folder, ("attention.py",)), self._folder / "src"
        )
        active = self._code.active()
        active.__enter__()
        self._open.append(lambda: active.__exit__(None, None, None))
        return importlib.import_module("attention")

    def tests(self, source):
        """Import the source as a test module of the lab."""
        (self._folder / "tests").mkdir(exist_ok=True)
        file = self._folder / "tests" / "test_attention.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("lab_tests", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def forbid(self, *targets, why="", tests=None):
        if self.forbidden is None:
            self.forbidden = Forbidden(self._code, tests)
            self._open.append(self.forbidden.close)
        self.forbidden(*targets, why=why)

    def close(self):
        while self._open:
            self._open.pop()()


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    yield lab
    lab.close()


@pytest.fixture
def q():
    return torch.randn(2, 3, 5, 4, dtype=torch.float64)


def refused(call, *args):
    """The message with which `call` is refused."""
    with pytest.raises(pytest.fail.Exception) as caught:
        call(*args)
    return str(caught.value)


SDPA = "scaled_dot_product_attention"


# --- PyTorch functions, by every road ---------------------------------------------------------

ROADS_TO_SDPA = {
    "by its full name": "def f(q): return F.scaled_dot_product_attention(q, q, q)",
    "an alias made at import": (
        "from torch.nn.functional import scaled_dot_product_attention as g\ndef f(q): return g(q, q, q)"
    ),
    "the name below": "def f(q): return torch._C._nn.scaled_dot_product_attention(q, q, q)",
    "getattr": "def f(q): return getattr(F, 'scaled_dot' + '_product_attention')(q, q, q)",
    "aten": "def f(q): return torch.ops.aten.scaled_dot_product_attention(q, q, q)",
    "an overload of aten": "def f(q): return torch.ops.aten.scaled_dot_product_attention.default(q, q, q)",
    "the private kernel": "def f(q): return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]",
    "the private mathematics": "def f(q): return torch.ops.aten._scaled_dot_product_attention_math(q, q, q)[0]",
    "a partial": "p = functools.partial(F.scaled_dot_product_attention)\ndef f(q): return p(q, q, q)",
    "a default argument": "def f(q, g=F.scaled_dot_product_attention): return g(q, q, q)",
    "a class attribute": (
        "class A:\n    g = staticmethod(F.scaled_dot_product_attention)\ndef f(q): return A.g(q, q, q)"
    ),
    "a closure": "def make(g):\n    return lambda q: g(q, q, q)\nf = make(F.scaled_dot_product_attention)",
    "map": "def f(q): return list(map(F.scaled_dot_product_attention, [q], [q], [q]))[0]",
    "eval": "def f(q): return eval('F.scaled_dot_product_attention(q, q, q)')",
    "a function made by eval": "f = eval('lambda q: F.scaled_dot_product_attention(q, q, q)')",
    "vmap": "def f(q): return torch.vmap(lambda x: F.scaled_dot_product_attention(x, x, x))(q)",
    "another PyTorch function": (
        "w, b = torch.randn(12, 4).double(), torch.zeros(12).double()\n"
        "def f(q): return F.multi_head_attention_forward(q[0], q[0], q[0], 4, 2, w, b, None, None, False, 0.0, w[:4],"
        " b[:4], need_weights=False)[0]"
    ),
    "a module": "m = nn.MultiheadAttention(4, 2).double()\ndef f(q): return m(q[0], q[0], q[0], need_weights=False)[0]",
    "a module with a fused kernel": (
        "m = nn.MultiheadAttention(4, 2, batch_first=True).double().eval().requires_grad_(False)\n"
        "def f(q): return m(q[0], q[0], q[0], need_weights=False)[0]"
    ),
    "a with block": "def f(q):\n    with torch.no_grad():\n        return F.scaled_dot_product_attention(q, q, q)",
    "a mode of its own": (
        "from torch.overrides import TorchFunctionMode\n"
        "class M(TorchFunctionMode):\n"
        "    def __torch_function__(self, func, types, args=(), kwargs=None): return func(*args, **(kwargs or {}))\n"
        "def f(q):\n    with M():\n        return F.scaled_dot_product_attention(q, q, q)"
    ),
}


@pytest.mark.parametrize("target", [F.scaled_dot_product_attention, SDPA], ids=["function", "name"])
@pytest.mark.parametrize("road", ROADS_TO_SDPA)
def test_sdpa_is_seen_by_every_road(lab, q, road, target):
    module = lab.code(ROADS_TO_SDPA[road])
    module.f(q)  # the road leads there
    if target == SDPA and "private" in road:
        target = "*scaled_dot_product*"
    lab.forbid(target, why="write it out")
    message = refused(module.f, q)
    assert message.endswith("is forbidden in this lab: write it out")
    assert lab.forbidden.violations == [message]


ROADS_TO_SOFTMAX = {
    "torch": "def f(x): return torch.softmax(x, -1)",
    "functional": "def f(x): return F.softmax(x, -1)",
    "an alias of the functional": "from torch.nn.functional import softmax\ndef f(x): return softmax(x, -1)",
    "a method": "def f(x): return x.softmax(-1)",
    "an unbound method": "def f(x): return torch.Tensor.softmax(x, -1)",
    "a bound method": "def f(x):\n    g = x.softmax\n    return g(-1)",
    "special": "def f(x): return torch.special.softmax(x, -1)",
    "aten": "def f(x): return torch.ops.aten.softmax.int(x, -1)",
    "private aten": "def f(x): return torch.ops.aten._softmax(x, -1, False)",
    "a module": "def f(x): return nn.Softmax(-1)(x)",
    "a module in a container": "m = nn.Sequential(nn.Identity(), nn.Softmax(-1))\ndef f(x): return m(x)",
    "inside gumbel_softmax": "def f(x): return F.gumbel_softmax(x)",
}


@pytest.mark.parametrize(
    "target",
    [F.softmax, torch.softmax, torch.Tensor.softmax, torch.ops.aten.softmax.int],
    ids=["F", "torch", "Tensor", "aten"],
)
@pytest.mark.parametrize("road", ROADS_TO_SOFTMAX)
def test_softmax_is_seen_by_every_road_whichever_of_its_functions_is_named(lab, road, target):
    module = lab.code(ROADS_TO_SOFTMAX[road])
    x = torch.randn(3, 4)
    module.f(x)
    lab.forbid(target)
    assert "softmax is forbidden in this lab" in refused(module.f, x)


def test_a_pattern_bans_what_it_matches_and_nothing_else(lab, q):
    module = lab.code(
        "def f(q): return F.scaled_dot_product_attention(q, q, q)\n"
        "def allowed(q): return (q @ q.mT / 2).softmax(-1) @ q"
    )
    lab.forbid("*scaled_dot_product*")
    assert_close(module.allowed(q), F.scaled_dot_product_attention(q, q, q), atol=1e-6)
    refused(module.f, q)


def test_two_bans_keep_their_own_reasons(lab):
    module = lab.code(
        "def f(x): return x.softmax(-1)\ndef g(x): return x.cumsum(-1)\ndef h(x): return x.exp()"
    )
    lab.forbid("softmax", why="write the exponentials")
    lab.forbid("cumsum", why="write the loop")
    x = torch.randn(3)
    assert refused(module.f, x).endswith(": write the exponentials")
    assert refused(module.g, x).endswith(": write the loop")
    assert_close(module.h(x), x.exp(), atol=1e-6)


def test_a_ban_without_a_reason_ends_with_the_sentence(lab):
    module = lab.code("def f(x): return x.softmax(-1)")
    lab.forbid("softmax")
    assert refused(module.f, torch.randn(3)) == "softmax is forbidden in this lab"


def test_an_in_place_variant_is_banned_with_its_function(lab):
    module = lab.code("def f(x): return x.cumsum_(-1)")
    lab.forbid(torch.cumsum)
    assert "cumsum_" in refused(module.f, torch.randn(3))


# --- derivatives --------------------------------------------------------------------------------

IN_BACKWARD = """
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x
    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return 2 * x * grad + 0 * x.softmax(-1)
f = Square.apply
"""


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda y, x: y.sum().backward(),
        lambda y, x: torch.autograd.grad(y.sum(), x),
        lambda y, x: torch.autograd.backward([y.sum()]),
    ],
    ids=["Tensor.backward", "autograd.grad", "autograd.backward"],
)
def test_a_call_in_the_learners_backward_is_seen(lab, differentiate):
    module = lab.code(IN_BACKWARD)
    x = torch.randn(3, requires_grad=True)
    lab.forbid("softmax")
    y = module.f(x)
    assert "softmax is forbidden" in refused(differentiate, y, x)


def test_gradients_are_right_while_something_is_forbidden(lab):
    module = lab.code("def f(x): return (x * x).sum()")
    lab.forbid("softmax")
    x = torch.randn(3, requires_grad=True)
    module.f(x).backward()
    assert_close(x.grad, 2 * x.detach(), atol=1e-6)
    (grad,) = torch.autograd.grad(module.f(x), x)
    assert_close(grad, 2 * x.detach(), atol=1e-6)


def test_methods_that_reach_their_own_c_version_work_while_something_is_forbidden(lab):
    module = lab.code(
        "def f(x):\n"
        "    y = x.unflatten(0, (2, 3))\n"
        "    y = torch.stack(y.split(1))\n"
        "    waves = x.flatten().stft(4, return_complex=True, window=torch.ones(4))\n"
        "    parts = torch.einsum('abij,abij->', y, y), torch.norm(x), x.norm(), x.unique(), 1 - x, 2 / x, waves\n"
        "    return sum(part.abs().sum() for part in parts) + len(x)\n"
    )
    x = torch.randn(6, 2)
    expected = module.f(x)
    lab.forbid("softmax")
    assert_close(module.f(x), expected, atol=1e-6)


def test_an_ordinary_error_stays_an_ordinary_error(lab):
    module = lab.code("def f(x): return torch.einsum('ij,jk->ik', x)")
    lab.forbid("softmax")
    with pytest.raises((RuntimeError, ValueError), match="operands"):
        module.f(torch.randn(2, 2))
    assert lab.forbidden.violations == []


# --- what does not count ------------------------------------------------------------------------


def test_a_test_may_use_the_function_as_its_oracle(lab, q):
    lab.code("def f(q): return q")
    lab.forbid(F.scaled_dot_product_attention, nn.MultiheadAttention, F.softmax, np.einsum)
    F.scaled_dot_product_attention(q, q, q)
    F.softmax(q, -1)
    nn.MultiheadAttention(4, 2).double()(q[0], q[0], q[0])
    np.einsum("i,i", np.ones(2), np.ones(2))
    assert lab.forbidden.violations == []


def test_a_callback_of_the_test_may_use_it_below_the_learners_frame(lab):
    module = lab.code("def apply(g, x): return g(x)\ndef f(x): return apply(lambda y: y.softmax(-1), x)")
    tests = lab.tests("import torch\ndef score(x):\n    return x.softmax(-1)\n")
    lab.forbid("softmax")
    x = torch.randn(3)
    assert_close(module.apply(tests.score, x), x.softmax(-1), atol=1e-6)
    refused(module.f, x)


def test_an_instance_made_by_the_test_may_be_read(lab):
    module = lab.code("def width(m): return m.embed_dim\ndef call(m, x): return m(x, x, x)")
    oracle = nn.MultiheadAttention(4, 2)
    lab.forbid(nn.MultiheadAttention)
    assert module.width(oracle) == 4
    refused(module.call, oracle, torch.randn(3, 4))


# --- classes ------------------------------------------------------------------------------------

ROADS_TO_A_MODULE = {
    "constructed": "def f(x): return nn.MultiheadAttention(4, 2)(x, x, x)[0]",
    "an alias": "from torch.nn import MultiheadAttention as M\ndef f(x): return M(4, 2)(x, x, x)[0]",
    "a partial": "M = functools.partial(nn.MultiheadAttention, 4)\ndef f(x): return M(2)(x, x, x)[0]",
    "an instance made at import": "m = nn.MultiheadAttention(4, 2)\ndef f(x): return m(x, x, x)[0]",
    "the forward of such an instance": "m = nn.MultiheadAttention(4, 2)\ndef f(x): return m.forward(x, x, x)[0]",
    "the forward of the class": (
        "m = nn.MultiheadAttention(4, 2)\ndef f(x): return nn.MultiheadAttention.forward(m, x, x, x)[0]"
    ),
    "inside another module": (
        "m = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8)\ndef f(x): return m(x)"
    ),
    "a subclass": "class M(nn.MultiheadAttention): pass\ndef f(x): return M(4, 2)(x, x, x)[0]",
    "a subclass with its own forward": (
        "class M(nn.MultiheadAttention):\n    def forward(self, x): return super().forward(x, x, x)[0]\n"
        "m = M(4, 2)\ndef f(x): return m(x)"
    ),
}


@pytest.mark.parametrize("road", ROADS_TO_A_MODULE)
def test_a_banned_module_is_seen_by_every_road(lab, road):
    module = lab.code(ROADS_TO_A_MODULE[road])
    x = torch.randn(3, 4)
    module.f(x)
    lab.forbid(nn.MultiheadAttention, why="build it")
    assert refused(module.f, x) == "MultiheadAttention is forbidden in this lab: build it"


def test_a_subclass_that_a_test_constructs_and_calls_is_seen(lab):
    module = lab.code("class M(nn.MultiheadAttention): pass\nm = M(4, 2)")
    lab.forbid(nn.MultiheadAttention)
    assert "MultiheadAttention is forbidden" in refused(module.M, 4, 2)
    x = torch.randn(3, 4)
    assert "MultiheadAttention is forbidden" in refused(module.m, x, x, x)


def test_a_subclass_that_uses_nothing_of_it_is_allowed(lab):
    module = lab.code(
        "class M(nn.MultiheadAttention):\n"
        "    def __init__(self): nn.Module.__init__(self)\n"
        "    def forward(self, x): return 2 * x\n"
        "    def __call__(self, x): return self.forward(x)\n"
    )
    lab.forbid(nn.MultiheadAttention)
    assert_close(module.M()(torch.ones(2)), 2 * torch.ones(2), atol=1e-6)


def test_a_plain_class_and_a_class_that_only_inherits_are_banned(lab):
    class Base:
        def __init__(self, n=0):
            self.n = n

        def __call__(self):
            return self.n

    class Empty(Base):
        pass

    class Bare:
        pass

    library = types.SimpleNamespace(Base=Base, Empty=Empty, Bare=Bare, instance=Empty(5))
    module = lab.code("def make(cls): return cls()\ndef call(x): return x()")
    lab.forbid(Empty, Bare)
    assert "Empty is forbidden" in refused(module.make, library.Empty)
    assert "Bare is forbidden" in refused(module.make, library.Bare)
    assert "Empty is forbidden" in refused(module.call, library.instance)
    assert module.make(Base).n == 0
    assert library.instance() == 5
    lab.close()
    assert not {"__init__", "__call__", "__new__"} & set(vars(Empty))
    assert "__init__" not in vars(Bare)
    assert Empty(3).n == 3


def test_a_class_with_its_own_new_is_banned_and_mended(lab):
    class Point:
        def __new__(cls, x):
            self = super().__new__(cls)
            self.x = x
            return self

    module = lab.code("def make(cls): return cls(1)")
    lab.forbid(Point)
    assert "Point is forbidden" in refused(module.make, Point)
    assert Point(2).x == 2
    lab.close()
    assert module.make(Point).x == 1
    assert isinstance(vars(Point)["__new__"], staticmethod)


def test_a_class_written_in_c_is_replaced_by_name(lab):
    import collections

    module = lab.code(
        "import collections\nfrom collections import deque as d\ndef f(): return collections.deque()\n"
        "def g(): return d()"
    )
    original = collections.deque
    lab.forbid(collections.deque)
    assert "deque is forbidden" in refused(module.f)
    assert "deque is forbidden" in refused(module.g)
    assert list(collections.deque([1])) == [1]
    lab.close()
    assert collections.deque is original
    assert module.d is original


# --- other callables ----------------------------------------------------------------------------

ROADS_TO_NUMPY = {
    "by its full name": "def f(x): return np.einsum('i,i', x, x)",
    "an alias": "from numpy import einsum as e\ndef f(x): return e('i,i', x, x)",
    "a class attribute": "class A:\n    e = np.einsum\ndef f(x): return A.e('i,i', x, x)",
    "a static method": "class A:\n    e = staticmethod(np.einsum)\ndef f(x): return A().e('i,i', x, x)",
    "an instance": "class A: pass\na = A()\na.e = np.einsum\ndef f(x): return a.e('i,i', x, x)",
    "a closure": "def make(e):\n    return lambda x: e('i,i', x, x)\nf = make(np.einsum)",
    "a partial": "p = functools.partial(np.einsum, 'i,i')\ndef f(x): return p(x, x)",
    "a default argument": "def f(x, e=np.einsum): return e('i,i', x, x)",
    "a keyword default": "def f(x, *, e=np.einsum): return e('i,i', x, x)",
    "a table": "table = {'e': [np.einsum]}\ndef f(x): return table['e'][0]('i,i', x, x)",
}


@pytest.mark.parametrize("road", ROADS_TO_NUMPY)
def test_a_numpy_function_is_seen_wherever_the_code_keeps_it_and_is_put_back(lab, road):
    module = lab.code(ROADS_TO_NUMPY[road])
    original, x = np.einsum, np.array([1.0, 2.0])
    lab.forbid(np.einsum, why="use @")
    assert refused(module.f, x) == "einsum is forbidden in this lab: use @"
    lab.forbidden.close()
    assert np.einsum is original
    assert module.f(x) == 5.0


def test_a_ufunc_is_banned(lab):
    module = lab.code("def f(x): return np.exp(x)")
    lab.forbid(np.exp)
    assert "exp is forbidden" in refused(module.f, 0.0)
    assert np.exp(0.0) == 1.0


@pytest.mark.parametrize(
    "road",
    [
        "def f(lib): return lib.function(1)",
        "class A: pass\ndef f(lib):\n    A.g = staticmethod(lib.function)\n    return A.g(1)",
        "def f(lib): return functools.partial(lib.function, 1)()",
        "def f(lib): return [*map(lib.function, [1])][0]",
        "def f(lib): return lib.kept['anywhere'](1)",
    ],
)
def test_a_python_function_is_seen_through_every_alias(lab, road):
    bound = 10

    def function(x, y=2, *, z=3):
        return bound + x + y + z

    library = types.SimpleNamespace(function=function, kept={"anywhere": function})
    module = lab.code(road)
    code, defaults, keywords = function.__code__, function.__defaults__, function.__kwdefaults__
    assert module.f(library) == 16
    lab.forbid(function)
    assert "function is forbidden" in refused(module.f, library)
    assert function(1) == 16
    assert function(1, y=0, z=0) == 11
    lab.close()
    assert (function.__code__, function.__defaults__, function.__kwdefaults__) == (code, defaults, keywords)
    assert function(1) == 16


def test_a_method_and_a_generator_can_be_banned(lab):
    class Library:
        def method(self, x):
            return x

        def numbers(self):
            yield 1

    module = lab.code("def f(a): return a.method(1)\ndef g(a): return list(a.numbers())")
    lab.forbid(Library.method, Library.numbers)
    assert "method is forbidden" in refused(module.f, Library())
    assert "numbers is forbidden" in refused(module.g, Library())
    assert Library().method(2) == 2
    assert list(Library().numbers()) == [1]


def test_a_python_function_of_torch_that_no_mode_sees_is_banned(lab):
    from torch.nn.utils import clip_grad_norm_

    module = lab.code("from torch.nn.utils import clip_grad_norm_ as clip\ndef f(p): return clip(p, 1.0)")
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    lab.forbid(clip_grad_norm_)
    assert "clip_grad_norm_ is forbidden" in refused(module.f, [p])
    clip_grad_norm_([p], 1.0)


def test_what_cannot_be_intercepted_is_an_error_of_the_test(lab):
    lab.code("")
    with pytest.raises(ValueError, match="cannot intercept"):
        lab.forbid(np.ndarray.dot)


# --- the function itself as the answer ------------------------------------------------------------

EXPORTS = {
    "the function": ("from torch.nn.functional import scaled_dot_product_attention as attend", SDPA),
    "a partial of it": ("attend = functools.partial(F.scaled_dot_product_attention, is_causal=True)", SDPA),
    "its private name": (
        "attend = torch._C._nn.scaled_dot_product_attention",
        F.scaled_dot_product_attention,
    ),
    "the class": ("attend = nn.MultiheadAttention", nn.MultiheadAttention),
    "an instance": ("attend = nn.MultiheadAttention(4, 2)", nn.MultiheadAttention),
    "a numpy function": ("attend = np.einsum", np.einsum),
}


@pytest.mark.parametrize(
    "tests",
    [
        "from attention import attend",
        "from attention import attend as student",
        "import attention\nattention.attend",
    ],
    ids=["name", "alias", "module"],
)
@pytest.mark.parametrize("export", EXPORTS)
def test_a_banned_function_offered_as_the_answer_is_refused(lab, export, tests):
    source, target = EXPORTS[export]
    lab.code(source)
    message = refused(functools.partial(lab.forbid, target, tests=lab.tests(tests), why="write it"))
    assert message.startswith("`attend` is ")
    assert message.endswith("which is forbidden in this lab: write it")
    assert lab.forbidden.violations == [message]


def test_an_import_that_the_tests_do_not_take_is_allowed(lab):
    lab.code(
        "from torch.nn.functional import softmax\nfrom torch.nn import MultiheadAttention\ndef attend(q): return q"
    )
    tests = lab.tests("from attention import attend\nfrom torch.nn.functional import softmax")
    lab.forbid(F.softmax, nn.MultiheadAttention, "softmax", tests=tests)
    assert lab.forbidden.violations == []


# --- swallowing, and the end ----------------------------------------------------------------------


def test_except_exception_does_not_swallow_it(lab):
    module = lab.code(
        "def f(x):\n    try:\n        return x.softmax(-1)\n    except Exception:\n        return x"
    )
    lab.forbid("softmax")
    refused(module.f, torch.randn(3))


def test_except_base_exception_swallows_the_error_but_not_the_record(lab):
    module = lab.code(
        "def f(x):\n    try:\n        return x.softmax(-1)\n    except BaseException:\n        return x"
    )
    lab.forbid("softmax", why="no")
    module.f(torch.randn(3))
    assert lab.forbidden.violations == ["softmax is forbidden in this lab: no"]


def test_everything_is_as_before_after_close(lab, q):
    module = lab.code(
        "from numpy import einsum\nm = nn.MultiheadAttention(4, 2).double()\n"
        "def f(q): return F.scaled_dot_product_attention(q, q, q) + F.softmax(q, -1) + m(q[0], q[0], q[0])[0] + "
        "einsum('i->', np.zeros(2))"
    )

    def state():
        watched = [
            *vars(nn.MultiheadAttention).items(),
            *vars(np).items(),
            *vars(F).items(),
            *vars(module).items(),
        ]
        return [(name, id(value)) for name, value in watched], F.softmax.__code__, len(_modes())

    before, expected = state(), module.f(q)
    lab.forbid(F.scaled_dot_product_attention, F.softmax, nn.MultiheadAttention, np.einsum, "exp")
    assert state() != before
    lab.forbidden.close()
    assert state() == before
    assert_close(module.f(q), expected, atol=1e-6)


def test_a_mode_the_code_leaves_on_is_left_on_and_the_ban_ends(lab):
    module = lab.code(
        "from torch.overrides import BaseTorchFunctionMode\nleft = BaseTorchFunctionMode()\n"
        "def leave(): left.__enter__()\ndef f(x): return x.softmax(-1)"
    )
    lab.forbid("softmax")
    module.leave()
    refused(module.f, torch.randn(3))
    lab.forbidden.close()
    assert _modes() == [module.left]
    module.left.__exit__(None, None, None)
    assert module.f(torch.zeros(2)).tolist() == [0.5, 0.5]


def test_a_mode_the_code_took_off_is_not_missed(lab):
    module = lab.code("def take(): torch.overrides._pop_mode()")
    lab.forbid("softmax")
    module.take()
    lab.forbidden.close()
    assert _modes() == []


def _modes():
    return torch.overrides._get_current_function_mode_stack()


def test_closing_twice_is_harmless(lab):
    lab.code("")
    lab.forbid("softmax")
    lab.forbidden.close()
    lab.forbidden.close()
    assert _modes() == []
    assert "attention" in sys.modules
