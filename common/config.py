"""Settings: one place for every default. How they are read is in common/settings.py."""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from common.broker import Broker
from common.door import DoorConfig
from common.lesson import StudentConfig
from common.mask import Mask
from common.plan import PlanConfig
from common.section import Section
from common.services import (
    DeviceMetricsConfig,
    HubConfig,
    MetricsConfig,
    PageConfig,
    RegionConfig,
    RegionEntry,
)

Aggregation: TypeAlias = Literal["mean", "median", "trimmed", "krum"]


Trainable: TypeAlias = Literal["bias", "attention", "lora", "full"]
LEARNING_RATES = {"bias": 3e-3, "attention": 1e-4, "lora": 1e-3, "full": 3e-5}
"""Of the backbone, by trainable set: the more numbers move, the less each of them may."""


class TrainConfig(Section):
    """How a farm aligns its copy of the backbone in one round; travels in every request."""

    trainable: Trainable = Field(default="lora", description="what a farm learns and sends")
    rank: int = Field(default=1, ge=1, le=64, description="of the factors of lora")
    epochs: int = Field(default=1, ge=1, le=100, description="passes over the fit part per round")
    batch_size: int = Field(default=16, ge=8, le=1024, description="images per step")
    lr: float | None = Field(
        default=None, gt=0, le=1, description="of the backbone (AdamW); unset: what suits the set"
    )
    classifier_lr: float = Field(default=1e-3, gt=0, le=1, description="AdamW")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="share for other classes")
    dal: Literal["mmd", "coral"] = Field(default="mmd", description="domain alignment loss")
    dal_weight: float = Field(default=0.05, ge=0, le=100, description="lambda; 0 turns it off")
    proximal: float = Field(default=0.0, ge=0, le=100, description="mu of FedProx; 0 turns it off")
    self_distil: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="after a cut: weight of what the backbone of before it says; 0: off",
    )
    self_distil_temperature: float = Field(
        default=2.0, gt=0, le=100, description="T of those soft answers"
    )
    update_bits: Literal[2, 4, 8, 32] = Field(
        default=4, description="bits per number of a farm's update, and of the step back"
    )
    top: float = Field(
        default=1.0, gt=0, le=1, description="share of an update's numbers sent, the largest"
    )
    error_feedback: bool = Field(
        default=True, description="what coding loses is part of the next update, or step"
    )

    @property
    def backbone_lr(self) -> float:
        """The learning rate of the backbone."""
        return LEARNING_RATES[self.trainable] if self.lr is None else self.lr


class RecoveryConfig(Section):
    """How farms train in the rounds after a cut, until the run ends.

    A cut leaves much to learn again, and little time: what suits a backbone that is whole, and
    costs the fewest bytes, need not suit what is left of it.
    """

    trainable: Trainable | None = Field(
        default=None, description="full: all numbers, megabytes a round; unset: as before the cut"
    )
    rank: int | None = Field(default=None, ge=1, le=64, description="likewise")
    epochs: int | None = Field(default=None, ge=1, le=100, description="likewise")
    lr: float | None = Field(default=None, gt=0, le=1, description="unset: what suits the set")
    self_distil: float | None = Field(default=None, ge=0, le=100, description="as in train")

    def after(self, train: TrainConfig) -> TrainConfig:
        """What these make of the settings of before the cut."""
        changes = self.model_dump(exclude_none=True)
        if self.trainable not in (None, train.trainable):
            changes["lr"] = self.lr  # the rate of another set does not suit this one
        return train.model_copy(update=changes)


class RoundConfig(Section):
    """When a round is complete."""

    quorum: float = Field(default=1.0, gt=0, le=1, description="share of the farms asked")
    deadline_seconds: float = Field(default=1800.0, gt=0, description="per farm, from its request")
    grace_seconds: float = Field(default=10.0, ge=0, description="waited for more after quorum")
    attempts: int = Field(default=3, ge=1, le=100, description="requests per farm and round")
    attempt_seconds: float | None = Field(
        default=None, gt=0, description="wait before asking again; default: deadline / attempts"
    )
    mode: Literal["sync", "async"] = Field(
        default="sync", description="async: a new candidate after every `buffer` replies"
    )
    buffer: int = Field(default=10, ge=1, description="replies per candidate in async mode")
    sample: int | None = Field(
        default=None, ge=1, description="farms asked per round; all if unset"
    )
    staleness: int = Field(
        default=0, ge=0, le=1000, description="rounds by which a reply may be late; 0: discard it"
    )
    staleness_exponent: float = Field(
        default=0.5, ge=0, le=10, description="a late reply weighs (1 + rounds late)^-exponent"
    )
    step_budget: bool = Field(
        default=False, description="slow farms take fewer steps, to arrive with the others"
    )
    strikes: int = Field(
        default=3, ge=1, description="bad replies in a row after which a farm is paused"
    )
    max_in_flight: int = Field(default=64, ge=1, le=10_000, description="farms at work at once")
    min_farms: int = Field(default=1, ge=1, description="farms that must be online to start")
    max_reply_bytes: int = Field(default=200_000_000, ge=1, description="longer ones are refused")
    aggregation: Aggregation = Field(default="mean", description="how updates become one")
    clip: float = Field(
        default=3.0, gt=0, description="longer updates are cut to this multiple of the median norm"
    )
    liars: float = Field(
        default=0.2, ge=0, lt=0.5, description="share of farms a robust rule withstands"
    )

    @property
    def patience_seconds(self) -> float:
        """How long one request may stay without an answer before another is sent."""
        return self.attempt_seconds or self.deadline_seconds / self.attempts


