"""What one run does, as the command that starts it hands it to the server process."""

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.config import NetworkConfig, ServerConfig
from common.messages import Label
from server.rows import GUARD


class RunSettings(BaseModel):
    """What one run does; written by the command that starts it, read by the server process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ServerConfig
    label: Label = "model"
    probe: bool = Field(default=True, description="report the base before the first round")
    local_rounds: int = Field(default=0, ge=0, description="report the local-only baseline")

    @field_validator("label")
    @classmethod
    def _not_a_baseline(cls, label: str) -> str:
        if label in ("probe", "local", GUARD):
            raise ValueError(f"'{label}' names a baseline; choose another label")
        return label

    def are_those_of(self, stored: str) -> bool:
        """Whether a run with these settings is the one with the stored ones, so that it goes on.

        Where the server listens, and what it shows to whom, may have changed. A setting that an
        older release did not know counts as its default.
        """
        try:
            other = RunSettings.model_validate_json(stored)
        except ValidationError:
            return False
        return self._of_the_run() == other._of_the_run()

    def _of_the_run(self) -> "RunSettings":
        place = {
            "server": NetworkConfig(),
            "regions": (),
            **dict.fromkeys(("door", "hub", "metrics", "page", "broker", "region")),
        }
        return self.model_copy(update={"config": self.config.model_copy(update=place)})
