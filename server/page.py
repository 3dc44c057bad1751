"""The operator's page: where the run is, how good the backbone is, what devices are offered.

    python -P -m server.page FOLDER

    /  /rounds  /farms  /heads  /versions  /devices  /events     for people
    /healthz                                                     200 while this process answers

A process of its own that reads what is on disk whenever it is asked, and keeps nothing. What it
changes (promote, roll back, rollouts) goes through the functions that the commands use, needs the
token in STATE/page.token, and is on record before it is done (server/actions.py).

It listens on this machine alone. Who is elsewhere comes through a tunnel, for example
``ssh -L 9465:127.0.0.1:9465 SERVER``. A browser that was led here under another name (DNS
rebinding), or by a form of another site, is refused.
"""

import contextlib
import hashlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import get_args
from xml.etree.ElementTree import Element

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.exceptions import HTTPException

from common.config import ServerConfig
from common.errors import ConfigError, FieldfedError, LaunchError
from common.processes import terminate_like_interrupt
from common.services import PageConfig, require_near
from common.settings import load_settings
from server import events, page_changes
from server.facts import Sources, sources
from server.markup import document, node
from server.page_access import Access, AccessError, AttemptsError, Session
from server.page_devices import devices_page
from server.page_events import events_page
from server.page_farms import farm_page, farms_page
from server.page_guard import HEADERS, Fields, from_here, is_own_name, own_path
from server.page_heads import head_page, heads_page
from server.page_overview import overview, told
from server.page_rounds import rounds_page
from server.page_script import SCRIPT
from server.page_shell import LEAF, Frame, empty, heading, write
from server.page_sign_in import sign_in_page
from server.page_style import STYLE
from server.page_versions import versions_page
from server.service import run_service

log = logging.getLogger("server.page")  # also where this module is the program

COOKIE = "fieldfed_page"
MOST_REQUESTS = 64
"""At once; further ones are answered with 503."""
STOP_SECONDS = 3
FRESH_SECONDS = 15.0
"""After which a page is written again although nothing on disk has changed: who is online."""
WATCHED = ("fieldfed.db", "registry/registry.db", "actions.db", "telemetry.db")

Parts = Sequence[Element | None]
Read = Callable[[Sources], Parts | None]


