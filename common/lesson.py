"""Settings of learning from a teacher, beside those of training (common/config.py)."""

from pathlib import Path

from pydantic import Field

from common.section import Section


class Terms(Section):
    """How much a student heeds its teacher beside the labels (common/distil.py)."""

    temperature: float = Field(default=4.0, gt=0, le=100, description="T of the soft answers")
    alpha: float = Field(default=1.0, ge=0, le=100, description="weight of the soft answers")
    beta: float = Field(default=1.0, ge=0, le=1000, description="weight of the maps")


class StudentConfig(Terms):
    """The student that farms teach together: what it is, and how long and fast it learns."""

    name: str = Field(default="mobilenetv3_small_100", description="a timm network")
    weights: Path | None = Field(default=None, description="safetensors file; none: random")
    rounds: int = Field(default=20, ge=1, le=10_000, description="of a run that distils")
    epochs: int = Field(default=3, ge=1, le=100, description="passes over the fit part per round")
    batch_size: int = Field(default=16, ge=8, le=1024, description="images per step")
    lr: float = Field(default=2e-3, gt=0, le=1, description="of student and classifier (AdamW)")
    weight_decay: float = Field(default=0.05, ge=0, le=1, description="AdamW")
