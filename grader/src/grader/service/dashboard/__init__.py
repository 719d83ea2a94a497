"""The dashboard: pages for people, served by the same program as the API.

| module | holds |
|---|---|
| `browser` | what a request must be before it is answered: the right host, and the same origin to change anything |
| `sessions` | who a browser is signed in as |
| `reading` | the course's Markdown as safe HTML |
| `views` | what the pages show, from catalogue and database |
| `gauge` | where a milestone's marks stand on its scale |
| `pages` | the routes |
"""

from grader.service.dashboard.pages import install, sign_in_link

__all__ = ["install", "sign_in_link"]