class Page:
    """The page of one server."""

    def __init__(self, state_dir: Path, network: str, access: Access) -> None:
        self.state_dir, self.network, self.access = state_dir, network, access
        self.app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        self.app.middleware("http")(self._guarded)
        self.app.add_exception_handler(HTTPException, self._http_error)
        self.app.add_exception_handler(RequestValidationError, self._not_found)
        self._add_pages()
        self._add_files()
        self._add_changes()

    # --- what comes in and what goes out -------------------------------------------------------

    async def _guarded(
        self, request: Request, answer: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Only for this machine's names, and what is changed only from the page itself."""
        if not is_own_name(request.headers.get("host", "")):
            status, words = HTTPStatus.MISDIRECTED_REQUEST, "This page answers to localhost only\n"
            response = Response(words, status, media_type="text/plain")
        elif request.method not in ("GET", "HEAD") and not from_here(request):
            response = Response(
                "This form is not from this page\n", HTTPStatus.FORBIDDEN, media_type="text/plain"
            )
        else:
            response = await answer(request)
        for name, value in HEADERS.items():
            response.headers[name] = value
        return response

    def frame(self, request: Request) -> Frame:
        """Where a request belongs."""
        session = self.access.session(request.cookies.get(COOKIE))
        query = f"?{request.url.query}" if request.url.query else ""
        return Frame(self.network, request.url.path + query, session)

    def error(
        self, request: Request, status: HTTPStatus, title: str, words: str, live: bool = False
    ) -> Response:
        """A page that says what is wrong."""
        parts = [heading(title), empty(words)]
        return HTMLResponse(write(self.frame(request), title, parts, live=live), status)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        if status == HTTPStatus.NOT_FOUND:
            return await self._not_found(request, error)
        return self.error(request, status, status.phrase, status.description or status.phrase)

    async def _not_found(self, request: Request, _error: Exception) -> Response:
        words = "There is no such page. The menu leads to those that there are."
        return self.error(request, HTTPStatus.NOT_FOUND, "Not found", words)

    # --- pages ---------------------------------------------------------------------------------

    def show(self, request: Request, title: str, read: Read) -> Response:
        """A page that is read now; 304 where the asker has it, 503 where it cannot be read."""
        frame = self.frame(request)
        tag = self._tag(frame)
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=HTTPStatus.NOT_MODIFIED)
        try:
            with sources(self.state_dir, events.MOST_EVENTS) as found:
                parts = read(found)
                frame = replace(frame, told=told(found), tag=tag)
            text = "" if parts is None else write(frame, title, parts)
        except Exception as error:  # whatever damage does to what is read, it is said in words
            return self._unreadable(request, error)
        if parts is None:
            words = "The newest run knows nothing of that name."
            return self.error(request, HTTPStatus.NOT_FOUND, "Not found", words)
        return HTMLResponse(text, headers={"ETag": tag})

    def _unreadable(self, request: Request, error: Exception) -> Response:
        if isinstance(error, FieldfedError):
            words = str(error)
        else:
            log.warning("a page cannot be written", exc_info=error)
            words = f"What is on disk cannot be shown ({type(error).__name__}); see logs/page.log"
        new = not (self.state_dir / "fieldfed.db").exists()
        title = "Nothing to show yet" if new else "The state of this server cannot be read"
        return self.error(request, HTTPStatus.SERVICE_UNAVAILABLE, title, words, live=True)

    def _tag(self, frame: Frame) -> str:
        """Changes with what a page is made of: files on disk, who looks, and every so often."""
        parts = [id(self), frame.path, time.time() // FRESH_SECONDS]
        if frame.session is not None:
            parts += [frame.session.name, frame.session.said, frame.session.at]
        for name in WATCHED:
            for path in (self.state_dir / name, self.state_dir / f"{name}-wal"):
                with contextlib.suppress(OSError):
                    found = path.stat()
                    parts += [name, found.st_ino, found.st_size, found.st_mtime_ns]
        return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}"'

    def _add_pages(self) -> None:
        """Each reads what it shows in one go, in a thread of the pool."""
        get = self.app.get

        @get("/")
        def _overview(request: Request) -> Response:
            return self.show(request, "Overview", lambda found: overview(found, time.time()))

        @get("/rounds")
        def _rounds(request: Request, before: int | None = None) -> Response:
            return self.show(request, "Rounds", lambda found: rounds_page(found, before))

        @get("/farms")
        def _farms(request: Request) -> Response:
            return self.show(request, "Farms", lambda found: farms_page(found, time.time()))

        @get("/farms/{farm}")
        def _farm(request: Request, farm: str) -> Response:
            return self.show(request, farm, lambda found: farm_page(found, farm, time.time()))

        @get("/heads")
        def _heads(request: Request) -> Response:
            return self.show(request, "Attention heads", heads_page)

        @get("/heads/{block}/{head}")
        def _head(request: Request, block: int, head: int) -> Response:
            name = f"Block {block}, head {head}"
            return self.show(request, name, lambda found: head_page(found, block, head))

        @get("/versions")
        def _versions(request: Request) -> Response:
            frame = self.frame(request)
            return self.show(request, "Versions", lambda found: versions_page(found, frame))

        @get("/devices")
        def _devices(request: Request) -> Response:
            return self.show(request, "Devices", devices_page)

        @get("/events")
        def _events(request: Request, kind: str | None = None) -> Response:
            known = next((one for one in get_args(events.Kind) if one == kind), None)
            return self.show(request, "Events", lambda found: events_page(found, known))

    def _add_files(self) -> None:
        leaf = node("path", d=LEAF, fill="#0b7a57")
        drawn = node("svg", leaf, xmlns="http://www.w3.org/2000/svg", viewBox="0 0 24 24")
        picture = document(drawn).removeprefix("<!doctype html>\n")
        for path, text, kind in (
            ("/page.css", STYLE, "text/css"),
            ("/page.js", SCRIPT, "text/javascript"),
            ("/icon.svg", picture, "image/svg+xml"),
            ("/healthz", "ok\n", "text/plain"),
        ):
            self.app.get(path)(_file(text, kind))

    # --- changes -------------------------------------------------------------------------------

    def _add_changes(self) -> None:
        app = self.app

        @app.get("/sign-in")
        def _ask(request: Request, next: str = "/") -> Response:  # noqa: A002
            return self._ask(request, next)

        @app.post("/sign-in")
        def _sign_in(request: Request, sent: Fields) -> Response:
            return self._sign_in(request, sent)

        @app.post("/sign-out")
        def _sign_out(request: Request, sent: Fields) -> Response:
            return self._changed(request, sent, lambda session: self.access.sign_out(session), "/")

        for path, change in page_changes.CHANGES.items():
            app.post(path)(self._changing(change))

    def _ask(
        self, request: Request, then: str, fault: str = "", status: HTTPStatus = HTTPStatus.OK
    ) -> HTMLResponse:
        parts = sign_in_page(own_path(then), fault, self.state_dir)
        return HTMLResponse(write(self.frame(request), "Sign in", parts, live=False), status)

    def _sign_in(self, request: Request, sent: Mapping[str, str]) -> Response:
        then = own_path(sent.get("next", "/"))
        try:
            session = self.access.sign_in(sent.get("token", ""))
        except AttemptsError as error:
            response = self._ask(request, then, str(error), HTTPStatus.TOO_MANY_REQUESTS)
            response.headers["Retry-After"] = f"{error.seconds:.0f}"
            return response
        except AccessError as error:
            return self._ask(request, then, str(error), HTTPStatus.FORBIDDEN)
        response_to = RedirectResponse(then, HTTPStatus.SEE_OTHER)
        response_to.set_cookie(COOKIE, session.name, httponly=True, samesite="strict")
        return response_to

    def _changing(self, change: page_changes.Change) -> Callable[..., Response]:
        def act(request: Request, sent: Fields) -> Response:
            return self._changed(request, sent, lambda session: self._do(change, sent, session))

        return act

    def _do(self, change: page_changes.Change, sent: Mapping[str, str], session: Session) -> None:
        try:
            session.said, session.refused = change(self.state_dir, sent), False
        except FieldfedError as error:
            session.said, session.refused = str(error), True
        except Exception:  # a fault of ours; what was to be done is on record without an outcome
            log.exception("what an operator asked for was not done")
            session.said, session.refused = "a fault of this program; see logs/page.log", True
        session.at = time.time()

    def _changed(
        self,
        request: Request,
        sent: Mapping[str, str],
        act: Callable[[Session], None],
        then: str = "/versions",
    ) -> Response:
        """Do what a form of this session asks for, and lead back to what it changed."""
        try:
            session = self.access.require(request.cookies.get(COOKIE), sent.get("secret", ""))
        except AccessError as error:
            return self.error(request, HTTPStatus.FORBIDDEN, "Not allowed", str(error))
        act(session)
        return RedirectResponse(then, HTTPStatus.SEE_OTHER)


