"""Earlier labs' solutions, for labs that build on them.

A lab never depends on what its learner wrote before: `solution_of("ch03/lab03")` is our code. The lab's entry
in `chapter.toml` must name the other under `uses`, or a sandbox will not have it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from shared.course import find_lab


def solution_of(lab: str, module: str | None = None) -> ModuleType:
    """Return a module of an earlier lab's solution, the same object at every call.

    Args:
        lab: such as `ch03/lab03`.
        module: one of the lab's files, without `.py`; may be left out where the lab has only one.

    Raises:
        ImportError: there is no such lab or file; the message says what there is.
    """
    folder = _folder(lab)
    found = find_lab(folder)
    files = found.module_files if found else {}
    if module is None and len(files) == 1:
        module = next(iter(files))
    if module not in files:
        raise ImportError(
            f"{lab} has the modules {', '.join(files) or 'none'}; solution_of wants one of them, not {module}"
        )
    file = folder / "solutions" / files[module]
    # A name of its own: `gpt` is the code under test in some labs.
    name = f"topeka_solutions.{lab.replace('/', '_')}.{module}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ImportError(f"{file} is not here: does chapter.toml list {lab} under the lab's `uses`?")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # before it runs, as dataclasses and pickle expect
    try:
        spec.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[name]
        raise
    return loaded


def _folder(lab: str) -> Path:
    chapter, _, name = lab.partition("/")
    # In a sandbox the labs lie in the working folder and `shared` somewhere else.
    for root in [Path.cwd(), *Path.cwd().parents, *Path(__file__).resolve().parents]:
        if (root / "labs").is_dir() and (found := sorted(root.glob(f"labs/{chapter}_*/{name}_*"))):
            return found[0]
    raise ImportError(f"there is no lab {lab!r} in this course; labs are named like ch03/lab03")
