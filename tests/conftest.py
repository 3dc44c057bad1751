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
def _logging_as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set logging up; no test notices what an earlier one, or a fixture, has called."""
    monkeypatch.setenv(STYLE_VARIABLE, "text")
    _forget_logging()
    yield
    _forget_logging()


def _forget_logging() -> None:
    for name in ("common", "server", "client"):
        room = logging.getLogger(name)
        room.handlers.clear()
        room.propagate = True
        room.setLevel(logging.NOTSET)


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
