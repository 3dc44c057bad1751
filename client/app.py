"""Flower ClientApp: nothing but glue between a Flower message and the farm that answers it."""

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast, get_args

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.bundle import guarded
from client.door import address_of
from client.ledger import FILE, Ledger, kinds_of
from client.worker import in_worker
from common.config import FarmConfig
from common.errors import DataError, LinkError, ProtocolError, RejectReason
from common.logs import start_logging
from common.messages import Refusal, Reply, Request, Work
from common.settings import load_settings
from common.wire import from_record, message_type, size_of, to_record

log = logging.getLogger(__name__)

_T = TypeVar("_T")

app = ClientApp()

# What could be imported before Flower put the unpacked app first on the import path.
_IMPORT_PATH = list(sys.path)

_apart = False
"""Whether work is done in a process of its own; as a program, always."""


@app.query("hello")
@app.train("align")
@app.evaluate("report")
def answer(message: Message, context: Context) -> Message:
    """Answer a request; whatever goes wrong is answered with a refusal.

    Raises:
        LaunchError: the process that worked on it was killed; Flower tells the server.
    """
    sys.path[:] = _IMPORT_PATH
    request = _told(functools.partial(_request_of, message, context))
    reply: Reply
    if isinstance(request, Refusal):
        reply = request
    else:
        work = functools.partial(_told, functools.partial(_handle, request, context))
        reply = in_worker(work) if _apart else work()
    record = to_record(reply)
    _write_down(reply, size_of(record), context)
    return Message(record, reply_to=message)


def _told(work: Callable[[], _T]) -> _T | Refusal:
    """What this returns, or a refusal that says why there is nothing."""
    try:
        return work()
    except ProtocolError as error:
        log.error("refused a message: %s", error)
        other = error.reason is RejectReason.PROTOCOL
        return Refusal(reason="protocol" if other else "bad_request", detail=str(error)[:500])
    except LinkError as error:
        log.error("%s; asking for the backbone in the request itself", error)
        return Refusal(reason="missing_base", detail=str(error)[:500])
    except DataError as error:
        log.error("%s", error)
        return Refusal(reason="data", detail="the image folder cannot be used; see the farm's log")
    except Exception as error:
        # The text of an exception may name an image: it stays in the farm's own log.
        log.exception("a request failed")
        return Refusal(reason="internal", detail=f"{type(error).__name__}; see the farm's log")


def load() -> None:
    """Import all that an answer needs, so that nothing is left to import then."""
    for module in ("client.farm", "flwr.supernode.cli"):
        importlib.import_module(module)


def main() -> None:
    """Flower's program ``flwr-clientapp``, with this very module as ``client.app``."""
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp as flower

    global _apart
    _apart = True
    start_logging()
    # Flower offers no place to say no to a bundle; were this name gone, nothing would run at all
    names = vars(flower)
    names["install_from_fab"] = guarded(names["install_from_fab"])
    flwr_clientapp()


def _request_of(message: Message, context: Context) -> Request:
    """The request, with a body that it only names."""
    content: RecordDict = message.content
    request = from_record(content)
    if not isinstance(request, get_args(Request)):
        raise ProtocolError(f"a farm is sent requests, not '{request.kind}'")
    if message_type(request) != message.metadata.message_type:
        raise ProtocolError(f"'{request.kind}' came as '{message.metadata.message_type}'")
    if isinstance(request, Work) and request.body_kind == "hub":
        from client.bodies import with_body

        return with_body(request, *_settings_of(context))
    return cast(Request, request)


def _handle(request: Request, context: Context) -> Reply:
    # Here, so that a broken installation is answered with a refusal instead of silence.
    from client.farm import Farm

    return Farm.open(*_settings_of(context)).handle(request)


def _write_down(reply: Reply, size: int, context: Context) -> None:
    """Say in the farm's ledger what is about to leave; whatever goes wrong, it leaves."""
    try:
        config, state_dir = _settings_of(context)
        destination = f"server {address_of(config.farm, state_dir)}"
        with Ledger.open(state_dir / FILE) as ledger:
            for kind, count in kinds_of(reply, size).items():
                ledger.add(kind, count, destination)
    except Exception:
        log.exception("a reply of %d bytes is not in the ledger", size)


def _settings_of(context: Context) -> tuple[FarmConfig, Path]:
    config = load_settings(FarmConfig, Path(str(context.node_config["config"])))
    return config, Path(str(context.node_config["state-dir"]))
