"""What Prometheus is told, and that the operations dashboard asks for nothing else."""

import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .cluster import ROOT
from .conftest import RIGHT, WRONG, Running, body, events_of, graded

DASHBOARD = json.loads((ROOT / "docker" / "grafana-dashboard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def values(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Samples by name and label values."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def test_the_dashboard_asks_only_for_what_there_is_and_gradings_are_counted_once(
    server: Running, tokens: dict[str, str]
):
    with server.client(tokens["ada"]) as ada, server.client(tokens["ina"]) as ina:
        for source in (RIGHT, WRONG, RIGHT + "#"):
            last = ada.post("/submissions", json=body(source)).json()["id"]
            graded(ada, last)
        with ada.stream("GET", f"/submissions/{last}/events") as stream:
            told = len(list(events_of(stream)))
        ada.get("/submissions/" + "0" * 32)
        first = ina.get("/metrics").text
        found = values(ina.get("/metrics").text)
        assert values(first)["topeka_outcomes_total"] == found["topeka_outcomes_total"], (
            "each scrape counts anew"
        )
    names = found.keys()
    for expression in EXPRESSIONS:
        asked = set(re.findall(r"\btopeka_\w+", expression))
        assert asked
        assert asked <= names, f"{asked - names} in {expression}"
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            for label in set(labels.split(", ")) - {"le"}:
                [name] = asked
                assert re.search(rf"{name}{{[^}}]*\b{label}=", first), f"{name} has no label {label}"
    assert found["topeka_outcomes_total"] == {("cpu", "verified"): 2, ("cpu", "failed"): 1}
    assert found["topeka_submissions_total"] == {("ch01/lab01",): 3}
    assert found["topeka_waiting_seconds_count"] == found["topeka_grading_seconds_count"] == {("cpu",): 3}
    assert 0 < found["topeka_grading_seconds_sum"]["cpu",] < 300
    assert (found["topeka_workers"][()], found["topeka_queue_workers"]["cpu",]) == (1, 1)
    assert sum(found["topeka_events_sent_total"].values()) == told
    assert found["topeka_event_streams"][()] == 0
    posts = found["topeka_http_seconds_count"]["POST", "/api/v1/submissions", "201"]
    assert posts == 3
    route = "/api/v1/submissions/{submission_id}"
    assert found["topeka_http_seconds_count"]["GET", route, "404"] == 1, "an id is no label"
    log = (server.catalog.root / "serve.log").read_text()
    for line in map(json.loads, log.splitlines()):
        if line["logger"] in ("topeka.worker", "topeka.submissions"):
            assert len(line["submission"]) == 32, line


def test_every_metric_is_on_the_dashboard_once():
    drawn = {name for e in EXPRESSIONS for name in re.findall(r"\btopeka_\w+", e)}
    assert len(EXPRESSIONS) == len(set(EXPRESSIONS))
    assert {"topeka_queue_depth", "topeka_waiting_seconds_bucket", "topeka_http_seconds_bucket"} <= drawn
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places = [tuple(panel["gridPos"][k] for k in "xy") for panel in DASHBOARD["panels"]]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict):
    assert panel["title"]
    assert panel["datasource"]["uid"] == "${source}"
    assert all(target["legendFormat"] for target in panel["targets"])
