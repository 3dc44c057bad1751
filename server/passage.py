"""What the front door lets through, request by request: an ASGI application.

A path is compared as it came, byte by byte: it is one of ours or is refused. Nothing is decoded,
shortened or put right first, so there are no two ways to read it. A request says how long its body
is, once; of its headers only those that Flower reads go on, so nothing of this connection reaches
SuperLink's. Bodies stream in both directions.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeAlias

import httpx
from pydantic import ValidationError

from common.door import CHECK, JOIN, LEAVE, RENEW, Checked, Checking, DoorConfig
from common.errors import FieldfedError, LinkError, ProtocolError
from common.protocols import PROTOCOL
from common.release import release
from server.enrol import Enrolment
from server.nodes import Nodes, activated

log = logging.getLogger("server.door")

Scope: TypeAlias = MutableMapping[str, Any]
Event: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Event]]
Send: TypeAlias = Callable[[Event], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

BODY_BYTES = 6 << 20
"""Flower cuts arrays into pieces of at most 5 MiB."""
SMALL_BODY_BYTES, HEAD_BYTES = 65_536, 16_384
STALL_SECONDS, REQUEST_SECONDS = 60.0, 900.0
BURST_REQUESTS = 500.0
OWN_PER_SECOND, OWN_BURST = 0.5, 20.0
MOST_PACED = 10_000
LONGEST_WAIT_SECONDS = 30.0
LINK_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
KEPT_SECONDS = 2.0
"""SuperLink ends a connection that was silent for 5 s: better not to rely on one that long."""

FLEET_PATH = re.compile(rb"/v1/fleet/[a-z]+(?:-[a-z]+)*")
OWN_PATHS = {path.encode(): path for path in (JOIN, RENEW, LEAVE, CHECK)}
KEY, KEY_BYTES = b"flwr-public-key", 400
UP = frozenset({b"content-type", b"content-length", b"accept"})
DOWN = frozenset({b"content-type", b"content-length"})
_REGISTER, _ACTIVATE = b"/v1/fleet/register-node", b"/v1/fleet/activate-node"
_SHORT_BYTES = 64


@dataclass(frozen=True)
class Caller:
    """Who is on the other side of a connection; a farm, where it has shown a certificate."""

    address: str
    farm: str | None = None
    serial: int = 0
    key: str = ""
    expires: datetime | None = None


class Revoked(Protocol):
    """Knows which certificates count no longer."""

    def holds(self, serial: int) -> bool:
        """Whether one does not."""


class No(Exception):  # noqa: N818
    """A request that goes no further: a status and the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Pace:
    """Requests of each farm: a burst, and so many a second from then on."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second, self._burst = per_second, burst
        self._free_at: dict[str, float] = {}

    async def take(self, who: str) -> None:
        """Wait until one more may pass; raises No when that would take too long."""
        now = asyncio.get_running_loop().time()
        full = now - self._burst / self._per_second
        if len(self._free_at) > MOST_PACED:
            self._free_at = {one: at for one, at in self._free_at.items() if at > full}
        begin = max(self._free_at.get(who, 0.0), full)
        if begin - now > LONGEST_WAIT_SECONDS:
            raise No(429, "too many requests; slow down")
        self._free_at[who] = begin + 1 / self._per_second
        if begin > now:
            await asyncio.sleep(begin - now)


class Passage:
    """The application.

    Args:
        config: of the door.
        superlink: ``http://host:port``.
        enrolment: takes farms in.
        nodes: which farm owns which of Flower's keys.
        revoked: which certificates count no longer.
        shown: the certificate that the door shows now, in DER form.
    """

    def __init__(
        self,
        config: DoorConfig,
        superlink: str,
        enrolment: Enrolment,
        nodes: Nodes,
        revoked: Revoked,
        shown: Callable[[], bytes],
    ) -> None:
        self._pace = Pace(config.requests_per_second, BURST_REQUESTS)
        self._own_pace = Pace(OWN_PER_SECOND, OWN_BURST)
        self._superlink = superlink
        self._enrolment, self._nodes = enrolment, nodes
        self._revoked, self._shown = revoked, shown
        self._leaving: list[Caller] = []
        self._out: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "enrolment")
        self._http = httpx.AsyncClient(
            timeout=LINK_TIMEOUT,
            limits=httpx.Limits(max_connections=256, keepalive_expiry=KEPT_SECONDS),
            trust_env=False,
        )

    def leaves(self, caller: Caller) -> bool:
        """Whether this very connection is about to hear that its farm has left."""
        return any(one is caller for one in self._leaving)

    def revoked(self, caller: Caller) -> bool:
        """Whether the certificate of a farm counts no longer; the log says so once for each."""
        if not self._revoked.holds(caller.serial):
            self._out.discard(caller.serial)
            return False
        if caller.serial not in self._out:
            self._out.add(caller.serial)
            log.warning("farm %s is revoked: it is refused from now on", caller.farm)
        return True

    async def close(self) -> None:
        """End the connections to SuperLink."""
        await self._http.aclose()
        self._thread.shutdown(wait=False)

    async def __call__(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answer = _Answer(send)
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await self._pass(caller, scope, receive, answer)
        except No as no:
            await answer.short(no.status, no.why)
        except TimeoutError:
            await answer.short(408, "too slow")
        except httpx.HTTPError as error:
            log.warning("SuperLink: %r", error)
            await answer.short(503, "SuperLink does not answer; try again later")
        except FieldfedError as error:
            log.error("%s: %s", caller.farm or caller.address, error)
            await answer.short(503, "the server has a trouble of its own; see its log")

    async def _pass(
        self, caller: Caller, scope: Scope, receive: Receive, answer: "_Answer"
    ) -> None:
        path: bytes = scope["raw_path"]
        if scope["query_string"] or not (path in OWN_PATHS or FLEET_PATH.fullmatch(path)):
            raise No(404, "there is nothing here")
        if scope["method"] != "POST":
            raise No(405, "POST alone")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
            raise No(431, "too many words before the body")
        length = _length(
            scope["headers"], BODY_BYTES if path not in OWN_PATHS else SMALL_BODY_BYTES
        )
        if path != JOIN.encode():
            self._require_farm(caller)
        if path in OWN_PATHS:
            await self._own_pace.take(caller.farm or caller.address)
            body = b"".join([piece async for piece in _body(receive)])
            await self._own(OWN_PATHS[path], caller, body, answer)
            return
        assert caller.farm is not None
        await self._pace.take(caller.farm)
        key = self._key_of(caller.farm, path, scope["headers"])
        await self._fleet(path, key, scope["headers"], _body(receive) if length else None, answer)

    def _require_farm(self, caller: Caller) -> None:
        if caller.farm is None or caller.expires is None:
            raise No(401, "show the certificate of a farm of this network")
        if self.revoked(caller):
            raise No(403, f"the certificate of farm {caller.farm} is revoked; ask the operator")
        if datetime.now(UTC) > caller.expires:
            raise No(403, f"the certificate of farm {caller.farm} has expired; join again")

    # --- what is ours ----------------------------------------------------------------------

    async def _own(self, path: str, caller: Caller, body: bytes, answer: "_Answer") -> None:
        if path == CHECK:
            checked = await self._check(caller, body)
            await answer.whole(200, checked.model_dump_json(exclude_none=True).encode())
            return
        if path == LEAVE:
            self._leaving.append(caller)
        try:
            said = await asyncio.get_running_loop().run_in_executor(
                self._thread, self._enrol, path, caller, body
            )
            await answer.whole(200, said)
        except LinkError as error:
            raise No(403, str(error)) from error
        except ProtocolError as error:
            raise No(400, str(error)) from error
        finally:
            self._leaving = [one for one in self._leaving if one is not caller]

    def _enrol(self, path: str, caller: Caller, body: bytes) -> bytes:
        """In a thread: it waits for the disk."""
        if path == JOIN:
            joined = self._enrolment.join(body, self._shown(), caller.address)
            return joined.model_dump_json().encode()
        assert caller.farm is not None
        if path == RENEW:
            return self._enrolment.renew(caller.farm, caller.key, body).model_dump_json().encode()
        self._enrolment.leave(caller.farm)
        return b"{}"

    async def _check(self, caller: Caller, body: bytes) -> Checked:
        assert caller.farm is not None
        assert caller.expires is not None
        try:
            asked = Checking.model_validate_json(body) if body else Checking()
        except ValidationError as error:
            raise No(400, "this is no question of ours; update fieldfed") from error
        told = {"protocol": PROTOCOL, "release": release()} if asked.versions else {}
        try:
            reached = (await self._http.get(f"{self._superlink}/health")).status_code < 500
        except httpx.HTTPError:
            reached = False
        return Checked.model_validate(
            {"farm": caller.farm, "expires": caller.expires, "superlink": reached, **told}
        )

    # --- what is Flower's ------------------------------------------------------------------

    def _key_of(self, farm: str, path: bytes, headers: Headers) -> str:
        """The key that this request is signed with, which is this farm's."""
        keys = [value for name, value in headers if name == KEY]
        if len(keys) != 1 or len(keys[0]) > KEY_BYTES:
            raise No(401, "a SuperNode signs its requests")
        key = keys[0].decode("latin-1")
        if path == _REGISTER and self._nodes.claim(key, farm):
            return key
        owner = self._nodes.owner(key)
        if owner is None:
            raise No(401, "this SuperNode has to register first")
        if owner != farm:
            log.warning("farm %s used the key of a SuperNode of farm %s", farm, owner)
            raise No(403, "this SuperNode belongs to another farm")
        return key

    async def _fleet(
        self,
        path: bytes,
        key: str,
        headers: Headers,
        body: AsyncIterator[bytes] | None,
        answer: "_Answer",
    ) -> None:
        request = self._http.build_request(
            "POST",
            self._superlink + path.decode(),
            headers=[*_kept(headers, UP), (b"accept-encoding", b"identity")],
            content=body,
        )
        response = await self._http.send(request, stream=True)
        try:
            raw = [(name.lower(), value) for name, value in response.headers.raw]
            await answer.begin(response.status_code, _kept(raw, DOWN))
            first = b""
            async for piece in response.aiter_raw():
                first = first or piece
                await answer.more(piece)
            await answer.end()
        finally:
            await response.aclose()
        if path == _ACTIVATE and response.status_code == 200 and len(first) <= _SHORT_BYTES:
            node = activated(first)
            if node is not None:
                await asyncio.to_thread(self._nodes.tell, key, node)


