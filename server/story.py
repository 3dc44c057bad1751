"""The story of a run: everything that a report, the terminal and ``result.json`` show.

Frozen values with a JSON round trip (``model_dump_json`` and ``model_validate_json``). Accuracies,
F1 and shares are ratios between 0 and 1; sizes are bytes; a run that did not take place is None.
"""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, median
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Ratio = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Difference = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Chapter(BaseModel):
    """A frozen part of a story; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FarmLine(Chapter):
    """What one farm (or the mean farm) reached on its test part."""

    farm: str
    species: str
    probe: Ratio = Field(description="classifier on the untouched backbone")
    local: Ratio | None = Field(default=None, description="trained alone, as long as the rounds")
    dense: Ratio | None = Field(default=None, description="federated, nothing removed")
    pruned: Ratio = Field(description="federated and pruned")
    f1_pruned: Ratio = Field(description="macro-F1 of the pruned backbone")

    def accuracies(self) -> dict[str, float | None]:
        """As one entry of ``result.json``."""
        return self.model_dump(exclude={"farm", "species"})


class RoundPoint(Chapter):
    """One committed round; ``round`` 0 is the state before the first."""

    round: Count
    macs_ratio: Ratio
    heads_kept_ratio: Ratio
    mean_accuracy: Ratio | None = None
    accuracy: dict[str, Ratio] = Field(default_factory=dict, description="by farm")
    bytes_up: dict[str, Count] = Field(default_factory=dict, description="by farm")
    bytes_down: dict[str, Count] = Field(default_factory=dict, description="by farm")
    link_sent: dict[str, Count] = Field(
        default_factory=dict, description="at the socket since its reply before, by farm"
    )
    link_received: dict[str, Count] = Field(default_factory=dict, description="the same")
    seconds: Seconds = 0.0
    event: str | None = Field(default=None, description="a prune event, in words")


class HeadMap(Chapter):
    """Every head of the dense backbone: what it scored, and whether it is still there."""

    scores: tuple[tuple[Finite | None, ...], ...] = Field(description="by block, then head")
    kept: tuple[tuple[bool, ...], ...] = Field(description="by block, then head")

    @model_validator(mode="after")
    def _same_shape(self) -> Self:
        if [len(row) for row in self.scores] != [len(row) for row in self.kept]:
            raise ValueError("scores and kept must name the same heads, block by block")
        return self

    def counts(self) -> tuple[int, int]:
        """Heads kept, and heads there were."""
        return sum(map(sum, self.kept)), sum(map(len, self.kept))


class CutHead(Chapter):
    """What a head was worth when a prune event judged it, over the mean head of that round.

    ``together`` is what the mask went by; blocks and heads count from 0, in the dense backbone.
    """

    block: Count
    head: Count
    removed: bool
    together: Finite
    farms: dict[str, Finite] = Field(default_factory=dict, description="by farm")


class CutPoint(Chapter):
    """A prune event: the heads that it removed and, of those that stayed, the closest."""

    round: Count = Field(description="after which it took place")
    heads: Count = Field(description="that were judged")
    left: Count
    threshold: Finite = Field(description="between the heads that went and those that stayed")
    undone: bool = Field(default=False, description="the accuracy guard brought them back")
    tried: str = Field(default="", description="what farms tried before, and what came of it")
    rows: tuple[CutHead, ...] = Field(min_length=1, description="the least worth first")


class Provenance(Chapter):
    """How to get the same result again."""

    command: str
    commit: str
    versions: dict[str, str]
    seed: int
    settings: dict[str, Any] = Field(default={}, description="other than the defaults")


class PrivacyLine(Chapter):
    """The farm whose privacy cost most, over all runs of the story."""

    farm: str
    epsilon: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        description="None: something was sent without noise"
    )
    delta: Ratio
    updates: Count
    scores: Count


class Story(Chapter):
    """A whole run, from the first probe to the last table."""

    title: str
    farms: tuple[FarmLine, ...] = Field(min_length=1)
    mean: FarmLine
    ci95_dense_minus_pruned: tuple[Difference, Difference] | None = None
    rounds: tuple[RoundPoint, ...] = ()
    heads: HeadMap
    cuts: tuple[CutPoint, ...] = ()
    neurons_kept: tuple[Ratio, ...] = Field(description="share of MLP neurons kept, by block")
    heads_kept_ratio: Ratio
    macs_ratio: Ratio
    params_ratio: float = Field(ge=0, allow_inf_nan=False, description="may exceed 1 in a student")
    macs: Count = Field(description="multiply-accumulates per image of the final backbone")
    params: Count = Field(description="parameters of the final backbone")
    seconds: Seconds
    provenance: Provenance
    privacy: PrivacyLine | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [line.farm for line in self.farms]
        if len(set(names)) != len(names):
            raise ValueError("every farm must be listed once")
        if len(self.neurons_kept) != len(self.heads.kept):
            raise ValueError("heads and neurons_kept must name the same number of blocks")
        order = [point.round for point in self.rounds]
        if order != sorted(set(order)):
            raise ValueError("rounds must be ascending and listed once")
        return self

    def total_bytes(self, farm: str) -> tuple[int, int]:
        """All bytes (up, down) of one farm, round 0 with its first download included."""
        return (
            sum(point.bytes_up.get(farm, 0) for point in self.rounds),
            sum(point.bytes_down.get(farm, 0) for point in self.rounds),
        )

    def played(self) -> tuple[RoundPoint, ...]:
        """The rounds in which farms worked: all but round 0."""
        return tuple(point for point in self.rounds if point.round > 0)

    def mean_bytes(self, farm: str | None = None) -> tuple[float, float]:
        """Mean bytes (up, down) per round of one farm, or per farm and round of all."""
        up = [point.bytes_up for point in self.played()]
        down = [point.bytes_down for point in self.played()]
        return _mean_size(up, farm), _mean_size(down, farm)

    def usual_bytes(self) -> tuple[float, float]:
        """Median bytes (up, down) of a farm in a round: without what a start or a cut needs."""
        up = [size for point in self.played() for size in point.bytes_up.values()]
        down = [size for point in self.played() for size in point.bytes_down.values()]
        return median(up or [0]), median(down or [0])

    def mean_link_bytes(self, farm: str | None = None) -> tuple[float, float] | None:
        """The same at the socket (sent, received), with all that Flower sends around messages.

        None where nobody counted.
        """
        sent = [point.link_sent for point in self.played()]
        received = [point.link_received for point in self.played()]
        if not any(farm in by or (farm is None and by) for by in sent):
            return None
        return _mean_size(sent, farm), _mean_size(received, farm)

    def result(self) -> dict[str, Any]:
        """The contents of ``result.json``; accuracies as ratios, absent runs None.

        ``privacy`` is there only where it was asked for.
        """
        interval = self.ci95_dense_minus_pruned
        private = {} if self.privacy is None else {"privacy": self.privacy.model_dump()}
        return private | {
            "farms": {line.farm: line.accuracies() for line in self.farms},
            "mean": self.mean.accuracies(),
            "ci95_dense_minus_pruned": None if interval is None else list(interval),
            "heads_kept_ratio": self.heads_kept_ratio,
            "macs_ratio": self.macs_ratio,
            "params_ratio": self.params_ratio,
            "rounds": len(self.played()),
            "seconds": self.seconds,
            "bytes_up_per_round": self.mean_bytes()[0],
            "provenance": self.provenance.model_dump(exclude_defaults=True),
        }


def _mean_size(rounds: Iterable[Mapping[str, int]], farm: str | None) -> float:
    sizes = [size for by in rounds for name, size in by.items() if farm in (None, name)]
    return fmean(sizes) if sizes else 0.0


# --- words -------------------------------------------------------------------------------------


def percent(ratio: float | None, digits: int = 1) -> str:
    """``0.8731`` as ``87.3 %``; a dash for a run that did not take place."""
    return "-" if ratio is None else f"{100 * ratio:.{digits}f} %"


def size_text(size: float) -> str:
    """Bytes in the unit that leaves one to three digits: ``71.4 kB``."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: float) -> str:
    """A large count with its SI letter: ``5.51 G``."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def duration_text(seconds: float) -> str:
    """``75`` as ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def epsilon_text(value: float | None) -> str:
    """``3.21``, rounded up, for the bound must hold; words where there is none."""
    return "no bound" if value is None else f"{math.ceil(100 * value) / 100:.2f}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    exponent = 0
    while abs(value) >= 999.5 and exponent < len(units) - 1:
        value, exponent = value / 1000, exponent + 1
    digits = 0 if exponent == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[exponent]}".rstrip()


