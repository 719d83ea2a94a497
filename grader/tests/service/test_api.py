"""The HTTP interface, against a real `topeka serve` with its worker."""

import csv
import io
import signal
from pathlib import Path

import httpx
import pytest
from grader.catalog import Catalog

from .conftest import RIGHT, WRONG, Running, body, events_of, graded


def test_a_submission_is_graded_and_its_report_is_that_of_the_command(
    server: Running, tokens: dict[str, str]
):
    with server.client(tokens["ada"]) as ada:
        answer = ada.post("/submissions", json=body())
        assert answer.status_code == 201
        assert answer.headers["Location"].endswith(answer.json()["id"])
        found = graded(ada, answer.json()["id"])
        assert (found["status"], found["passed"], found["tests"], found["user"]) == ("verified", 5, 5, "ada")
        report = ada.get(f"/submissions/{found['id']}/report").json()
        assert report["schema_version"] == 1
        assert report["labs"][0]["status"] == "verified"
        assert len(report["labs"][0]["tests"]) == 5
        assert report["isolation"]["sandbox"] == "local"
        wrong = graded(ada, ada.post("/submissions", json=body(WRONG)).json()["id"])
        assert wrong["status"] == "failed"
        # A lab stays verified when a later attempt fails.
        assert ada.get("/progress").json() == {"ch01/lab01": "verified"}
        labs = ada.get("/catalog").json()[0]["labs"]
        assert [lab["status"] for lab in labs] == ["verified", None]