class PrivacyConfig(Section):
    """Noise that hides each farm, added on the farm; travels in every request for alignment.

    ``clip`` is found on farms whose images may be looked at (drawn plants, one's own): a run with a
    large ``clip`` and ``noise = 0`` lets every farm log the length of its updates, and their median
    is a good value. A poor one costs accuracy, never privacy.
    """

    clip: float | None = Field(
        default=None, gt=0, le=1e6, description="L2 norm to which a farm's whole update is cut"
    )
    noise: float = Field(
        default=0.0, ge=0, le=1e4, description="of updates: standard deviation over clip"
    )
    score_clip: float = Field(
        default=1.0, gt=0, le=1e3, description="deviation over mean to which scores are cut"
    )
    score_noise: float = Field(
        default=0.0, ge=0, le=1e4, description="of scores: standard deviation over their cut norm"
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="at which epsilon is reported")
    max_epsilon: float | None = Field(
        default=None, gt=0, le=1e6, description="no further round beyond it, for no farm asked"
    )

    @model_validator(mode="after")
    def _noise_needs_clip(self) -> Self:
        if self.noise > 0 and self.clip is None:
            raise ValueError("noise is a multiple of clip: set clip, the length updates are cut to")
        if self.max_epsilon is not None and self.noise == 0:
            raise ValueError("max_epsilon cannot be kept by updates without noise: set noise")
        return self


class BackboneConfig(Section):
    """Which backbone the network shares and where it comes from."""

    name: str = Field(default="vit_small_patch14_dinov2", description="timm name")
    image_size: int = Field(default=112, ge=16, le=2048, description="pixels, of each side")
    options: dict[str, int] = Field(default={}, description="for timm: depth, embed_dim, ...")
    weights: str | None = Field(default=None, description="safetensors file, hub[:NAME], or none")
    source: Path | None = Field(default=None, description="folder of the source species")
    epochs: int = Field(default=0, ge=0, le=1000, description="training epochs on the source")
    lr: float = Field(default=3e-4, gt=0, le=1, description="of those epochs (AdamW)")
    interpolation: float = Field(
        default=1.0, ge=0, le=1, description="1: the trained weights, 0: the start (WiSE-FT)"
    )
    anchor_images: int = Field(
        default=512, ge=16, le=100_000, description="of the source, for anchors and compensation"
    )
    token_macs: float | None = Field(
        default=None, gt=0, lt=1, description="share of the MACs that token sampling leaves"
    )
    merge_tokens: bool = Field(
        default=True, description="tokens that go are merged into the most similar, not dropped"
    )
    linear_blocks: tuple[int, ...] = Field(
        default=(), description="numbers of the blocks whose attention is linear"
    )


class NetworkConfig(Section):
    """Names, folders and ports of the server."""

    name: str = Field(
        default="fieldfed", pattern=r"^[A-Za-z0-9_-]{1,40}$", description="of the network"
    )
    host: str = Field(default="127.0.0.1", description="SuperLink's; others come in by [door]")
    port: int = Field(default=8000, ge=1, le=65535, description="SuperLink's, for farms")


