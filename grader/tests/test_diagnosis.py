from grader.diagnosis import diagnose, fingerprint, likeness, signature
from grader.report import Outcome, TestResult


def failed(name: str, message: str) -> TestResult:
    return TestResult(name=name, outcome=Outcome.FAILED, message=message)


def passed(name: str) -> TestResult:
    return TestResult(name=name, outcome=Outcome.PASSED)


HINTS = {"halves": "You halve.", "doubles": "You double.", "everything": "Everything is zero."}
SIGNATURES = {
    "halves": {"a": fingerprint("got 0.5, expected 1.0"), "b": fingerprint("got 1.0, expected 2.0")},
    "doubles": {"a": fingerprint("got 2.0, expected 1.0"), "b": fingerprint("got 4.0, expected 2.0")},
    "everything": {t: fingerprint("got 0.0") for t in "abcd"},
}


def test_the_same_failing_tests_are_told_apart_by_their_numbers():
    tests = [
        failed("a", "got 2.0000001, expected 1.0"),
        failed("b", "got 4.0, expected 2.0"),
        passed("c"),
        passed("d"),
    ]
    found = diagnose(tests, SIGNATURES, HINTS)
    assert found is not None
    assert (found.misconception, found.hint, found.likeness) == ("doubles", "You double.", 1.0)


def test_failures_of_ones_own_get_no_hint():
    tests = [failed("a", "got 77"), failed("d", "got 78"), passed("b"), passed("c")]
    assert diagnose(tests, SIGNATURES, HINTS) is None


def test_nothing_failed_means_no_diagnosis():
    assert diagnose([passed("a")], SIGNATURES, HINTS) is None


def test_tests_that_wait_for_unwritten_code_are_left_out():
    unwritten = TestResult(name="b", outcome=Outcome.NOT_WRITTEN, message="not written yet")
    tests = [failed("a", "got 0.5, expected 1.0"), unwritten, passed("c"), passed("d")]
    found = diagnose(tests, SIGNATURES, HINTS)
    assert found is not None
    assert found.misconception == "halves"


def test_fingerprints_ignore_small_differences_addresses_and_places_in_the_code():
    assert fingerprint("error 1.23456e-3 at 7") == fingerprint("error 1.23999e-3 at 7")
    assert fingerprint("error 1.2 at 7") != fingerprint("error 1.2 at 8")
    file = "{}/topeka-job-{}/tmp/pytest/test_x0/{}: not a header"
    here, there = file.format("/tmp", "12-ab_9", "a"), file.format("/var/other", "3456-zz", "a")
    assert fingerprint(here) == fingerprint(there)
    assert fingerprint(here) != fingerprint(file.format("/tmp", "12-ab_9", "b"))
    assert fingerprint("<f at 0x7f01> failed") == fingerprint("<f at 0x7fff> failed")
    frame = '  File "src/a.py", line {}\n    x = y\nNameError: y'
    assert fingerprint(frame.format(3)) == fingerprint(frame.format(99))


def test_likeness_counts_tests_in_common_and_numbers_in_common():
    assert likeness({}, {}) == 0.0
    assert likeness({"a": "1"}, {"a": "1"}) == 1.0
    assert likeness({"a": "1"}, {"b": "1"}) == 0.0
    assert 0.0 < likeness({"a": "1"}, {"a": "2"}) < 1.0


def test_signature_holds_failures_only():
    unwritten = TestResult(name="n", outcome=Outcome.NOT_WRITTEN)
    assert signature([failed("a", "x"), passed("b"), unwritten]).keys() == {"a"}
