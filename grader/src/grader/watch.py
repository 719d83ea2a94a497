"""Grades again whenever a learner's file is saved."""

from collections.abc import Callable, Sequence

import watchfiles

from grader.catalog import Lab


def on_save(labs: Sequence[Lab], grade: Callable[[Sequence[Lab]], None]) -> None:
    """Call `grade` with all of `labs`, then with those whose files changed, until Ctrl-C.

    The folders are watched, not the files: many editors write a new file and rename it over the
    old one, and a watched file would be gone.

    Args:
        labs: what to watch.
        grade: called at once, and once for each burst of changes.
    """
    folders = [lab.path / "src" for lab in labs]

    def is_source(_: watchfiles.Change, path: str) -> bool:
        return any(path == str(source) for lab in labs for source in lab.source_paths)

    # An editor's save is several events within a few milliseconds; 20 ms of quiet end the burst.
    changes = watchfiles.watch(
        *folders, watch_filter=is_source, step=20, debounce=400, rust_timeout=100, yield_on_timeout=True
    )
    next(changes)  # the system watches from here on, so a save during the first grading is not missed
    grade(labs)
    for burst in changes:
        paths = {path for _, path in burst}
        if changed := [lab for lab in labs if any(str(source) in paths for source in lab.source_paths)]:
            grade(changed)
