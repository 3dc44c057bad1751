"""The operator's page: what it shows, what it lets whom change, and what it says of damage."""

import hashlib
import http.client
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from html import unescape
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from typer.testing import CliRunner

from common.config import ServerConfig
from common.errors import ConfigError, LaunchError, StateError
from common.messages import AlignReply, Reply, Request
from common.processes import Child, free_port, port_is_free, wait_for_port
from common.protocols import PROTOCOL
from common.services import PageConfig
from common.settings import load_settings
from common.spec import saved_spec
from server import alerts, events, launch, page_access, rollout
from server.actions import Actions
from server.alerts import Alert
from server.charts import score_colour
from server.cli import app as commands
from server.explain import explain
from server.facts import sources
from server.headmap import Head
from server.models import Models
from server.page import COOKIE, Page, listening
from server.page_access import Access, AttemptsError
from server.page_guard import MOST_FORM_BYTES, is_own_name, own_path
from server.page_heads import _ink
from server.page_overview import map_of
from server.page_style import STYLE
from server.registry import STABLE, Registry
from server.rollout import RolloutPlan
from server.status import snapshot
from server.store import opened_run
from server.versions import InstallRow
from tests.lab.devices import tell
from tests.lab.network import Lab
from tests.lab.versions import two_versions

TOKEN = "a-token-that-is-long-enough"
BASE = "http://127.0.0.1:9465"
PAGES = (
    *("/", "/rounds", "/rounds?before=2", "/farms", "/farms/farm0", "/heads", "/heads/1/2"),
    *("/versions", "/devices", "/events", "/sign-in"),
    *(f"/events?kind={kind}" for kind in get_args(events.Kind)),
)
EVIL = "<script>alert(1)</script><img src=x onerror='y'>\"&"
FORMS = ("/versions/promote", "/versions/roll-back", "/rollouts/start", "/rollouts/abort")


def foreign(node: int, _request: Request, reply: Reply) -> Reply | None:
    if node == 2 and isinstance(reply, AlignReply) and reply.round == 1:
        return reply.model_copy(update={"mask": "0" * 64})
    return None


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A server with a run that pruned, two versions and what devices made of them."""
    made = Lab(tmp_path_factory.mktemp("lab"), prune_heads=0.4, criterion="taha")
    made.run(fault=foreign)
    with two_versions(made.server_dir) as registry:
        registry.promote(STABLE, 1)
        for farm, outcome in (("farm0", "committed"), ("farm2", "refused")):
            row = InstallRow(farm, "pi", 1, outcome, "a text", 0.5, 0.6, time.time())
            registry.rows.record_install(row)
    tell(made.server_dir)
    return made


@pytest.fixture
def folder(lab: Lab, tmp_path: Path) -> Path:
    """What the server has on disk, to be changed."""
    return Path(shutil.copytree(lab.server_dir, tmp_path / "server"))


def opened(folder: Path, access: Access | None = None) -> TestClient:
    """A browser that keeps cookies."""
    page = Page(folder, "valley", access or Access(TOKEN))
    return TestClient(page.app, BASE, follow_redirects=False)


@pytest.fixture
def client(folder: Path) -> TestClient:
    return opened(folder)


def signed_in(client: TestClient) -> str:
    """Sign in; returns the secret that forms carry."""
    answer = client.post("/sign-in", data={"token": TOKEN, "next": "/versions"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/versions")
    (secret,) = set(re.findall(r'name="secret" value="([^"]+)"', client.get("/versions").text))
    return str(secret)


def do(client: TestClient, path: str, **fields: object) -> str:
    """Send a form as the page has it; returns in words what the page says after it."""
    sent = {"secret": signed_in(client), **{key: str(value) for key, value in fields.items()}}
    answer = client.post(path, data=sent, headers={"origin": BASE})
    assert answer.status_code == 303, answer.text
    return words(client.get(answer.headers["location"]).text)


def words(text: str) -> str:
    """What a page says, without its tags."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def named(folder: Path, channel: str = STABLE) -> int:
    with Registry.open(folder) as registry:
        return registry.named(channel).version


