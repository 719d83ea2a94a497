"""The dashboard in a real Chromium: what people see, by mouse, by keyboard, on a phone, and as axe judges it."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grader.catalog import Catalog
from grader.report import TestResult
from shared.plugin import NOT_VERIFIED_HERE

from grader import diagnosis

from .conftest import RIGHT, WRONG, body, graded
from .dashboard_site import Site, open_site

try:
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
except ImportError:
    if TYPE_CHECKING:
        raise
    pytest.skip(
        f"{NOT_VERIFIED_HERE}: docker/requirements/browser-tests.txt is not installed",
        allow_module_level=True,
    )

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
HALF = RIGHT.replace("x * 2", "x / 2").replace("double", "half")
EVERY_PAGE = (
    "/", "/chapters/ch01", "/chapters/ch01/lectures/01_why", "/labs/ch01/lab01", "/labs/ch01/lab02",
    "/submissions", "/submissions/FAILED", "/submissions/MEASURED", "/queue", "/gradebook", "/nowhere",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip(f"{NOT_VERIFIED_HERE}: there is no Chromium (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        # Chromium's own sandbox refuses to run as root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(
    chromium: Browser, tmp_path_factory: pytest.TempPathFactory, make_course: Callable[[Path], Catalog]
) -> Iterator[Site]:
    with open_site(make_course(tmp_path_factory.mktemp("course"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def signed_in(chromium: Browser, site: Site) -> dict[str, object]:
    """Cookies by user: signing in is tested once, and costs a page each."""
    return {name: _sign_in(chromium, site, name) for name in ("ada", "ben", "ina")}


def _sign_in(chromium: Browser, site: Site, name: str) -> object:
    context = chromium.new_context()
    page = context.new_page()
    page.goto(site.address)
    page.get_by_label(re.compile("Or sign in with a token|Your token")).fill(site.tokens[name])
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("of 2 labs verified")
    state = context.storage_state()
    context.close()
    return state


class Visit:
    """Opens pages as a user, and remembers what the browser complained about."""

    def __init__(self, chromium: Browser, site: Site, states: dict[str, object]) -> None:
        self.chromium, self.site, self.states = chromium, site, states
        self.contexts: list[BrowserContext] = []
        self.complaints: list[str] = []

    def __call__(self, name: str | None, path: str = "/", **options: object) -> Page:
        state = self.states[name] if name else None
        context = self.chromium.new_context(
            base_url=self.site.address,
            storage_state=state,  # type: ignore[arg-type]
            viewport=options.pop("viewport", DESKTOP),  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )
        self.contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        page.goto(path)
        return page


@pytest.fixture
def visit(chromium: Browser, site: Site, signed_in: dict[str, object]) -> Iterator[Visit]:
    visit = Visit(chromium, site, signed_in)
    yield visit
    for context in visit.contexts:
        context.close()
    # A server that was killed; /nowhere; a link that was used.
    expected = "ERR_CONNECTION", "ERR_INCOMPLETE", "404 (Not Found)", "403 (Forbidden)"
    assert [c for c in visit.complaints if not any(word in c for word in expected)] == []


@pytest.fixture(scope="module")
def results(site: Site) -> dict[str, str]:
    """A failed submission with a diagnosis and a measured one, of ada; by what stands in EVERY_PAGE."""
    with site.api("ada") as program:
        first = graded(program, program.post("/submissions", json=body(WRONG)).json()["id"])
        report = program.get(f"/submissions/{first['id']}/report").json()["labs"][0]
        tests = [TestResult.model_validate(test) for test in report["tests"]]
        diagnosis.write_signatures(site.running.catalog.labs[0], {"wrong_factor": diagnosis.signature(tests)})
        failed = graded(program, program.post(f"/submissions/{first['id']}/regrade").json()["id"])
        measured = graded(program, program.post("/submissions", json=body(HALF, "ch01/lab02")).json()["id"])
    return {"FAILED": failed["id"], "MEASURED": measured["id"]}


def waits_for(gate: Path) -> str:
    """Right code whose last test waits until `gate` is there, so that a test can look in between."""
    wait = f'import pathlib, time\n    while not pathlib.Path("{gate}").exists():\n        time.sleep(0.02)\n    '
    return RIGHT.replace("return n % 2", f"{wait}return n % 2")


def hand_in(page: Page, source: str) -> None:
    file = {"name": "numbers_lab.py", "mimeType": "text/x-python", "buffer": source.encode()}
    page.get_by_label("numbers_lab.py").set_input_files(file)  # type: ignore[arg-type]
    page.get_by_role("button", name="Grade", exact=True).click()


def test_results_come_live_and_end_verified(visit: Visit, tmp_path: Path):
    page = visit("ben", "/labs/ch01/lab01")
    expect(page.get_by_text("Nothing graded yet.")).to_be_visible()
    expect(page.get_by_role("button", name="Grade", exact=True)).to_be_disabled()
    hand_in(page, waits_for(tmp_path / "gate"))
    expect(page.locator(".live-status")).to_have_text("Running: 4 tests so far", timeout=20_000)
    assert page.locator("#live .strip i.is-passed").count() == 4
    (tmp_path / "gate").touch()
    expect(page.locator("#result .verdict")).to_have_text("Verified")
    expect(page.locator("#said")).to_contain_text("Graded: Verified. 5 of 5 tests passed")
    expect(page.locator("#lab-status")).to_have_text("Verified")
    expect(page.locator("#history tbody tr")).to_have_count(1)
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("1 of 2 labs verified")
    expect(page.get_by_role("link", name="1.1 Doubling verified")).to_be_visible()


def test_a_failed_attempt_has_messages_a_diagnosis_and_a_folded_hint(visit: Visit, results: dict[str, str]):
    page = visit("ada", "/labs/ch01/lab01")
    hand_in(page, WRONG + "# once more\n")
    expect(page.locator("#result .verdict")).to_have_text("Not yet right", timeout=20_000)
    expect(page.get_by_text("got 4.5: is the operator right?")).to_be_visible()
    expect(page.get_by_label("Diagnosis")).to_contain_text("wrong_factor")
    hint = page.get_by_text("You are off by one somewhere.")
    expect(hint).to_be_hidden()
    page.get_by_text("Show the hint").click()
    expect(hint).to_be_visible()


def test_a_file_that_is_none_of_the_labs_is_refused_in_the_page(visit: Visit):
    page = visit("ada", "/labs/ch01/lab01")
    page.get_by_label("numbers_lab.py").set_input_files(
        {"name": "other.py", "mimeType": "text/x-python", "buffer": b""}
    )
    expect(page.get_by_role("alert")).to_have_text("This lab takes numbers_lab.py, and no other.py.")
    expect(page.get_by_role("button", name="Grade", exact=True)).to_be_disabled()


def test_a_dropped_file_can_be_graded(visit: Visit):
    page = visit("ada", "/labs/ch01/lab02")
    page.evaluate(
        """source => {
            const data = new DataTransfer();
            data.items.add(new File([source], "numbers_lab.py"));
            const drop = document.getElementById("drop");
            for (const kind of ["dragover", "drop"])
                drop.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        HALF + "# dropped\n",
    )
    page.get_by_role("button", name="Grade", exact=True).click()
    expect(page.locator("#result .verdict")).to_have_text("Verified", timeout=20_000)
    expect(page.get_by_role("img", name="the target is at most 10⁻⁵")).to_be_visible()