def _file(text: str, kind: str) -> Callable[[], Response]:
    return lambda: Response(text, media_type=kind)


# --- the process ---------------------------------------------------------------------------------


def listening(config: PageConfig) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the host is not on this machine.
        LaunchError: the port is taken.
    """
    require_near(config, "[page]")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise LaunchError(
            f"the page cannot be shown on {config.host}:{config.port}: {error.strerror}; stop what "
            "listens there, or choose another port in [page]"
        ) from error


def serving(page: Page) -> uvicorn.Server:
    """What answers on a socket until it is told to stop."""
    return uvicorn.Server(
        uvicorn.Config(
            page.app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_REQUESTS,
            timeout_graceful_shutdown=STOP_SECONDS,
        )
    )


def _main(folder: Path) -> None:
    settings = load_settings(ServerConfig, folder / "server.toml")
    if settings.page is None:
        raise ConfigError(f"'{folder / 'server.toml'}' has no [page]; add that line there")
    with contextlib.suppress(KeyboardInterrupt), terminate_like_interrupt():
        access = Access.open(folder / "page.token")
        with listening(settings.page) as listener:
            log.info("the page is at %s", settings.page.address)
            page = Page(folder, settings.server.name, access)
            serving(page).run(sockets=[listener])


if __name__ == "__main__":
    run_service(_main, log)