def contents(folder: Path) -> dict[str, str]:
    """What lies there; SQLite's readers, too, make its shared memory and an empty log."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.stat().st_size and not path.name.endswith("-shm")
    }


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_whole_and_asks_for_nothing_elsewhere(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert answer.headers["x-frame-options"] == "DENY"
    text = answer.text
    assert not re.search(r"""(?:src|href|action|url)\s*[=(]\s*["']?(?:[a-z]+:)?//""", text, re.I)
    assert not re.search(r"\s(?:style|on[a-z]+)=", text)
    assert re.findall(r"<script[^>]*>[^<]", text) == []
    assert text.count("<h1>") == text.count("<main") == 1
    assert "http-equiv" not in text or "noscript" in text
    assert '<html lang="en">' in text
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("path", ["/page.css", "/page.js", "/icon.svg"])
def test_what_pages_are_made_of_comes_from_here(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "").replace("  // ", "")


def test_the_overview_says_what_status_says(client: TestClient, folder: Path) -> None:
    values, text = snapshot(folder), words(client.get("/").text)
    last = values["rounds"][-1]
    assert "Run 1" in text
    assert f"{last['round']} of 2" in text
    assert f"{last['replies']} of {last['quorum']} replies needed" in text
    assert f"{100 * last['mean_accuracy']:.1f} %" in text
    assert f"{100 * last['macs_ratio']:.1f} %" in text
    assert "7 of 12" in text
    assert "3 of 3" in text


def test_rounds_tell_replies_and_why_some_do_not_count(client: TestClient, folder: Path) -> None:
    text = words(client.get("/rounds").text)
    for row in snapshot(folder)["rounds"]:
        assert f"{row['replies']} of {row['quorum']}" in text
        assert f"{100 * row['mean_accuracy']:.1f} %" in text
    assert "1 foreign mask" in text


def test_farms_and_a_page_for_each(client: TestClient, folder: Path) -> None:
    text = client.get("/farms").text
    for row in snapshot(folder)["farms"]:
        assert f'href="/farms/{row["farm"]}"' in text
        assert f"{100 * row['reports']['model']:.1f} %" in words(text)
        own = words(client.get(f"/farms/{row['farm']}").text)
        assert f"{row['images']} images in {row['classes']} classes" in own
    assert text.count('class="spark"') == 3
    assert "foreign mask" in words(client.get("/farms/farm1").text)
    assert "version 1" in words(client.get("/farms/farm0").text)


def test_the_head_map_says_what_explain_says(client: TestClient, folder: Path) -> None:
    with opened_run(folder) as (_, run), sources(folder, 5) as found:
        blocks = map_of(found, run)
        dense = saved_spec(Models(folder).path(run.base))
        cases = [explain(found.facts, run, dense, one.block, one.head) for one in _heads(blocks)]
    text = client.get("/heads").text
    assert text.count('class="cell"') == len(cases) == 12
    for one, case in zip(_heads(blocks), cases, strict=True):
        (hearing,) = case.hearings
        together = next(opinion for opinion in hearing.opinions if opinion.farm is None)
        own = [opinion for opinion in hearing.opinions if opinion.farm is not None]
        assert (one.kept, one.rank, one.heads) == (case.kept, together.rank, hearing.heads)
        assert one.score == pytest.approx(together.score, rel=1e-5)
        assert one.farms == len(own)
        assert one.needed == sum(opinion.score > 1 for opinion in own)
        assert [need.farm for need in one.needs] == [
            opinion.farm
            for opinion in sorted(own, key=lambda it: (-it.score, str(it.farm)))
            if opinion.score > 1
        ]
        assert one.gone == (None if case.kept else 1)
        page = words(client.get(f"/heads/{one.block}/{one.head}").text)
        assert case.fate in page
    assert sum("gone" in kind for kind in re.findall(r'class="(head[^"]*)"', text)) == 5 + 1  # key


@given(st.floats(0, 1))
@settings(deadline=None)
def test_a_score_is_easy_to_read_on_its_colour(share: float) -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colour = score_colour(share)
    ink = {"bright": "#ffffff", "dark": "#000000"}[_ink(colour)]
    light, dark = sorted((luminance(colour), luminance(ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert ".headmap .bright { fill: #fff; } .headmap .dark { fill: #000; }" in STYLE


def _heads(blocks: tuple[tuple[Head, ...], ...]) -> list[Head]:
    return [head for row in blocks for head in row]


def test_events_are_newest_first_and_of_one_kind_where_asked(folder: Path) -> None:
    with sources(folder, 5) as found:
        every = events.events(found)
        for kind in get_args(events.Kind):
            assert events.events(found, kind) == [one for one in every if one.kind == kind]
        assert events.events(found, most=3) == every[:3]
    assert [one.at for one in every] == sorted((one.at for one in every), reverse=True)
    titles = [one.title for one in every]
    for title in (
        "run 1 'model' began",
        "run 1 'model' is done",
        "round 2 of run 1 was committed",
        "a reply of farm1 to round 1 was put into quarantine: foreign mask",
        "version 2 was made",
        "channel stable names version 1",
        "device pi of farm2 refused version 1",
    ):
        assert title in titles


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *(("/farms/nobody", 404), ("/heads/9/0", 404), ("/heads/0/-1", 404), ("/heads/a/0", 404)),
        *(("/none", 404), ("/fieldfed.db", 404), ("/../server.toml", 404), ("/page.token", 404)),
        *(("/docs", 404), ("/openapi.json", 404), ("/versions/promote", 405)),
    ],
)
def test_what_is_not_there(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "Traceback" not in answer.text


def test_whatever_a_name_or_a_text_holds_is_shown_as_text(folder: Path) -> None:
    changes = {
        "fieldfed.db": (
            "UPDATE farms SET farm = ?1 WHERE farm = 'farm0'",
            "UPDATE replies SET farm = ?1 WHERE farm = 'farm0'",
            "UPDATE scores SET farm = ?1 WHERE farm = 'farm0'",
            "UPDATE reports SET farm = ?1 WHERE farm = 'farm0'",
            "UPDATE runs SET message = ?1, detail = ?1, state = 'failed'",
            "UPDATE rejections SET detail = ?1",
            "INSERT INTO pauses (farm, reason, since) VALUES (?1, ?1, 1)",
        ),
        "registry/registry.db": (
            "UPDATE installs SET farm = ?1, device = ?1, detail = ?1 WHERE farm = 'farm2'",
            "UPDATE channels SET name = ?1, why = ?1",
        ),
    }
    with Actions.open(Actions.path(folder)) as actions:
        actions.do(EVIL, EVIL, lambda: EVIL)
    for name, statements in changes.items():
        with closing(sqlite3.connect(folder / name)) as db, db:
            for statement in statements:
                db.execute(statement, (EVIL,))
    client = opened(folder)
    signed_in(client)
    for path in (*PAGES, "/farms/" + EVIL.replace("/", "%2F")):
        text = client.get(path).text
        assert "<script>a" not in text, path
        assert "<img" not in text, path
    for path in ("/", "/farms", "/heads", "/versions", "/devices", "/events", "/heads/1/2"):
        assert "&lt;script&gt;alert(1)" in client.get(path).text, path


def test_a_page_is_sent_again_only_when_it_has_changed(client: TestClient, folder: Path) -> None:
    paths = ("/", "/rounds", "/versions")
    tags = {path: client.get(path).headers["etag"] for path in paths}
    assert len(set(tags.values())) == 3
    answer = client.get("/")
    (written,) = re.findall(r'data-tag="([^"]+)"', answer.text)  # what its script asks with first
    assert unescape(written) == answer.headers["etag"]
    for _ in range(3):  # who is online is looked at now and then
        answers = [client.get(path, headers={"if-none-match": tags[path]}) for path in paths]
        if [answer.status_code for answer in answers] == [304] * 3:
            break
        tags = {path: client.get(path).headers["etag"] for path in paths}
    assert [answer.status_code for answer in answers] == [304] * 3
    assert answers[0].text == ""
    with Registry.open(folder) as registry:
        registry.promote("canary", 2)
    answer = client.get("/versions", headers={"if-none-match": tags["/versions"]})
    assert answer.status_code == 200
    assert "canary" in answer.text


def test_reading_changes_nothing_on_disk(client: TestClient, folder: Path) -> None:
    before = contents(folder)
    for path in PAGES:
        assert client.get(path).status_code == 200
    assert contents(folder) == before


def test_without_a_registry_the_run_is_shown(folder: Path) -> None:
    shutil.rmtree(folder / "registry")
    client = opened(folder)
    assert "Run 1" in client.get("/").text
    assert "registry publish" in client.get("/versions").text
    assert "No device has reported" in client.get("/devices").text


def test_devices_are_shown_as_they_told_it(folder: Path) -> None:
    client = opened(folder)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", client.get("/devices").text))
    assert "1 online, 1 offline." in text
    assert re.search(r"farm0 farm0 online .{0,40} - - 50 % 50 % 3 B 7 ", text), text
    assert re.search(r"gate - offline - - - - - - - ", text), text
    (folder / "telemetry.db").write_bytes(b"no database at all" * 100)
    for path in ("/devices", "/events", "/"):
        assert client.get(path).status_code == 200
    assert "What devices told cannot be read" in client.get("/").text
    (folder / "telemetry.db").unlink()
    assert "No device has told how it is" in client.get("/devices").text


# --- damage --------------------------------------------------------------------------------------


def test_without_a_store_the_page_says_so(tmp_path: Path) -> None:
    for path in ("/", "/farms", "/events"):
        answer = opened(tmp_path).get(path)
        assert answer.status_code == 503
        assert "Nothing to show yet" in answer.text
        assert "no database at" in answer.text
        assert "start the server once" in answer.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 5000, 40_000])
def test_a_damaged_store_is_said_not_traced(folder: Path, size: int) -> None:
    (folder / "fieldfed.db-wal").unlink(missing_ok=True)
    whole = (folder / "fieldfed.db").read_bytes()
    for number in range(6):
        cut = number * len(whole) // 6
        damaged = whole[:cut] + b"\xa5" * size + whole[cut + size :]
        (folder / "fieldfed.db").write_bytes(damaged)
        for path in PAGES[:10]:
            answer = opened(folder).get(path)
            assert answer.status_code in (200, 404, 503), path
            assert "Traceback" not in answer.text
            assert "<h1>" in answer.text
    (folder / "fieldfed.db").write_bytes(b"no database" * 1000)
    answer = opened(folder).get("/")
    assert answer.status_code == 503
    assert "cannot be read" in answer.text


def test_what_no_query_notices_is_said_as_well(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "fieldfed.db")) as db, db:
        db.execute("UPDATE scores SET heads = x'0102'")
        db.execute("UPDATE runs SET config_json = '{}'")
    for path in ("/", "/heads"):
        answer = opened(folder).get(path)
        assert answer.status_code == 503
        assert "cannot be shown" in answer.text


