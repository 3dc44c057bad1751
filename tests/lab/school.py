"""A network of farms that has aligned a teacher, and goes on to teach a student."""

from pathlib import Path
from typing import Any

from common.config import PrivacyConfig
from common.lesson import StudentConfig
from server.begin import run_rounds
from server.distil import last_teacher, lesson_settings
from server.models import Models
from server.settings import RunSettings
from tests.lab.link import Fault, LabClock, LabLink
from tests.lab.network import Lab

STUDENT = "test_efficientnet"
"""100 000 numbers, and 2.3 million MACs at 32 pixels; the teacher has three times as many."""
TEACHER = {"depth": 3, "embed_dim": 96, "num_heads": 4, "patch_size": 8}


class School(Lab):
    """Run 1 has made the teacher."""

    def __init__(self, root: Path, count: int = 3, **settings: dict[str, Any]) -> None:
        chosen = {"backbone": {"options": TEACHER, "epochs": 1}, **settings}
        super().__init__(root, count, chosen, rounds=1)
        self.run()

    def lesson(self, privacy: PrivacyConfig | None = None, **terms: Any) -> RunSettings:
        """The settings of a run that distils."""
        wanted = {"name": STUDENT, "rounds": 2, "epochs": 1, **terms}
        changes = {"distil": StudentConfig(**wanted), "privacy": privacy}
        config = self.config.model_copy(update=changes)
        models = Models(self.server_dir)
        with self.store() as store:
            teacher = last_teacher(store)
        settings = lesson_settings(config, models, teacher)
        models.settle()
        return settings

    def teach(self, fault: Fault | None = None, **terms: Any) -> LabLink:
        """One run that distils, to its end."""
        return self.play(self.lesson(**terms), fault)

    def play(self, settings: RunSettings, fault: Fault | None = None) -> LabLink:
        """A run with these settings, begun or gone on with."""
        path = self.root / "lesson.json"
        path.write_text(settings.model_dump_json())
        link = LabLink(self.farms, fault=fault)
        run_rounds(link, self.server_dir, path, LabClock())
        return link

    def students(self, run: int = 2) -> list[str]:
        """The digests that a run has come to, by round."""
        with self.store() as store:
            return [row.digest for row in store.candidates(run).values()]
