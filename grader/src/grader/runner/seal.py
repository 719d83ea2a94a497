"""Authenticates what a child says, so that a line written by anybody else is seen.

The parent draws a secret for each job and hands it to the child after the fork, through a pipe: it is in no variable
of the child. There it goes into a hash object, whose key Python cannot read back. Each tag covers every line before
it, so lines can be neither forged, repeated, left out nor put in another order.
"""

import hashlib
import hmac
import secrets

_TAG_BYTES = 16
_TAG_CHARS = 2 * _TAG_BYTES
SECRET_BYTES = 32


def new_secret() -> bytes:
    """Return the secret of one job."""
    return secrets.token_bytes(SECRET_BYTES)


class Seal:
    """One side's state; both sides start from the same secret.

    Args:
        secret: `SECRET_BYTES` long.
    """

    __slots__ = ("_mac",)

    def __init__(self, secret: bytes) -> None:
        self._mac = hashlib.blake2b(key=secret, digest_size=_TAG_BYTES)

    def close(self, line: bytes) -> bytes:
        """Return `line` with its tag before it."""
        self._mac.update(line + b"\n")
        return self._mac.hexdigest().encode() + b" " + line

    def open(self, sealed: bytes) -> bytes | None:
        """Return the line that `close` sealed as the next one, or None if this is none."""
        tag, line = sealed[:_TAG_CHARS], sealed[_TAG_CHARS + 1 :]
        mac = self._mac.copy()
        mac.update(line + b"\n")
        if not hmac.compare_digest(mac.hexdigest().encode(), tag):
            return None
        self._mac = mac
        return line