def test_a_damaged_registry_takes_only_its_own_away(folder: Path) -> None:
    (folder / "registry" / "registry.db").write_bytes(b"no database" * 1000)
    client = opened(folder)
    text = words(client.get("/").text)
    assert "The registry cannot be read" in text
    assert "2 of 2" in text
    assert client.get("/versions").status_code == 200


def test_a_version_that_was_changed_on_disk_is_told_in_its_line(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "registry" / "registry.db")) as db, db:
        db.execute("UPDATE versions SET document = replace(document, 'run', 'rnu') WHERE counter=2")
    answer = opened(folder).get("/versions")
    assert answer.status_code == 200
    assert "restore the registry" in answer.text
    assert "run 1, round 2" in answer.text  # of the other


# --- the token -----------------------------------------------------------------------------------


def test_the_token_is_made_once_for_its_user_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "page.token"
    with caplog.at_level("INFO", "server.page_access"):
        Access.open(path)
    assert str(path) in caplog.text
    token = path.read_text().strip()
    assert token not in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 40
    Access.open(path).sign_in(token)
    assert path.read_text().strip() == token


def test_a_token_that_others_may_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.token"
    path.write_text("x" * 40)
    path.chmod(0o644)
    with pytest.raises(StateError, match="others may read"):
        Access.open(path)
    path.chmod(0o600)
    for text in ("", "short", "\n" * 40):
        path.write_text(text)
        with pytest.raises(StateError, match="holds no token"):
            Access.open(path)


