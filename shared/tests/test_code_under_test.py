import importlib
import os
import sys
from pathlib import Path

import pytest
from shared.code_under_test import CannotImport, CodeUnderTest, explain, locate_code, relative
from shared.course import LabFolder


@pytest.fixture
def make_code(tmp_path):
    """`make_code(numbers_lab="...", other="...")`: one lab whose files hold the given sources."""

    def make(lab="lab01", **sources):
        folder = tmp_path / "ch01_numbers" / lab
        (folder / "src").mkdir(parents=True, exist_ok=True)
        for name, source in sources.items():
            (folder / "src" / f"{name}.py").write_text(source)
        listed = LabFolder(f"ch01/{lab}", folder, tuple(f"{name}.py" for name in sources))
        return CodeUnderTest(listed, folder / "src")

    return make


@pytest.fixture
def bytecode(monkeypatch):
    """Bytecode caching as learners have it, whatever this process was told."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)


def load(code, name):
    with code.active():
        return importlib.import_module(name)


def refusal(code, name):
    """Why `name` cannot be imported; the reason must be for the learner to read."""
    with pytest.raises(CannotImport) as caught:
        load(code, name)
    assert caught.value.name == name
    return str(caught.value)


# --- which file is imported -----------------------------------------------------------------


def test_a_file_answers_to_its_name_only_while_active(make_code):
    code = make_code(numbers_lab="VALUE = 1")
    with code.active():
        import numbers_lab

        assert numbers_lab.VALUE == 1
        assert numbers_lab.__file__ == str(code.folder / "numbers_lab.py")
    assert "numbers_lab" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("numbers_lab")


def test_namesakes_of_two_labs_are_kept_apart_and_each_is_run_once(make_code):
    first, second = make_code("lab01", same="RUNS = [1]"), make_code("lab02", same="RUNS = [2]")
    a, b = load(first, "same"), load(second, "same")
    assert (a.RUNS, b.RUNS) == ([1], [2])
    assert load(first, "same") is a
    assert load(second, "same") is b


def test_a_namesake_that_was_imported_before_is_set_aside_and_comes_back(make_code, tmp_path, monkeypatch):
    (tmp_path / "numbers_lab.py").write_text("VALUE = 'elsewhere'")
    monkeypatch.syspath_prepend(tmp_path)
    elsewhere = importlib.import_module("numbers_lab")
    try:
        code = make_code(numbers_lab="VALUE = 'under test'")
        assert load(code, "numbers_lab").VALUE == "under test"
        assert sys.modules["numbers_lab"] is elsewhere
    finally:
        del sys.modules["numbers_lab"]


def test_everything_is_put_back_when_the_body_raises(make_code):
    code = make_code(numbers_lab="VALUE = 1")
    before = list(sys.meta_path)

    def fail_while_active():
        with code.active():
            importlib.import_module("numbers_lab")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_while_active()
    assert "numbers_lab" not in sys.modules
    assert sys.meta_path == before


def test_a_file_that_empties_the_list_of_finders_does_no_further_damage(make_code):
    code = make_code(numbers_lab="import sys\ndef spoil():\n    sys.meta_path.clear()")
    before = list(sys.meta_path)
    try:
        with code.active():
            importlib.import_module("numbers_lab").spoil()
        assert sys.meta_path == []
    finally:
        sys.meta_path[:] = before


def test_two_files_may_import_each_other(make_code):
    code = make_code(
        first="import second\nVALUE = 1\ndef total():\n    return VALUE + second.VALUE",
        second="import first\nVALUE = 2\ndef total():\n    return first.total()",
    )
    with code.active():
        assert importlib.import_module("second").total() == 3
        assert importlib.import_module("first").total() == 3
        assert code.strangers() == []


def test_an_edit_of_equal_size_in_the_same_second_is_seen(make_code, bytecode):
    code = make_code(numbers_lab="VALUE = 1 + 2\n")
    file = code.folder / "numbers_lab.py"
    assert load(code, "numbers_lab").VALUE == 3
    before = file.stat()
    file.write_text("VALUE = 1 - 2\n")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load(CodeUnderTest(code.lab, code.folder), "numbers_lab").VALUE == -1


def test_no_bytecode_is_written_beside_the_files(make_code, bytecode):
    code = make_code(numbers_lab="VALUE = 1")
    load(code, "numbers_lab")
    assert sorted(p.name for p in code.folder.iterdir()) == ["numbers_lab.py"]


# --- files that are not the lab's -----------------------------------------------------------


def test_an_unlisted_helper_cannot_be_imported_and_the_message_says_what_to_do(make_code):
    code = make_code(numbers_lab="import helper")
    (code.folder / "helper.py").write_text("VALUE = 1")
    message = refusal(code, "numbers_lab")
    assert "numbers_lab.py" in message
    assert "line 1\n    import helper\n" in message
    assert "helper.py is not one of the files of ch01/lab01 (numbers_lab.py)" in message
    assert "move what you need from helper.py into one of them" in message


def test_an_unlisted_helper_cannot_be_reached_through_sys_path_either(make_code, monkeypatch):
    code = make_code(numbers_lab="import helper")
    (code.folder / "helper.py").write_text("VALUE = 1")
    monkeypatch.syspath_prepend(code.folder)
    assert "helper.py is not one of the files of ch01/lab01" in refusal(code, "numbers_lab")


def test_an_unlisted_file_does_not_hide_a_library_of_its_name(make_code):
    code = make_code(numbers_lab="import colorsys\nVALUE = colorsys.rgb_to_hls")
    (code.folder / "colorsys.py").write_text("")
    sys.modules.pop("colorsys", None)
    assert callable(load(code, "numbers_lab").VALUE)


def test_a_helper_may_be_missed_with_an_ordinary_import_error(make_code):
    code = make_code(numbers_lab="try:\n    import helper\nexcept ModuleNotFoundError:\n    helper = None")
    (code.folder / "helper.py").write_text("VALUE = 1")
    assert load(code, "numbers_lab").helper is None


# --- what keeps a file from being imported --------------------------------------------------


def test_a_missing_file_is_named_with_the_way_to_get_it_back(make_code):
    code = make_code(numbers_lab="")
    (code.folder / "numbers_lab.py").unlink()
    message = refusal(code, "numbers_lab")
    assert message.startswith(str(code.folder / "numbers_lab.py") + " is missing.")
    assert message.endswith("`topeka reset ch01/lab01` brings back the file as shipped.")


def test_nobody_is_told_to_reset_a_file_missing_from_another_folder(make_code, tmp_path):
    code = CodeUnderTest(make_code(numbers_lab="").lab, tmp_path)
    assert refusal(code, "numbers_lab") == f"{tmp_path / 'numbers_lab.py'} is missing."


def test_a_syntax_error_shows_file_line_and_caret_and_nothing_else(make_code, monkeypatch):
    code = make_code(numbers_lab="def double(x):\n    return x +* 2\n")
    monkeypatch.chdir(code.lab.path)
    lines = refusal(code, "numbers_lab").splitlines()
    assert lines[0].strip() == f'File "{Path("src") / "numbers_lab.py"}", line 2'
    assert lines[1].strip() == "return x +* 2"
    assert lines[2].strip() == "^"
    assert lines[2].index("^") == lines[1].index("*")
    assert lines[3] == "SyntaxError: invalid syntax"
    assert len(lines) == 4


@pytest.mark.parametrize(
    "source", ["def f():\nreturn 1\n", "if True:\n\tx = 1\n        y = 2\n"], ids=["indent", "tab"]
)
def test_wrong_indentation_shows_the_line(make_code, source):
    message = refusal(make_code(numbers_lab=source), "numbers_lab")
    assert "numbers_lab.py" in message
    assert ", line " in message
    assert "Error: " in message


@pytest.mark.parametrize("content", [b"x = 1\x00\n", b"x = '\xff'\n"], ids=["null byte", "not utf-8"])
def test_a_file_that_is_no_text_is_named(make_code, content):
    code = make_code(numbers_lab="")
    (code.folder / "numbers_lab.py").write_bytes(content)
    message = refusal(code, "numbers_lab")
    assert "numbers_lab.py" in message
    assert "SyntaxError: " in message


def test_an_error_at_import_shows_only_the_learners_frames(make_code):
    code = make_code(
        numbers_lab="import json\n\ndef ratio(a):\n    return 1 / 0\n\nVALUE = json.loads('1', parse_int=ratio)\n"
    )
    message = refusal(code, "numbers_lab").splitlines()
    file = code.folder / "numbers_lab.py"
    assert message == [
        f'  File "{file}", line 6',
        "    VALUE = json.loads('1', parse_int=ratio)",
        f'  File "{file}", line 4',
        "    return 1 / 0",
        "ZeroDivisionError: division by zero",
    ]


def test_an_error_in_an_imported_file_of_the_lab_is_reported_once(make_code):
    code = make_code(first="import second", second="undefined_name")
    with pytest.raises(CannotImport) as caught:
        load(code, "first")
    message = str(caught.value)
    assert message.splitlines() == [
        f'  File "{code.folder / "second.py"}", line 1',
        "    undefined_name",
        "NameError: name 'undefined_name' is not defined",
    ]


@pytest.mark.parametrize(
    "source",
    ["exit()", "raise SystemExit(0)", "import pytest\npytest.skip('later', allow_module_level=True)"],
)
def test_a_file_that_leaves_at_import_cannot_be_imported(make_code, source):
    assert "numbers_lab.py" in refusal(make_code(numbers_lab=source), "numbers_lab")


def test_an_interrupt_is_no_error_of_the_file(make_code):
    with pytest.raises(KeyboardInterrupt):
        load(make_code(numbers_lab="raise KeyboardInterrupt"), "numbers_lab")


def test_a_failed_import_is_tried_again(make_code):
    code = make_code(numbers_lab="1 / 0")
    refusal(code, "numbers_lab")
    (code.folder / "numbers_lab.py").write_text("VALUE = 1")
    assert load(code, "numbers_lab").VALUE == 1


# --- provenance -----------------------------------------------------------------------------


def test_a_module_that_replaces_itself_is_a_stranger(make_code):
    code = make_code(numbers_lab="import sys\nsys.modules[__name__] = dict(double=2)")
    with code.active():
        importlib.import_module("numbers_lab")
        (sentence,) = code.strangers()
    assert "numbers_lab.py: `numbers_lab` is an object of class dict" in sentence
    assert "sys.modules" in sentence


def test_a_module_that_was_exchanged_at_call_time_is_a_stranger_for_that_test_only(make_code):
    code = make_code(
        numbers_lab="import sys, json\ndef swap():\n    sys.modules[__name__] = json\n"
        "def vanish():\n    del sys.modules[__name__]"
    )
    module = load(code, "numbers_lab")
    with code.active():
        module.swap()
        assert f"is the module {sys.modules['json'].__file__}" in code.strangers()[0]
    with code.active():
        module.vanish()
        assert "was taken out of sys.modules" in code.strangers()[0]
    with code.active():
        assert sys.modules["numbers_lab"] is module
        assert code.strangers() == []


def test_what_a_module_says_about_itself_does_not_count(make_code):
    code = make_code(numbers_lab="__file__ = 5\n__name__ = 'else'\n__spec__ = None\n__loader__ = None")
    with code.active():
        importlib.import_module("numbers_lab")
        assert code.strangers() == []


def test_a_reloaded_module_is_no_stranger(make_code):
    code = make_code(numbers_lab="VALUE = 1")
    with code.active():
        importlib.reload(importlib.import_module("numbers_lab"))
        assert code.strangers() == []


def test_frames_of_the_files_and_of_what_they_made_with_eval_are_owned(make_code):
    code = make_code(
        numbers_lab="import sys\ndef frame():\n    return sys._getframe()\n"
        "lambda_frame = eval('lambda: sys._getframe()')"
    )
    module = load(code, "numbers_lab")
    assert code.owns_frame(module.frame())
    assert code.owns_frame(module.lambda_frame())
    assert not code.owns_frame(sys._getframe())
    assert not code.owns(str(code.folder) + "_other/numbers_lab.py")


# --- where --code points --------------------------------------------------------------------


def test_src_and_solutions_are_folders_of_the_lab_wherever_one_stands(make_code, tmp_path):
    lab = make_code(numbers_lab="").lab
    (tmp_path / "src").mkdir()
    assert locate_code(lab, "src", tmp_path) == lab.path / "src"
    assert locate_code(lab, "solutions", tmp_path) == lab.path / "solutions"


def test_a_folder_is_relative_to_where_pytest_was_called(make_code, tmp_path):
    lab = make_code(numbers_lab="").lab
    (tmp_path / "mine").mkdir()
    assert locate_code(lab, "mine", tmp_path) == tmp_path / "mine"
    assert locate_code(lab, "../mine", tmp_path / "ch01_numbers") == tmp_path / "mine"
    assert locate_code(lab, str(tmp_path / "mine"), Path("/")) == tmp_path / "mine"


def test_a_folder_that_mirrors_labs_holds_each_labs_files_in_its_place(make_code, tmp_path):
    lab = make_code(numbers_lab="").lab
    mirrored = tmp_path / "mirror" / "ch01_numbers" / "lab01"
    mirrored.mkdir(parents=True)
    assert locate_code(lab, "mirror", tmp_path) == mirrored


def test_a_tilde_is_the_home_folder(make_code, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_code(make_code(numbers_lab="").lab, "~/mine", Path("/")) == tmp_path / "mine"


# --- words ----------------------------------------------------------------------------------


def test_a_path_is_shown_relative_to_the_current_folder_if_below_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert relative(tmp_path / "a" / "b.py") == str(Path("a") / "b.py")
    assert relative(tmp_path.parent / "b.py") == str(tmp_path.parent / "b.py")


def test_a_path_is_shown_whole_when_the_current_folder_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert relative(tmp_path / "b.py") == str(tmp_path / "b.py")


def test_a_deep_recursion_is_cut_in_the_middle_and_keeps_the_error(make_code):
    module = load(
        code := make_code(numbers_lab="def f(n):\n    return 1 / n if n == 0 else f(n - 1)"), "numbers_lab"
    )
    with pytest.raises(ZeroDivisionError) as caught:
        module.f(100)
    lines = explain(caught.value, code.folder).splitlines()
    assert "  ... 93 more calls ..." in lines
    assert len(lines) == 2 * 8 + 2
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_an_exception_whose_message_raises_is_explained_all_the_same(make_code):
    code = make_code(
        numbers_lab="class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\ndef f():\n    raise Odd"
    )
    module = load(code, "numbers_lab")
    with pytest.raises(module.Odd) as caught:
        module.f()
    assert explain(caught.value, code.folder).splitlines()[-1].startswith("numbers_lab.Odd: ")
