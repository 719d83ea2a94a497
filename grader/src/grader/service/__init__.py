"""The grader as a service: submissions come in over HTTP, wait in a durable queue, are graded, and leave a report.

| module | holds |
|---|---|
| `settings` | what an operator may choose |
| `models`, `database` | the tables, and connections to SQLite or PostgreSQL |
| `accounts` | users and their tokens |
| `submissions` | every change of a submission's state: the only module that makes one |
| `work_queue` | the durable queue: the only module that knows DBOS |
| `worker` | takes submissions that its machine can verify, and grades them |
| `api` | HTTP |
"""
