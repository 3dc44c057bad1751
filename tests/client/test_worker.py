"""The work on a request is done in a process of its own, and its end is told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from client.worker import in_worker
from common.errors import LaunchError
from common.messages import AlignReply, HelloReply
from tests.lab.replies import align_reply
from tests.waiting import wait_until

PARENT = """
import time
from pathlib import Path
from client.worker import in_worker
import os, sys

def work():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)

in_worker(work)
"""


def _hello() -> HelloReply:
    return HelloReply(farm=str(os.getpid()), examples=3, classes=2)


def test_an_answer_comes_from_another_process() -> None:
    reply = in_worker(_hello)
    assert isinstance(reply, HelloReply)
    assert int(reply.farm) != os.getpid()
    assert not psutil.pid_exists(int(reply.farm)) or _is_gone(int(reply.farm))


def test_arrays_come_through_unchanged() -> None:
    update = np.arange(300_000).astype(np.uint8)
    sent = align_reply(update)
    reply = in_worker(lambda: sent)
    assert isinstance(reply, AlignReply)
    np.testing.assert_array_equal(reply.update, update)
    assert reply.model_dump(exclude={"update"}) == sent.model_dump(exclude={"update"})


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGKILL, "memory is full"), (signal.SIGTERM, "by SIGTERM")]
)
def test_a_killed_worker_is_told(number: signal.Signals, said: str) -> None:
    def work() -> HelloReply:
        os.kill(os.getpid(), number)
        return _hello()

    with pytest.raises(LaunchError, match=said):
        in_worker(work)


def test_work_that_fails_is_told_and_does_not_return_twice(tmp_path: Path) -> None:
    def work() -> HelloReply:
        raise MemoryError

    with pytest.raises(LaunchError, match="with status 1"):
        in_worker(work)
    with (tmp_path / "returns").open("a") as returns:  # a worker that went on would write as well
        returns.write("once\n")
    time.sleep(0.1)
    assert (tmp_path / "returns").read_text() == "once\n"


def test_a_worker_ends_with_the_process_that_asked(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", PARENT, str(note)]) as parent:
        wait_until(lambda: note.exists() and note.read_text(), 30, "work")
        worker = int(note.read_text())
        assert not _is_gone(worker)
        parent.kill()
    wait_until(lambda: _is_gone(worker), 30, "the end of the worker")


def _is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True
