"""Settings of what a run does: its rounds, and how its prune events cut."""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from common.section import Section

Criterion: TypeAlias = Literal["taylor", "taha", "l1gates", "magnitude", "random"]
Compensation: TypeAlias = Literal["none", "bias", "least_squares"]
MOST_TRIED = 8
"""Cuts that farms try at a prune event; each is a backbone on every farm's disk for a round."""
Split: TypeAlias = Annotated[float, Field(gt=0, le=10)]
BUDGETS = ("prune_heads", "prune_macs", "prune_time", "targets")
"""Fields of a plan of which one at most says how far to go."""


class TargetsConfig(Section):
    """A run that looks for the smallest backbone that is still good enough."""

    macs_ratio: float = Field(gt=0, lt=1, description="of the dense backbone; not below it")
    max_drop_ratio: float = Field(
        ge=0, le=1, description="decide accuracy that all cuts together may cost"
    )
    recovery_rounds: int = Field(
        default=2, ge=1, le=100, description="rounds from a cut to the verdict on it"
    )


class PlanConfig(Section):
    """What a run does: its rounds and its prune events."""

    rounds: int = Field(default=6, ge=1, le=10_000, description="of a run")
    prune_heads: float | None = Field(default=None, description="share of heads removed, (0, 1)")
    prune_macs: float | None = Field(default=None, description="share of MACs removed, (0, 1)")
    prune_time: float | None = Field(
        default=None, description="share of the time on a device removed, (0, 1); needs costs"
    )
    costs: Path | None = Field(
        default=None, description="what 'fieldfed-client costs' wrote on such a device"
    )
    targets: TargetsConfig | None = Field(
        default=None, description="absent: another budget says how far to go"
    )
    prune_events: int = Field(default=2, ge=1, le=100, description="cuts on the way")
    warmup: int = Field(default=1, ge=0, le=1000, description="rounds before the first event")
    criterion: Criterion = Field(
        default="taylor", description="how farms score heads and neurons (client/criteria.py)"
    )
    exponent: float = Field(
        default=1.0, ge=0, le=10, description="a in importance * invariance^a of taha"
    )
    compensation: Compensation = Field(
        default="least_squares", description="how what was cut is made up for, by second moments"
    )
    moments: Literal["source", "farms"] = Field(
        default="source",
        description="farms: they send second moments of their images before a cut, megabytes",
    )
    redundancy: bool = Field(
        default=True,
        description="with least squares: count only what other units cannot say in a unit's place",
    )
    kappa: float = Field(
        default=0.25, ge=0, le=1, description="share of the maximum over farms, with mean"
    )
    consensus: Literal["mean", "median", "trimmed"] = Field(
        default="mean", description="how scores of many farms become one"
    )
    max_drop_ratio: float = Field(
        default=0.05, ge=0, le=1, description="accuracy a prune event may cost after its recovery"
    )
    whole_attention: bool = Field(
        default=False, description="a block may lose all heads; no older farm or device takes that"
    )
    heads_per_neurons: Split = Field(
        default=0.7, description="share of heads dropped per share of neurons dropped"
    )
    neuron_multiple: int = Field(
        default=1, ge=1, le=256, description="blocks keep a multiple of so many neurons"
    )
    try_splits: tuple[Split, ...] = Field(
        default=(),
        description="heads_per_neurons of which the farms' decide parts choose one at each cut",
    )
    try_compensations: tuple[Compensation, ...] = Field(
        default=(), description="likewise for compensation"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(getattr(self, name) is not None for name in BUDGETS) > 1:
            raise ValueError(f"give one of {', '.join(BUDGETS)}, and no other")
        if self.prune_time is not None and self.costs is None:
            raise ValueError("prune_time needs costs: a file that 'fieldfed-client costs' wrote")
        if self.prune_time is not None and self.whole_attention:
            raise ValueError("prune_time cannot have whole_attention: no time is known of it")
        for name in ("prune_heads", "prune_macs", "prune_time"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1 (exclusive), not {value}")
        if max(len(self.try_splits), 1) * max(len(self.try_compensations), 1) > MOST_TRIED:
            raise ValueError(f"try_splits times try_compensations: at most {MOST_TRIED} cuts")
        if self.try_splits and (self.prune_heads is not None or not self.prunes):
            raise ValueError("try_splits is for budgets of MACs or time, which it divides")
        return self

    @property
    def invariance_exponent(self) -> float:
        """How much a head's invariance counts: taha's ``exponent``, 0 for every other criterion."""
        return self.exponent if self.criterion == "taha" else 0.0

    def spares_redundant(self, compensation: Compensation) -> bool:
        """Whether scores are lowered where other units can stand in (server/redundancy.py)."""
        return self.redundancy and compensation == "least_squares"

    @property
    def prunes(self) -> bool:
        """Whether the run removes anything."""
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def cuts_neurons(self) -> bool:
        """Whether cuts remove MLP neurons too; a share of the heads is of heads alone."""
        return self.prune_heads is None

    def uncut(self) -> Self:
        """The same plan, removing nothing."""
        nothing = dict.fromkeys(BUDGETS)
        return self.model_copy(update=nothing | {"try_splits": (), "try_compensations": ()})

    @property
    def tolerance(self) -> float:
        """Decide accuracy that may be lost before a cut is undone."""
        return self.max_drop_ratio if self.targets is None else self.targets.max_drop_ratio
