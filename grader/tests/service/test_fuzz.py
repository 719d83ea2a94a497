"""schemathesis plays the client from hell: whatever the OpenAPI schema allows, and what it does not."""

import os
import subprocess
import sys

from .conftest import School

# CI's short form; docs/operations.md has the long one.
EXAMPLES = os.environ.get("TOPEKA_FUZZ_EXAMPLES", "15")

CHECKS = ",".join(
    (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "ignored_auth",
        "unsupported_method",
    )
)


def test_no_request_makes_the_server_fail_or_answer_what_its_schema_does_not_promise(school: School):
    ina = school.instructor()
    run = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "run",
            f"http://127.0.0.1:{school.running.port}/openapi.json",
            "--header", f"Authorization: Bearer {ina.token}",
            "--checks", CHECKS,
            "--max-examples", EXAMPLES,
            "--seed", "1",
            "--exclude-path-regex", "/events$",  # a stream without end for a submission that waits
            "--suppress-health-check", "all",
            "--request-timeout", "30",
            "--no-color",
        ],
        capture_output=True, text=True, cwd=school.running.catalog.root,
        env=os.environ | {"COLUMNS": "160"}, check=False, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "Tested: 13" in run.stdout, run.stdout[-3000:]
