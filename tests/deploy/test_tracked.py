"""What git tracks holds no secret, names no machine's folders and no package registry."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Patterns and examples are put together here, so that this file may be read as well.
HOSTS = {"pypi": "org", "pythonhosted": "org", "npmjs": "org", "debian": "org", "pytorch": "org"}
TOKENS = (
    r"gh[pousr]_[A-Za-z0-9]{30,}",
    r"github_pat_[A-Za-z0-9_]{40,}",
    r"glpat-[\w-]{20}",
    r"AKIA[0-9A-Z]{16}",
    r"xox[abprs]-[\w-]{20,}",
    r"hf_[A-Za-z]{30,}",
    r"npm_\w{36}",
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
)
FOLDERS = (r"/(?:home|Users)/(?!farmer/|pi/)[a-z][\w.-]+/", r"/work/[a-z]+/", r"/root/\.")
PATTERNS = {
    "private key": r"-----BEGIN [A-Z ]*PRIVATE" + r" KEY-----\s+[A-Za-z0-9+/=]{20}",
    "token": rf"\b(?:{'|'.join(TOKENS)})",
    "password": r"(?i)\b(?:password|passwd|secret|api_?key)\s*[:=]\s*"
    r"[\"'](?!\W)[^\"'\s{}$<]{12,}[\"']",
    "login in an address": r"\b[a-z]+://[^\s/:@\"'{}]+:[^\s/@\"'{}]+@[\w.-]+",
    "machine path": rf"(?<![\w.])(?:{'|'.join(FOLDERS)})",
    "registry host": "|".join(rf"\b{name}\.{end}\b" for name, end in HOSTS.items()),
}
EXAMPLES = {
    "private key": "-----BEGIN EC PRIVATE" + " KEY-----\nMHcCAQEEIIrYSSNQFaA2Hwf1",
    "token": "ghp_" + "a1" * 18,
    "password": 'password = "' + 'correct-horse-battery"',
    "login in an address": "https://apple:" + "sour@example.org/x",
    "machine path": "see /home/" + "maria/farm",
    "registry host": "https://pypi" + ".org/simple",
}


def tracked() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60).stdout
    return [name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def found(text: str) -> dict[str, str]:
    """What a text has that it should not have, by kind."""
    seen = {kind: re.search(pattern, text) for kind, pattern in PATTERNS.items()}
    return {kind: one[0][:60] for kind, one in seen.items() if one is not None}


def test_no_tracked_file_tells_what_it_should_not() -> None:
    names = tracked()
    assert "pyproject.toml" in names
    told = {name: found((ROOT / name).read_text(errors="replace")) for name in names}
    assert {name: what for name, what in told.items() if what} == {}


@pytest.mark.parametrize("kind", PATTERNS)
def test_each_kind_would_be_found(kind: str) -> None:
    assert kind in found(f"first line\nx {EXAMPLES[kind]} y\n")


def test_what_is_made_on_machines_is_not_tracked() -> None:
    endings = (".pem", ".key", ".db", ".safetensors", ".onnx", ".member", ".csr", ".whl", ".pt")
    assert [name for name in tracked() if name.endswith(endings)] == []
    assert not [name for name in tracked() if Path(name).name in {".env", "id_rsa", "id_ed25519"}]


def test_files_are_small() -> None:
    assert {name for name in tracked() if (ROOT / name).stat().st_size > 2_000_000} == set()