def test_cancelling_and_grading_again(visit: Visit, tmp_path: Path):
    page = visit("ada", "/labs/ch01/lab01")
    hand_in(page, waits_for(tmp_path / "gate"))
    expect(page.locator(".live-status")).to_contain_text("Running", timeout=20_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#result")).to_contain_text("Cancelled before it was graded.")
    (tmp_path / "gate").touch()
    page.locator("#history a").first.click()
    page.get_by_role("button", name="Grade again").click()
    expect(page.locator("#result .verdict")).to_have_text("Verified", timeout=20_000)


def test_two_users_see_their_own_and_the_instructor_sees_both(visit: Visit, results: dict[str, str]):
    ada, ben, ina = visit("ada", "/submissions"), visit("ben", "/submissions"), visit("ina", "/gradebook")
    expect(ada.locator(f'a[href="/submissions/{results["FAILED"]}"]')).to_be_visible()
    expect(ben.locator(f'a[href="/submissions/{results["FAILED"]}"]')).to_have_count(0)
    assert ben.goto(f"/submissions/{results['FAILED']}").status == 404  # type: ignore[union-attr]
    expect(ben.get_by_role("navigation", name="Main").get_by_role("link", name="Gradebook")).to_have_count(0)
    row = ina.get_by_role("row", name="ada")
    row.get_by_role("link", name="1.2 verified").click()
    expect(ina.get_by_role("heading", level=1)).to_have_text("Attempts of ada")
    ina.get_by_role("link", name="Queue").click()
    expect(ina.get_by_role("row", name="alive")).to_be_visible()


def test_who_waits_is_told_how_many_are_before_them(visit: Visit, site: Site, tmp_path: Path):
    with site.api("ben") as program:
        for number in range(2):  # one runs until the gate is there, one waits
            program.post("/submissions", json=body(waits_for(tmp_path / "gate") + f"# {number}\n"))
    page = visit("ada", "/labs/ch01/lab01")
    hand_in(page, waits_for(tmp_path / "gate"))
    expect(page.locator(".live-status")).to_have_text("Waiting for a worker: 1 before you", timeout=10_000)
    (tmp_path / "gate").touch()
    expect(page.locator("#result .verdict")).to_have_text("Verified", timeout=20_000)


def test_who_waits_where_no_worker_is_is_told_so(
    chromium: Browser,
    url: str,
    tmp_path: Path,
    make_course: Callable[[Path], Catalog],
):
    course = make_course(tmp_path)
    chapter = course.labs[0].path.parent / "chapter.toml"
    chapter.write_text(chapter.read_text().replace("minutes = 5\n", "minutes = 5\nmemory_gb = 900\n", 1))
    with open_site(course, TOPEKA_DATABASE_URL=url) as site:
        state = _sign_in(chromium, site, "ada")
        page = chromium.new_context(base_url=site.address, storage_state=state).new_page()  # type: ignore[arg-type]
        page.goto("/labs/ch01/lab01")
        hand_in(page, RIGHT)
        words = "No worker with 900 GiB of memory is there. Your code is kept, and graded when one comes"
        expect(page.locator(".live-status")).to_have_text(words, timeout=10_000)
        page.context.close()
        state = _sign_in(chromium, site, "ina")
        page = chromium.new_context(base_url=site.address, storage_state=state).new_page()  # type: ignore[arg-type]
        page.goto("/queue")
        expect(page.locator(".problem")).to_contain_text("No worker takes cpu-900g, where 1 waits.")
        page.context.close()


def test_a_page_goes_on_by_itself_after_the_server_restarts(visit: Visit, site: Site, tmp_path: Path):
    page = visit("ada", "/labs/ch01/lab01")
    hand_in(page, waits_for(tmp_path / "gate"))
    expect(page.locator(".live-status")).to_have_text("Running: 4 tests so far", timeout=20_000)
    site.running.end(signal.SIGKILL)
    expect(page.locator(".live-status")).to_have_text("The connection is lost; trying again")
    (tmp_path / "gate").touch()
    site.running.start()
    expect(page.locator("#result .verdict")).to_have_text("Verified", timeout=45_000)
    page.reload()
    expect(page.locator("#result .verdict")).to_have_text("Verified")


def test_everything_can_be_done_by_keyboard(visit: Visit, site: Site):
    page = visit(None)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    _tab_to(page, "token")
    page.keyboard.type(site.tokens["ben"])
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("labs verified")
    _tab_to(page, "Halving")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("1.2 Halving")
    _tab_to(page, "files")
    _tab_to(page, "slow")
    page.keyboard.press("Space")
    expect(page.get_by_label("run slow tests too")).to_be_checked()
    page.goto("/sign-in")
    _tab_to(page, "Sign out")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")


def _tab_to(page: Page, what: str) -> None:
    """Press Tab until the element of this id, or one with this text, has the focus."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(
            "what => document.activeElement.id === what || document.activeElement.innerText?.includes(what)",
            what,
        ):
            return
    raise AssertionError(f"Tab never reaches {what}")


def test_the_owner_grades_the_working_copy_by_keyboard(visit: Visit, site: Site):
    page = visit(None, site.new_link())
    page.goto("/labs/ch01/lab02")
    _tab_to(page, "grade-mine")
    page.keyboard.press("Enter")
    expect(page.locator("#result .verdict")).to_have_text("Nothing written yet", timeout=20_000)


def test_what_is_below_the_fold_is_drawn_without_scrolling(visit: Visit):
    page = visit("ada", "/")
    page.set_viewport_size({"width": 1280, "height": 200})
    page.goto("/")
    expect(page.locator("html.painted")).to_have_count(1)
    left_out = "e => getComputedStyle(e).contentVisibility"
    assert page.locator(".phase").evaluate_all(f"all => all.map({left_out})") == ["visible"]


def test_without_javascript_pages_can_be_read_and_say_how_to_grade(visit: Visit, results: dict[str, str]):
    page = visit("ada", "/labs/ch01/lab01", java_script_enabled=False)
    expect(page.locator("noscript .problem")).to_have_count(1)  # with JavaScript it holds no elements
    expect(page.get_by_role("button", name="Grade", exact=True)).to_be_disabled()
    page.goto(f"/submissions/{results['FAILED']}")
    expect(page.locator(".verdict")).to_have_text("Not yet right")
    page.goto("/")
    expect(page.locator(".phase").last).to_be_visible()


def test_formulas_are_drawn_as_formulas(visit: Visit):
    page = visit("ada", "/chapters/ch01/lectures/01_why")
    formula = page.locator("math[display=block]").bounding_box()
    letter = page.locator("math[display=block] mi").first.bounding_box()
    assert formula is not None
    assert letter is not None
    assert formula["height"] > 2 * letter["height"], "numerator above denominator"
    above, below = (page.locator("math[display=block] mfrac > *").nth(n).bounding_box() for n in (0, 1))
    assert above is not None
    assert below is not None
    assert above["y"] + above["height"] <= below["y"]


def test_axe_finds_nothing_on_any_page_in_light_and_dark(visit: Visit, results: dict[str, str]):
    page, stranger = visit("ina", "/", reduced_motion="reduce"), visit(None, "/sign-in?once=wrong")
    found = violations(stranger, "/sign-in")
    for path in _pages(results):
        page.goto(path)
        for summary in page.locator("main summary").all():
            if summary.is_visible():
                summary.click()
        found += violations(page, path)
    assert found == [], "\n".join(found)


def violations(page: Page, path: str) -> list[str]:
    """What axe finds wrong with the page as it is, in both colour schemes."""
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for found_here in Axe().run(page).response["violations"]:
            found.append(f"{path} ({scheme}): {found_here['id']}: {found_here['nodes'][0]['html'][:150]}")
    return found


def _pages(results: dict[str, str]) -> list[str]:
    return [
        path.replace("FAILED", results["FAILED"]).replace("MEASURED", results["MEASURED"])
        for path in EVERY_PAGE
    ]


def test_no_page_is_wider_than_a_phone(visit: Visit, results: dict[str, str]):
    page = visit("ina", "/", viewport=PHONE, is_mobile=True, has_touch=True)
    wide = []
    for path in [*_pages(results), "/submissions?user=ada"]:
        page.goto(path)
        if page.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
            wide.append(path)
    assert wide == []
