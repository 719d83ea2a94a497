"""Real files: a small course in `tmp_path`, broken in one place each, and the repository itself."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from grader.catalog import (
    Catalog,
    CatalogError,
    CourseNotFound,
    UnknownTarget,
    find_root,
    load,
)
from grader.chapter_file import unlisted_labs
from pydantic import ValidationError

REPOSITORY = Path(__file__).resolve().parents[2]

SYLLABUS = {
    "ch01_attention": [
        "lab01_dot_product",
        "lab02_visualization",
        "lab03_multihead",
        "lab04_pytorch_parity",
    ],
    "ch02_transformer_block": [
        "lab01_normalization",
        "lab02_positional_encoding",
        "lab03_feed_forward",
        "lab04_transformer_block",
    ],
    "ch03_full_transformer": [
        "lab01_causal_masking",
        "lab02_tokenizer_and_embeddings",
        "lab03_decoder_only",
        "lab04_pretrained_weights",
    ],
    "ch04_training": [
        "lab01_loss",
        "lab02_gradient_flow",
        "lab03_training_loop",
        "lab04_tiny_shakespeare",
    ],
    "ch05_linear_attention": [
        "lab01_quadratic_wall",
        "lab02_kernel_trick",
        "lab03_feature_maps",
        "lab04_causal_linear",
    ],
    "ch06_flash_linear_attention": [
        "lab01_rnn_view",
        "lab02_chunkwise_parallel",
        "lab03_flash_linear_attention",
        "lab04_gated_linear_attention",
        "lab05_deltanet",
    ],
    "ch07_deepseek_mla": [
        "lab01_sparse_patterns",
        "lab02_sliding_window",
        "lab03_kv_compression",
        "lab04_mla",
        "lab05_mixture_of_experts",
    ],
    "ch08_inference": [
        "lab01_kv_cache",
        "lab02_generation",
        "lab03_batched_generation",
        "lab04_quantization",
    ],
    "ch09_serving": [
        "lab01_huggingface",
        "lab02_vllm",
        "lab03_llama_cpp",
        "lab04_structured_generation",
        "lab05_benchmark",
    ],
    "ch10_flash_attention": [
        "lab01_memory_profiling",
        "lab02_online_softmax",
        "lab03_tiled_attention",
        "lab04_flash_in_practice",
        "lab05_gradient_checkpointing",
    ],
    "ch11_distributed": [
        "lab01_collectives",
        "lab02_ddp",
        "lab03_fsdp",
        "lab04_mixed_precision",
        "lab05_tensor_pipeline",
    ],
    "ch12_kernels": [
        "lab01_triton_basics",
        "lab02_fused_attention",
        "lab03_jax_attention",
        "lab04_pallas_tpu",
        "lab05_profiling",
    ],
}

CHAPTER = """\
title = "Attention"
phase = "foundation"
stack = "cpu"
also = ["cuda"]
summary = "From a dot product to heads."

[milestone]
lab = "lab02_heads"
claim = "Heads match"
measure = "largest difference"
unit = "absolute"
better = "lower"
promised = 1e-5
ours = 1e-6

[[lab]]
folder = "lab01_dot_product"
title = "Dot products"
summary = "Softmax first"
minutes = 60
files = ["attention.py"]

[[lab]]
folder = "lab02_heads"
title = "Heads"
summary = "Many at once"
minutes = 90
files = ["heads.py", "split.py"]
planned = true
"""

FILE = "labs/ch01_attention/chapter.toml"


@pytest.fixture(autouse=True)
def _no_course_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOPEKA_ROOT", raising=False)


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """One chapter: a written lab and a planned one."""
    (tmp_path / "pyproject.toml").touch()
    add_chapter(tmp_path, "ch01_attention", CHAPTER)
    return tmp_path


def add_chapter(root: Path, folder: str, text: str) -> None:
    solutions = root / "labs" / folder / "lab01_dot_product" / "solutions"
    solutions.mkdir(parents=True)
    (solutions / "attention.py").touch()
    (root / "labs" / folder / "chapter.toml").write_text(text, encoding="utf-8")


Fault = Callable[[str, str], str]


@pytest.fixture
def fault(course: Path) -> Fault:
    """Replaces text in the chapter's file and returns what `load` says about it."""

    def replace(find: str, by: str) -> str:
        assert CHAPTER.count(find) == 1
        (course / FILE).write_text(CHAPTER.replace(find, by), encoding="utf-8")
        return message(course)

    return replace


