"""A running service whose course has lectures, for the dashboard's tests."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import httpx
from grader.catalog import Catalog
from grader.service import accounts
from grader.service.models import Role

from .conftest import Running

LECTURE = r"""# Why *halves*?

Text with `code` and the formula $\frac{1}{\sqrt{d_k}}$, which costs $5 or $6.

$$
w_t = \frac{\exp(s_t)}{\sum_{u=1}^{T} \exp(s_u)}
$$

<details><summary>Answer</summary>

Because **so**.

</details>

<script>alert(1)</script> <img src=x onerror=alert(1)> <b onclick="x()">bold</b>

[bad](javascript:alert(1)) [a test](../lab01_double/tests/test_numbers.py) [up](../../../../etc/passwd)
[lab](../lab01_double/README.md) [chapter](../README.md#more-here) [there](https://example.org/x)
[self](02_again.md) [part](#a-part)

![figure](figures/one.svg) ![outside](../../../secret.svg)

| a | b |
|---|--:|
| 1 | 2 |

## A part

```python
x = 1  # one
```
"""


@dataclasses.dataclass
class Site:
    """A running service with lectures, and its users' tokens."""

    running: Running
    tokens: dict[str, str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.running.port}"

    @contextlib.contextmanager
    def browser(self, token: str | None = None, **headers: str) -> Iterator[httpx.Client]:
        """A client with cookies that asks for pages, as browsers do."""
        headers = {"Accept": "text/html,*/*", "Sec-Fetch-Site": "same-origin"} | headers
        with httpx.Client(base_url=self.address, headers=headers, timeout=30) as client:
            if token:
                assert client.post("/sign-in", content=f"token={token}").status_code == 303
            yield client

    def new_link(self) -> str:
        """The next link that the server prints: one when it starts, one whenever one was used. Use it."""
        assert self.running.process is not None
        assert self.running.process.stdout is not None
        for line in self.running.process.stdout:
            if found := re.search(r"http\S+once=\S+", line):
                return found.group()
        raise AssertionError("the server has ended")

    def api(self, name: str) -> httpx.Client:
        return self.running.client(self.tokens[name])


def write_lectures(course: Catalog) -> None:
    """Give the miniature course an overview, lectures, a figure, and things that nobody may fetch."""
    chapter = course.chapters[0].path
    (chapter / "README.md").write_text("# Numbers\n\nAn overview.\n")
    (chapter / "docs" / "figures").mkdir(parents=True)
    (chapter / "docs" / "01_why.md").write_text(LECTURE)
    (chapter / "docs" / "02_again.md").write_text("# Again\n\nOnce more.\n")
    (chapter / "docs" / "figures" / "one.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (chapter / "docs" / "figures" / "one.py").write_text("secret = 1\n")
    (course.root / "secret.svg").write_text("<svg>secret</svg>")
    (chapter / "docs" / "figures" / "link.svg").symlink_to(course.root / "secret.svg")


@contextlib.contextmanager
def open_site(course: Catalog, **environment: str) -> Iterator[Site]:
    """Serve `course`, with four learners and an instructor."""
    write_lectures(course)
    running = Running(course, environment=environment)
    with running.database.session() as session:
        tokens = {
            name: accounts.create_token(session, name, Role.LEARNER) for name in ("ada", "ben", "cy", "eve")
        }
        tokens["ina"] = accounts.create_token(session, "ina", Role.INSTRUCTOR)
    running.start()
    try:
        yield Site(running, tokens)
    finally:
        running.close()
