"""The dashboard over HTTP: who gets in, what pages say, and what they refuse. One server for all tests."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from grader.catalog import Catalog
from grader.report import Report, Status, TestResult
from grader.service import accounts
from grader.service.api import Service, create_app
from grader.service.dashboard import sign_in_link
from grader.service.dashboard.gauge import gauge
from grader.service.dashboard.reading import Library
from grader.service.dashboard.sessions import has_local_owner
from grader.service.database import Database
from grader.service.models import BrowserSession, Role, now
from grader.service.settings import Settings
from grader.service.work_queue import WorkQueue
from grader.state import State

from grader import diagnosis

from .conftest import RIGHT, WRONG, body, graded, url_of
from .dashboard_site import Site, open_site
from .own import until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, make_course: Callable[[Path], Catalog]) -> Iterator[Site]:
    with open_site(make_course(tmp_path_factory.mktemp("course"))) as opened:
        yield opened


# --- signing in ------------------------------------------------------------------------------------------


def test_nobody_sees_a_page_without_signing_in(site: Site):
    with site.browser() as nobody:
        for page in ("/", "/labs/ch01/lab01", "/chapters/ch01", "/submissions", "/queue", "/gradebook"):
            answer = nobody.get(page)
            assert answer.status_code == 303, page
            assert answer.headers["location"].startswith("/sign-in")
        assert nobody.get("/chapters/ch01/docs/figures/one.svg").status_code == 303
        assert nobody.get("/labs/ch01/lab01/files", headers={"Accept": "*/*"}).status_code == 401


def test_a_token_signs_in_and_leads_on_to_the_page_asked_for(site: Site):
    with site.browser() as ada:
        asked = ada.get("/labs/ch01/lab01").headers["location"]
        assert 'value="/labs/ch01/lab01"' in ada.get(asked).text
        answer = ada.post("/sign-in", content=f"token={site.tokens['ada']}&next=/labs/ch01/lab01")
        assert answer.headers["location"] == "/labs/ch01/lab01"
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Secure" not in cookie, "loopback is no https"
        assert site.tokens["ada"].split("_")[2] not in cookie
        assert ada.get("/labs/ch01/lab01").status_code == 200


def test_a_wrong_token_is_told_so_and_gets_no_cookie(site: Site):
    with site.browser() as nobody:
        answer = nobody.post("/sign-in", content="token=topeka_000000000000_0")
        assert answer.status_code == 403
        assert "no valid token" in answer.text
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example/", "/\\evil.example", "javascript:1"]
)
def test_signing_in_leads_to_no_other_site(site: Site, target: str):
    with site.browser() as ada:
        answer = ada.post("/sign-in", data={"token": site.tokens["ada"], "next": target})
        assert answer.headers["location"] == "/"


def test_signing_out_ends_the_session_and_not_only_the_cookie(site: Site):
    with site.browser(site.tokens["ada"]) as ada:
        kept = dict(ada.cookies)
        assert ada.post("/sign-out").headers["location"] == "/sign-in"
        assert ada.get("/").status_code == 303
        with site.browser() as thief:
            thief.cookies.update(kept)
            assert thief.get("/").status_code == 303


def test_a_revoked_token_ends_its_sessions(site: Site):
    with site.browser(site.tokens["cy"]) as cy:
        assert cy.get("/").status_code == 200
        database = site.running.database
        with database.session() as session:
            accounts.revoke(session, site.tokens["cy"])
        assert cy.get("/").status_code == 303
        assert cy.get("/api/v1/progress").status_code == 401


def test_the_printed_link_signs_the_owner_in_once(site: Site):
    link = site.new_link()
    assert link.startswith(site.address)
    with site.browser() as owner, site.browser() as second:
        assert owner.get(link).status_code == 303
        assert "Grade my files" in owner.get("/labs/ch01/lab01").text
        assert owner.get(link).status_code == 303, "for who is in already it leads on"
        answer = second.get(link)
        assert answer.status_code == 403
        assert "used already" in answer.text
        assert second.get(site.new_link()).status_code == 303
        files = second.get("/labs/ch01/lab01/files").json()
        assert files["lab"] == "ch01/lab01"
        assert list(files["files"]) == ["numbers_lab.py"]
    with site.browser(site.tokens["ina"]) as ina:
        assert "Grade my files" not in ina.get("/labs/ch01/lab01").text
        assert ina.get("/labs/ch01/lab01/files").status_code == 403


@pytest.mark.parametrize(
    ("url", "host", "public_url", "has_owner"),
    [
        ("sqlite:///x", "127.0.0.1", None, True),
        ("sqlite:///x", "localhost", None, True),
        ("sqlite:///x", "0.0.0.0", None, False),
        ("sqlite:///x", "127.0.0.1", "https://grader.example", False),
        ("postgresql://u:p@h/d", "127.0.0.1", None, False),
    ],
)
def test_only_an_embedded_service_on_loopback_has_an_owner(
    url: str, host: str, public_url: str | None, has_owner: bool
):
    assert has_local_owner(Settings(database_url=url, host=host, public_url=public_url)) is has_owner


def test_a_session_ends_after_its_time(site: Site):
    with site.browser(site.tokens["ada"]) as ada:
        [key] = [value.split(".")[0] for value in ada.cookies.values()]
        database = site.running.database
        with database.session() as session:
            session.get_one(BrowserSession, key).ends = now()
        assert ada.get("/").status_code == 303
        with site.browser(site.tokens["ada"]):
            pass
        with database.session() as session:
            assert session.get(BrowserSession, key) is None, "the next signing in sweeps"


def test_what_the_command_verified_counts_for_the_owner_and_nobody_else(site: Site):
    with site.api("ben") as program:
        submission_id = program.post("/submissions", json=body(RIGHT + "# ben's")).json()["id"]
        graded(program, submission_id)
        document = program.get(f"/submissions/{submission_id}/report").json()
    for lab in document["labs"]:
        del lab["passed"]  # computed
    checkout = State(site.running.catalog.root / ".topeka")
    with site.browser() as owner, site.browser(site.tokens["eve"]) as eve:
        assert owner.get(site.new_link()).status_code == 303
        assert "0 of 2 labs verified" in owner.get("/").text
        checkout.remember(Report.model_validate(document))
        assert "1 of 2 labs verified" in owner.get("/").text
        assert checkout.statuses() == {"ch01/lab01": "verified"}
        assert "0 of 2 labs verified" in eve.get("/").text


def test_what_the_owner_grades_here_counts_for_topeka_progress_and_others_work_does_not(site: Site):
    checkout = State(site.running.catalog.root / ".topeka")
    before = checkout.count("ch01/lab01")
    with site.api("ada") as program:
        graded(program, program.post("/submissions", json=body(WRONG + "# ada's")).json()["id"])
    with site.browser() as owner:
        assert owner.get(site.new_link()).status_code == 303
        found = owner.post("/api/v1/submissions", json=body(WRONG + "# mine")).json()["id"]
        until(lambda: owner.get(f"/api/v1/submissions/{found}").json()["state"] == "graded")
    until(lambda: checkout.count("ch01/lab01") == before + 1)
    last = checkout.last("ch01/lab01")
    assert last is not None
    assert last.report.status is Status.FAILED


# --- requests from elsewhere -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "", "Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "", "Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "", "Origin": "null"},
        {"Sec-Fetch-Site": ""},
    ],
)
def test_nothing_is_changed_by_a_page_elsewhere(site: Site, headers: dict[str, str]):
    with site.api("ben") as program:
        before = len(program.get("/submissions").json())
    with site.browser(site.tokens["ben"]) as ben:
        for path in ("/sign-out", "/sign-in"):
            assert ben.post(path, headers=headers).status_code == 403, path
        assert ben.post("/api/v1/submissions", json=body(), headers=headers).status_code == 403
        assert ben.get("/").status_code == 200, "still signed in"
    with site.api("ben") as program:
        assert len(program.get("/submissions").json()) == before


def test_an_old_browser_says_its_origin_instead(site: Site):
    with site.browser(site.tokens["ben"]) as ben:
        old = {"Sec-Fetch-Site": "", "Origin": site.address}
        assert ben.post("/sign-out", headers=old).status_code == 303


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8300", "127.0.0.1.evil.example", "[", "[::1"])
def test_a_foreign_name_for_this_machine_reaches_nothing(site: Site, host: str):
    with site.browser(Host=host) as rebound:
        for path in ("/", "/sign-in", "/api/v1/health"):
            assert rebound.get(path).status_code == 421, path
    with site.browser(Host=f"localhost:{site.running.port}") as local:
        assert local.get("/sign-in").status_code == 200


def test_pages_allow_no_script_but_the_services_own(site: Site):
    with site.browser(site.tokens["ada"]) as ada:
        for page in ("/", "/labs/ch01/lab01", "/chapters/ch01/lectures/01_why", "/nowhere"):
            answer = ada.get(page)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert "form-action 'self'" in policy
            assert not re.search(r"<script(?! type=\"module\" src=\"/static/)", answer.text), page
            assert not re.search(r"\s(style|on\w+)=", answer.text), page
            assert "://" not in re.sub(r'xmlns="[^"]*"|href="https://example.org/x"', "", answer.text), page
            for file in re.findall(r'(?:src|href)="(/static/[^"]+)"', answer.text):
                assert ada.get(file).status_code == 200, file
                assert "immutable" in ada.get(file).headers["cache-control"]


# --- pages ---------------------------------------------------------------------------------------------------


def test_unknown_pages_are_pages_and_the_api_keeps_its_problems(site: Site):
    with site.browser(site.tokens["ada"]) as ada:
        for page in ("/nowhere", "/labs/ch09/lab01", "/labs/ch01/lab77", "/chapters/ch99",
                     "/chapters/ch01/lectures/none", "/submissions/" + "0" * 32, "/static/none.css"):  # fmt: skip
            answer = ada.get(page)
            assert answer.status_code == 404, page
            if not page.startswith("/static/"):
                assert "Back to the course" in answer.text
                assert '<nav aria-label="Main">' in answer.text
        answer = ada.get("/api/v1/nowhere")
        assert answer.headers["content-type"] == "application/problem+json"
        assert ada.get("/gradebook").status_code == 403
        assert ada.get("/queue").status_code == 403
    with site.browser() as stranger:
        answer = stranger.get("/nowhere")
        assert (answer.status_code, "<nav" in answer.text) == (404, False)


def test_a_lecture_is_rendered_and_cleaned(site: Site):
    with site.browser(site.tokens["ada"]) as ada:
        page = ada.get("/chapters/ch01/lectures/01_why").text
        text = page[page.index("<article") : page.index("</article>")]
    assert "<h1>Why halves?</h1>" in page
    assert "<msqrt><mrow><msub><mi>d</mi><mi>k</mi></msub></mrow></msqrt>" in text
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in text
    assert "costs $5 or $6" in text, "money is no formula"
    assert "<details><summary>Answer</summary>" in text
    for bad in (
        "<script",
        "onerror",
        "onclick",
        '="javascript:',
        "/etc/passwd",
        "secret",
        "alert(1)</",
        "style=",
    ):
        assert bad not in text, bad
    assert '<span class="elsewhere">a test</span>' in text
    assert 'href="/labs/ch01/lab01"' in text
    assert 'href="/chapters/ch01#t-more-here"' in text
    assert 'href="/chapters/ch01/lectures/02_again"' in text
    assert 'href="#t-a-part"' in text
    assert '<h2 id="t-a-part">' in text
    assert 'src="/chapters/ch01/docs/figures/one.svg"' in text
    assert '<td class="right">2</td>' in text
    assert '<span class="c1"># one</span>' in text


def test_a_changed_file_is_read_anew(course: Catalog):
    library, file = Library(course), course.root / "text.md"
    file.write_text("# One\n")
    assert library.text(file) == library.text(file)
    file.write_text("# Another\n")
    text = library.text(file)
    assert text is not None
    assert text.title == "Another"
    file.unlink()
    assert library.text(file) is None


@pytest.mark.parametrize(
    "path",
    [
        "figures/one.py", "figures/none.svg", "figures/link.svg", "01_why.md", "figures",
        "..%2F..%2F..%2Fsecret.svg", "%2e%2e/%2e%2e/%2e%2e/secret.svg", "figures/%00.svg", "%2Fetc%2Fpasswd",
    ],
)  # fmt: skip
def test_only_figures_of_lectures_are_sent(site: Site, path: str):
    with site.browser(site.tokens["ada"]) as ada:
        assert ada.get(f"/chapters/ch01/docs/{path}").status_code == 404
        answer = ada.get("/chapters/ch01/docs/figures/one.svg")
        assert answer.headers["content-type"] == "image/svg+xml"
        assert "sandbox" in answer.headers["content-security-policy"]


def test_results_diagnosis_history_and_who_may_see_them(site: Site):
    with site.api("ada") as program:
        wrong = graded(program, program.post("/submissions", json=body(WRONG)).json()["id"])
        report = program.get(f"/submissions/{wrong['id']}/report").json()["labs"][0]
        tests = [TestResult.model_validate(test) for test in report["tests"]]
        diagnosis.write_signatures(site.running.catalog.labs[0], {"wrong_factor": diagnosis.signature(tests)})
        wrong = graded(program, program.post(f"/submissions/{wrong['id']}/regrade").json()["id"])
        right = graded(program, program.post("/submissions", json=body()).json()["id"])
        half = RIGHT.replace("x * 2", "x / 2").replace("double", "half")
        graded(program, program.post("/submissions", json=body(half, "ch01/lab02")).json()["id"])
    with site.browser(site.tokens["ada"]) as ada, site.browser(site.tokens["ben"]) as ben:
        failed = ada.get(f"/submissions/{wrong['id']}").text
        assert "Not yet right" in failed
        assert "is the operator right?" in failed
        assert "<code>wrong_factor</code>" in failed
        assert "<summary>Show the hint</summary><p>You are off by one somewhere.</p>" in failed
        assert "return</span> <span" in failed, "the code, highlighted"
        page = ada.get("/labs/ch01/lab01").text
        assert "Verified" in page
        assert page.index(right["id"]) < page.index(wrong["id"]), "the newest first"
        measured = ada.get("/labs/ch01/lab02").text
        assert 'role="img"' in measured
        assert "the target is at most 10⁻⁵" in measured
        assert " cores of " in measured, "the hardware"
        course = ada.get("/").text
        assert "2 of 2 labs verified" in course
        assert "1 of 1 milestones reached" in course
        for page in (f"/submissions/{wrong['id']}", f"/submissions/{wrong['id']}/result"):
            assert ben.get(page).status_code == 404, page
        assert "ada" not in ben.get("/submissions?user=ada").text, "one's own, whatever one asks for"
    with site.browser(site.tokens["ina"]) as ina:
        assert wrong["id"] in ina.get("/submissions?user=ada&lab=ch01/lab01").text
        assert ina.get(f"/submissions/{wrong['id']}").status_code == 200
        book = ina.get("/gradebook").text
        assert book.index(">ada<") < book.index(">ben<")
        book = ina.get("/gradebook?sort=ch01/lab02&descending=true").text
        assert book.index(">ben<") < book.index(">ada<")
        assert 'aria-sort="descending"' in book
        assert ina.get("/gradebook?sort=password").status_code == 404
        table = ina.get("/api/v1/gradebook.csv")
        assert "ada,2,verified,verified" in table.text
        queue = ina.get("/queue").text
        assert "alive" in queue
        assert "The queue is empty." in queue


def test_why_no_test_counted_is_on_the_page(site: Site):
    reaches_out = "import shared.compare\nshared.compare.assert_close = lambda *a, **k: None\n" + RIGHT
    for source, words in (
        ("def double(x:\n    return x\n", "numbers_lab.py&#34;, line 1"),
        (reaches_out, "the code under test made a comparison that must fail succeed"),
    ):
        with site.api("ben") as program:
            found = graded(program, program.post("/submissions", json=body(source)).json()["id"])
        assert found["status"] == "failed"
        with site.browser(site.tokens["ben"]) as ben:
            assert words in ben.get(f"/submissions/{found['id']}").text


def test_the_gradebook_has_whoever_submitted(site: Site):
    with site.api("ina") as program:
        graded(program, program.post("/submissions", json=body()).json()["id"])
        assert "ina" in [row["user"] for row in program.get("/gradebook").json()]


def test_a_name_is_text_and_no_markup(site: Site):
    database = site.running.database
    with database.session() as session:
        accounts.create_token(session, "<b>x</b>&", Role.LEARNER)
    with site.browser(site.tokens["ina"]) as ina:
        book = ina.get("/gradebook").text
        assert "<b>x" not in book
        assert "&lt;b&gt;x&lt;/b&gt;&amp;" in book
        assert ina.get("/submissions", params={"user": "<b>x</b>&"}).status_code == 200


def test_behind_a_proxy_nobody_is_the_owner_and_cookies_are_secure(course: Catalog, database: Database):
    with database.session() as session:
        token = accounts.create_token(session, "ada", Role.LEARNER)
    settings = Settings(database_url=url_of(course), public_url="https://grader.example")
    app = create_app(Service(database, settings, course, WorkQueue(database)))
    assert sign_in_link(app, "http://127.0.0.1:8300") is None

    async def visit() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://grader.example") as browser:
            page = await browser.get("/sign-in")
            assert page.status_code == 200
            assert "topeka serve" not in page.text
            assert (await browser.get("/sign-in?once=x")).status_code == 403
            assert (await browser.get("/sign-in", headers={"Host": "evil.example"})).status_code == 421
            for origin, status in (("http://other.example", 403), ("https://grader.example", 303)):
                answer = await browser.post("/sign-in", data={"token": token}, headers={"Origin": origin})
                assert answer.status_code == status, origin
            assert "Secure" in answer.headers["set-cookie"]

    asyncio.run(visit())


# --- the gauge -------------------------------------------------------------------------------------------------


def test_a_gauge_is_linear_near_its_target_and_logarithmic_far_from_it():
    near = gauge(1.59, 1.60, "lower")
    assert near is not None
    assert near.scale == "linear"
    assert near.value < near.target == near.reached_to
    assert near.reached_from == 0
    far = gauge(3e-8, 1e-5, "lower")
    assert far is not None
    assert (far.scale, far.low, far.high) == ("logarithmic", 1e-9, 1e-4)
    assert far.value < far.target
    higher = gauge(8.5, 4, "higher")
    assert higher is not None
    assert higher.reached_from == higher.target < higher.value < higher.reached_to == 100
    exact = gauge(0.0, 1e-5, "lower")
    assert exact is not None
    assert exact.value == 0


@pytest.mark.parametrize(
    ("value", "target"), [(float("inf"), 1), (float("nan"), 1), (-1, 1), (1, 0), (1, -2)]
)
def test_what_no_scale_can_show_has_no_gauge(value: float, target: float):
    assert gauge(value, target, "lower") is None
