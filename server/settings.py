"""What one run does, as the command that starts it hands it to the server process."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.config import NetworkConfig, ServerConfig
from common.messages import Digest, Label, Lesson
from server.rows import on_the_way


class Taught(BaseModel):
    """Of a run that distils: the backbone that teaches, and the student as it begins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: Digest
    student: Digest


class RunSettings(BaseModel):
    """What one run does; written by the command that starts it, read by the server process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: ServerConfig
    label: Label = "model"
    probe: bool = Field(default=True, description="report the base before the first round")
    local_rounds: int = Field(default=0, ge=0, description="report the local-only baseline")
    taught: Taught | None = Field(default=None, description="None: the backbone itself is aligned")

    @field_validator("label")
    @classmethod
    def _not_a_baseline(cls, label: str) -> str:
        if label in ("probe", "local") or on_the_way(label):
            raise ValueError(f"'{label}' names a baseline or a trial; choose another label")
        return label

    @model_validator(mode="after")
    def _a_student_is_no_transformer(self) -> Self:
        """What only a transformer can do is not asked of a student."""
        if self.taught is None:
            return self
        train = self.config.train
        faults = {
            f"train.trainable = '{train.trainable}' (it is 'full')": train.trainable != "full",
            "train.dal_weight (it has no heads to align)": train.dal_weight > 0,
            "train.proximal": train.proximal > 0,
            "plan.prune_heads or another budget": self.config.plan.prunes,
            "a local-only baseline": self.local_rounds > 0,
            "no probe, by which farms get the teacher": not self.probe,
        }
        found = [what for what, wrong in faults.items() if wrong]
        if found:
            raise ValueError(f"a run that distils cannot have {', '.join(found)}")
        return self

    @property
    def lesson(self) -> Lesson | None:
        """What farms are told of the teacher; None where there is none."""
        if self.taught is None:
            return None
        terms = self.config.distil
        return Lesson(
            teacher=self.taught.teacher,
            temperature=terms.temperature,
            alpha=terms.alpha,
            beta=terms.beta,
        )

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
