"""Bytes at the farms' sockets: from the counters in replies to growth per farm and round."""

import sqlite3
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import RejectReason
from common.mask import Mask
from common.messages import from_parts, to_parts
from server import status
from server.migrations import MIGRATIONS, migrate
from server.rows import LinkRow
from server.store import Store
from tests.server.test_store import BASE, reply, report, spooled

MASK = Mask(((0, 1), (1,)), ((0, 2), (0, 1)), (2, 2), (3, 3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "fieldfed.db")


def started(store: Store, nodes: tuple[int, ...] = (1, 2)) -> int:
    run = store.start_run("{}", 7, BASE, MASK.to_json(), "hello")
    for node in nodes:
        store.upsert_farm(run, node, "mango" if node == 1 else "rice", 10, 3)
    return run


def opened(store: Store, run: int, number: int) -> None:
    store.open_round(
        run, number, kind="align", base=BASE, mask=MASK.digest, quorum=2, deadline=99.0
    )


def answer(
    store: Store, run: int, number: int, sent: int | None, received: int | None, **changes: object
) -> bool:
    values: dict[str, object] = {"round": number, "link_sent": sent, "link_received": received}
    farm = str(changes.pop("farm", "mango"))
    node = int(str(changes.pop("node", 1)))
    taken = reply(farm, **values, **changes)
    return store.record_reply(run, number, node, 1, 500, taken, spooled(node))


def test_each_round_has_what_the_counters_grew_by(store: Store) -> None:
    run = started(store)
    for number, (sent, received) in enumerate([(1000, 90_000), (1700, 91_000), (1700, 91_000)], 1):
        opened(store, run, number)
        answer(store, run, number, sent, received)
    assert store.link_bytes(run) == [
        LinkRow(1, "align", "mango", 1000, 90_000),
        LinkRow(2, "align", "mango", 700, 1000),
        LinkRow(3, "align", "mango", 0, 0),
    ]


def test_the_counters_go_on_from_run_to_run_and_from_node_to_node(store: Store) -> None:
    first = started(store)
    opened(store, first, 1)
    answer(store, first, 1, 1000, 5000)
    second = started(store, (2,))
    store.upsert_farm(second, 77, "mango", 10, 3)  # it slept: another node, the same farm
    opened(store, second, 1)
    answer(store, second, 1, 1200, 5500, node=77)
    assert store.link_bytes(second) == [LinkRow(1, "align", "mango", 200, 500)]


def test_reports_count_in_rounds_of_their_own(store: Store) -> None:
    run = started(store)
    opened(store, run, 2)
    answer(store, run, 2, 100, 200)
    told = report().model_copy(update={"link_sent": 150, "link_received": 300})
    assert store.record_report(run, "pruned", 1, 80, told)
    guard = told.model_copy(update={"link_sent": 160, "link_received": 310})
    assert store.record_report(run, "guard", 1, 80, guard)
    assert store.link_bytes(run) == [
        LinkRow(2, "align", "mango", 100, 200),
        LinkRow(2, "evaluate", "mango", 60, 110),
    ]


@pytest.mark.parametrize("wiped", [(40, 6000), (2000, 30), (40, 30)])
def test_counters_that_go_backwards_count_from_zero(store: Store, wiped: tuple[int, int]) -> None:
    run = started(store)
    opened(store, run, 1)
    answer(store, run, 1, 1000, 5000)
    opened(store, run, 2)
    answer(store, run, 2, *wiped)
    opened(store, run, 3)
    answer(store, run, 3, wiped[0] + 7, wiped[1] + 8)
    rows = [(row.sent, row.received) for row in store.link_bytes(run)]
    assert rows == [(1000, 5000), wiped, (7, 8)]


def test_a_reply_that_counts_already_changes_nothing(store: Store) -> None:
    run = started(store)
    opened(store, run, 1)
    assert answer(store, run, 1, 1000, 5000)
    assert not answer(store, run, 1, 1300, 5500)
    told = report().model_copy(update={"link_sent": 1400, "link_received": 5600})
    store.record_report(run, "pruned", 1, 80, told)
    store.record_report(run, "pruned", 1, 80, told.model_copy(update={"link_sent": 9999}))
    assert [(row.sent, row.received) for row in store.link_bytes(run)] == [(1000, 5000), (400, 600)]


def test_a_reply_taken_again_after_its_body_was_lost_adds_up(store: Store) -> None:
    run = started(store)
    opened(store, run, 1)
    answer(store, run, 1, 1000, 5000)
    store.drop_reply(run, 1, 1)
    answer(store, run, 1, 1100, 5100)
    assert store.link_bytes(run) == [LinkRow(1, "align", "mango", 1100, 5100)]


@pytest.mark.parametrize("counters", [(None, None), (5, None), (None, 5)])
def test_where_nobody_counts_there_is_no_row(
    store: Store, counters: tuple[int | None, int | None]
) -> None:
    run = started(store)
    opened(store, run, 1)
    answer(store, run, 1, *counters)
    assert store.link_bytes(run) == []


def test_the_counters_travel_and_their_absence_does_not() -> None:
    counted = reply(link_sent=7, link_received=2**49)
    again = from_parts(*to_parts(counted))
    assert again.model_dump(exclude={"update"}) == counted.model_dump(exclude={"update"})
    assert "link_" not in to_parts(reply())[0]
    for wrong in (-1, 2**50, 1.5):
        with pytest.raises(ValueError, match="link_sent"):
            reply(link_sent=wrong)


def test_a_database_of_before_gets_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "fieldfed.db"
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, MIGRATIONS[:4])
    connection.close()
    with Store.open(path) as store:
        run = started(store)
        opened(store, run, 1)
        answer(store, run, 1, 5, 6)
        assert store.link_bytes(run) == [LinkRow(1, "align", "mango", 5, 6)]


