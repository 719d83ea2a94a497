"""The HTTP interface, against a real `topeka serve` with its worker."""

import csv
import io
import signal
from pathlib import Path

import httpx
import pytest
from grader.catalog import Catalog
from grader.service.models import Role

from .conftest import RIGHT, WRONG, Person, Running, School, body, events_of, graded


def submitted(person: Person, source: str = RIGHT) -> str:
    answer = person.post("/submissions", json=body(source))
    assert answer.status_code == 201, answer.text
    submission_id: str = answer.json()["id"]
    return submission_id


def test_a_submission_is_graded_and_its_report_is_that_of_the_command(school: School):
    ada = school.learner()
    answer = ada.post("/submissions", json=body())
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/api/v1/submissions/{answer.json()['id']}"
    found = graded(ada, answer.json()["id"])
    assert (found["status"], found["passed"], found["tests"], found["user"]) == ("verified", 5, 5, ada.user)
    report = ada.get(f"/submissions/{found['id']}/report").json()
    assert report["schema_version"] == 1
    assert report["labs"][0]["status"] == "verified"
    assert len(report["labs"][0]["tests"]) == 5
    assert report["isolation"]["sandbox"] == "local"
    assert graded(ada, submitted(ada, WRONG))["status"] == "failed"
    # A lab stays verified when a later attempt fails.
    assert ada.get("/progress").json() == {"ch01/lab01": "verified"}
    labs = ada.get("/catalog").json()[0]["labs"]
    assert [lab["status"] for lab in labs] == ["verified", None]


