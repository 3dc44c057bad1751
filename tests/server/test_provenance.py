"""A figure names the commit that it was measured at."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from server.provenance import commit


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("server/rounds.py", "bench-output/cells/bytes.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("as committed\n")
    author = ("-c", "user.name=x", "-c", "user.email=x@localhost")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, timeout=30)
    return tmp_path


def test_a_change_to_the_program_is_said(checkout: Path) -> None:
    head = commit(checkout)
    assert len(head) == 12
    (checkout / "server/rounds.py").write_text("changed\n")
    assert commit(checkout) == f"{head} with uncommitted changes"


def test_what_was_measured_so_far_is_no_change(checkout: Path) -> None:
    head = commit(checkout)
    (checkout / "bench-output/cells/bytes.jsonl").write_text("one more cell\n")
    (checkout / "notes.txt").write_text("beside the project\n")
    assert commit(checkout) == head


def test_without_a_checkout_the_release_is_named(tmp_path: Path) -> None:
    assert commit(tmp_path) == f"release {version('fieldfed')}"
