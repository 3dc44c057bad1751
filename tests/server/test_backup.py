"""Backups: whole while everything is written to, refused when they are not, and believed again."""

import json
import shutil
import sqlite3
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, StateError
from common.files import only_one
from common.manifest import read_channel
from server import rollout
from server.backup import ABOUT, SETTINGS, WAITING, back_up, files_of, restore
from server.identity import Authority
from server.registry import LOCK, STABLE, Registry
from server.rollout import RolloutPlan
from tests.lab.versions import NETWORK, two_versions

NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A server's folder in which a bit of everything lies."""
    made = tmp_path / "server"
    with two_versions(made) as registry:
        registry.promote(STABLE, 2)
        Authority.create(made / "identity", NETWORK, [])
        (made / SETTINGS).write_text(f'[server]\nname = "{NETWORK}"\n')
        for name in (
            "logs/door.log",
            "flower/superlink.db",
            "spool/1/1.replies",
            ".half",
            "x.lock",
        ):
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(name)
        yield made


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    back_up(folder, tmp_path / "network.tar")
    return tmp_path / "network.tar"


def contents(folder: Path) -> dict[str, bytes]:
    """What lies there, but databases, whose pages may be laid out differently."""
    names = [name for name in files_of(folder) if not name.endswith(".db")]
    return {name: (folder / name).read_bytes() for name in names}


def test_all_comes_back_and_nothing_of_processes(folder: Path, file: Path, tmp_path: Path) -> None:
    before = contents(folder)
    shutil.rmtree(folder)
    made = restore(folder, file)
    assert made.network == NETWORK
    assert contents(folder) == before
    assert set(made.files) == {*before, "registry/registry.db"}
    assert not [
        name for name in made.files if name.startswith(("logs", "flower", ".")) or "lock" in name
    ]
    with Registry.open(folder) as registry:
        assert registry.named(STABLE).version == 2
        assert registry.check() == []
    assert Authority.open(folder / "identity").network == NETWORK


def test_nobody_else_may_read_it_nor_the_keys_in_it(file: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    restore(tmp_path / "again", file)
    keys = [path for path in (tmp_path / "again").rglob("*") if path.suffix in (".key", ".pem")]
    assert len(keys) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}


def test_a_device_believes_a_channel_that_was_changed_after_the_backup(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    with Registry.open(folder) as registry:
        keys = registry.keys.keys
        seen = registry.promote(STABLE, 1).counter
    restore(tmp_path / "again", file)
    with Registry.open(tmp_path / "again") as registry:
        row = registry.named(STABLE)
    named = read_channel(row.document, keys, NOW)
    assert (named.version, row.why) == (2, "restored from a backup")
    assert named.counter >= seen  # a device refuses what is lower
    named.require(NETWORK, STABLE, seen, NOW)


def test_a_rollout_that_went_on_goes_on(folder: Path, tmp_path: Path) -> None:
    with Registry.open(folder) as registry:
        registry.promote(STABLE, 1)
        rollout.start(registry, RolloutPlan(channel=STABLE, version=2))
    back_up(folder, tmp_path / "network.tar")
    restore(tmp_path / "again", tmp_path / "network.tar")
    with Registry.open(tmp_path / "again") as registry:
        row, named = registry.rows.rollout(STABLE), registry.named(STABLE)
        assert row is not None
        assert row.going
        assert row.counter > named.counter
        assert read_channel(row.document, registry.keys.keys, NOW).counter == row.counter


def test_a_database_is_copied_as_of_one_instant(folder: Path, tmp_path: Path) -> None:
    """Two tables that are only ever changed together, by a writer that never rests."""
    path, stop = folder / "fieldfed.db", threading.Event()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE one (n, fill)")
        db.execute("CREATE TABLE two (n, fill)")

    def write() -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            n = 0
            while not stop.is_set():
                n += 1
                db.execute("BEGIN IMMEDIATE")
                for table in ("one", "two"):
                    db.execute(f"INSERT INTO {table} VALUES (?, randomblob(3000))", (n,))
                db.execute("COMMIT")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            back_up(folder, tmp_path / "network.tar")
            restore(tmp_path / f"{number}", tmp_path / "network.tar")
            with closing(sqlite3.connect(tmp_path / f"{number}" / "fieldfed.db")) as db:
                counts = [
                    db.execute(f"SELECT count(*), max(n) FROM {t}").fetchone()
                    for t in ("one", "two")
                ]
                assert counts[0] == counts[1]
    finally:
        stop.set()
        writer.join()


def test_a_reply_that_goes_meanwhile_stops_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.backup.files_of", lambda one: [*files_of(one), "spool/1/2.replies"])
    made = back_up(folder, tmp_path / "network.tar")
    assert "spool/1/1.replies" in made.files
    assert "spool/1/2.replies" not in made.files


def test_a_registry_that_is_changed_all_the_time_is_given_up(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.backup.REGISTRY_SECONDS", 0.3)
    (tmp_path / "network.tar").write_text("the one before")
    with (
        only_one(folder / "registry" / LOCK),
        pytest.raises(StateError, match="wait until it ends"),
    ):
        back_up(folder, tmp_path / "network.tar")
    assert (tmp_path / "network.tar").read_text() == "the one before"


def test_where_it_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="somewhere else"):
        back_up(folder, folder / "network.tar")
    with pytest.raises(ConfigError, match=SETTINGS):
        back_up(tmp_path, tmp_path / "network.tar")


def test_a_folder_in_use_is_left_alone(folder: Path, file: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match="is not empty"):
        restore(folder, file)
    assert contents(folder) == before


# Mounted volumes are empty folders that cannot be replaced.
def test_an_empty_folder_stays_the_same_folder(file: Path, tmp_path: Path) -> None:
    place = tmp_path / "again"
    place.mkdir()
    inode = place.stat().st_ino
    restore(place, file)
    assert place.stat().st_ino == inode
    assert (place / SETTINGS).is_file()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.floats(0, 1, exclude_max=True))
