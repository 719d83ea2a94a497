"""The same program on PostgreSQL: a server, workers as if on many machines, and what dies among them."""

import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from grader.catalog import Catalog
from grader.service import accounts
from grader.service.models import Role
from grader.service.serve import open_database
from grader.service.settings import Settings

from .conftest import RIGHT, WRONG, Running, body, events_of, graded
from .own import QUICK, RunningWorker, gated, until

MakeWorker = Callable[..., RunningWorker]


@pytest.fixture
def tokens(url: str) -> dict[str, str]:
    database = open_database(Settings(database_url=url))
    with database.session() as session:
        made = {
            "ada": accounts.create_token(session, "ada", Role.LEARNER),
            "ina": accounts.create_token(session, "ina", Role.INSTRUCTOR),
        }
    database.close()
    return made


@pytest.fixture
def server(course: Catalog, url: str, tokens: dict[str, str]) -> Iterator[Running]:
    running = Running(course, environment=QUICK | {"TOPEKA_DATABASE_URL": url})
    running.start()
    yield running
    if running.process is not None and running.process.poll() is None:
        running.end(signal.SIGKILL)


@pytest.fixture
def make_worker(course: Catalog, url: str) -> Iterator[MakeWorker]:
    made: list[RunningWorker] = []

    def make(name: str, *arguments: str, **environment: str) -> RunningWorker:
        made.append(RunningWorker(course, url, name, environment, arguments))
        return made[-1].begin()

    yield make
    for worker in made:
        worker.kill()


def kinds_of(client, submission_id: str) -> list[str]:
    with client.stream("GET", f"/submissions/{submission_id}/events") as stream:
        return [kind for _, kind, _ in events_of(stream)]


def test_two_workers_share_the_work_and_each_submission_is_graded_once(
    server: Running, tokens: dict[str, str], make_worker: MakeWorker, tmp_path: Path
):
    workers = [make_worker(name) for name in ("north", "south")]
    with server.client(tokens["ada"]) as ada, server.client(tokens["ina"]) as ina:
        gate = tmp_path / "gate"
        # Both must be at work at the same time for both signs to appear.
        held = [ada.post("/submissions", json=body(gated(gate, n))).json()["id"] for n in range(2)]
        until(lambda: all(Path(f"{gate}.{n}.begun").exists() for n in range(2)))
        wrong = ada.post("/submissions", json=body(WRONG)).json()["id"]
        gate.touch()
        found = [graded(ada, s) for s in held]
        assert [s["status"] for s in found] == ["verified", "verified"]
        assert {s["worker"] for s in found} == {"north/0", "south/0"}
        assert graded(ada, wrong)["status"] == "failed"
        report = ada.get(f"/submissions/{held[0]}/report").json()
        assert (len(report["labs"][0]["tests"]), report["stack"]) == (5, "cpu")
        assert kinds_of(ada, wrong) == ["queued", "started", *["test"] * 5, "graded"]
        assert sorted(w["id"] for w in ina.get("/workers").json() if w["alive"]) == ["north/0", "south/0"]
        assert sum(w["graded"] for w in ina.get("/workers").json()) == 3
    for worker in workers:
        assert worker.end() == 0
        lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
        about_gradings = [line for line in lines if line["message"] in ("begun", "graded")]
        assert about_gradings
        assert all(len(line["submission"]) == 32 for line in about_gradings)


def test_what_waits_says_for_what(server: Running, tokens: dict[str, str], make_worker: MakeWorker):
    with server.client(tokens["ada"]) as ada:
        first, second = (
            ada.post("/submissions", json=body(source)).json()["id"] for source in (RIGHT, WRONG)
        )
        reasons = [ada.get(f"/submissions/{s}").json()["waiting"] for s in (first, second)]
        assert reasons == [{"needs": "", "workers": 0, "ahead": ahead} for ahead in (0, 1)]
        worker = make_worker("late")
        assert graded(ada, first)["waiting"] is None
        assert graded(ada, second)["waiting"] is None
        assert worker.end() == 0


def test_the_same_content_sent_twenty_times_at_once_is_one_submission(
    server: Running, tokens: dict[str, str]
):
    with server.client(tokens["ada"]) as ada, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ada.post("/submissions", json=body()), range(20)))
        assert sorted(a.status_code for a in answers) == [*[200] * 19, 201]
        assert len({a.json()["id"] for a in answers}) == 1
        assert len(ada.get("/submissions").json()) == 1


def test_two_servers_are_one_service_and_one_may_die(
    course: Catalog,
    url: str,
    server: Running,
    tokens: dict[str, str],
    make_worker: MakeWorker,
    tmp_path: Path,
):
    other = Running(course, environment=QUICK | {"TOPEKA_DATABASE_URL": url})
    other.start()
    gate = tmp_path / "gate"
    try:
        with server.client(tokens["ada"]) as here, other.client(tokens["ada"]) as there:
            make_worker("only").ready()
            with ThreadPoolExecutor(20) as pool:
                source = body(gated(gate))
                sent = list(
                    pool.map(lambda n: (here, there)[n % 2].post("/submissions", json=source), range(20))
                )
            assert sorted(a.status_code for a in sent) == [*[200] * 19, 201]
            (held,) = {a.json()["id"] for a in sent}
            until(Path(f"{gate}.0.begun").exists)
            seen = []
            with here.stream("GET", f"/submissions/{held}/events") as stream:
                for number, kind, _ in events_of(stream):
                    seen.append((number, kind))
                    if kind == "started":
                        break
            assert server.end(signal.SIGKILL) == -signal.SIGKILL
            gate.touch()
            last = {"Last-Event-ID": str(seen[-1][0])}
            with there.stream("GET", f"/submissions/{held}/events", headers=last) as stream:
                seen += [(number, kind) for number, kind, _ in events_of(stream)]
            assert [kind for _, kind in seen] == ["queued", "started", *["test"] * 5, "graded"]
            assert graded(there, held)["status"] == "verified"
    finally:
        other.close()