def message(root: Path) -> str:
    with pytest.raises(CatalogError) as caught:
        load(root)
    return str(caught.value)


# --- the repository ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load(REPOSITORY)


def test_repository_has_the_labs_of_the_syllabus(catalog: Catalog) -> None:
    assert {c.path.name: [lab.folder for lab in c.labs] for c in catalog.chapters} == SYLLABUS
    assert (len(catalog.chapters), len(catalog.labs)) == (12, 54)


def test_repository_has_phases_and_stacks_of_the_product(catalog: Catalog) -> None:
    phases = [c.phase for c in catalog.chapters]
    expected = ["foundation"] * 4 + ["attention variants"] * 3 + ["production"] * 2 + ["hardware"] * 3
    assert phases == expected
    assert [c.stack for c in catalog.chapters] == ["cpu"] * 9 + ["cuda", "multi-gpu", "cuda"]
    assert [c.id for c in catalog.chapters if c.also == ("cuda",)] == ["ch05", "ch06", "ch07", "ch08", "ch09"]


def test_repository_promises_the_numbers_of_the_product(catalog: Catalog) -> None:
    claims = {c.number: (c.milestone.promised, c.milestone.ours) for c in catalog.chapters}
    assert claims == {
        1: (1e-5, 1e-6),
        2: (1e-5, 1e-5),
        3: (1e-4, 1e-4),
        4: (1.88, 1.60),
        5: (10, 30),
        6: (1e-5, 1e-5),
        7: (4, 8),
        8: (10, 20),
        9: (100, 260),
        10: (4, 16),
        11: (1, 1),
        12: (80, 100),
    }


def test_twelve_chapters_load_in_50_ms(catalog: Catalog) -> None:
    def seconds() -> float:
        started = time.process_time()
        load(REPOSITORY)
        return time.process_time() - started

    assert min(seconds() for _ in range(5)) < 0.05


# --- what a catalogue holds ----------------------------------------------------------------


def test_lab_knows_its_id_and_files(course: Path) -> None:
    chapter = load(course).chapters[0]
    heads = chapter.labs[1]
    assert (chapter.id, chapter.number, heads.id, heads.chapter_id) == ("ch01", 1, "ch01/lab02", "ch01")
    assert heads.path == course / "labs/ch01_attention/lab02_heads"
    assert heads.source_paths == (heads.path / "src/heads.py", heads.path / "src/split.py")


def test_optional_keys_have_defaults(course: Path) -> None:
    lab = load(course).labs[0]
    assert (lab.preload, lab.uses, lab.timeout, lab.memory_gb) == (("torch",), (), 300, 4)
    assert not lab.planned


def test_optional_keys_can_be_given(course: Path) -> None:
    keys = 'planned = true\npreload = ["jax.numpy"]\nuses = ["ch01/lab01"]\ntimeout = 60\nmemory_gb = 0.5\n'
    (course / FILE).write_text(CHAPTER.replace("planned = true\n", keys), encoding="utf-8")
    lab = load(course).labs[1]
    assert (lab.preload, lab.uses, lab.timeout, lab.memory_gb) == (("jax.numpy",), ("ch01/lab01",), 60, 0.5)


def test_lab_takes_its_chapters_stack(course: Path) -> None:
    assert [(lab.stack, lab.also) for lab in load(course).labs] == [("cpu", ("cuda",))] * 2


def test_lab_with_its_own_stack_does_not_inherit_also(course: Path) -> None:
    own = CHAPTER.replace("planned = true\n", 'planned = true\nstack = "multi-gpu"\n')
    (course / FILE).write_text(own, encoding="utf-8")
    assert [(lab.stack, lab.also) for lab in load(course).labs] == [("cpu", ("cuda",)), ("multi-gpu", ())]


def test_entries_are_frozen_and_hashable(course: Path) -> None:
    lab = load(course).labs[0]
    with pytest.raises(ValidationError, match="frozen"):
        lab.title = "other"
    assert lab in set(load(course).labs)


