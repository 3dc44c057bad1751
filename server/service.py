"""How our programs beside Flower begin and end: ``python -P -m server.NAME FOLDER``."""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from common import logs
from common.errors import FieldfedError


def run_service(main: Callable[[Path], None], log: logging.Logger) -> None:
    """Run until ``main`` returns; an expected error is one line, and ends with its exit code."""
    logs.start_logging()
    try:
        main(Path(sys.argv[1]))
    except FieldfedError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


def until_told() -> asyncio.Event:
    """Set when this process is asked to end; for its event loop."""
    told = asyncio.Event()
    for stop in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(stop, told.set)
    return told
