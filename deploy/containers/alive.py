"""Says with its exit status whether the container's own program works; HEALTHCHECK asks it.

    alive.py http URL       something answers there with 200
    alive.py process WORD   a process with this word in its command line runs, and is not stopped

A port that the environment changes is looked up there: %FIELDFED_SERVER__PORT:8000%.
"""

import os
import re
import sys
import urllib.request

import psutil

ANSWER_SECONDS = 5.0


def answers(url: str) -> bool:
    """Whether a server on this machine says that all is well."""
    found = re.sub(r"%(\w+):(\d+)%", lambda one: os.environ.get(one[1], one[2]), url)
    if not found.startswith("http://127.0.0.1:"):
        return False
    try:
        with urllib.request.urlopen(found, timeout=ANSWER_SECONDS) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except OSError:
        return False


def runs(word: str) -> bool:
    """Whether a process other than this one has the word in its command line, and goes on."""
    gone = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED}
    return any(
        word in " ".join(process.info["cmdline"] or []) and process.info["status"] not in gone
        for process in psutil.process_iter(["cmdline", "status", "pid"])
        if process.info["pid"] != os.getpid()
    )


if __name__ == "__main__":
    question = {"http": answers, "process": runs}[sys.argv[1]]
    sys.exit(0 if question(sys.argv[2]) else 1)
