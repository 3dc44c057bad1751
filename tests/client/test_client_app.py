"""The ClientApp in-process: what reaches the farm, and what is answered when it does not."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.app
from client.ledger import FILE, Ledger, Total
from common.errors import DataError
from common.messages import AlignRequest, HelloReply, HelloRequest, Refusal
from common.protocols import PROTOCOL
from common.wire import from_record, message_type, size_of, to_record

DIGEST, OTHER = "d" * 64, f"protocol {PROTOCOL + 1}"
SECRET = "/home/farmer/pictures/leaf_17.jpg"
REPLY = HelloReply(farm="alpha", examples=3, classes=2)


class FakeFarm:
    """Answers, or raises what it is told to."""

    raises: Exception | None = None
    opened: list[Any]

    @classmethod
    def open(cls, config: Any, state_dir: Path) -> "FakeFarm":
        cls.opened.append((config.farm.name, state_dir))
        return cls()

    def handle(self, _request: Any) -> HelloReply:
        if self.raises:
            raise self.raises
        return REPLY


@pytest.fixture
def farm(monkeypatch: pytest.MonkeyPatch) -> type[FakeFarm]:
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    module = types.ModuleType("client.farm")
    module.Farm = FakeFarm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "client.farm", module)
    monkeypatch.setattr(FakeFarm, "raises", None)
    monkeypatch.setattr(FakeFarm, "opened", [], raising=False)
    return FakeFarm


def ask(folder: Path, content: RecordDict, kind: str = "query.hello") -> Any:
    settings = folder / "farm.toml"
    settings.write_text('[farm]\nname = "alpha"\ndata = "images"\n')
    config = {"config": str(settings), "state-dir": str(folder / "state")}
    message = Message(content, dst_node_id=3, message_type=kind)
    context = Context(1, 3, config, RecordDict(), {})  # type: ignore[arg-type]
    return from_record(client.app.app(message, context).content)


def test_a_request_reaches_the_farm_and_its_reply_goes_out(
    farm: type[FakeFarm], tmp_path: Path
) -> None:
    assert ask(tmp_path, to_record(HelloRequest())) == REPLY
    assert farm.opened == [("alpha", tmp_path / "state")]


def test_every_request_has_a_function(farm: type[FakeFarm], tmp_path: Path) -> None:
    work: dict[str, Any] = {"run": 1, "round": 4, "attempt": 2, "seed": 0, "train": {}}
    request = AlignRequest(**work, base=DIGEST, mask=DIGEST)
    assert ask(tmp_path, to_record(request), message_type(request)) == REPLY


@pytest.mark.parametrize(
    ("content", "kind", "reason", "named"),
    [
        (
            to_record(HelloRequest(protocol=PROTOCOL + 1)),
            "query.hello",
            "protocol",
            f"protocol {PROTOCOL + 1}",
        ),
        (RecordDict(), "query.hello", "bad_request", "not a fieldfed message"),
        (RecordDict({"x": ConfigRecord({"a": 1})}), "train.align", "bad_request", "fieldfed"),
        (to_record(REPLY), "query.hello", "bad_request", "requests"),
        (to_record(HelloRequest()), "train.align", "bad_request", "train.align"),
    ],
)
def test_what_is_not_a_request_is_refused(
    farm: type[FakeFarm], tmp_path: Path, content: RecordDict, kind: str, reason: str, named: str
) -> None:
    reply = ask(tmp_path, content, kind)
    assert isinstance(reply, Refusal)
    assert reply.reason == reason
    assert named in reply.detail
    assert not farm.opened


@pytest.mark.parametrize(
    ("error", "reason"),
    [(DataError(f"cannot read {SECRET}"), "data"), (RuntimeError(SECRET), "internal")],
)
def test_no_path_of_an_image_leaves_the_farm(
    farm: type[FakeFarm],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    reason: str,
) -> None:
    farm.raises = error
    reply = ask(tmp_path, to_record(HelloRequest()))
    assert isinstance(reply, Refusal)
    assert reply.reason == reason
    assert "leaf" not in reply.detail
    assert SECRET in caplog.text


def test_a_broken_installation_is_answered(
    farm: type[FakeFarm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "client.farm", None)
    reply = ask(tmp_path, to_record(HelloRequest()))
    assert isinstance(reply, Refusal)
    assert "ModuleNotFoundError" in reply.detail


def test_the_unpacked_app_is_no_longer_searched_for_modules(
    farm: type[FakeFarm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "unpacked"), *sys.path])
    ask(tmp_path, to_record(HelloRequest()))
    assert str(tmp_path / "unpacked") not in sys.path


def test_what_leaves_is_in_the_ledger(farm: type[FakeFarm], tmp_path: Path) -> None:
    for _ in range(2):
        ask(tmp_path, to_record(HelloRequest()))
    refused = ask(tmp_path, RecordDict())
    sizes = size_of(to_record(REPLY)), size_of(to_record(refused))
    server = "server 127.0.0.1:8000"
    with Ledger.open(tmp_path / "state" / FILE) as ledger:
        assert ledger.totals() == [
            Total("hello", server, 2, 2 * sizes[0]),
            Total("refusal", server, 1, sizes[1]),
        ]


def test_a_ledger_that_cannot_be_written_holds_nothing_up(
    farm: type[FakeFarm], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    assert ask(tmp_path, to_record(HelloRequest())) == REPLY
    assert "not written down" in caplog.text
