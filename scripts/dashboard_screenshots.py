"""Makes docs/images/dashboard-{map,lab,phone}.png: the dashboard with real gradings of the real course.

    .venv/bin/python scripts/dashboard_screenshots.py [FOLDER]

Needs Chromium and what docker/requirements/browser-tests.txt lists. It starts a `topeka serve` with a database
of its own, hands in a misconception and then solutions, and takes the pictures on the way.
"""

import base64
import io
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from grader.catalog import Catalog, Lab, load
from grader.submission import read_code
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from grader import misconceptions

ROOT = Path(__file__).resolve().parents[1]
WRONG_LAB, WRONG = "ch01/lab01", "scales_by_d_k"
DESKTOP = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}
# All chapters that are written but the last labs, so that the map shows what is left to do, too.
LEFT_OUT = 5


def main() -> None:
    """Grade and take the pictures."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    catalog = load(ROOT)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        environment = os.environ | {"TOPEKA_DATABASE_URL": f"sqlite:///{folder}/grader.sqlite3"}
        topeka = [sys.executable, "-m", "grader.cli"]
        token = subprocess.check_output(
            [*topeka, "token", "create", "you"], env=environment, text=True
        ).strip()
        server = subprocess.Popen(
            [*topeka, "serve", "--port", "0", "--sandbox", "local"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        try:
            assert server.stdout is not None
            address = "http://127.0.0.1:" + server.stdout.readline().split(":")[2].split(";")[0]
            browser = playwright.chromium.launch(
                executable_path="/usr/bin/chromium", args=["--no-sandbox"] if os.geteuid() == 0 else []
            )
            take(browser, address, token, catalog, target)
            browser.close()
        finally:
            server.terminate()
            server.wait()


def take(browser: Browser, address: str, token: str, catalog: Catalog, target: Path) -> None:
    """Hand in, and take a picture of each page when it has something to show."""
    api = httpx.Client(base_url=f"{address}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    state = signed_in(browser, address, token)
    lab = next(lab for lab in catalog.labs if lab.id == WRONG_LAB)
    edit = next(m for m in misconceptions.load(lab).misconception if m.name == WRONG)
    graded(api, lab, edit.apply(read_code(lab, lab.path / "solutions")))
    shot(browser, state, f"{address}/labs/{WRONG_LAB}", target / "dashboard-lab.png", dark=False)
    written = [lab for lab in catalog.labs if not lab.planned]
    for each in written[:-LEFT_OUT]:
        status = graded(api, each, read_code(each, each.path / "solutions"))
        print(each.id, status, flush=True)
    shot(browser, state, f"{address}/", target / "dashboard-map.png", dark=False)
    milestone = "ch01/lab04"
    shot(
        browser,
        state,
        f"{address}/labs/{milestone}#work",
        target / "dashboard-phone.png",
        dark=True,
        phone=True,
    )


def signed_in(browser: Browser, address: str, token: str) -> dict[str, object]:
    """Sign in by hand, and return the cookies."""
    page = browser.new_page()
    page.goto(address)
    page.get_by_label("token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="labs verified").wait_for()
    return dict(page.context.storage_state())


def graded(api: httpx.Client, lab: Lab, code: dict[str, bytes]) -> str:
    """Hand in and wait for the status."""
    files = {name: base64.b64encode(content).decode() for name, content in code.items()}
    while (answer := api.post("/submissions", json={"lab": lab.id, "files": files})).status_code == 429:
        time.sleep(float(answer.headers["retry-after"]))
    submission = answer.raise_for_status().json()
    while submission["state"] not in ("graded", "cancelled"):
        time.sleep(0.3)
        submission = api.get(f"/submissions/{submission['id']}").raise_for_status().json()
    return str(submission["status"])


def shot(
    browser: Browser, state: dict[str, object], address: str, file: Path, *, dark: bool, phone: bool = False
) -> None:
    """Save one picture, small enough for a README."""
    context = browser.new_context(
        storage_state=state,  # type: ignore[arg-type]
        viewport=PHONE if phone else DESKTOP,  # type: ignore[arg-type]
        color_scheme="dark" if dark else "light",
        is_mobile=phone,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(address, wait_until="networkidle")
    page.evaluate("document.fonts.ready")
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file.name}: {file.stat().st_size / 1000:.0f} kB", flush=True)
    context.close()


if __name__ == "__main__":
    main()