def test_events_tell_the_story_in_order_and_can_be_resumed(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada:
        submission_id = ada.post("/submissions", json=body()).json()["id"]
        with ada.stream("GET", f"/submissions/{submission_id}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            told = list(events_of(stream))
        assert [number for number, _, _ in told] == list(range(1, len(told) + 1))
        kinds = [kind for _, kind, _ in told]
        assert kinds == ["queued", "started", *["test"] * 5, "graded"]
        with ada.stream(
            "GET", f"/submissions/{submission_id}/events", headers={"Last-Event-ID": "3"}
        ) as stream:
            assert list(events_of(stream)) == told[3:]


def test_a_double_click_is_one_submission_and_a_regrade_is_another(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada, server.client(tokens["ben"]) as ben:
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


def test_a_learner_sees_nothing_of_another_by_any_route(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada, server.client(tokens["ben"]) as ben:
        theirs = ada.post("/submissions", json=body()).json()["id"]
        graded(ada, theirs)
        for method, path in (
            ("GET", ""), ("GET", "/report"), ("GET", "/events"), ("POST", "/regrade"), ("POST", "/cancel"),
        ):  # fmt: skip
            answer = ben.request(method, f"/submissions/{theirs}{path}")
            assert answer.status_code == 404, (method, path)
            assert "ada" not in answer.text
        assert ben.get("/submissions").json() == []
        assert ben.get("/submissions", params={"user": "ada"}).json() == []
        assert ben.get("/progress").json() == {}
        for path in ("/gradebook", "/gradebook.csv", "/workers", "/metrics"):
            assert ben.get(path).status_code == 403, path


def test_the_instructor_sees_the_class(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada, server.client(tokens["ina"]) as ina:
        mine = ada.post("/submissions", json=body()).json()["id"]
        graded(ada, mine)
        assert ina.get(f"/submissions/{mine}/report").status_code == 200
        assert [s["user"] for s in ina.get("/submissions").json()] == ["ada"]
        rows = ina.get("/gradebook").json()
        assert rows == [
            {"user": "ada", "verified": 1, "labs": {"ch01/lab01": "verified"}},
            {"user": "ben", "verified": 0, "labs": {}},
        ]
        table = list(csv.reader(io.StringIO(ina.get("/gradebook.csv").text)))
        assert table[0] == ["user", "verified", "ch01/lab01", "ch01/lab02"]
        assert table[1] == ["ada", "1", "verified", ""]
        [worker] = ina.get("/workers").json()
        assert (worker["alive"], worker["queues"], worker["graded"]) == (True, ["cpu"], 1)
        text = ina.get("/metrics").text
        assert 'topeka_submissions_total{lab="ch01/lab01"} 1.0' in text
        assert "topeka_workers 1.0" in text


@pytest.mark.parametrize("shown", [None, "", "nonsense", "topeka_000000000000_" + "0" * 64])
def test_without_a_valid_token_nobody_gets_in(server: Running, shown: str | None):
    with server.client(shown) as nobody:
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
        (body(lab="../../etc"), 422, "body.lab"),
        (body(name="other.py"), 422, "it takes no other.py"),
        (body(name="../numbers_lab.py"), 422, "it takes no ../numbers_lab.py"),
        (body() | {"files": {}}, 422, "no file was sent"),
        (body() | {"files": {"numbers_lab.py": "???"}}, 422, "not base64"),
        (body("#" * (1 << 20) + "\n"), 422, "a source file may have 1,048,576"),
        (body() | {"admin": True}, 422, "body.admin"),
        ([], 422, "body"),
    ],
)
def test_what_is_no_submission_is_refused_with_a_sentence(
    server: Running, tokens: dict[str, str], request_body: object, status: int, words: str
):
    with server.client(tokens["ada"]) as ada:
        answer = ada.post("/submissions", json=request_body)
        assert answer.status_code == status
        problem = answer.json()
        assert words in problem["detail"], problem
        assert (problem["status"], problem["type"]) == (status, "about:blank")
        assert ada.get("/submissions").json() == []


def test_large_requests_are_refused_unread_and_headers_are_safe(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada:
        answer = ada.post(
            "/submissions", content=b"x" * (5 << 20), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
        answer = ada.get("/catalog", headers={"Origin": "https://elsewhere.example"})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_a_queued_submission_can_be_cancelled_and_gets_no_report(server: Running, tokens: dict[str, str]):
    slow = RIGHT.replace("return x * 2", "import time; time.sleep(3); return x * 2")
    with server.client(tokens["ada"]) as ada:
        busy = ada.post("/submissions", json=body(slow)).json()["id"]
        waiting = ada.post("/submissions", json=body()).json()["id"]
        assert ada.post(f"/submissions/{waiting}/cancel").json()["state"] == "cancelled"
        assert ada.get(f"/submissions/{waiting}/report").status_code == 409
        assert ada.post(f"/submissions/{waiting}/cancel").status_code == 409
        graded(ada, busy)
        assert ada.get(f"/submissions/{waiting}").json()["state"] == "cancelled"


def test_more_than_so_many_a_minute_are_refused_until_later(course: Catalog, tokens: dict[str, str]):
    running = Running(course, environment={"TOPEKA_SUBMISSIONS_PER_MINUTE": "2"})
    running.start()
    try:
        with running.client(tokens["ada"]) as ada, running.client(tokens["ben"]) as ben:
            codes = [ada.post("/submissions", json=body(RIGHT + "#" * n)).status_code for n in range(3)]
            assert codes == [201, 201, 429]
            assert int(ada.post("/submissions", json=body()).headers["retry-after"]) > 0
            assert ben.post("/submissions", json=body()).status_code == 201
    finally:
        running.end()


def test_what_was_accepted_survives_sigkill_and_is_graded_once(server: Running, tokens: dict[str, str]):
    with server.client(tokens["ada"]) as ada:
        ids = [ada.post("/submissions", json=body(RIGHT + "#" * n)).json()["id"] for n in range(4)]
        graded(ada, ids[0])
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server.start()
    with server.client(tokens["ada"]) as ada:
        for submission_id in ids:
            assert graded(ada, submission_id)["status"] == "verified"
            with ada.stream("GET", f"/submissions/{submission_id}/events") as stream:
                kinds = [kind for _, kind, _ in events_of(stream)]
            assert kinds.count("graded") == 1


def test_sigterm_ends_the_server_in_peace(server: Running, course: Catalog):
    assert server.end() == 0
    assert "Traceback" not in Path(course.root / "serve.log").read_text()


def test_a_taken_port_is_a_sentence(server: Running, course: Catalog):
    second = Running(course, port=server.port)
    with pytest.raises(AssertionError):
        second.start()
    assert second.process is not None
    assert second.process.wait(timeout=30) == 3
    assert "is another `topeka serve` running?" in (course.root / "serve.log").read_text()


def test_httpx_is_what_talks(server: Running):
    # HTTP/1.1 pipelining and odd methods get a problem, not a stack trace.
    answer = httpx.request("DELETE", f"http://127.0.0.1:{server.port}/api/v1/submissions")
    assert answer.status_code == 405
    assert answer.json()["title"] == "Method Not Allowed"