def test_signing_in_needs_the_token(client: TestClient) -> None:
    for wrong in ("", "x", TOKEN + "x", TOKEN.upper()):
        answer = client.post("/sign-in", data={"token": wrong, "next": "/"})
        assert answer.status_code == 403
        assert "that is not the token" in answer.text
        assert not client.cookies
    answer = client.post("/sign-in", data={"token": f" {TOKEN}\n", "next": "/versions"})
    assert answer.status_code == 303
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"{COOKIE}=")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert TOKEN not in cookie
    assert "Promote at once" in client.get("/versions").text


def test_attempts_are_few(folder: Path) -> None:
    now = [0.0]
    access = Access(TOKEN, now=lambda: now[0])
    client = opened(folder, access)
    for _ in range(page_access.MOST_ATTEMPTS):
        now[0] += 1
        assert client.post("/sign-in", data={"token": "wrong"}).status_code == 403
    answer = client.post("/sign-in", data={"token": TOKEN})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 50
    with pytest.raises(AttemptsError):
        access.sign_in(TOKEN)
    now[0] += page_access.ATTEMPT_SECONDS
    assert client.post("/sign-in", data={"token": TOKEN}).status_code == 303


def test_a_session_ends(folder: Path) -> None:
    now = [0.0]
    access = Access(TOKEN, now=lambda: now[0])
    client = opened(folder, access)
    secret = signed_in(client)
    now[0] += page_access.SESSION_SECONDS + 1
    fields = {"secret": secret, "channel": STABLE, "version": "2"}
    assert client.post("/versions/promote", data=fields).status_code == 403
    assert "Promote at once" not in client.get("/versions").text
    names = [access.sign_in(TOKEN).name for _ in range(page_access.MOST_SESSIONS + 1)]
    assert access.session(names[0]) is None
    assert access.session(names[-1]) is not None