def test_one_that_was_cut_off_is_refused_and_leaves_nothing(
    file: Path, tmp_path: Path, share: float
) -> None:
    cut, place = tmp_path / "cut.tar", tmp_path / "place"
    # behind the last file there is only padding
    end = file.read_bytes().rindex(b"\n}") + 2
    cut.write_bytes(file.read_bytes()[: int(share * end)])
    with pytest.raises(StateError):
        restore(place, cut)
    assert not place.exists() or not list(place.iterdir())


def test_one_with_a_changed_byte_is_refused_and_leaves_nothing(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        member = max(archive.getmembers(), key=lambda one: one.size)
    data[member.offset_data + member.size // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StateError, match=f"is damaged: .*{member.name}"):
        restore(tmp_path / "place", file)
    assert not list((tmp_path / "place").iterdir())


def test_what_was_damaged_before_is_noticed_on_the_way_back(folder: Path, tmp_path: Path) -> None:
    with Registry.open(folder) as registry:
        digest = next(iter(registry.manifest(2).objects))
        registry.objects.path(digest).write_bytes(b"thorns")
    back_up(folder, tmp_path / "network.tar")
    with pytest.raises(StateError, match=f"object {digest[:12]} is damaged"):
        restore(tmp_path / "place", tmp_path / "network.tar")


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_no_file_is_written_elsewhere(tmp_path: Path, name: str) -> None:
    made = tmp_path / "network.tar"
    (tmp_path / "bait").write_text("x")
    with tarfile.open(made, "w") as archive:
        archive.add(tmp_path / "bait", name)
    with tarfile.open(made) as archive:
        found = archive.getnames()[0]
    if found == name:  # tarfile itself takes the first '/' away
        with pytest.raises(StateError, match="names no file"):
            restore(tmp_path / "deep" / "place", made)
    assert not (tmp_path / "out").exists()


def test_half_a_folder_has_no_settings_so_no_command_works_on_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []

    def dying(folder: Path) -> None:
        seen.append({path.name for path in folder.iterdir()})
        raise KeyboardInterrupt

    monkeypatch.setattr("server.backup._check", dying)
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path / "place", file)
    assert WAITING in seen[0]
    assert SETTINGS not in seen[0]


def test_it_says_of_which_network_and_when_it_is(file: Path) -> None:
    with tarfile.open(file) as archive:
        assert archive.getnames()[-1] == ABOUT
        data = archive.extractfile(ABOUT)
        assert data is not None
        about = json.load(data)
    assert about["network"] == NETWORK
    assert abs((datetime.fromisoformat(about["made"]) - datetime.now(UTC)).total_seconds()) < 600
    assert file.stat().st_size > about["bytes"]
