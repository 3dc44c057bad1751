"""Ports of this machine: whether one may be listened on, and who does."""

import contextlib
import socket

import psutil


def refusal(host: str, port: int) -> OSError | None:
    """Why a server could not listen there now; None: it could."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def holder(port: int) -> psutil.Process | None:
    """Who listens there, as far as this user may know."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            listening = connection.status == psutil.CONN_LISTEN
            if listening and connection.laddr and connection.laddr[1] == port and connection.pid:
                return psutil.Process(connection.pid)
    return None


def holder_words(port: int) -> str:
    """The same, for an error message; nothing where nobody knows."""
    with contextlib.suppress(psutil.Error):
        if (process := holder(port)) is not None:
            return f" by process {process.pid} ({process.name()})"
    return ""