def test_signing_out_ends_it_at_once(client: TestClient, folder: Path) -> None:
    secret = signed_in(client)
    kept = dict(client.cookies)
    assert client.post("/sign-out", data={"secret": secret}).status_code == 303
    client.cookies.update(kept)
    fields = {"secret": secret, "channel": STABLE, "version": "2"}
    assert client.post("/versions/promote", data=fields).status_code == 403
    assert named(folder) == 1


# --- changes -------------------------------------------------------------------------------------


def test_promote_goes_through_the_registry_and_is_on_record(
    client: TestClient, folder: Path
) -> None:
    said = do(client, "/versions/promote", channel=STABLE, version=2)
    assert "Done channel stable names version 2" in said
    assert named(folder) == 2
    with Actions.open(Actions.path(folder), read_only=True) as actions:
        (row,) = actions.newest(5)
    assert (row.who, row.what) == ("page", "promote version 2 to stable")
    assert row.outcome == "channel stable names version 2"
    assert abs(row.at - time.time()) < 60
    told = words(opened(folder).get("/events?kind=action").text)  # another process would say so too
    assert "page: promote version 2 to stable" in told


def test_rolling_back_names_the_version_of_before(client: TestClient, folder: Path) -> None:
    do(client, "/versions/promote", channel=STABLE, version=2)
    said = do(client, "/versions/roll-back", channel=STABLE, version=1)
    assert "channel stable names version 1 again: rolled back from 2" in said
    assert named(folder) == 1


def test_a_fault_of_ours_is_said_without_a_trace(
    client: TestClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    monkeypatch.setattr(Registry, "promote", fail)
    said = do(client, "/versions/promote", channel=STABLE, version=2)
    assert "Refused a fault of this program" in said
    assert "inside" not in said
    assert "not known: it was begun" in words(client.get("/events").text)


@pytest.mark.parametrize("path", FORMS)
def test_without_the_token_nothing_changes(client: TestClient, folder: Path, path: str) -> None:
    before = contents(folder)
    fields = {"channel": STABLE, "version": "2", "stages": "1"}
    for sent in (fields, {**fields, "secret": ""}, {**fields, "secret": "x" * 43}):
        answer = client.post(path, data=sent)
        assert answer.status_code == 403
        assert "sign in first" in answer.text
    assert contents(folder) == before


@pytest.mark.parametrize("path", FORMS)
def test_a_form_of_elsewhere_changes_nothing(client: TestClient, folder: Path, path: str) -> None:
    fields = {"channel": STABLE, "version": "2", "stages": "1"}
    secret = signed_in(client)
    before = contents(folder)
    for wrong in ("", "x" * len(secret), secret[:-1]):
        assert client.post(path, data={**fields, "secret": wrong}).status_code == 403
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:8000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ):
        answer = client.post(path, data={**fields, "secret": secret}, headers=headers)
        assert answer.status_code == 403, headers
    json = client.post(path, json={**fields, "secret": secret})
    assert json.status_code == 415
    assert contents(folder) == before