def test_description_of_a_lab_does_not_depend_on_where_the_checkout_is(course: Path) -> None:
    assert str(course) not in repr(load(course).labs)


# --- where the course is -------------------------------------------------------------------


@pytest.mark.parametrize(
    "below", [".", "labs", "labs/ch01_attention/lab01_dot_product/solutions/attention.py"]
)
def test_root_is_found_from_below(course: Path, below: str) -> None:
    assert find_root(course / below) == course


def test_nearest_course_is_taken(course: Path) -> None:
    inner = course / "inner"
    (inner / "labs/ch01_attention").mkdir(parents=True)
    (inner / "pyproject.toml").touch()
    (inner / FILE).write_text(CHAPTER)
    assert find_root(inner / "labs") == inner


def test_environment_comes_first(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPEKA_ROOT", str(course))
    assert find_root(REPOSITORY) == course


def test_environment_without_a_course_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPEKA_ROOT", str(tmp_path))
    with pytest.raises(CourseNotFound, match=r"TOPEKA_ROOT is .* which holds no course .* or unset it"):
        find_root(REPOSITORY)


def test_no_course_above_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "labs").mkdir()
    with pytest.raises(CourseNotFound, match=r"no course at or above .*change into the course's folder"):
        find_root(tmp_path)
    with pytest.raises(CourseNotFound, match="holds no course"):
        load(tmp_path)