class ServerConfig(Section):
    """``server.toml``: everything the server needs."""

    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything that is drawn")
    server: NetworkConfig = Field(default_factory=NetworkConfig)
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    plan: PlanConfig = Field(default_factory=PlanConfig)
    rounds: RoundConfig = Field(default_factory=RoundConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    recovery: RecoveryConfig | None = Field(default=None, description="absent: as in train")
    distil: StudentConfig = Field(default_factory=StudentConfig)
    privacy: PrivacyConfig | None = Field(default=None, description="absent: no noise")
    hub: HubConfig | None = Field(default=None, description="absent: models are not delivered")
    door: DoorConfig | None = Field(default=None, description="absent: farms of this machine only")
    metrics: MetricsConfig | None = Field(default=None, description="absent: nothing is shown")
    page: PageConfig | None = Field(default=None, description="absent: no operator page")
    broker: Broker | None = Field(default=None, description="absent: devices tell nothing")
    region: RegionConfig | None = Field(default=None, description="absent: no region of a centre")
    regions: tuple[RegionEntry, ...] = Field(
        default=(), description="the regions that this server is the centre of"
    )

    @model_validator(mode="after")
    def _regions_recover_alike(self) -> Self:
        if self.recovery is not None and self.regions:
            raise ValueError("recovery cannot go with regions: they train alike in all rounds")
        return self

    def train_under(self, mask: Mask) -> TrainConfig:
        """How farms train a backbone that a run has brought under this mask."""
        if self.recovery is None or mask.is_dense:
            return self.train
        return self.recovery.after(self.train)

    @model_validator(mode="after")
    def _privacy_fits_plan(self) -> Self:
        if self.plan.moments == "farms" and self.privacy is not None:
            raise ValueError("plan.moments = 'farms' adds no noise: it cannot go with [privacy]")
        if self.plan.moments == "farms" and self.rounds.aggregation != "mean":
            raise ValueError(
                "plan.moments = 'farms' trusts every farm: with rounds.aggregation = "
                f"'{self.rounds.aggregation}' leave it at 'source'"
            )
        if self.privacy is None or not self.plan.prunes:
            return self
        if self.privacy.score_noise > 0 and self.plan.invariance_exponent > 0:
            raise ValueError(
                "plan.criterion cannot be taha with privacy.score_noise: shifts are not sent"
            )
        if self.privacy.max_epsilon is not None and self.privacy.score_noise == 0:
            raise ValueError("privacy.max_epsilon needs privacy.score_noise in a run that prunes")
        return self


METERED_POLL_SECONDS = 30.0
Hour = Annotated[int, Field(ge=0, le=23)]


class FarmSection(Section):
    """Who the farm is, where its images are and whom it talks to."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$", description="of the farm in its network")
    data: Path = Field(description="CLASS/*.jpg, or train/CLASS and test/CLASS")
    superlink: str | None = Field(
        default=None,
        pattern=r"^[^\s:/]+:\d{1,5}$",
        description="unset: the door, or port 8000 here",
    )
    link: Literal["always", "metered"] = Field(
        default="always", description="metered: connected only while awake"
    )
    poll_seconds: float | None = Field(
        default=None, ge=3, le=600, description="between asking for work; unset: 3, metered 30"
    )
    wake_hours: float = Field(
        default=6.0, gt=0, le=168, description="a metered farm sleeps so long, or until it is woken"
    )
    awake_minutes: float = Field(
        default=10.0, gt=0, le=1440, description="and goes to sleep after so long without work"
    )
    device: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]{1,40}$", description="unset: the farm's name"
    )
    channel: str = Field(
        default="stable", pattern=r"^[a-z][a-z0-9-]{0,19}$", description="whose versions it tries"
    )
    update_hours: tuple[Hour, Hour] | None = Field(
        default=None, description="local hours, from and to; unset: always, metered at night"
    )
    per_class: int | None = Field(default=None, ge=5, description="few-shot: training images used")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the few-shot draw")
    threads: int = Field(default=0, ge=0, le=256, description="CPU threads; 0: all")
    turns: Path | None = Field(
        default=None, description="folder shared by farms on one machine: they take turns at work"
    )
    places: int = Field(default=1, ge=1, le=256, description="farms at work at once, with turns")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 for training where the hardware has it"
    )
    min_noise: float = Field(
        default=0.0, ge=0, le=1e4, description="updates and scores leave with no less noise"
    )
    max_epsilon: float | None = Field(
        default=None, gt=0, le=1e6, description="of all that ever leaves, at delta 1e-5"
    )

    @model_validator(mode="after")
    def _awake_long_enough(self) -> Self:
        polls = self.seconds_between_polls or 0.0
        if self.link == "metered" and 60 * self.awake_minutes < 2 * polls:
            raise ValueError(
                f"awake_minutes = {self.awake_minutes:g} is too short to ask for work every "
                f"{polls:g} s; raise it, or lower poll_seconds"
            )
        return self

    @property
    def seconds_between_polls(self) -> float | None:
        """For which "nothing to do" is believed; None where the link does not count."""
        if self.poll_seconds is None:
            return METERED_POLL_SECONDS if self.link == "metered" else None
        return self.poll_seconds


class WatchConfig(Section):
    """A folder into which a camera drops photographs, which the device classifies."""

    folder: Path = Field(description="where photographs appear")
    quota_bytes: int | None = Field(
        default=None, ge=1_000_000, description="of photographs; the oldest go; unset: none ever"
    )


class FarmConfig(Section):
    """``farm.toml``: everything a farm needs."""

    farm: FarmSection
    broker: Broker | None = Field(default=None, description="absent: this device tells nothing")
    watch: WatchConfig | None = Field(default=None, description="absent: no photographs come")
    metrics: DeviceMetricsConfig | None = Field(default=None, description="absent: none shown")
