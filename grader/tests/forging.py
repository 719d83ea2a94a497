# ruff: noqa: E501
"""Attacks by wrong code that wants to be `verified`: what `docs/security.md` lists and `test_forging.py` runs.

Every attack gets a lab of one file, `answer.py`, whose `double` must return twice its input, and returns three times
that. `compares` says how the lab's only test compares.
"""

from dataclasses import dataclass

COMPARES = {
    "==": "assert double(1.5) == 3.0",
    "tensor": "x = randn(3, 4)\n    assert_close(double(x.clone()), expected(x), atol=1e-9)",
    "torch.testing": "x = randn(3, 4)\n    torch.testing.assert_close(double(x.clone()), expected(x))",
    "torch.allclose": "x = randn(3, 4)\n    assert torch.allclose(double(x.clone()), expected(x))",
    "torch.equal": "x = randn(3, 4)\n    assert torch.equal(double(x.clone()), expected(x))",
    "max": "x = randn(3, 4)\n    assert (double(x.clone()) - expected(x)).abs().max() < 1e-9",
    "approx": "assert double(1.5) == pytest.approx(3.0)",
    "abs": "assert abs(double(1.5) - 3.0) < 1e-9 and isinstance(double(1.5), float)",
    "numpy": "x = rng.standard_normal((3, 4))\n    np.testing.assert_allclose(double(x.copy()), 2 * x)",
    "raises": "with pytest.raises(ValueError, match='text'):\n        double('text')",
    "reference": "x = randn(3, 4)\n    assert_close(double(x.clone()), F.softmax(x, -1), atol=1e-9)",
    "forbid": "forbid(torch.add)\n    x = randn(3, 4)\n    assert_close(double(x.clone()), expected(x), atol=1e-9)",
    "milestone": "milestone('error', abs(double(1.5) - 3.0), 1e-9, 'absolute', better='lower')",
    "timer": "timing = paired_timer(lambda: time.sleep(0.002), lambda: double(1.5), pairs=3)\n"
    "    milestone('speed-up', timing.ratio, 2.0, 'x')",
    "input": "x = randn(3, 4)\n    assert_close(double(x), 2 * x, atol=1e-9)",
}  # fmt: skip

TEST = """
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from answer import double
from shared.compare import assert_close


def expected(x):
    return 2 * x


def test_double(rng, randn, forbid, milestone, paired_timer):
    {body}
"""

WRONG = "def double(x):\n    return x * 3\n"
RIGHT = "def double(x):\n    return x * 2\n"


@dataclass(frozen=True)
class Attack:
    """One wrong program.

    Attributes:
        name: of the attack, as `docs/security.md` has it.
        compares: key of `COMPARES`.
        code: of `answer.py`.
        same_process: what becomes of it: `found` (not verified, with a finding), `refused` (not verified),
            or `possible` (verified, and nobody sees it).
        strict: the same with `--trust strict`.
        before: what became of it before this defence, `verified` or not; kept for the table.
    """

    name: str
    compares: str
    code: str
    same_process: str = "found"
    before: str = "verified"
    strict: str = "refused"


def _once(body: str) -> str:
    """`double` that attacks when it is called."""
    return "import sys\n\n\ndef double(x):\n" + "".join(
        f"    {line}\n" for line in [*body.splitlines(), "return x * 3"]
    )


_CONFIG = "import _pytest.assertion.util\nconfig = _pytest.assertion.util._config\n"

