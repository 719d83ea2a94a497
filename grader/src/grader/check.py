"""The authors' gate: proves of a lab most of what the lab standard asks.

Anatomy and drift are read from the files. The rest is run: the skeleton must pass no test, the
solution all of them (with a second seed too), each misconception must fail the tests it names
and be diagnosed as itself, each alternative must pass.

A misconception whose signature is known runs the tests of that signature and those in
`caught_by`, and is taken to pass the others: they are what makes a check of forty misconceptions
take minutes. `--write` runs every test.
"""

import os
import queue
import re
import threading
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from grader import diagnosis, misconceptions, skeleton
from grader.catalog import Catalog, CatalogError, Lab
from grader.chapter_file import unlisted_labs
from grader.grading import grade_lab
from grader.misconceptions import Edit, Misconception, Misconceptions
from grader.report import LabReport, Outcome, Status, TestResult
from grader.sandbox.local import LocalSandbox
from grader.submission import read_code

SECTIONS = ("You will build", "Why", "Background", "Steps", "How it is checked", "Going further")
FEWEST_MISCONCEPTIONS = 5


@dataclass(frozen=True)
class Variant:
    """One program to run against a lab's tests.

    Attributes:
        lab: whose tests.
        kind: `skeleton`, `solution`, `reseeded` (the solution, other inputs), `misconception`
            or `alternative`.
        name: of the misconception or alternative.
        code: its source files.
        seed: shifts the tests' inputs.
        only: the tests to run: full names, or names of functions; None for all.
    """

    lab: Lab
    kind: str
    name: str
    code: dict[str, bytes]
    seed: int = 0
    only: frozenset[str] | None = None

    def wants(self, test: str) -> bool:
        """Whether the test of this name is to run."""
        return self.only is None or test in self.only or _function(test) in self.only


@dataclass
class LabCheck:
    """What was found out about one lab.

    Attributes:
        lab: the lab.
        problems: a sentence each; none means the lab is at the standard.
        tests: how many the solution passed.
        misconceptions: how many there are.
        caught: how many of them the tests named in `caught_by` fail for.
        diagnosed: how many of them are diagnosed as themselves.
        alternatives: how many correct rewrites there are.
        accepted: how many of them pass.
        solution_seconds: what the solution's run took.
    """

    lab: Lab
    problems: list[str] = field(default_factory=list)
    tests: int = 0
    misconceptions: int = 0
    caught: int = 0
    diagnosed: int = 0
    alternatives: int = 0
    accepted: int = 0
    solution_seconds: float = 0.0


def check(
    catalog: Catalog,
    labs: Sequence[Lab],
    *,
    cache: Path | None = None,
    write_signatures: bool = False,
    slow: bool = False,
    workers: int | None = None,
    on_run: Callable[[Variant, LabReport], None] | None = None,
) -> list[LabCheck]:
    """Check `labs` and return what was found, in the same order.

    Args:
        catalog: the course.
        labs: written labs; planned ones are skipped.
        cache: folder for expected test sets.
        write_signatures: make `signatures.json` anew from this run instead of checking it.
        slow: whether the solution's run has the tests marked slow too. The other runs never have them.
        workers: how many programs run at a time; None means one per core.
        on_run: called with every finished run.
    """
    labs = [lab for lab in labs if not lab.planned]
    checks = {lab.id: LabCheck(lab) for lab in labs}
    variants: list[Variant] = []
    known: dict[str, Misconceptions] = {}
    for chapter in catalog.chapters:
        for lab in [lab for lab in labs if lab in chapter.labs][:1]:
            checks[lab.id].problems += [
                f"chapter.toml does not list the folder {name} beside it" for name in unlisted_labs(chapter)
            ]
    for lab in labs:
        found = checks[lab.id]
        found.problems += anatomy(lab)
        try:
            known[lab.id] = misconceptions.load(lab)
            variants += _variants(lab, known[lab.id], found.problems, every_test=write_signatures)
        except CatalogError as error:
            found.problems.append(str(error))
            known[lab.id] = Misconceptions()
    reports = _run_all(catalog, variants, cache, slow, workers or os.cpu_count() or 1, on_run)
    for lab in labs:
        mine = [(v, r) for v, r in zip(variants, reports, strict=True) if v.lab is lab]
        _judge(catalog, checks[lab.id], known[lab.id], mine, write_signatures)
    return list(checks.values())


# --- reading -----------------------------------------------------------------------------