# --- terminal ----------------------------------------------------------------------------------


def terminal_table(story: Story) -> Group:
    """The story for ``rich.console.Console.print``; readable without colour and at 80 columns."""
    parts: list[RenderableType] = [
        _results(story),
        Text(_interval_line(story)),
        Text(),
        _costs(story),
        _mask(story),
    ]
    if story.privacy is not None:
        parts += [Text(_privacy_line(story.privacy)), Text()]
    if story.played():
        parts += [_rounds(story), _traffic(story)]
    return Group(*parts)


def _privacy_line(line: PrivacyLine) -> str:
    return (
        f"  privacy of farm {line.farm}, the worst: epsilon {epsilon_text(line.epsilon)} at delta "
        f"{line.delta:g}; accuracies, image counts and times are outside"
    )


def _interval_line(story: Story) -> str:
    if story.ci95_dense_minus_pruned is None:
        return ""
    low, high = (100 * bound for bound in story.ci95_dense_minus_pruned)
    return f"  dense minus pruned: {low:+.1f} to {high:+.1f} points (95 %, paired bootstrap)"


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A plain table whose first ``left`` columns hold words and the others numbers."""
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        if number < left:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _results(story: Story) -> Table:
    columns = ("farm", "species", "probe", "local", "dense", "pruned", "macro-F1")
    table = _table(f"{story.title}: accuracy on the test images", *columns, left=2)
    for line in (*story.farms, story.mean):
        figures = (line.probe, line.local, line.dense, line.pruned, line.f1_pruned)
        if line is story.mean:
            table.add_section()
        # Text, not str: a name in square brackets is no markup
        table.add_row(Text(line.farm), Text(line.species), *map(percent, figures))
    return table


def _costs(story: Story) -> Table:
    table = _table("What is left of the backbone", "", "left", "of dense")
    kept, heads = story.heads.counts()
    table.add_row("heads", f"{kept} of {heads}", percent(story.heads_kept_ratio))
    table.add_row("MACs per image", count_text(story.macs), percent(story.macs_ratio))
    table.add_row("parameters", count_text(story.params), percent(story.params_ratio))
    return table


def _mask(story: Story) -> Table:
    table = _table("Mask (# kept, . removed)", "block", "heads", "kept", "neurons", left=2)
    for number, (row, share) in enumerate(
        zip(story.heads.kept, story.neurons_kept, strict=True), start=1
    ):
        drawn = "".join("#" if kept else "." for kept in row)
        table.add_row(str(number), drawn, f"{sum(row)} of {len(row)}", percent(share, 0))
    return table


def _rounds(story: Story) -> Table:
    columns = ("round", "event", "accuracy", "MACs", "heads", "time")
    table = _table("Rounds", *columns, left=2)
    for point in story.rounds:
        table.add_row(
            str(point.round),
            Text(point.event or ""),
            percent(point.mean_accuracy),
            percent(point.macs_ratio, 0),
            percent(point.heads_kept_ratio, 0),
            duration_text(point.seconds),
        )
    return table


def _traffic(story: Story) -> Table:
    table = _table("Bytes per farm and round (mean)", "farm", "sent", "received", "in all")
    for line in story.farms:
        up, down = story.mean_bytes(line.farm)
        total = sum(story.total_bytes(line.farm))
        table.add_row(Text(line.farm), size_text(up), size_text(down), size_text(total))
    up, down = story.mean_bytes()
    table.add_section()
    table.add_row("mean", size_text(up), size_text(down), "")
    return table
