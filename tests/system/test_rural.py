"""A farm behind a narrow, distant link that stalls and breaks takes part in a run."""

from pathlib import Path

import pytest

from tests.system.site import call, init_farm, open_site
from tests.system.slowlink import Conditions, SlowLink

pytestmark = [pytest.mark.processes, pytest.mark.system]

# breaks more often than a real one, so that a short run meets some
LINK = Conditions(128_000, 0.6, stall_every=20, stall=3, reset_every=12)
SETTINGS = {
    "plan": {"rounds": 2},
    "rounds": {"min_farms": 1, "attempt_seconds": 60, "attempts": 10, "deadline_seconds": 280},
}


def test_its_rounds_are_complete(tmp_path: Path) -> None:
    with open_site(tmp_path, settings=SETTINGS, names=[]) as site:
        host, _, port = site.proxy.address.partition(":")
        with SlowLink(host, int(port), LINK, seed=1) as link:
            folder = init_farm(site.root, "hill", 0, link)
            call("fieldfed-client", "load", folder, str(Path(site.server) / "base.safetensors"))
            site.start("hill", "fieldfed-client", "run", folder)
            assert "run 1 is done" in call("fieldfed-server", "train", site.server)
            assert link.resets >= 1, "the link broke nothing"
        with site.store as store:
            assert [len(store.replies(1, number)) for number in (1, 2)] == [1, 1]
            carried = sum(row.bytes_up + row.bytes_down for row in store.traffic(1))
        assert link.up + link.down > carried
