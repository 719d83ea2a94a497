"""What an operator may choose, from the environment; the command line may override it."""

import os
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grader.errors import UsageError
from grader.report import Trust

PREFIX = "TOPEKA_"
_PASSWORD_FILE = "TOPEKA_DATABASE_PASSWORD_FILE"


class Settings(BaseModel):
    """How the service runs.

    Attributes:
        database_url: `sqlite:///FILE` for one machine, `postgresql://USER:PASSWORD@HOST/NAME` for any number. The
            password may be in the file that TOPEKA_DATABASE_PASSWORD_FILE names instead.
        host: the address that the server listens on.
        port: its port.
        public_url: what browsers call it behind a proxy, such as `https://grader.example.org`.
        local_owner: whether whoever can see what the server prints owns the service, though it listens on more than
            loopback: in a container whose port is published to loopback, say. Else that holds on loopback only.
        link_file: where the link that signs the owner in is kept too; None means nowhere.
        max_request_bytes: a larger request is refused before it is read.
        duplicate_window_s: how long the same content for the same lab is the same submission.
        submissions_per_minute: of one user.
        heartbeat_s: how often a worker says that it lives.
        lost_after_s: a worker silent for so long is lost, and its work goes to others.
        drain_s: how long a worker that shall end may take to finish what it has begun.
        worker_host: a worker's machine in its id, unique and stable; None means the hostname.
        alive_file: touched by a worker at each beat of its heart, for health checks; None means none.
        trust: `strict` grades labs that support it with their code in a process of its own, and all others as
            ever; each report says which.
        keep_days: how long submissions are kept; None keeps them for ever.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    database_url: str
    host: str = "127.0.0.1"
    port: int = Field(default=8300, ge=0, le=65535)
    public_url: str | None = Field(default=None, pattern=r"^https?://[^/\s]+$")
    local_owner: bool = False
    link_file: Path | None = None
    max_request_bytes: int = Field(default=4 << 20, ge=1024)
    duplicate_window_s: float = Field(default=60.0, ge=0)
    submissions_per_minute: int = Field(default=30, ge=1)
    heartbeat_s: float = Field(default=5.0, gt=0)
    lost_after_s: float = Field(default=25.0, gt=0)
    drain_s: float = Field(default=60.0, ge=0)
    worker_host: str | None = Field(default=None, min_length=1, max_length=180)
    alive_file: Path | None = None
    trust: Trust = Trust.SAME_PROCESS
    keep_days: float | None = Field(default=None, gt=0)

    @classmethod
    def from_environment(cls, folder: Path, **chosen: object) -> Self:
        """Return the settings of TOPEKA_DATABASE_URL, TOPEKA_PORT and so on.

        Args:
            folder: where the SQLite file lies if no database is named.
            chosen: values from the command line; None stands for not chosen.

        Raises:
            UsageError: a value is not one the setting can have; the message names the variable.
        """
        values: dict[str, object] = {"database_url": f"sqlite:///{folder / 'grader.sqlite3'}"}
        for name in cls.model_fields:
            if text := os.environ.get(PREFIX + name.upper()):
                values[name] = text
        if secret := os.environ.get(_PASSWORD_FILE):
            values["database_url"] = _with_password(str(values["database_url"]), Path(secret))
        values |= {name: value for name, value in chosen.items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + str(first["loc"][0]).upper()
            raise UsageError(f"{name}: {first['msg']}, found {first['input']!r}") from error


def _with_password(url: str, file: Path) -> str:
    from sqlalchemy import make_url

    try:
        password = file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UsageError(f"{_PASSWORD_FILE}: {file}: {error.strerror}") from error
    return make_url(url).set(password=password).render_as_string(hide_password=False)