# --- targets -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "ids"),
    [
        ("ch05/lab04", ["ch05/lab04"]),
        ("CH5/LAB4", ["ch05/lab04"]),
        ("5.4", ["ch05/lab04"]),
        ("5/04", ["ch05/lab04"]),
        ("ch05_linear_attention/lab04_causal_linear", ["ch05/lab04"]),
        ("lab04_causal_linear", ["ch05/lab04"]),
        ("labs/ch05_linear_attention/lab04_causal_linear/", ["ch05/lab04"]),
        ("labs/ch01_attention/lab01_dot_product/src/attention.py", ["ch01/lab01"]),
        ("ch05", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        (" 5 ", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        ("05", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        ("CH=5", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        ("ch05_linear_attention", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        ("./labs/ch05_linear_attention", ["ch05/lab01", "ch05/lab02", "ch05/lab03", "ch05/lab04"]),
        ("12.5", ["ch12/lab05"]),
    ],
)
def test_target_names_labs(catalog: Catalog, target: str, ids: list[str]) -> None:
    assert [lab.id for lab in catalog.select([target])] == ids


@pytest.mark.parametrize("target", ["all", "ALL", "labs", "labs/", str(REPOSITORY)])
def test_target_names_all(catalog: Catalog, target: str) -> None:
    assert catalog.select([target]) == catalog.labs


def test_every_folder_name_is_a_target(catalog: Catalog) -> None:
    for lab in catalog.labs:
        assert (
            catalog.select([lab.folder])
            == catalog.select([lab.id])
            == catalog.select([str(lab.path)])
            == (lab,)
        )


def test_paths_start_from_the_current_folder(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY / "labs/ch01_attention/lab01_dot_product")
    for target in (".", "src", "../lab01_dot_product", "src/attention.py"):
        assert [lab.id for lab in catalog.select([target])] == ["ch01/lab01"]
    assert {lab.chapter_id for lab in catalog.select([".."])} == {"ch01"}


def test_several_targets_keep_their_order_and_count_once(catalog: Catalog) -> None:
    labs = catalog.select(["ch02/lab02", "1.1", "ch02"])
    assert [lab.id for lab in labs] == ["ch02/lab02", "ch01/lab01", "ch02/lab01", "ch02/lab03", "ch02/lab04"]
    assert catalog.select([]) == ()


@pytest.mark.parametrize(
    ("target", "matches"),
    [
        ("dot_prodct", ["ch01/lab01"]),
        ("ch01_atention", ["ch01"]),
        ("ch01/lab09", ["ch01/lab01", "ch01/lab02", "ch01/lab03", "ch01/lab04"]),
        ("labs/ch01_attention/lab9", ["ch01/lab01", "ch01/lab02", "ch01/lab03", "ch01/lab04"]),
        ("labs/ch01_attention/lab01_dot_product/src/absent.py", None),
        ("13", []),
        ("0", []),
        ("", []),
        ("1.1.1", None),
        ("lab01", None),
        ("/", []),
        ("..", []),
        ("\0", []),
        ("~nobody", []),
    ],
)
def test_unknown_target_says_what_is_close_and_what_is_valid(
    catalog: Catalog, target: str, matches: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UnknownTarget) as caught:
        catalog.select(["ch01", target])
    text = str(caught.value)
    assert text.startswith(f"there is no lab or chapter {target!r}.")
    assert (
        "ch01/lab01), a chapter (ch01 to ch12), a folder (such as labs/ch01_attention/lab01_dot_product)"
        in text
    )
    assert caught.value.target == target
    if matches is not None:
        assert list(caught.value.matches)[: len(matches) or None] == matches
    assert ("Did you mean" in text) == bool(caught.value.matches)


# --- faults in a file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "by", "says"),
    [
        (
            "minutes = 90",
            'minutes = "long"',
            'lab02_heads.minutes: found "long"; allowed: a whole number from 5 to 600',
        ),
        ("minutes = 90", "minutes = 1.5", "lab02_heads.minutes: found 1.5; allowed: a whole number from 5 to 600"),
        ("minutes = 90", "minutes = true", "lab02_heads.minutes: found true; allowed: a whole number from 5 to 600"),
        ("minutes = 90", "minutes = 0", "lab02_heads.minutes: found 0; allowed: a whole number from 5 to 600"),
        (
            "minutes = 90",
            "minuts = 90",
            "lab02_heads.minutes: missing; allowed: a whole number from 5 to 600\n"
            f"{FILE}: lab02_heads.minuts: found a key of no meaning; did you mean minutes?; allowed: folder, title, "
            "summary, minutes, files, planned, stack, also, preload, uses, data, strict, timeout, memory_gb",
        ),
        (
            'phase = "foundation"',
            'phase = "basics"',
            'phase: found "basics"; allowed: "foundation", "attention variants", "production" or "hardware"',
        ),
        ('stack = "cpu"', 'stack = "gpu"', 'stack: found "gpu"; allowed: "cpu", "cuda" or "multi-gpu"'),
        ('stack = "cpu"', "", 'stack: missing; allowed: "cpu", "cuda" or "multi-gpu"'),
        ('["cuda"]', '["cuda", "tpu"]', 'also[1]: found "tpu"; allowed: a list of "cpu", "cuda", "multi-gpu"'),
        (
            "planned = true",
            'stack = "tpu"',
            'lab02_heads.stack: found "tpu"; allowed: "cpu", "cuda" or "multi-gpu"',
        ),
        ("planned = true", 'planned = "no"', 'lab02_heads.planned: found "no"; allowed: true or false'),
        ("planned = true", 'path = "x"', 'lab02_heads.path: found "x"; allowed: nothing, this key is not for the file'),
        ('title = "Heads"', 'title = ""', 'lab02_heads.title: found ""; allowed: one line of text'),
        ('title = "Heads"', 'title = "a\\nb"', 'lab02_heads.title: found "a\\nb"; allowed: one line of text'),
        ('title = "Heads"', "", "lab02_heads.title: missing; allowed: one line of text"),
        (
            'folder = "lab02_heads"',
            'folder = "heads"',
            'heads.folder: found "heads"; allowed: lab, two digits and a name, such as lab01_dot_product',
        ),
        (
            'folder = "lab02_heads"',
            "folder = 2",
            "lab[1].folder: found 2; allowed: lab, two digits and a name, such as lab01_dot_product",
        ),
        (
            'folder = "lab02_heads"',
            'folder = "lab03_heads"',
            "lab03_heads.folder: found lab number 3; allowed: 2, without gaps, in order\n"
            f'{FILE}: milestone.lab: found "lab02_heads"; allowed: lab01_dot_product, lab03_heads',
        ),
        (
            'folder = "lab01_dot_product"',
            'folder = "lab02_heads"',
            "lab02_heads.folder: found 2 times; allowed: once",
        ),
        (
            'lab = "lab02_heads"',
            'lab = "lab03_x"',
            'milestone.lab: found "lab03_x"; allowed: lab01_dot_product, lab02_heads',
        ),
        ('better = "lower"', 'better = "more"', 'milestone.better: found "more"; allowed: "lower" or "higher"'),
        ("ours = 1e-6", "ours = nan", "milestone.ours: found NaN; allowed: a finite number"),
        ("ours = 1e-6", "ours = 1e-4", "milestone.ours: found 0.0001; allowed: at most what is promised, 1e-05"),
        (
            'better = "lower"',
            'better = "higher"',
            "milestone.ours: found 1e-06; allowed: at least what is promised, 1e-05",
        ),
        ("ours = 1e-6", "ours = 1e-6\nnotes = 3", "milestone.notes: found 3; allowed: a list of lines of text"),
        ("planned = true", "timeout = 0", "lab02_heads.timeout: found 0; allowed: seconds, above 0, at most 7200"),
        ("planned = true", "memory_gb = -1", "lab02_heads.memory_gb: found -1; allowed: GiB, above 0, at most 1024"),
        (
            "planned = true",
            'uses = ["lab01"]',
            'lab02_heads.uses[0]: found "lab01"; allowed: a list of ids of earlier labs, such as ch03/lab03',
        ),
        (
            "planned = true",
            'planned = true\nuses = ["ch01/lab02"]',
            'lab02_heads.uses: found "ch01/lab02"; allowed: ids of earlier labs',
        ),
        ("planned = true", 'preload = ["a b"]', 'lab02_heads.preload[0]: found "a b"; allowed: a list of module names'),
    ],
)  # fmt: skip
def test_fault_is_named_by_file_key_value_and_what_is_allowed(
    fault: Fault, find: str, by: str, says: str
) -> None:
    assert f"{FILE}: {says}" in fault(find, by)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tokenize.py", ", which would hide the module `tokenize`"),
        ("statistics.py", ", which would hide the module `statistics`"),
        ("torch.py", ", which would hide the module `torch`"),
        ("numpy.py", ", which would hide the module `numpy`"),
        ("pytest.py", ", which would hide the module `pytest`"),
        ("profiling.py", ", which would hide the module `profiling`"),
        ("lambda.py", ", which tests could not import"),
        ("test_heads.py", ", which pytest would take for tests"),
        ("my-heads.py", ""),
        ("2heads.py", ""),
        ("Heads.py", ""),
        ("heads", ""),
        ("heads.txt", ""),
        ("../heads.py", ""),
        ("", ""),
    ],
)
def test_file_that_tests_cannot_import_is_refused(fault: Fault, name: str, says: str) -> None:
    assert fault('"heads.py"', f'"{name}"') == (
        f'{FILE}: lab02_heads.files[0]: found "{name}"{says}; '
        "allowed: a list of Python files, lower-case, none named like a module the labs import"
    )


def test_only_file_refused_is_told_once(fault: Fault) -> None:
    assert len(fault('["attention.py"]', '["torch.py"]').splitlines()) == 1


def test_files_must_be_there_and_differ(fault: Fault) -> None:
    assert 'lab02_heads.files: found "split.py" 2 times; allowed: once' in fault('"heads.py"', '"split.py"')
    assert "lab02_heads.files: found []; allowed: a list of Python files" in fault(
        '["heads.py", "split.py"]', "[]"
    )


def test_every_fault_of_a_file_is_told_once(fault: Fault) -> None:
    lines = fault('phase = "foundation"\nstack = "cpu"', 'phase = 1\nstack = "x"').splitlines()
    assert [line.split(": ")[1] for line in lines] == ["phase", "stack"]


def test_long_values_are_cut(fault: Fault) -> None:
    assert len(fault('phase = "foundation"', f'phase = "{"x" * 5000}"')) < 250


@pytest.mark.parametrize("text", ["lab = 3", "lab = [1, 2]", "milestone = 4", "lab = []", ""])
def test_wrong_kinds_of_tables_are_faults_not_crashes(course: Path, text: str) -> None:
    (course / FILE).write_text(text)
    said = message(course)
    assert all(re.fullmatch(r"labs/ch01_attention/chapter\.toml: \S+: .+; allowed: .+|.*: missing; .*", line)
               for line in said.splitlines())  # fmt: skip


def test_milestone_and_labs_are_needed(course: Path) -> None:
    (course / FILE).write_text('title = "x"\nphase = "hardware"\nstack = "cpu"\nsummary = "x"\n')
    assert message(course) == (
        f"{FILE}: milestone: missing; allowed: a table [milestone]\n{FILE}: lab: missing; allowed: tables [[lab]]"
    )


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'title = "x"\nphase == 1\n', "2:8: Invalid value"),
        (b'title = "x"\nphase = [1,\n', "2:12: Invalid value"),
        (b'title = "x"\ntitle = "y"\n', "2:12: Cannot overwrite a value"),
        (b'title = "x"\nphase = "\xe9t\xff"\n', "2:10: this is not UTF-8"),
    ],
)
def test_syntax_error_has_line_and_column(course: Path, content: bytes, place: str) -> None:
    (course / FILE).write_bytes(content)
    assert message(course) == f"{FILE}:{place}"


