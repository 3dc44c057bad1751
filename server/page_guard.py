"""What a request must be before the page answers it, and what every answer carries.

The page is on loopback, which is no protection from a browser on the same machine: another site may
have its name lead here (DNS rebinding), or post a form to it. So a request must name this machine,
and one that changes something must come from the page itself.
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from common.processes import is_loopback

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # with no-referrer forms would come from origin "null"
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
MOST_FORM_BYTES = 4096
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::\d{1,5})?")
_OWN_PATH = re.compile(r"/([A-Za-z0-9_%.-]+(/[A-Za-z0-9_%.-]+)*)?")


async def _fields(request: Request) -> dict[str, str]:
    """What a form sends; of a field that is there twice, the last."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_FORM_BYTES:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    try:
        return dict(parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=20))
    except ValueError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST) from error


Fields = Annotated[dict[str, str], Depends(_fields)]


def is_own_name(host: str) -> bool:
    """Whether a Host header names this machine; its port may be that of a tunnel or container."""
    found = _HOST.fullmatch(host)
    return found is not None and is_loopback(found[1].strip("[]").lower())


def from_here(request: Request) -> bool:
    """Whether a browser sent this from this page; what is no browser says neither."""
    if request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def own_path(path: str) -> str:
    """A path of this page, where it is one."""
    return path if _OWN_PATH.fullmatch(path) else "/"