def _length(headers: Headers, most: int) -> int:
    """Bytes of the body, as the one header says that may say so."""
    named = [name for name, _ in headers]
    if b"transfer-encoding" in named or b"upgrade" in named or b"expect" in named:
        raise No(400, "a request with a plain body of a length that it says")
    lengths = [value for name, value in headers if name == b"content-length"]
    if len(lengths) != 1 or not lengths[0].isdigit():
        raise No(411, "say how long the body is")
    if len(lengths[0]) > 12 or int(lengths[0]) > most:
        raise No(413, f"a body has at most {most} bytes")
    return int(lengths[0])


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        async with asyncio.timeout(STALL_SECONDS):
            event = await receive()
        if event["type"] == "http.disconnect":
            raise No(400, "the body ended early")
        more = event.get("more_body", False)
        if event.get("body"):
            yield event["body"]


def _kept(headers: Iterable[tuple[bytes, bytes]], names: frozenset[bytes]) -> Headers:
    return [(name, value) for name, value in headers if name in names or name.startswith(b"flwr-")]


class _Answer:
    """The way back; each step has a time limit, and nothing is begun twice."""

    def __init__(self, send: Send) -> None:
        self._send, self._begun = send, False

    async def begin(self, status: int, headers: Headers) -> None:
        self._begun = True
        await self._event(type="http.response.start", status=status, headers=headers)

    async def more(self, piece: bytes) -> None:
        await self._event(type="http.response.body", body=piece, more_body=True)

    async def end(self) -> None:
        await self._event(type="http.response.body", body=b"", more_body=False)

    async def whole(self, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await self.begin(status, headers)
        await self.more(body)
        await self.end()

    async def short(self, status: int, why: str) -> None:
        """A refusal, behind which the connection ends: what is left of its body is not read."""
        if self._begun:
            raise ConnectionAbortedError(why)  # half an answer must not look like a whole one
        body = why.encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await self.begin(status, headers)
        await self.more(body)
        await self.end()

    async def _event(self, **event: object) -> None:
        async with asyncio.timeout(STALL_SECONDS):
            await self._send(event)