def anatomy(lab: Lab) -> list[str]:
    """Return what is missing from the lab's files, a sentence each."""
    problems = []
    readme = lab.path / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if not text:
        problems.append("README.md is missing")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if text and [h for h in headings if h in SECTIONS] != list(SECTIONS):
        problems.append(
            f"README.md needs the sections {', '.join(SECTIONS)}, in this order; it has {headings}"
        )
    if text and not re.search(r"\d+ minutes", text.split("\n## ")[0]):
        problems.append("README.md gives no time estimate (`About 60 minutes`) above the first section")
    if not list((lab.path / "tests").glob("test_*.py")):
        problems.append("tests/ holds no test_*.py")
    for name in lab.files:
        try:
            ours = (lab.path / "src" / name).read_text(encoding="utf-8")
            theirs = (lab.path / "solutions" / name).read_text(encoding="utf-8")
            problems += [f"src/{name}: {p}" for p in skeleton.drift(ours, theirs)]
            problems += [f"src/{name}: {p}" for p in skeleton.missing_guidance(ours)]
            if skeleton.stubs(theirs):
                problems.append(f"solutions/{name} still raises NotImplementedError")
        except FileNotFoundError as error:
            problems.append(f"{Path(error.filename).relative_to(lab.path)} is missing")
        except (SyntaxError, tokenize.TokenError) as error:
            problems.append(f"{name} is no Python: {error}")
    if not any(skeleton.stubs(_text(lab.path / "src" / name)) for name in lab.files):
        problems.append("src/ has nothing to write")
    return problems


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


# --- running -----------------------------------------------------------------------------


def _variants(lab: Lab, known: Misconceptions, problems: list[str], every_test: bool) -> list[Variant]:
    solution = read_code(lab, lab.path / "solutions")
    variants = [
        Variant(lab, "skeleton", "", read_code(lab, lab.path / "src")),
        Variant(lab, "solution", "", solution),
        Variant(lab, "reseeded", "", solution, seed=1),
    ]
    signatures = {} if every_test else diagnosis.read_signatures(lab)
    kinds: tuple[tuple[str, tuple[Edit, ...]], ...] = (
        ("misconception", known.misconception),
        ("alternative", known.alternative),
    )
    for kind, edits in kinds:
        for edit in edits:
            only = None
            if isinstance(edit, Misconception) and edit.name in signatures:
                only = frozenset([*signatures[edit.name], *edit.caught_by])
            try:
                variants.append(Variant(lab, kind, edit.name, edit.apply(solution), only=only))
            except CatalogError as error:
                problems.append(f"{kind} {error}")
    return variants


def _run_all(
    catalog: Catalog,
    variants: Sequence[Variant],
    cache: Path | None,
    slow: bool,
    workers: int,
    on_run: Callable[[Variant, LabReport], None] | None,
) -> list[LabReport]:
    """Run every variant, each worker with a warm parent of its own, and return reports in order."""
    reports: list[LabReport | BaseException | None] = [None] * len(variants)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(variants)):
        waiting.put(index)
    one_at_a_time = threading.Lock()

    def work() -> None:
        # One torch thread each: the workers share the cores already.
        with LocalSandbox(threads=1) as sandbox:
            sandbox.start()
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                variant = variants[index]
                try:
                    report = grade_lab(
                        catalog,
                        variant.lab,
                        sandbox,
                        variant.code,
                        slow=slow and variant.kind == "solution",
                        seed=variant.seed,
                        only=variant.wants if variant.only is not None else None,
                        cache=cache,
                    )
                except BaseException as error:
                    reports[index] = error
                    raise
                reports[index] = report
                if on_run:
                    with one_at_a_time:
                        on_run(variant, report)

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(variants)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = []
    for report in reports:
        if not isinstance(report, LabReport):
            raise report if report is not None else RuntimeError("a worker ended early")
        done.append(report)
    return done


# --- judging -----------------------------------------------------------------------------


