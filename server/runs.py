"""Start a run on a network that is up, show it, and stop it when the operator does."""

from pathlib import Path

from rich.console import Console

from common.files import write_atomically
from server.follow import follow, last_run
from server.launch import Network, run_status, stop_run, submit_run
from server.rounds import RunSettings
from server.rows import RunRow


def play(network: Network, settings: RunSettings, console: Console) -> RunRow:
    """Run to the end; Ctrl-C stops the run, which continues when it is started again.

    Raises:
        LaunchError: the network is not up, or the server process died.
        FieldfedError: the run failed; the message is the run's own.
    """
    store = network.state_dir / "fieldfed.db"
    after = last_run(store)
    flower_run = submit_run(network, _write(network.state_dir, settings))

    def alive() -> bool:
        return not run_status(network, flower_run).finished

    try:
        return follow(store, settings, after, alive, console)
    except KeyboardInterrupt:
        stop_run(network, flower_run)
        raise


def _write(state_dir: Path, settings: RunSettings) -> Path:
    path = state_dir / f"run-{settings.label}.json"
    write_atomically(path, settings.model_dump_json(indent=2).encode())
    return path
