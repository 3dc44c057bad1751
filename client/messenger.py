"""Hands the arguments of one request to the executor; run as a file, without our packages.

    python -I -S messenger.py FOLDER ARGUMENT...

Exit status 0: the executor (client/executor.py) does the work. Anything else: it does not, and
whoever called does the work by other means. Imports the standard library alone: it starts in a
hundredth of the time that the work would take to import.
"""

import json
import os
import socket
import sys

SOCKET = "executor.sock"
WAIT_SECONDS = 120.0
"""The executor may still be importing, for a minute on a small device."""


def main() -> int:
    """0 if the executor took the work."""
    folder, *arguments = sys.argv[1:]
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_SECONDS)
            os.chdir(folder)  # the path of a socket is at most 108 bytes long
            connection.connect(SOCKET)
            connection.sendall(json.dumps(arguments).encode() + b"\n")
            return 0 if connection.recv(1) == b"\n" else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