# --- faults between files and folders ------------------------------------------------------


def test_lab_without_a_folder_must_be_planned(fault: Fault) -> None:
    said = fault("planned = true\n", "")
    assert (
        said
        == f"{FILE}: lab02_heads.folder: found no such folder; allowed: an existing one, or planned = true"
    )


def test_planned_lab_may_be_half_written(course: Path) -> None:
    (course / "labs/ch01_attention/lab02_heads/src").mkdir(parents=True)
    assert load(course).labs[1].planned


def test_written_lab_needs_every_file_in_solutions(course: Path) -> None:
    (course / "labs/ch01_attention/lab01_dot_product/solutions/attention.py").unlink()
    assert message(course) == (
        f'{FILE}: lab01_dot_product.files: found "attention.py", which is not in solutions/; '
        "allowed: files that are, or planned = true"
    )


def test_learner_may_lose_a_file(course: Path) -> None:
    assert not load(course).labs[0].source_paths[0].exists()


def test_unlisted_labs_are_found_and_are_no_error(course: Path) -> None:
    folder = course / "labs/ch01_attention/lab03_extra"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "__pycache__/attention.pyc").touch()
    (folder / ".ipynb_checkpoints").mkdir()
    assert unlisted_labs(load(course).chapters[0]) == []  # what remains of a deleted lab is none
    (folder / "README.md").touch()
    assert unlisted_labs(load(course).chapters[0]) == ["lab03_extra"]


