"""What a service manager is told: up, alive, about to end (systemd's ``sd_notify`` protocol).

A datagram to the Unix socket that ``$NOTIFY_SOCKET`` names. Where nobody asked, nothing is said,
and a manager that does not listen is no reason to stop working.
"""

import contextlib
import os
import socket

SEND_SECONDS = 2.0


def ready(status: str) -> bool:
    """It does what it is for; operators are shown ``status``. Returns whether this was sent."""
    return _tell("READY=1", f"STATUS={status}")


def alive() -> bool:
    """It has looked after its children; it is started again when this stays away for long."""
    return _tell("WATCHDOG=1")


def stopping() -> bool:
    """It is about to end, which may take some seconds."""
    return _tell("STOPPING=1")


def _tell(*lines: str) -> bool:
    name = os.environ.get("NOTIFY_SOCKET", "")
    if not name.startswith(("/", "@")):
        return False
    address = name.replace("@", "\0", 1) if name.startswith("@") else name
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.settimeout(SEND_SECONDS)
        sender.sendto("\n".join(" ".join(line.split()) for line in lines).encode(), address)
        return True
    return False