def test_what_the_command_refuses_the_page_refuses_in_the_same_words(
    client: TestClient, folder: Path
) -> None:
    with Registry.open(folder) as registry:
        rollout.start(registry, RolloutPlan(channel=STABLE, version=2, canary=("farm0",)))
    tries = {
        ("promote", "2", STABLE): ("/versions/promote", {"version": 2}),
        ("rollback", STABLE, "--to", "1"): ("/versions/roll-back", {"version": 1}),
    }
    for command, (path, fields) in tries.items():
        name, *rest = command
        done = CliRunner().invoke(commands, ["registry", name, str(folder), *rest])
        assert isinstance(done.exception, ConfigError)
        assert "is on its way to channel 'stable'" in str(done.exception)
        said = do(client, path, channel=STABLE, **fields)
        assert f"Refused {done.exception}" in said
    assert named(folder) == 1
    with Actions.open(Actions.path(folder), read_only=True) as actions:
        assert [row.outcome.split(":")[0] for row in actions.newest(5)] == ["refused"] * 2


def test_a_rollout_from_its_start_to_its_end(client: TestClient, folder: Path) -> None:
    said = do(
        client, "/rollouts/start", channel=STABLE, version=2, canary="farm0, farm2", stages="0.5,1"
    )
    assert "version 2 goes to farm0, farm2" in said
    assert "Version 2 to stable, after 1 running" in said
    assert "version 2 waits" in do(client, "/rollouts/pause", channel=STABLE)
    assert "paused" in words(client.get("/").text)
    assert "version 2 goes on" in do(client, "/rollouts/resume", channel=STABLE)
    with Registry.open(folder) as registry:
        row = registry.rows.rollout(STABLE)
        assert row is not None
        assert RolloutPlan.model_validate_json(row.plan).canary == ("farm0", "farm2")
    assert "names version 1 for every farm" in do(client, "/rollouts/abort", channel=STABLE)
    assert named(folder) == 1
    assert "Refused nothing is on its way" in do(client, "/rollouts/abort", channel=STABLE)


