"""Watch a run from its store: a progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.errors import FieldfedError, LaunchError
from server.rows import RunRow
from server.settings import RunSettings
from server.store import Store

POLL_SECONDS = 1.0
ALIVE_SECONDS = 20.0


def last_run(store_path: Path) -> int:
    """Number of the last run in the store, 0 when there is none."""
    if not store_path.is_file():
        return 0
    store = Store.open(store_path, read_only=True)
    try:
        row = store.latest_run()
        return 0 if row is None else row.run
    finally:
        store.close()


def follow(
    store_path: Path,
    settings: RunSettings,
    after: int,
    alive: Callable[[], bool],
    console: Console,
) -> RunRow:
    """Show progress until the run is over.

    Args:
        store_path: the server's store; it may not exist yet.
        settings: of the run that was started.
        after: the last run before it was started; a run that goes on may have that number.
        alive: whether the process that carries the run still lives; asked now and then.
        console: where to show it.

    Raises:
        LaunchError: the process died before the run was over.
        FieldfedError: the run failed; the message is the run's own.
    """
    asked, living = time.monotonic(), True
    with _view(console, settings) as show:
        while True:
            if time.monotonic() - asked > ALIVE_SECONDS:
                # asked before the store is read, so that a last commit is not missed
                asked, living = time.monotonic(), alive()
            run = _latest(store_path, settings, after, show)
            if run is not None and run.state == "done":
                return run
            if run is not None and run.state != "running":
                raise FieldfedError(f"run {run.run} {run.state}: {run.detail}")
            if not living:
                raise LaunchError(
                    "the server process ended before the run was over; see its log in "
                    f"'{store_path.parent / 'logs'}'"
                )
            time.sleep(POLL_SECONDS)


Show = Callable[[Store, RunRow], None]


def _latest(store_path: Path, settings: RunSettings, after: int, show: Show) -> RunRow | None:
    if not store_path.is_file():
        return None
    store = Store.open(store_path, read_only=True)
    try:
        run = store.latest_run()
        if run is None or not settings.are_those_of(run.config_json):
            return None
        if run.run <= after and run.state != "running":
            return None
        show(store, run)
        return run
    finally:
        store.close()


@contextmanager
def _view(console: Console, settings: RunSettings) -> Iterator[Show]:
    if not console.is_terminal:
        yield _Lines(console, settings)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} farms"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield _Bars(progress, settings)


def _stage(store: Store, run: RunRow, settings: RunSettings) -> tuple[str, int, int]:
    """What is going on: its name, answers so far, farms asked."""
    farms = len(store.farms(run.run))
    rounds = [row for row in store.rounds(run.run) if row.kind == "align"]
    for row in rounds:
        if row.state == "open":
            done = len(store.replies(run.run, row.round))
            name = f"{settings.label}: round {row.round} of {settings.config.plan.rounds}"
            return name, done, farms
    labels = (
        ["probe"] * settings.probe + ["local"] * bool(settings.local_rounds)
        if not rounds
        else [settings.label]
    )
    for label in labels:
        done = len(store.reports(run.run, label))
        if done < farms:
            return f"{settings.label}: report '{label}'", done, farms
    return f"{settings.label}: waiting for farms", 0, max(farms, 1)


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[str, float], None]]:
    """A callback that shows (what is done, share of it); silent where there is no terminal."""
    if not console.is_terminal:
        yield lambda _what, _share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        yield tell


class _Lines:
    """One line per committed round, and one when a stage begins."""

    def __init__(self, console: Console, settings: RunSettings) -> None:
        self._console, self._settings = console, settings
        self._said: set[str] = set()

    def __call__(self, store: Store, run: RunRow) -> None:
        for row in store.rounds(run.run):
            if row.kind == "align" and row.state == "committed":
                self._say(
                    f"{self._settings.label}: round {row.round} done, {row.participants} farms, "
                    f"decide accuracy before it {row.mean_accuracy or 0:.3f}, "
                    f"MACs now {100 * (row.macs_ratio or 1):.0f} %, "
                    f"{(row.finished or row.started) - row.started:.0f} s"
                )
        self._say(_stage(store, run, self._settings)[0])

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._console.print(line, highlight=False, soft_wrap=True)


class _Bars:
    """One bar per stage."""

    def __init__(self, progress: Progress, settings: RunSettings) -> None:
        self._progress, self._settings = progress, settings
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, store: Store, run: RunRow) -> None:
        name, done, total = _stage(store, run, self._settings)
        if name not in self._tasks:
            for task in self._tasks.values():
                self._progress.update(task, completed=total, total=total)
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)
