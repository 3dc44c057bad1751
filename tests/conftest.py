"""Shared fixtures, and the rule that no test is skipped silently where everything is present."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from common.logs import STYLE_VARIABLE

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # results depend on the number of threads


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A shell's background job ignores SIGINT, and so would all that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands that a test calls set up logging; the next test must not notice."""
    monkeypatch.setenv(STYLE_VARIABLE, "text")
    rooms = [logging.getLogger(name) for name in ("common", "server", "client")]
    before = [(list(room.handlers), room.propagate, room.level) for room in rooms]
    yield
    for room, (handlers, propagate, level) in zip(rooms, before, strict=True):
        room.handlers[:] = handlers
        room.propagate = propagate
        room.setLevel(level)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """With ``-n``, tests that start real processes run on one worker, one after the other.

    Elsewhere they would take the processor from each other, and set up what they share twice.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "processes" if nodeid.startswith("tests/system/") else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real plant photographs; skips where they are absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("real photographs are not beside this checkout (../shared/data)")
    return folder


@pytest.fixture(scope="session")
def plant_weights() -> Path:
    """A ViT-S pre-trained on plants; skips where it is absent."""
    path = SHARED / "weights" / "vit_small_p14_tomato.safetensors"
    if not path.is_file():
        pytest.skip("real weights are not beside this checkout (../shared/weights)")
    return path


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]  # noqa: ANN201
    """With CI=true a skip fails unless its test is named in allowed_skips.txt."""
    outcome = yield
    report = outcome.get_result()
    allowed = ALLOWED_SKIPS.read_text().split() if ALLOWED_SKIPS.is_file() else []
    unexpected = report.skipped and not hasattr(report, "wasxfail") and item.nodeid not in allowed
    if unexpected and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped although CI=true: {report.longrepr}"
