"""Draws docs/images/grade.svg: what `topeka grade` shows for code that divides by d_k.

    .venv/bin/python scripts/readme_screenshot.py

The text is the real report of a real grading, exported by Rich.
"""

import re
import tempfile
from pathlib import Path

from grader.catalog import load
from grader.grading import grade
from grader.sandbox.local import LocalSandbox
from grader.submission import read_code
from grader.terminal import print_report
from rich.console import Console

from grader import misconceptions

ROOT = Path(__file__).resolve().parents[1]
WRONG = "scales_by_d_k"


def main() -> None:
    """Grade the misconception and save what the terminal shows."""
    catalog = load(ROOT)
    lab = catalog.select(["ch01/lab01"])[0]
    edit = next(m for m in misconceptions.load(lab).misconception if m.name == WRONG)
    with tempfile.TemporaryDirectory() as folder, LocalSandbox() as sandbox:
        for name, content in edit.apply(read_code(lab, lab.path / "solutions")).items():
            (Path(folder) / name).write_bytes(content)
        report = grade(catalog, [lab], sandbox, code=folder)
    console = Console(record=True, width=112, force_terminal=True, color_system="truecolor", highlight=False)
    print_report(console, catalog, report)
    target = ROOT / "docs" / "images" / "grade.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="topeka grade ch01/lab01", unique_id="topeka-grade")
    # Rich's template asks a server for its font; the page must not.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    target.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
