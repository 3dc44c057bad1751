"""A file layer that loses what was not synced, for a process that is killed.

The process that is to be killed calls :func:`record`: from then on every sync, rename and removal
is noted in a journal outside of its folder, and whatever a rename or removal replaces is kept by a
hard link. After the kill another process calls :func:`lose`, which takes back a random part of what
a power cut may take back:

    bytes of a file behind its last sync are cut off, or read as zeros
    a rename, removal, new file or new folder has not happened, if nobody synced the folder above
"""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_JOURNAL, _SAVED = "journal.jsonl", "saved"


def record(root: Path, beside: Path, kill_at: int | None = None) -> Callable[[], int]:
    """Note what this process does to the files below ``root``.

    Args:
        root: the folder that is watched; all in it counts as synced now.
        beside: where notes are kept, emptied first by the caller.
        kill_at: this process dies by SIGKILL at its so-and-so-many-th operation.

    Returns:
        How many operations there were so far.
    """
    saved, count = beside / _SAVED, 0
    saved.mkdir(parents=True)
    journal = (beside / _JOURNAL).open("a", buffering=1)
    fsync, replace, unlink, mkdir = os.fsync, os.replace, os.unlink, os.mkdir
    draw = random.Random(kill_at)

    def note(**what: Any) -> None:
        journal.write(json.dumps(what) + "\n")

    def step(act: Callable[[], None], **what: Any) -> None:
        """Die before or after an operation, or do it and note it."""
        nonlocal count
        count += 1
        last = count == kill_at
        if last and draw.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        act()
        note(**what)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    def keep(path: Path) -> str | None:
        """A second name for what is about to lose its only one."""
        if not path.is_file():
            return None
        name = f"{count}"
        os.link(path, saved / name)
        return name

    def ours(path: Path) -> bool:
        return path.absolute().is_relative_to(root)

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not ours(path):
            fsync(descriptor)
        elif path.is_dir():
            step(lambda: None, folder=str(path), names=_names(path))
        else:
            size, inode = os.fstat(descriptor).st_size, os.fstat(descriptor).st_ino
            step(lambda: None, file=str(path), inode=inode, size=size)

    def rename(old: Any, new: Any, **_: Any) -> None:
        source, target = Path(old).absolute(), Path(new).absolute()
        if not ours(target):
            replace(old, new)
            return
        was = keep(target)
        step(lambda: replace(old, new), old=str(source), new=str(target), was=was)

    def remove(path: Any, **_: Any) -> None:
        target = Path(path).absolute()
        if not ours(target):
            unlink(path)
            return
        was = keep(target)
        step(lambda: unlink(path), gone=str(target), was=was)

    def make(path: Any, *mode: int) -> None:
        target = Path(path).absolute()
        if ours(target):
            step(lambda: mkdir(path, *mode), made=str(target))
        else:
            mkdir(path, *mode)

    for path in [root, *root.rglob("*")]:
        if path.is_dir():
            note(folder=str(path), names=_names(path))
        else:
            note(file=str(path), inode=path.stat().st_ino, size=path.stat().st_size)
    note(begun=True)
    os.fsync, os.replace, os.unlink, os.mkdir = sync, rename, remove, make  # type: ignore[assignment]
    return lambda: count


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lose(root: Path, beside: Path, draw: random.Random) -> int:
    """Take back what a power cut may take back; returns how many things were lost."""
    notes = [json.loads(line) for line in (beside / _JOURNAL).read_text().splitlines()]
    if {"begun": True} not in notes:
        return 0  # killed before it had done anything
    synced: dict[str, int] = {}
    sizes: dict[int, int] = {}
    names: dict[str, set[str]] = {}
    for number, note in enumerate(notes):
        if "folder" in note:
            synced[note["folder"]] = number
            names[note["folder"]] = set(note["names"])
        elif "file" in note:
            sizes[note["inode"]] = note["size"]
    lost, happened = 0, set()
    for number, note in reversed(list(enumerate(notes))):
        target = note.get("new") or note.get("gone") or note.get("made")
        if target is None or number < synced.get(str(Path(target).parent), -1):
            continue
        if draw.random() < 0.5:
            happened.add(target)  # a file is never lost under its old name and its new one
            continue
        lost += _take_back(note, Path(target), beside)
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        known = names.get(str(folder), set())
        for path in folder.iterdir():
            new = path.name not in known and str(path) not in happened
            if new and path.is_file() and draw.random() < 0.5:
                path.unlink()
                lost += 1
    for path in root.rglob("*"):
        if path.is_file():
            lost += _cut_off(path, sizes.get(path.stat().st_ino, 0), draw)
    return lost


def _take_back(note: dict[str, Any], target: Path, beside: Path) -> int:
    if "made" in note:
        shutil.rmtree(target, ignore_errors=True)
        return 1
    if "new" in note and target.is_file() and not Path(note["old"]).exists():
        target.rename(note["old"])
    if note["was"] is not None:
        target.unlink(missing_ok=True)
        os.link(beside / _SAVED / note["was"], target)
    return 1


def _cut_off(path: Path, synced: int, draw: random.Random) -> int:
    size = path.stat().st_size
    if size <= synced:
        return 0
    end = draw.randint(synced, size)
    with path.open("r+b") as file:
        file.truncate(end)
        if draw.random() < 0.5:  # the length reached the disk, the bytes did not
            file.truncate(size)
    return 1