def test_what_a_lost_worker_had_begun_is_graded_elsewhere_and_counts_once(
    server: Running, tokens: dict[str, str], make_worker: MakeWorker, tmp_path: Path
):
    gate = tmp_path / "gate"
    lost, other = make_worker("lost").ready(), None
    with server.client(tokens["ada"]) as ada:
        held = ada.post("/submissions", json=body(gated(gate))).json()["id"]
        until(Path(f"{gate}.0.begun").exists)
        assert lost.end(signal.SIGKILL) == -signal.SIGKILL
        other = make_worker("other").ready()
        gate.touch()
        found = graded(ada, held)
        assert (found["status"], found["worker"], found["attempts"]) == ("verified", "other/0", 2)
        kinds = kinds_of(ada, held)
        assert (kinds.count("started"), kinds.count("graded")) == (2, 1)
    assert "put back: its worker is lost" in other.log.read_text()


def test_a_grading_outlives_the_end_of_the_database(
    postgresql, server: Running, tokens: dict[str, str], make_worker: MakeWorker, tmp_path: Path
):
    gate = tmp_path / "gate"
    worker = make_worker("north").ready()
    with server.client(tokens["ada"]) as ada:
        held = ada.post("/submissions", json=body(gated(gate))).json()["id"]
        until(Path(f"{gate}.0.begun").exists)
        postgresql.kill()
        answer = ada.post("/submissions", json=body())
        assert answer.status_code == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) > 0
        gate.touch()  # the tests end while nothing can be written down
        until(lambda: "the database does not answer" in worker.log.read_text())
        postgresql.start()
        assert graded(ada, held)["status"] == "verified"
        assert kinds_of(ada, held).count("graded") == 1
        again = ada.post("/submissions", json=body(RIGHT + "#")).json()["id"]
        assert graded(ada, again)["status"] == "verified", "the worker goes on taking work"


def test_one_id_is_one_worker_and_after_its_end_it_is_free_at_once(
    server: Running, tokens: dict[str, str], make_worker: MakeWorker
):
    first = make_worker("north").ready()
    twin = make_worker("north")
    assert twin.process is not None
    assert twin.process.wait(timeout=60) == 3
    assert (
        "a worker north/0 is running already: give this one another number with --slot"
        in twin.log.read_text()
    )
    first.end(signal.SIGKILL)
    make_worker("north").ready()
    make_worker("north", "--slot", "1").ready()
    with server.client(tokens["ina"]) as ina:
        assert [w["id"] for w in ina.get("/workers").json()] == ["north/0", "north/1"]


def test_a_drain_finishes_what_has_begun_and_leaves_the_rest_waiting(
    server: Running, tokens: dict[str, str], make_worker: MakeWorker, tmp_path: Path
):
    gate = tmp_path / "gate"
    worker = make_worker("north").ready()
    with server.client(tokens["ada"]) as ada, server.client(tokens["ina"]) as ina:
        begun = ada.post("/submissions", json=body(gated(gate))).json()["id"]
        waiting = ada.post("/submissions", json=body()).json()["id"]
        until(Path(f"{gate}.0.begun").exists)
        assert worker.process is not None
        worker.process.terminate()
        until(lambda: ina.get("/workers").json()[0]["draining"])
        gate.touch()
        assert worker.process.wait(timeout=60) == 0
        assert graded(ada, begun)["status"] == "verified"
        assert ada.get(f"/submissions/{waiting}").json()["state"] == "queued"
        assert not ina.get("/workers").json()[0]["alive"], "it has said goodbye"
        make_worker("south").ready()
        assert graded(ada, waiting)["worker"] == "south/0"


def test_what_a_drain_cannot_finish_is_put_back_and_not_reported(
    server: Running, tokens: dict[str, str], make_worker: MakeWorker, tmp_path: Path
):
    gate = tmp_path / "gate"
    worker = make_worker("north", TOPEKA_DRAIN_S="0.1").ready()
    with server.client(tokens["ada"]) as ada:
        held = ada.post("/submissions", json=body(gated(gate))).json()["id"]
        until(Path(f"{gate}.0.begun").exists)
        assert worker.end() == 0
        assert "put back: this worker ends" in worker.log.read_text()
        assert ada.get(f"/submissions/{held}").json()["state"] == "running"
        gate.touch()
        make_worker("south").ready()
        found = graded(ada, held)
        assert (found["status"], found["worker"], found["attempts"]) == ("verified", "south/0", 2)
        assert kinds_of(ada, held).count("graded") == 1


def test_a_worker_for_gpus_is_refused_where_there_are_none(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    worker = make_worker("north", "--stacks", "cuda")
    assert worker.process is not None
    assert worker.process.wait(timeout=60) == 3
    assert "--stacks cuda: gradings here see no GPU" in worker.log.read_text()
