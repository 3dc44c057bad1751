"""A million mutated inputs, or ten minutes, for everything that decodes bytes of other machines.

``make fuzz`` goes through all targets in turn with a new seed for every thousand inputs, the same
seeds in every call. Inputs that were not survived lie in ``bench-work/fuzz``.
"""

import os
import time
from pathlib import Path

from common.files import write_atomically
from tests.benchmarks.cells import Cells
from tests.lab.fuzz import Crash, described, fuzz, targets

INPUTS, MINUTES = 1_000_000, 10.0
AT_ONCE = {"step": 50, "tensors": 500, "chain": 500}
"""Inputs of a target in its turn; those that build a model are slower."""


def main() -> None:
    """Fuzz until the inputs or the time are over, then write the figures."""
    until = time.monotonic() + 60 * float(os.environ.get("MINUTES", MINUTES))
    started, done, seed = time.monotonic(), dict.fromkeys(targets(), 0), 0
    crashes: list[Crash] = []
    while sum(done.values()) < INPUTS and time.monotonic() < until:
        seed += 1
        for name in targets():
            inputs = AT_ONCE.get(name, 1000)
            crashes += [crash for crash in fuzz(name, seed, inputs) if crash is not None]
            done[name] += inputs
        if seed % 10 == 0:
            print(f"{sum(done.values()):,} inputs, {len(crashes)} crashes", flush=True)
    for number, crash in enumerate(crashes[:100]):
        write_atomically(Path("bench-work/fuzz") / f"{number}-{crash.target}.bin", crash.data)
        print(described(crash))
    figures = {
        "inputs": sum(done.values()),
        "seconds": round(time.monotonic() - started, 1),
        "crashes": len(crashes),
        "targets": done,
    }
    print(f"{figures}\nfigures: {Cells('fuzz').finish(figures, [1, seed])}")
    if crashes:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
