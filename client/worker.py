"""Runs the work on a request in a process of its own, so that its end is told and not waited out.

The heaviest process of a farm is the one the kernel kills when memory is full. Flower notices only
after a minute without heartbeats, and the farm takes no other request until then. Here the process
that speaks with Flower computes nothing; it forks one that computes, and says so when that is gone.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Never, cast

from common.errors import LaunchError
from common.messages import Reply

log = logging.getLogger(__name__)

WATCH_SECONDS = 1.0


def in_worker(work: Callable[[], Reply]) -> Reply:
    """Do the work in a forked process; returns what it returns.

    To be called before this process has computed anything with torch, whose threads a fork lacks.

    Args:
        work: raises nothing that anybody would want to hear of.

    Raises:
        LaunchError: the process was killed or ended without an answer.
    """
    receiver, sender = Pipe(duplex=False)
    parent = os.getpid()
    worker = os.fork()
    if worker == 0:
        receiver.close()
        _work(work, sender, parent)
    sender.close()
    reply = None
    with receiver, contextlib.suppress(EOFError):
        reply = cast(Reply, receiver.recv())
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if reply is None:
        raise LaunchError(_how_it_ended(code))
    return reply


def _work(work: Callable[[], Reply], sender: Connection, parent: int) -> Never:
    """Never returns: what the caller would do afterwards is the parent's to do."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # Flower's handlers speak for the parent
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        sender.send(work())
        status = 0
    except BaseException:
        log.exception("a request failed")
    finally:
        os._exit(status)


def _end_with(parent: int) -> None:
    """Work for nobody is not gone on with."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def _how_it_ended(code: int) -> str:
    """In words that may leave the farm."""
    if code == -signal.SIGKILL:
        return "the farm's work on this request was killed, as happens when memory is full"
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return f"the farm's work on this request ended {how} before it had an answer"
