"""What may be set is written down once, with its default, and is what is really used."""

import re
from pathlib import Path

from grader.catalog import find_root

ROOT = find_root(Path(__file__))


def test_the_documented_settings_are_those_of_compose_with_their_defaults() -> None:
    used = re.findall(r"\$\{(TOPEKA_\w+):-(.*?)\}", (ROOT / "compose.yaml").read_text())
    documented = dict(re.findall(r"^(TOPEKA_\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {name for name, _ in used} == set(documented)
    # One name may have another default in another stack (TOPEKA_SHM); the documented one is one of them.
    assert {name: value for name, value in documented.items() if (name, value) not in used} == {}
