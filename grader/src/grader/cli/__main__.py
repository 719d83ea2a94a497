"""`python -m grader.cli` is `topeka`."""

from grader.cli import main

main()