def _judge(
    catalog: Catalog,
    found: LabCheck,
    known: Misconceptions,
    runs: Sequence[tuple[Variant, LabReport]],
    write_signatures: bool,
) -> None:
    problems, lab = found.problems, found.lab
    wrong = {v.name: r for v, r in runs if v.kind == "misconception"}
    names = [t.name for v, r in runs if v.kind == "solution" for t in r.tests]
    if not names:
        # Nothing below would say anything that this does not.
        problems += [f"the solution cannot be run: {r.reason}" for v, r in runs if v.kind == "solution"]
        return
    for variant, report in runs:
        if variant.kind == "skeleton":
            if passed := [t.name for t in report.tests if t.outcome is Outcome.PASSED]:
                problems.append(f"the skeleton passes {len(passed)} tests: {', '.join(passed[:3])}")
            elif report.status is not Status.NOT_ATTEMPTED:
                problems.append(f"the skeleton is {report.status.value}, not not_attempted: {report.reason}")
        elif variant.kind == "solution":
            found.solution_seconds = report.seconds
            found.tests = report.passed
            problems += _solution_problems(catalog, lab, report)
        elif variant.kind == "reseeded" and not _passes(report):
            problems.append(f"the solution fails with another seed: {_failures(report)}")
        elif variant.kind == "alternative":
            found.alternatives += 1
            if _passes(report):
                found.accepted += 1
            else:
                problems.append(f"alternative {variant.name} is rejected: {_failures(report)}")
    if len(known.misconception) < FEWEST_MISCONCEPTIONS:
        problems.append(
            f"{len(known.misconception)} misconceptions, {FEWEST_MISCONCEPTIONS} at least are needed"
        )
    found.misconceptions = len(known.misconception)
    for misconception in known.misconception:
        if misconception.name not in wrong:
            continue
        report = wrong[misconception.name]
        failing = {_function(t.name) for t in report.tests if t.outcome in (Outcome.FAILED, Outcome.ERROR)}
        functions = {_function(name) for name in names}
        if unknown := [t for t in misconception.caught_by if t not in functions]:
            problems.append(f"misconception {misconception.name}: there is no test {', '.join(unknown)}")
        elif missed := [t for t in misconception.caught_by if t not in failing]:
            # A runner that was killed has failed no test either.
            because = f": {report.reason}" if report.status in (Status.ERROR, Status.TIMEOUT) else ""
            problems.append(
                f"misconception {misconception.name} is not caught by {', '.join(missed)}{because}"
            )
        else:
            found.caught += 1
    outcomes = {}
    for name, report in wrong.items():
        ran = {t.name: t for t in report.tests}
        outcomes[name] = [ran.get(n, TestResult(name=n, outcome=Outcome.PASSED)) for n in names]
    _judge_diagnoses(found, known, outcomes, write_signatures)


def _solution_problems(catalog: Catalog, lab: Lab, report: LabReport) -> list[str]:
    problems = []
    if not _passes(report):
        problems.append(f"the solution is {report.status.value}: {report.reason} {_failures(report)}")
    for chapter in catalog.chapters:
        claim = chapter.milestone
        if lab not in chapter.labs or claim.lab != lab.path.name:
            continue
        if not report.milestones:
            elsewhere = any(t.outcome is Outcome.NOT_VERIFIED_HERE for t in report.tests)
            if not elsewhere and not report.slow_left_out:
                problems.append("the chapter's milestone is in this lab, but no test records it")
            continue
        for value in (m.value for m in report.milestones):
            if not (value <= claim.ours if claim.better == "lower" else value >= claim.ours):
                problems.append(
                    f"the solution's milestone is {value:.4g} {claim.unit}, ours should be {claim.ours:g}"
                )
    return problems


def _judge_diagnoses(
    found: LabCheck, known: Misconceptions, wrong: dict[str, list[TestResult]], write_signatures: bool
) -> None:
    lab, problems = found.lab, found.problems
    hints = {m.name: m.hint for m in known.misconception}
    if write_signatures and not problems:
        diagnosis.write_signatures(lab, {n: diagnosis.signature(tests) for n, tests in sorted(wrong.items())})
    signatures = diagnosis.read_signatures(lab)
    if signatures.keys() != wrong.keys():
        problems.append(
            "signatures.json does not match misconceptions.toml: run `topeka check --write` and commit the file"
        )
    for name, tests in wrong.items():
        named = diagnosis.diagnose(tests, signatures, hints)
        if named is not None and named.misconception == name:
            found.diagnosed += 1
        elif name in signatures:
            problems.append(
                f"misconception {name} is diagnosed as {named.misconception if named else 'nothing'}: "
                "do their tests fail alike, or is signatures.json out of date?"
            )


def _passes(report: LabReport) -> bool:
    """Whether nothing failed; tests that need other hardware are no failure of the code."""
    return report.status in (Status.VERIFIED, Status.NOT_VERIFIED_HERE)


def _failures(report: LabReport) -> str:
    wrong = [t for t in report.tests if t.outcome not in (Outcome.PASSED, Outcome.NOT_VERIFIED_HERE)]
    listed = "; ".join(f"{t.name.split('::')[-1]}: {t.message.splitlines()[0] if t.message else t.outcome}"
                       for t in wrong[:3])  # fmt: skip
    return listed or report.reason


def _function(test: str) -> str:
    return test.split("::")[-1].split("[")[0]
