"""A device's agent, with stand-ins for what is Flower's: programs that only live."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import client.launch
from client.agent import Agent
from common.config import FarmConfig
from common.processes import Child
from common.programs import logs_of, programs_of
from common.settings import load_settings
from tests.lab.network import draw_folder
from tests.system.site import toml

LIVES = "#!/bin/sh\nexec sleep 1001\n"

# As 'fieldfed-client run', with the same stand-ins.
RUN = """
import sys
from pathlib import Path
import client.launch
from common.processes import Child
def executor(state_dir, env):
    return Child("executor", lambda: ["sleep", "1000"], state_dir / "logs" / "executor.log", env)
client.launch.executor = executor
from client.cli import main
main()
"""


class Place:
    """A farm's folder, its settings, and its agent in a thread or a process."""

    def __init__(self, root: Path, **sections: dict[str, Any]) -> None:
        self.folder, self.state = root / "oak", root / "oak" / "state"
        self.config_path = self.folder / "farm.toml"
        self.supernode(LIVES)
        data = root / "apple"
        if not data.exists():
            draw_folder(data, 3, 10, 100)
        self.farm: dict[str, Any] = {"name": "oak", "data": str(data), "threads": 1}
        self.farm |= sections.pop("farm", {})
        # nothing listens there
        self.farm.setdefault("superlink", "127.0.0.1:9")
        self.config_path.write_text(toml({"farm": self.farm, **sections}))

    def supernode(self, script: str) -> None:
        """What stands in for it: found before Flower's own."""
        path = programs_of(self.state) / "flower-supernode"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)

    @property
    def config(self) -> FarmConfig:
        """Its settings."""
        return load_settings(FarmConfig, self.config_path)

    @property
    def command(self) -> list[str]:
        """That runs its agent as a process."""
        return [sys.executable, "-P", "-c", RUN, "run", str(self.folder)]

    @contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch, **farm: Any) -> Iterator[Agent]:
        """Its agent in a thread; ``farm``: settings that no file may hold, to save time."""
        monkeypatch.setattr(client.launch, "executor", _executor)
        config = self.config
        config = config.model_copy(update={"farm": config.farm.model_copy(update=farm)})
        agent, stop = Agent(config, self.config_path, self.state), threading.Event()
        thread = threading.Thread(target=agent.run, args=(stop.wait,))
        thread.start()
        try:
            yield agent
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()


def _executor(state_dir: Path, env: dict[str, str]) -> Child:
    return Child("executor", lambda: ["sleep", "1000"], logs_of(state_dir) / "executor.log", env)