def test_a_reply_costs_three_statements_more(store: Store) -> None:
    run = started(store)
    opened(store, run, 1)
    opened(store, run, 2)
    answer(store, run, 1, 3, 4)  # with what only the first one costs
    statements = list[str]()
    store._db.set_trace_callback(statements.append)
    answer(store, run, 1, None, None, farm="rice", node=2)
    without = len(statements)
    answer(store, run, 2, 5, 6)
    store._db.set_trace_callback(None)
    assert len(statements) - without == without + 3, "there may be 500 farms in a round"
    assert sum(text.startswith("COMMIT") for text in statements) == 2


def test_status_shows_them_beside_the_messages_and_once_per_farm(tmp_path: Path) -> None:
    with Store.open(tmp_path / "fieldfed.db") as store:
        run = store.start_run("{}", 7, BASE, MASK.to_json(), "hello")
        for node, farm in ((1, "mango"), (2, "rice"), (3, "mango")):
            store.upsert_farm(run, node, farm, 10 * node, 3)
        opened(store, run, 1)
        answer(store, run, 1, 4000, 90_000)
        store.record_rejection(run, 1, 3, RejectReason.STALE, "old")
        opened(store, run, 2)
        answer(store, run, 2, 6000, 91_000, node=3)
        answer(store, run, 2, None, None, farm="rice", node=2)
    values = status.snapshot(tmp_path)
    mango, rice = values["farms"]
    assert (mango["farm"], mango["images"], mango["rejected"]) == ("mango", 30, 1)
    assert (mango["bytes_up"], mango["link_sent"], mango["link_received"]) == (1000, 6000, 91_000)
    assert (rice["farm"], rice["bytes_up"], rice["link_sent"]) == ("rice", 500, None)
    console = Console(width=120, record=True)
    console.print(status.show(values))
    shown = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "mango 30 3 - 1.00 kB up 6.00 kB up 1" in shown
    assert "0 B down 91.0 kB down" in shown
    assert "rice 20 3 - 500 B up - 0" in shown