@pytest.mark.parametrize(
    ("path", "fields", "why"),
    [
        ("/versions/promote", {"channel": STABLE, "version": 9}, "no version 9"),
        ("/versions/promote", {"channel": "No such", "version": 1}, "channel"),
        ("/versions/promote", {"channel": STABLE}, "version: Field required"),
        ("/versions/promote", {"channel": STABLE, "version": "one"}, "version"),
        ("/versions/roll-back", {"channel": "none", "version": 1}, "no channel 'none'"),
        ("/rollouts/start", {"channel": STABLE, "version": 2, "stages": "1,0.5"}, "must rise"),
        ("/rollouts/start", {"channel": STABLE, "version": 2, "canary": "a b"}, "canary"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(
    client: TestClient, folder: Path, path: str, fields: dict[str, object], why: str
) -> None:
    said = do(client, path, **fields)
    assert "Refused" in said
    assert why in said
    assert named(folder) == 1


def test_a_form_that_is_too_large_is_not_read(client: TestClient) -> None:
    sent = {"token": "x" * MOST_FORM_BYTES}
    assert client.post("/sign-in", data=sent).status_code == 413


def test_what_was_begun_is_on_record_whatever_follows(tmp_path: Path) -> None:
    def crash() -> str:
        raise KeyboardInterrupt

    def refuse() -> str:
        raise ConfigError("no")

    with Actions.open(Actions.path(tmp_path)) as actions:
        with pytest.raises(KeyboardInterrupt):
            actions.do("page", "promote", crash)
        with pytest.raises(ConfigError):
            actions.do("page", "again", refuse)
        assert [(row.what, row.outcome) for row in actions.newest(9)] == [
            ("again", "refused: no"),
            ("promote", ""),
        ]


# --- names of this machine -----------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1:9465", "[::1]:9465", "127.9.9.9"])
def test_this_machine_has_several_names(client: TestClient, host: str) -> None:
    assert client.get("/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:9465", "localhost.evil.example", "x@localhost"),
        *("10.0.0.1", "0.0.0.0:9465", "", "[::2]", "[::]", "["),
    ],
)
def test_other_names_are_refused(client: TestClient, host: str) -> None:
    for path in ("/", "/healthz", "/versions"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 421
        assert "fieldfed" not in answer.text


@given(st.text(alphabet="ab1./\\%?#:@&=\n ", max_size=12))
@settings(deadline=None)
def test_signing_in_leads_to_this_page_only(path: str) -> None:
    led = own_path(path)
    assert re.fullmatch(r"/(?![/\\]).*|/", led)
    assert not re.search(r"[\\\s:@?#]", led)


@given(st.text(max_size=20) | st.from_regex(r"[a-z@\[\]:.0-9]{1,14}", fullmatch=True))
@settings(deadline=None)
def test_a_host_header_may_be_anything(host: str) -> None:
    name = re.sub(r":\d*$", "", host)
    if is_own_name(host):
        assert re.fullmatch(r"localhost|127(\.\d{1,3}){3}|\[[0:.]*[:.0-9]*1\]", name, re.I)


# --- alerts --------------------------------------------------------------------------------------


def looked(folder: Path, after: float = 0.0) -> list[Alert]:
    with sources(folder, 5) as found:
        return alerts.alerts(found, found.facts.newest_run(), time.time() + after)


def changed(folder: Path, name: str, *statements: str) -> None:
    with closing(sqlite3.connect(folder / name)) as db, db:
        for statement in statements:
            db.execute(statement)


def test_nothing_is_to_be_looked_at_when_all_is_well(folder: Path) -> None:
    assert looked(folder) == []


@pytest.mark.parametrize(
    ("statement", "after", "title"),
    [
        ("UPDATE runs SET state = 'failed', detail = 'why'", 0, "Run 1 failed"),
        ("UPDATE runs SET state = 'stopped'", 0, "Run 1 was stopped"),
        (
            "INSERT INTO pauses (farm, reason, since) VALUES ('farm1', 'shape', 1)",
            0,
            "Farm farm1 is not asked any more",
        ),
        ("UPDATE runs SET state = 'running'", 7 * 3600, "3 farms were not heard of for 6 hours"),
        (
            "UPDATE verdicts SET accepted = 0; UPDATE runs SET state = 'running'",
            0,
            "The cut after round 1 was undone",
        ),
        (
            "UPDATE rounds SET state = 'open', deadline = 1 WHERE round = 2; "
            "UPDATE runs SET state = 'running'",
            0,
            "Round 2 is open beyond its deadline",
        ),
        ("SELECT 1", 26 * 86_400, "Channel stable expires soon"),
        ("SELECT 1", 40 * 86_400, "Channel stable has expired"),
    ],
)
def test_what_is_to_be_looked_at_is_told(
    folder: Path, statement: str, after: float, title: str
) -> None:
    changed(folder, "fieldfed.db", *statement.split("; "))
    assert title in [one.title for one in looked(folder, after)]
    if not after:
        assert title in words(opened(folder).get("/").text)


def test_the_worst_comes_first(folder: Path) -> None:
    changed(
        folder,
        "fieldfed.db",
        "UPDATE runs SET state = 'stopped'",
        "INSERT INTO pauses (farm, reason, since) VALUES ('farm1', 'shape', 1)",
    )
    assert [one.tone for one in looked(folder)] == ["bad", "warn"]


# --- size ----------------------------------------------------------------------------------------


def test_a_large_network_is_shown_within_seconds(folder: Path) -> None:
    farms, rounds = 1000, 60
    with closing(sqlite3.connect(folder / "fieldfed.db")) as db, db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute("DELETE FROM rounds WHERE kind = 'align' AND round > 1")
        db.executemany(
            "INSERT INTO farms VALUES (1, ?, ?, 40, 3, ?, ?)",
            [(10 + n, f"f{n:04d}", time.time(), PROTOCOL) for n in range(farms)],
        )
        db.executemany(
            "INSERT INTO rounds SELECT run, ?, kind, attempt, base, mask, quorum, deadline, state, "
            "started, finished, participants, macs_ratio, heads_kept_ratio, mean_accuracy, scored "
            "FROM rounds WHERE round = 1 AND kind = 'align'",
            [(number,) for number in range(2, rounds + 1)],
        )
        db.executemany(
            "INSERT INTO replies (run, round, node, farm, attempt, examples, accuracy, f1, loss, "
            "dal, seconds, size_bytes, path, digest, received, of_round) "
            "VALUES (1, ?1, ?2, ?3, 1, 40, 0.5, 0.5, 1, 0, 1, 9, '', '', 1, ?1)",
            [(r, 10 + n, f"f{n:04d}") for n in range(farms) for r in range(3, rounds + 1)],
        )
    client = opened(folder)
    for path in ("/", "/rounds", "/farms", "/farms/f0500", "/events"):
        begun = time.monotonic()
        answer = client.get(path)
        assert answer.status_code == 200, answer.text[:2000]
        assert len(answer.content) < 3_000_000, path
        assert time.monotonic() - begun < 10, path  # READ_SECONDS bounds what is read


# --- a process of its own ------------------------------------------------------------------------


def test_it_is_off_unless_there_is_a_section() -> None:
    assert ServerConfig().page is None
    config = ServerConfig.model_validate({"page": {}}).page
    assert config is not None
    assert (config.host, config.port) == ("127.0.0.1", 9465)


def test_other_machines_are_not_listened_for() -> None:
    with pytest.raises(ConfigError, match=r"\[page\] host '0.0.0.0' is not on this machine"):
        listening(PageConfig(host="0.0.0.0"))


def test_a_container_may_keep_other_machines_out_instead() -> None:
    config = PageConfig(host="0.0.0.0", port=free_port(), contained=True)
    with listening(config) as listener:
        assert listener.getsockname() == ("0.0.0.0", config.port)
    assert config.address == f"http://localhost:{config.port}/"


def test_a_port_that_is_taken() -> None:
    with (
        listening(PageConfig(port=free_port())) as taken,
        pytest.raises(LaunchError, match=r"choose another port in \[page\]"),
    ):
        listening(PageConfig(port=taken.getsockname()[1]))


def test_up_starts_and_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port, shown = free_port(), free_port()
    text = f'[server]\nname = "vale"\nport = {port}\n[page]\nport = {shown}\n'
    (folder / "server.toml").write_text(text)
    web = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]

    def stand_in(*_: object) -> Child:
        return Child("stand-in", lambda: web, folder / "stand-in.log")

    monkeypatch.setattr(launch, "_superlink", stand_in)
    monkeypatch.setattr(launch, "_superexec", stand_in)
    config = load_settings(ServerConfig, folder / "server.toml")
    with caplog.at_level("INFO", "server.launch"), launch.serve(config, folder):
        wait_for_port("127.0.0.1", shown, 60)
        with closing(http.client.HTTPConnection("127.0.0.1", shown, timeout=20)) as opened_http:
            opened_http.request("GET", "/")
            said = opened_http.getresponse().read().decode()
        assert "vale" in said
        assert "Run 1" in said
    assert port_is_free("127.0.0.1", shown)
    assert f"http://127.0.0.1:{shown}/; the token for changes is in" in caplog.text
    log = (folder / "logs" / "page.log").read_text()
    assert f"the page is at http://127.0.0.1:{shown}/" in log
    assert str(folder / "page.token") in log
    assert "Traceback" not in log
    assert (folder / "page.token").stat().st_mode & 0o777 == 0o600


def test_without_a_section_the_program_says_so(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("seed = 1\n")
    command = [sys.executable, "-P", "-m", "server.page", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ConfigError.exit_code
    assert "has no [page]" in done.stderr
