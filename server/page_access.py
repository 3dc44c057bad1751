"""Who may change something from the page: whoever knows the token that lies on the server's disk.

    STATE/page.token    made when the page first starts, readable by its user alone

The page is on the machine's loopback, which every user of that machine can reach, and so can every
web site that an operator's browser has open. Reading needs nothing. Changing needs a session, which
the token opens, the session's own secret in the form, and a form that came from the page itself.
"""

import hmac
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import FieldfedError, StateError
from common.files import write_atomically

log = logging.getLogger(__name__)

SESSION_SECONDS = 12 * 3600.0
MOST_SESSIONS = 50
"""The oldest ends when another is opened."""
MOST_ATTEMPTS = 5
ATTEMPT_SECONDS = 60.0
"""In which so many wrong tokens may be tried, by everybody together."""
SHORTEST = 20
"""Characters of a token that somebody else wrote."""


class AccessError(FieldfedError):
    """Whoever asks may not do that."""


class AttemptsError(AccessError):
    """Too many wrong tokens; ``seconds`` to wait."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many wrong tokens; wait {seconds:.0f} s and try again")
        self.seconds = seconds


@dataclass
class Session:
    """A browser that showed the token; ``said`` is what came of its last action, at ``at``."""

    name: str
    secret: str
    until: float
    said: str = ""
    refused: bool = False
    at: float = 0.0


class Access:
    """The token and the sessions that it opened; these end with the process."""

    def __init__(self, token: str, now: Callable[[], float] = time.monotonic) -> None:
        self._token, self._now = token.encode(), now
        self._sessions: dict[str, Session] = {}
        self._wrong: deque[float] = deque(maxlen=MOST_ATTEMPTS)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "Access":
        """The token in a file, which is made where there is none.

        Raises:
            StateError: others may read it, or it is too short to be one; names the file.
            DiskError: it cannot be written.
        """
        if not path.exists():
            write_atomically(path, f"{secrets.token_urlsafe(32)}\n".encode())
        log.info("the token that lets the page change something is in '%s'", path)
        return cls(read_token(path))

    def sign_in(self, token: str) -> Session:
        """Open a session.

        Raises:
            AttemptsError: too many wrong tokens were tried.
            AccessError: this is not the token.
        """
        with self._lock:
            return self._signed_in(token, self._now())

    def _signed_in(self, token: str, now: float) -> Session:
        if len(self._wrong) == MOST_ATTEMPTS and now - self._wrong[0] < ATTEMPT_SECONDS:
            raise AttemptsError(ATTEMPT_SECONDS - (now - self._wrong[0]))
        if not hmac.compare_digest(token.strip().encode(), self._token):
            self._wrong.append(now)
            log.warning("a wrong token was tried")
            raise AccessError("that is not the token; it is in page.token in the server's folder")
        self._wrong.clear()
        while len(self._sessions) >= MOST_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        made = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), now + SESSION_SECONDS)
        self._sessions[made.name] = made
        return made

    def session(self, name: str | None) -> Session | None:
        """The session of that name, unless it has ended."""
        found = self._sessions.get(name or "")
        if found is not None and found.until <= self._now():
            del self._sessions[found.name]
            return None
        return found

    def require(self, name: str | None, secret: str) -> Session:
        """The session that a form belongs to.

        Raises:
            AccessError: there is none, or the form is not of that session.
        """
        session = self.session(name)
        if session is None:
            raise AccessError("sign in first: changing something needs the token of this server")
        if not hmac.compare_digest(secret.encode(), session.secret.encode()):
            raise AccessError("this form is not of your session; load the page again")
        return session

    def sign_out(self, session: Session) -> None:
        """End a session."""
        self._sessions.pop(session.name, None)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        StateError: it cannot be read, others may read it, or it is too short.
    """
    try:
        open_to_others = path.stat().st_mode & 0o077 and os.name == "posix"
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"'{path}' cannot be read: {error}") from error
    if open_to_others:
        raise StateError(f"others may read '{path}'; remove it, and a new token is made")
    if len(text) < SHORTEST:
        raise StateError(f"'{path}' holds no token; remove it, and a new one is made")
    return text