def test_other_folders_are_left_alone(course: Path) -> None:
    for name in ("labs/notes", "labs/.ipynb_checkpoints", "labs/ch01_attention/docs", "labs/ch02_empty"):
        (course / name).mkdir()
    (course / "labs/notes/mine.md").touch()
    assert len(load(course).chapters) == 1


def test_chapter_folder_has_a_number_and_a_name(course: Path) -> None:
    add_chapter(course, "chapter2", CHAPTER)
    assert message(course) == (
        'labs/chapter2: found "chapter2", which has a chapter.toml; '
        "allowed: ch, two digits and a name, such as ch01_attention"
    )


def test_chapter_folder_has_a_file(course: Path) -> None:
    (course / "labs/ch02_blocks").mkdir()
    (course / "labs/ch02_blocks/README.md").touch()
    assert message(course) == "labs/ch02_blocks: found no chapter.toml; allowed: every chapter has one"


@pytest.mark.parametrize(("folder", "number"), [("ch03_blocks", 3), ("ch01_blocks", 1)])
def test_chapters_are_numbered_without_gaps(course: Path, folder: str, number: int) -> None:
    add_chapter(course, folder, CHAPTER)
    assert message(course) == (
        f"labs/{folder}: found chapter number {number}; "
        "allowed: 2, chapters are numbered without gaps and each number once"
    )


def test_labs_of_other_chapters_can_be_used(course: Path) -> None:
    add_chapter(course, "ch02_blocks", CHAPTER.replace("minutes = 60", 'minutes = 60\nuses = ["ch01/lab01"]'))
    assert load(course).labs[2].uses == ("ch01/lab01",)


def test_written_lab_cannot_use_a_planned_one(course: Path) -> None:
    add_chapter(course, "ch02_blocks", CHAPTER.replace("minutes = 60", 'minutes = 60\nuses = ["ch01/lab02"]'))
    assert message(course) == (
        'labs/ch02_blocks/chapter.toml: lab01_dot_product.uses: found "ch01/lab02", which is planned; '
        "allowed: labs that are written"
    )
