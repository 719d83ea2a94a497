"""Reads a lab's `misconceptions.toml`: named wrong answers, and correct ones written differently."""

import tomllib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grader.catalog import CatalogError, Lab


class Edit(BaseModel):
    """A solution with one piece of text replaced.

    Attributes:
        name: unique within the lab.
        file: the solution file it edits.
        find: text that occurs exactly once in that file.
        replace: what stands there instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    file: str
    find: str = Field(min_length=1)
    replace: str

    def apply(self, code: dict[str, bytes]) -> dict[str, bytes]:
        """Return `code` with this edit.

        Raises:
            CatalogError: the text to find does not occur exactly once.
        """
        if self.file not in code:
            raise CatalogError(f"{self.name}: there is no {self.file} in solutions/")
        text = code[self.file].decode()
        if (n := text.count(self.find)) != 1:
            raise CatalogError(f"{self.name}: `find` occurs {n} times in solutions/{self.file}, not once")
        return {**code, self.file: text.replace(self.find, self.replace).encode()}


class Misconception(Edit):
    """A wrong answer that people really give.

    Attributes:
        caught_by: the test functions that must fail for it.
        hint: what to tell a learner whose failures look like it.
    """

    caught_by: tuple[str, ...] = Field(min_length=1)
    hint: str = Field(min_length=10)


class Misconceptions(BaseModel):
    """One file.

    Attributes:
        misconception: wrong answers.
        alternative: correct answers, written differently.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    misconception: tuple[Misconception, ...] = ()
    alternative: tuple[Edit, ...] = ()


def load(lab: Lab) -> Misconceptions:
    """Read the lab's file; an absent one is empty.

    Raises:
        CatalogError: the file is no TOML, or a key is missing, unknown or of the wrong kind.
    """
    file = lab.path / "misconceptions.toml"
    try:
        document: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Misconceptions()
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{file}: {error}") from error
    try:
        found = Misconceptions.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"{file}: {where}: {first['msg']}") from error
    names = [edit.name for edit in (*found.misconception, *found.alternative)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CatalogError(f"{file}: used twice: {', '.join(sorted(twice))}")
    return found