def test_files_may_come_as_a_form_too(school: School):
    ada = school.learner()
    files = {"files": ("numbers_lab.py", RIGHT.encode(), "text/x-python")}
    answer = ada.post("/submissions", data={"lab": "ch01/lab01"}, files=files)
    assert answer.status_code == 201, answer.text
    assert ada.post("/submissions", json=body()).json()["id"] == answer.json()["id"], "the same content"
    assert graded(ada, answer.json()["id"])["status"] == "verified"


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({}, [("files", ("numbers_lab.py", b""))], "lab: Field required"),
        ({"lab": "ch01/lab01"}, [("files", ("../numbers_lab.py", b""))], "it takes no ../numbers_lab.py"),
        ({"lab": "ch01/lab01"}, [("files", ("numbers_lab.py", b""))] * 2, "numbers_lab.py was sent twice"),
        ({"lab": "ch01/lab01"}, [("code", ("numbers_lab.py", b""))], "code"),
        ({"lab": "ch01/lab01", "files": "text"}, [("x", ("y", b""))], "files"),
        ({"lab": "ch01/lab01", "slow": "perhaps"}, [("files", ("numbers_lab.py", b""))], "slow"),
    ],
)
def test_what_is_no_form_of_a_submission_is_refused_with_a_sentence(
    school: School, fields: dict[str, str], files: list[tuple[str, tuple[str, bytes]]], words: str
):
    ada = school.learner()
    answer = ada.post("/submissions", data=fields, files=files)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]
    assert ada.get("/submissions").json() == []


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("multipart/form-data", b"no boundary", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense", 422),
        ("application/json", b"{", 422),
        ("application/json", b"[" * 100_000, 422),
        ("application/json", b"\xff\xfe", 422),
        ("text/plain", b"def double", 415),
    ],
)
def test_what_cannot_be_read_is_a_problem_and_no_error_of_ours(
    school: School, kind: str, content: bytes, status: int
):
    answer = school.learner().post("/submissions", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_events_tell_the_story_in_order_and_can_be_resumed(school: School):
    ada = school.learner()
    path = f"/submissions/{submitted(ada)}/events"
    with ada.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = list(events_of(stream))
    assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
    assert [kind for _, kind, _ in told] == ["queued", "started", *["test"] * 5, "graded"]
    with ada.stream("GET", path, headers={"Last-Event-ID": "3"}) as stream:
        assert list(events_of(stream)) == told[3:]
    for nonsense in ("-1", "x", "9" * 30, "²"):
        with ada.stream("GET", path, headers={"Last-Event-ID": nonsense.encode()}) as stream:
            assert list(events_of(stream)) == told


def test_a_double_click_is_one_submission_and_a_regrade_is_another(school: School):
    ada, ben = school.learner("ada"), school.learner("ben")
    first, second = (ada.post("/submissions", json=body()) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    assert ben.post("/submissions", json=body()).json()["id"] != first.json()["id"], "another learner's"
    assert ada.post("/submissions", json=body(WRONG)).status_code == 201, "other content"
    again = ada.post(f"/submissions/{first.json()['id']}/regrade")
    assert again.status_code == 201
    assert again.json()["regrade_of"] == first.json()["id"]
    assert graded(ada, again.json()["id"])["status"] == "verified"
    assert len(ada.get("/submissions").json()) == 3


def test_pages_of_submissions_join_without_gap_or_repeat(school: School):
    ada = school.learner()
    ids = [submitted(ada, RIGHT + "#" * n) for n in range(5)]
    seen: list[str] = []
    before = {}
    while page := ada.get("/submissions", params={"limit": 2} | before).json():
        seen += [found["id"] for found in page]
        before = {"before": page[-1]["created"]}
    assert seen == ids[::-1]
    assert ada.get("/submissions", params={"before": "2026-11-25T12:00:00"}).status_code == 422


def test_a_learner_sees_nothing_of_another_by_any_route(school: School):
    ada, ben = school.learner("ada"), school.learner("ben")
    theirs = submitted(ada)
    graded(ada, theirs)
    routes = httpx.get(f"http://127.0.0.1:{school.running.port}/openapi.json").json()["paths"]
    of_one = [(m.upper(), p) for p, methods in routes.items() for m in methods if "{submission_id}" in p]
    assert len(of_one) == 5
    for method, path in of_one:
        answer = ben.request(method, path.replace("/api/v1", "").replace("{submission_id}", theirs))
        assert answer.status_code == 404, (method, path)
        assert ada.user not in answer.text
    assert ben.get("/submissions").json() == []
    assert ben.get("/submissions", params={"user": ada.user}).json() == []
    assert ben.get("/progress").json() == {}
    for path in ("/gradebook", "/gradebook.csv", "/workers", "/metrics"):
        assert ben.get(path).status_code == 403, path


def test_the_instructor_sees_the_class(school: School):
    ada, ben, ina = school.learner("=ada"), school.learner("ben"), school.instructor()
    mine = submitted(ada)
    graded(ada, mine)
    assert ina.get(f"/submissions/{mine}/report").status_code == 200
    assert [s["user"] for s in ina.get("/submissions", params={"user": ada.user}).json()] == [ada.user]
    rows = {row["user"]: row for row in ina.get("/gradebook").json()}
    assert rows[ada.user] == {"user": ada.user, "verified": 1, "labs": {"ch01/lab01": "verified"}}
    assert rows[ben.user] == {"user": ben.user, "verified": 0, "labs": {}}
    assert ina.user not in rows
    header, *table = csv.reader(io.StringIO(ina.get("/gradebook.csv").text))
    assert header == ["user", "verified", "ch01/lab01", "ch01/lab02"]
    # A spreadsheet would compute a name that begins with an equals sign.
    assert [f"'{ada.user}", "1", "verified", ""] in table
    [worker] = ina.get("/workers").json()
    assert (worker["alive"], worker["queues"]) == (True, ["cpu"])
    assert worker["graded"] >= 1
    text = ina.get("/metrics").text
    assert 'topeka_submissions_total{lab="ch01/lab01"} ' in text
    assert "topeka_workers 1.0" in text


@pytest.mark.parametrize("shown", [None, "", "nonsense", "topeka_000000000000_" + "0" * 64])
def test_without_a_valid_token_nobody_gets_in(school: School, shown: str | None):
    with school.running.client(shown) as nobody:
        for path in ("/submissions", "/catalog", "/progress", "/gradebook", "/metrics"):
            answer = nobody.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.headers["content-type"] == "application/problem+json"
        assert nobody.get("/health").json() == {"status": "ok", "workers": 1}


@pytest.mark.parametrize(
    ("request_body", "status", "words"),
    [
        (body(lab="ch77/lab01"), 404, "there is no lab ch77/lab01"),
        (body(lab="../../etc"), 422, "lab: "),
        (body(name="other.py"), 422, "it takes no other.py"),
        (body(name="../numbers_lab.py"), 422, "it takes no ../numbers_lab.py"),
        (body() | {"files": {}}, 422, "no file was sent"),
        (body() | {"files": {"numbers_lab.py": "???"}}, 422, "not base64"),
        (body("#" * (1 << 20) + "\n"), 422, "a source file may have 1,048,576"),
        (body() | {"admin": True}, 422, "admin"),
        ([], 422, "object"),
    ],
)
def test_what_is_no_submission_is_refused_with_a_sentence(
    school: School, request_body: object, status: int, words: str
):
    ada = school.learner()
    answer = ada.post("/submissions", json=request_body)
    assert answer.status_code == status
    problem = answer.json()
    assert words in problem["detail"], problem
    assert (problem["status"], problem["type"]) == (status, "about:blank")
    assert ada.get("/submissions").json() == []


def test_large_requests_are_refused_unread_and_headers_are_safe(school: School):
    ada = school.learner()
    answer = ada.post("/submissions", content=b"x" * (5 << 20), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    answer = ada.post("/submissions", content=iter([b"{}"]), headers={"content-type": "application/json"})
    assert answer.status_code == 411, "of unknown length"
    answer = ada.get("/catalog", headers={"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    answer = ada.delete("/submissions")
    assert (answer.status_code, answer.json()["title"]) == (405, "Method Not Allowed")


def test_a_queued_submission_can_be_cancelled_and_gets_no_report(school: School):
    ada = school.learner()
    busy = submitted(ada, RIGHT.replace("return x * 2", "import time; time.sleep(0.7); return x * 2"))
    waiting = submitted(ada)
    assert ada.post(f"/submissions/{waiting}/cancel").json()["state"] == "cancelled"
    assert ada.get(f"/submissions/{waiting}/report").status_code == 409
    assert ada.post(f"/submissions/{waiting}/cancel").status_code == 409
    graded(ada, busy)
    assert ada.get(f"/submissions/{waiting}").json()["state"] == "cancelled"


# --- with a server of one's own ---------------------------------------------------------------------


def test_more_than_so_many_a_minute_are_refused_until_later(course: Catalog):
    running = Running(course, environment={"TOPEKA_SUBMISSIONS_PER_MINUTE": "2"})
    running.start()
    try:
        with Person(running, "ada", Role.LEARNER) as ada, Person(running, "ben", Role.LEARNER) as ben:
            codes = [ada.post("/submissions", json=body(RIGHT + "#" * n)).status_code for n in range(3)]
            assert codes == [201, 201, 429]
            assert int(ada.post("/submissions", json=body()).headers["retry-after"]) > 0
            assert ben.post("/submissions", json=body()).status_code == 201
    finally:
        running.close()


def test_what_was_accepted_survives_sigkill_and_is_graded_once(server: Running):
    with Person(server, "ada", Role.LEARNER) as ada:
        ids = [submitted(ada, RIGHT + "#" * n) for n in range(4)]
        graded(ada, ids[0])
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()
    with server.client(ada.token) as ada_again:
        for submission_id in ids:
            assert graded(ada_again, submission_id)["status"] == "verified"
            with ada_again.stream("GET", f"/submissions/{submission_id}/events") as stream:
                kinds = [kind for _, kind, _ in events_of(stream)]
            assert kinds.count("graded") == 1


def test_strict_trust_where_the_lab_supports_it(course: Catalog):
    chapter = course.root / "labs" / "ch01_numbers" / "chapter.toml"
    text = chapter.read_text()
    chapter.write_text(text.replace("minutes = 5\n", "minutes = 5\nstrict = true\n", 1))
    running = Running(course, environment={"TOPEKA_TRUST": "strict"})
    running.start()
    half = RIGHT.replace("double", "half").replace("twice", "half of").replace("x * 2", "x / 2")
    try:
        with Person(running, "ada", Role.LEARNER) as ada:
            for lab, source, trust in (("ch01/lab01", RIGHT, "strict"), ("ch01/lab02", half, "same_process")):
                found = graded(ada, ada.post("/submissions", json=body(source, lab)).json()["id"])
                assert found["status"] == "verified", ada.get(f"/submissions/{found['id']}/report").text
                [report] = ada.get(f"/submissions/{found['id']}/report").json()["labs"]
                assert report["trust"] == trust
    finally:
        running.close()


def test_a_taken_port_is_a_sentence_and_sigterm_ends_in_peace(server: Running, course: Catalog):
    log = Path(course.root / "serve.log")
    second = Running(course, port=server.port)
    with pytest.raises(AssertionError):
        second.start()
    assert second.process is not None
    assert second.process.wait(timeout=30) == 3
    second.database.close()
    assert "is another `topeka serve` running?" in log.read_text()
    assert server.end() == 0
    assert "Traceback" not in log.read_text()
