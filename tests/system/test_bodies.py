"""A farm with a certificate gets its first backbone from the hub, between real processes."""

from collections import Counter
from pathlib import Path

import pytest

from client import traffic
from client.traffic import Counters as Carried
from common.processes import free_port, wait_for_port
from tests.system.site import call, init_farm, open_site

pytestmark = [pytest.mark.processes, pytest.mark.system]


def test_the_first_backbone_comes_from_the_hub(tmp_path: Path) -> None:
    port = free_port()
    settings = {"hub": {"port": port, "names": ["localhost"]}}
    with open_site(tmp_path, settings=settings, names=["oak"]) as site:
        wait_for_port("127.0.0.1", port, 60, site.up)
        folder = init_farm(tmp_path, "vine", 1, site.proxy)
        request, member = str(tmp_path / "vine.csr"), str(tmp_path / "vine.member")
        call("fieldfed-client", "request", folder, "--out", request)
        call("fieldfed-server", "certify", site.server, request, "--out", member)
        call("fieldfed-client", "join", folder, member)
        site.start("vine", "fieldfed-client", "run", folder)
        call("fieldfed-server", "train", site.server)
        state = Path(folder) / "state"
        size = sum(path.stat().st_size for path in (state / "bodies").glob("??/*"))
        counted = Carried.model_validate_json((state / traffic.HUB_FILE).read_bytes())
        assert counted.received == size > 100_000
        with site.store as store:
            assert {row.farm for row in store.reports(1)} == {"oak", "vine"}
            down: Counter[str] = Counter()
            for row in store.traffic(1):
                down[row.farm] += row.bytes_down
        assert down["vine"] < down["oak"] - size / 2