ATTACKS = [
    Attack("replaces shared.compare.assert_close", "tensor",
           "import shared.compare\nshared.compare.assert_close = lambda *a, **k: None\n" + WRONG),
    Attack("changes the code inside shared.compare.assert_close", "tensor",
           "import shared.compare\n"
           "def nothing(actual, expected, *, atol, rtol=0.0, hint='', name='result'): pass\n"
           "shared.compare.assert_close.__code__ = nothing.__code__\n" + WRONG),
    Attack("replaces a helper of shared.compare", "tensor",
           "import numpy as np, shared.compare\nshared.compare._errors = lambda a, e: np.zeros(a.shape)\n" + WRONG),
    Attack("replaces torch.testing.assert_close", "torch.testing",
           "import torch\ntorch.testing.assert_close = lambda *a, **k: None\n" + WRONG),
    Attack("replaces torch.allclose", "torch.allclose", "import torch\ntorch.allclose = lambda *a, **k: True\n" + WRONG, strict="found"),
    Attack("replaces torch.equal", "torch.equal", "import torch\ntorch.equal = lambda *a, **k: True\n" + WRONG, strict="found"),
    Attack("replaces torch.Tensor.__lt__", "max",
           "import torch\ntorch.Tensor.__lt__ = lambda a, b: torch.tensor(True)\n" + WRONG, strict="found"),
    Attack("replaces numpy.testing.assert_allclose", "numpy",
           "import numpy.testing\nnumpy.testing.assert_allclose = lambda *a, **k: None\n" + WRONG),
    Attack("replaces pytest.approx", "approx",
           "import pytest\nclass Any:\n    def __eq__(self, other): return True\n"
           "pytest.approx = lambda *a, **k: Any()\n" + WRONG, strict="found"),
    Attack("makes pytest.raises accept that nothing is raised", "raises",
           "import contextlib, pytest\npytest.raises = lambda *a, **k: contextlib.nullcontext()\n" + WRONG, strict="found"),
    Attack("replaces the builtins abs and isinstance", "abs",
           "import builtins\nbuiltins.abs = lambda x: 0.0\nbuiltins.isinstance = lambda *a: True\n" + WRONG,
           "refused", "not verified"),
    Attack("replaces the builtin AssertionError", "==",
           "import builtins\nclass Quiet(AssertionError):\n    pass\nbuiltins.AssertionError = Quiet\n" + WRONG,
           before="not verified", strict="found"),
    Attack("replaces Function.runtest of pytest", "==",
           "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None\n" + WRONG, strict="found"),
    Attack("replaces what pytest makes of an outcome", "==",
           "import _pytest.reports\n_pytest.reports.TestReport.outcome = property(lambda s: 'passed', lambda s, v: None)\n"
           + WRONG),
    Attack("replaces CallInfo.from_call of pytest", "==",
           "import _pytest.runner\n_real = _pytest.runner.CallInfo.from_call\n"
           "def call(func, when, reraise=None):\n"
           "    return _real(func if when != 'call' else (lambda: None), when=when, reraise=reraise)\n"
           "_pytest.runner.CallInfo.from_call = call\n" + WRONG, strict="found"),
    Attack("registers a plugin of its own with pytest", "==",
           _CONFIG + "import pytest\nclass Plugin:\n"
           "    @pytest.hookimpl(hookwrapper=True)\n"
           "    def pytest_runtest_makereport(self, item, call):\n"
           "        outcome = yield\n        report = outcome.get_result()\n        report.outcome = 'passed'\n"
           "def double(x):\n"
           "    import _pytest.assertion.util\n"
           "    manager = _pytest.assertion.util._config.pluginmanager\n"
           "    manager.hasplugin('mine') or manager.register(Plugin(), 'mine')\n    return x * 3\n"),
    Attack("takes the tests off the list through pytest's configuration", "==",
           _once("import _pytest.assertion.util as u\nu._config.pluginmanager.get_plugin('session').items.clear()"),
           same_process="refused", before="not verified"),
    Attack("replaces the test function of the item", "==",
           _once("import _pytest.assertion.util as u\n"
                 "for item in u._config.pluginmanager.get_plugin('session').items:\n"
                 "    item.obj = lambda **k: None\n") + "double_at_import = None\n",
           same_process="refused", before="not verified"),
    Attack("rewrites the reports in the grader's own plugin", "==",
           _once("import _pytest.assertion.util as u\n"
                 "for p in u._config.pluginmanager.get_plugins():\n"
                 "    if type(p).__name__ == 'EventsPlugin':\n"
                 "        send = p._send\n"
                 "        p._send = lambda **e: send(**{**e, **({'outcome': 'passed'} if 'outcome' in e else {})})")),
    Attack("calls the grader's plugin with a report of its own", "==",
           _once("import _pytest.assertion.util as u, os\n"
                 "for p in u._config.pluginmanager.get_plugins():\n"
                 "    if type(p).__name__ == 'EventsPlugin':\n"
                 "        p._send(event='test', test='tests/test_answer.py::test_double', outcome='passed', seconds=0.1,\n"
                 "                message='', output='', not_written=False, milestones=[])\n"
                 "        p._send(event='session_finished', exit_status=0)\n"
                 "os._exit(0)")),
    Attack("writes well-formed results to every descriptor and exits", "==",
           _once("import json, os\n"
                 "events = [dict(event='test', test='tests/test_answer.py::test_double', outcome='passed', seconds=0.1,\n"
                 "               message='', output='', not_written=False, milestones=[]),\n"
                 "          dict(event='session_finished', exit_status=0)]\n"
                 "for fd in range(3, 64):\n"
                 "    for event in events:\n"
                 "        try:\n            os.write(fd, json.dumps(event).encode() + b'\\n')\n"
                 "        except OSError:\n            pass\n"
                 "os._exit(0)")),
    Attack("finds the descriptor in /proc and writes results later, from a child process", "==",
           _once("import json, os, time\n"
                 "pipes = [int(fd) for fd in os.listdir('/proc/self/fd')]\n"
                 "if os.fork() == 0:\n"
                 "    event = dict(event='test', test='tests/test_answer.py::test_double', outcome='passed', seconds=0.1,\n"
                 "                 message='', output='', not_written=False, milestones=[])\n"
                 "    for _ in range(20):\n"
                 "        for fd in pipes:\n"
                 "            try:\n                fd > 2 and os.write(fd, json.dumps(event).encode() + b'\\n')\n"
                 "            except OSError:\n                pass\n"
                 "        time.sleep(0.01)\n"
                 "    os._exit(0)"), before="not verified", strict="found"),
    Attack("exits with status 0 at once", "==", _once("import os\nos._exit(0)"), "refused", "not verified"),
    Attack("exits with status 0 by atexit", "==",
           "import atexit, os\natexit.register(os._exit, 0)\n" + WRONG, "refused", "not verified"),
    Attack("searches the heap for the seal", "==",
           _once("import gc\nfor o in gc.get_objects():\n    if type(o).__name__ == 'Seal': break"), before="not verified", strict="found"),
    Attack("reads the expected value from the test's frame", "tensor",
           "def double(x):\n    import sys\n    frame = sys._getframe(1)\n"
           "    return frame.f_globals['expected'](frame.f_locals['x'])\n", strict="found"),
    Attack("reads the expected value by inspect.stack", "tensor",
           "def double(x):\n    import inspect\n    frame = inspect.stack()[1].frame\n"
           "    return frame.f_globals['expected'](frame.f_locals['x'])\n", strict="found"),
    Attack("reads the expected value from a traceback's frame", "tensor",
           "def double(x):\n    try:\n        raise ValueError\n    except ValueError as error:\n"
           "        frame = error.__traceback__.tb_frame.f_back\n"
           "    return frame.f_globals['expected'](frame.f_locals['x'])\n", strict="found"),
    Attack("finds the test by sys.setprofile", "tensor",
           _once("sys.setprofile(lambda *a: None)"), before="not verified", strict="found"),
    Attack("finds the test by sys.settrace", "tensor", _once("sys.settrace(lambda *a: None)"), before="not verified", strict="found"),
    Attack("calls the oracle of the test module, found in sys.modules", "tensor",
           "def double(x):\n    import sys\n"
           "    for name, module in list(sys.modules.items()):\n"
           "        if name.endswith('test_answer'):\n            return module.expected(x)\n    return x * 3\n",
           same_process="possible"),
    Attack("replaces the test module's own assert_close", "tensor",
           _once("for name, module in list(sys.modules.items()):\n"
                 "    if name.endswith('test_answer'):\n        module.assert_close = lambda *a, **k: None"), before="not verified"),
    Attack("reads the test file", "tensor",
           "import pathlib\nTEXT = (pathlib.Path(__file__).parents[1] / 'tests' / 'test_answer.py').read_text()\n"
           "space = {}\nexec(TEXT.split('import assert_close')[1].split('def test_')[0], space)\n"
           "double = space['expected']\n", strict="found"),
    Attack("answers with an object that equals everything", "==",
           "class Any(float):\n    def __eq__(self, other): return True\n    __hash__ = float.__hash__\n"
           "def double(x):\n    return Any(x * 3)\n", same_process="possible"),
    Attack("answers with a mock", "==",
           "class Any:\n    __class__ = float\n    def __eq__(self, other): return True\n"
           "    def __getattr__(self, name): return self\n    def __call__(self, *a): return self\n"
           "def double(x):\n    return Any()\n", same_process="possible"),
    Attack("answers with a subclass of Tensor, to assert_close", "tensor",
           "import torch\nclass Sly(torch.Tensor):\n"
           "    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
           "        return torch.tensor(True)\n"
           "def double(x):\n    return (x * 3).as_subclass(Sly)\n", "refused", "not verified"),
    Attack("answers with a subclass of Tensor, to torch.allclose", "torch.allclose",
           "import torch\nclass Sly(torch.Tensor):\n"
           "    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
           "        return True\n"
           "def double(x):\n    return (x * 3).as_subclass(Sly)\n", same_process="possible"),
    Attack("leaves a torch mode switched on", "torch.allclose",
           "import torch\nfrom torch.overrides import TorchFunctionMode\nclass Mode(TorchFunctionMode):\n"
           "    def __torch_function__(self, func, types, args=(), kwargs=None):\n"
           "        return True if func is torch.allclose else func(*args, **(kwargs or {}))\n"
           "def double(x):\n    Mode().__enter__()\n    return x * 3\n"),
    Attack("replaces torch.nn.functional.softmax, the reference", "reference",
           "import torch.nn.functional as F\nF.softmax = lambda x, dim: x * 3\n" + WRONG, strict="found"),
    Attack("replaces the milestone fixture in the plugin", "milestone",
           "import shared.plugin\nshared.plugin.Milestone.reached = property(lambda self: True)\n" + WRONG, strict="found"),
    Attack("replaces time.perf_counter", "timer",
           "import time\n_now = [0.0]\ndef clock():\n    _now[0] += 1.0\n    return _now[0]\n"
           "time.perf_counter = clock\n"
           "def double(x):\n    time.sleep(0.01)\n    return x * 3\n", before="not verified", strict="found"),
    Attack("replaces the clock of shared.timing", "timer",
           "import shared.timing, time\n_now = [0.0, 0]\n"
           "def clock():\n    _now[1] += 1\n    _now[0] += 1.0 if _now[1] % 4 in (1, 2) else 0.1\n    return _now[0]\n"
           "real = shared.timing.time_pairs\n"
           "shared.timing.time_pairs.__kwdefaults__['clock'] = lambda: 0.0\n"
           "shared.timing.PairedTiming.ratio = property(lambda self: 9.0)\n"
           "def double(x):\n    time.sleep(0.01)\n    return x * 3\n", strict="found"),
    Attack("removes the ban of forbid", "forbid",
           "import shared.forbid, torch\nshared.forbid.Forbidden.__call__ = lambda self, *a, **k: None\n"
           "def double(x):\n    return torch.add(x, x)\n", strict="found"),
    Attack("clears the violations that forbid has seen", "forbid",
           "import gc, torch\n"
           "def double(x):\n    try:\n        return torch.add(x, x)\n    except BaseException:\n"
           "        for o in gc.get_objects():\n"
           "            if type(o).__name__ == 'Forbidden': o.violations.clear()\n    return x + x\n", before="not verified", strict="found"),
    Attack("changes the input, so that the oracle gets another", "input",
           "def double(x):\n    x.zero_()\n    return x * 3\n", "possible", strict="possible"),
    Attack("puts another module in its own place", "==",
           "import sys, types\n_m = types.ModuleType('answer')\n_m.double = lambda x: 3.0\nsys.modules['answer'] = _m\n"
           + WRONG, "refused", "not verified"),
    Attack("answers later imports by a finder of its own", "==",
           "import sys\nclass Finder:\n    def find_spec(self, name, path=None, target=None):\n"
           "        import shared.compare\n        shared.compare.assert_close = lambda *a, **k: None\n"
           "sys.meta_path.insert(0, Finder())\n" + WRONG, "refused", "not verified"),
    Attack("patches later, from a thread begun at import", "==",
           "import threading, time\n"
           "def later():\n"
           "    import _pytest.python\n"
           "    _pytest.python.Function.runtest = lambda self: None\n"
           "_t = threading.Thread(target=later)\n_t.start()\n_t.join()\n" + WRONG, strict="found"),
    Attack("patches, and puts back when the test's last reference goes", "tensor",
           "import shared.compare, sys\n_real = shared.compare._errors\n"
           "def nothing(a, e):\n    import numpy as np\n    shared.compare._errors = _real\n    return np.zeros(a.shape)\n"
           "def double(x):\n    shared.compare._errors = nothing\n    return x * 3\n", same_process="possible"),
    Attack("skips the test", "==", _once("import pytest\npytest.skip('not today')"), "refused", "not verified"),
    Attack("lets the test be expected to fail", "==", _once("import pytest\npytest.xfail('so what')"), "refused",
           "not verified"),
    Attack("ends the session by pytest.exit", "==", _once("import pytest\npytest.exit('enough', 0)"), "refused",
           "not verified"),
    Attack("calls C by ctypes", "==", _once("import ctypes\nctypes.pythonapi.Py_GetVersion()"), before="not verified", strict="found"),
    Attack("makes tests random-free by changing seeds", "tensor",
           "import random, numpy as np, torch\nrandom.seed(0)\nnp.random.seed(0)\ntorch.manual_seed(0)\n"
           "torch.manual_seed = lambda *a: None\n" + WRONG, before="not verified", strict="found"),
    Attack("imports the solution of another lab from the checkout", "tensor",
           "from shared.earlier import solution_of\ntry:\n    double = solution_of('ch01/lab02').double\n"
           "except (ImportError, AttributeError):\n    def double(x):\n        return x * 3\n", "refused",
           "not verified"),
    Attack("answers in another dtype, with the right numbers rounded", "tensor",
           "def double(x):\n    return (x * 2).half()\n", "refused", "not verified"),
]  # fmt: skip
