"""Memory that classifying takes, measured in a process that does nothing else.

``python -m client.footprint PATH SIDE`` prints the most bytes that it has ever had in memory:
interpreter, libraries, model and one image at a time. Told by Linux alone.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from client.subjects import Subject, opened
from common.errors import ModelError

IMAGES = 3
TIMEOUT_SECONDS = 300.0


def peak_bytes(subject: Subject) -> int | None:
    """The most memory that a fresh process has while it classifies; None where nothing tells it.

    Raises:
        ModelError: the process failed, or took too long; says why.
    """
    command = [sys.executable, "-P", "-m", "client.footprint"]
    command += [str(subject.path.resolve()), str(subject.image_size)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "it was killed: is there enough memory?").strip().splitlines()[-1]
        raise ModelError(f"'{subject.path}' in a process of its own: {last}") from error
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"'{subject.path}' took more than {TIMEOUT_SECONDS:g} s for {IMAGES} images"
        ) from error
    return int(done.stdout) or None


def main() -> None:
    """Classify a few empty images and tell."""
    subject = opened(Path(sys.argv[1]), int(sys.argv[2]))
    run = subject.ready(1)
    for _ in range(IMAGES):
        run(np.zeros((1, 3, subject.image_size, subject.image_size), np.float32))
    print(_peak())


def _peak() -> int:
    """Not what getrusage tells: a child begins there with its parent's peak."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    main()
