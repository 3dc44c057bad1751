"""A network in regions agrees on what the same farms in one network would."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import backbone, codec
from common.errors import ProtocolError, RejectReason
from common.scores import UnitScores, median_tau
from server import consensus as flat
from server.aggregate import aggregate
from server.consensus import Part, consensus, farm_scores, pooled, total_weight
from server.region_close import sums_of
from server.region_record import RegionReply, check_sums
from server.spool import ReplyScores
from tests.lab.network import SIDE, TINY
from tests.lab.replies import DIGEST

SPEC = backbone.dense_spec("vit_tiny_patch16_224", SIDE, TINY)
HEADS, NEURONS = sum(SPEC.heads), sum(SPEC.neurons)
BASE = "cd" * 32
CLOSE = 1e-6
"""What fp32 rounds once more in the means of regions."""


@dataclass(frozen=True)
class Farm:
    """Who has sent what."""

    examples: int
    scores: ReplyScores
    update: codec.Floats


@st.composite
def networks(draw: st.DrawFn, most: int = 9, largest: int = 400) -> list[list[Farm]]:
    """Farms of like size in two or three regions."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, most), min_size=2, max_size=3))

    def farm() -> Farm:
        importance = rng.random(HEADS).astype(np.float32)
        scores = ReplyScores(
            importance,
            rng.normal(0.05, 0.1, HEADS).astype(np.float32),
            rng.random(NEURONS).astype(np.float32),
        )
        update = rng.normal(0, 1, 60).astype(np.float32)
        return Farm(int(rng.integers(largest // 8, largest)), scores, update)

    return [[farm() for _ in range(size)] for size in sizes]


def scored(farm: Farm, tau: float, exponent: float) -> UnitScores:
    sent = farm.scores
    return farm_scores(
        sent.head_importance,
        sent.head_mmd2,
        sent.neuron_importance,  # type: ignore[arg-type]
        tau=tau,
        exponent=exponent,
        spec=SPEC,
    )


def sums(farms: list[Farm], tau: float, exponent: float) -> dict[str, codec.Floats]:
    weighed = [(farm.examples, scored(farm, tau, exponent)) for farm in farms]
    mean, most = consensus(weighed, kappa=0.0), consensus(weighed, kappa=1.0)
    weight = total_weight([farm.examples for farm in farms])
    return sums_of(mean, most, [farm.scores for farm in farms], weight)


def part_of(arrays: dict[str, codec.Floats]) -> Part:
    mean, most = (
        UnitScores.from_flat(arrays[f"head_{what}"], arrays[f"neuron_{what}"], SPEC)
        for what in ("mean", "most")
    )
    return Part(float(arrays["totals"][0]), mean, most)


@settings(deadline=None, max_examples=40)
@given(networks(), st.floats(0, 1), st.floats(0.01, 1), st.sampled_from([0.0, 1.0, 2.0]))
def test_regions_agree_on_the_scores_of_one_network(
    regions: list[list[Farm]], kappa: float, tau: float, exponent: float
) -> None:
    everyone = [farm for region in regions for farm in region]
    whole = consensus([(farm.examples, scored(farm, tau, exponent)) for farm in everyone], kappa)
    apart = pooled([part_of(sums(region, tau, exponent)) for region in regions], kappa)
    for mine, theirs in (
        (apart.flat_heads(), whole.flat_heads()),
        (apart.flat_neurons(), whole.flat_neurons()),
    ):
        np.testing.assert_allclose(mine, theirs, rtol=CLOSE, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(networks())
def test_regions_find_the_scale_of_one_network(regions: list[list[Farm]]) -> None:
    everyone = [farm.scores.head_mmd2 for region in regions for farm in region]
    records = [sums(region, 1.0, 0.0) for region in regions]
    mean = np.average(
        np.stack([record["shift"] for record in records]).astype(np.float64),
        axis=0,
        weights=[float(record["totals"][1]) for record in records],
    )
    assert median_tau(mean) == pytest.approx(flat.median_tau(everyone), rel=CLOSE, abs=1e-8)


@dataclass(frozen=True)
class Sent:
    """A coded update as the aggregate reads it."""

    node: int
    farm: str
    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def merged(updates: list[tuple[int, codec.Floats]], clip: float | None = None) -> codec.Floats:
    sent = [
        Sent(node, f"farm{node:03d}", codec.encode(update, BASE, bits=32).tobytes())
        for node, (_, update) in enumerate(updates)
    ]
    weights = [float(examples) for examples, _ in updates]
    return aggregate(sent, weights, count=updates[0][1].size, clip=clip)


@settings(deadline=None, max_examples=40)
@given(networks())
def test_regions_learn_the_update_of_one_network(regions: list[list[Farm]]) -> None:
    everyone = [(farm.examples, farm.update) for region in regions for farm in region]
    records = [
        (
            sum(farm.examples for farm in region),
            merged([(farm.examples, farm.update) for farm in region]),
        )
        for region in regions
    ]
    np.testing.assert_allclose(merged(records), merged(everyone), rtol=1e-5, atol=CLOSE)


@settings(deadline=None, max_examples=40)
@given(networks(), st.floats(0, 1))
def test_a_farm_over_the_cap_of_its_region_weighs_three_medians_of_it(
    regions: list[list[Farm]], kappa: float
) -> None:
    """The one rule of the consensus that is another in regions, as its docstring says."""
    home = regions[0]
    giant = Farm(10**8, home[0].scores, home[0].update)
    crowd = [*home, *home, giant]
    roots = np.sqrt([farm.examples for farm in crowd])
    expected = np.minimum(roots, 3 * np.median(roots)).sum()
    assert total_weight([farm.examples for farm in crowd]) == pytest.approx(expected)
    assert roots.max() > 3 * np.median(roots)
    alone = pooled([part_of(sums(crowd, 1.0, 0.0))], kappa)
    whole = consensus([(farm.examples, scored(farm, 1.0, 0.0)) for farm in crowd], kappa)
    np.testing.assert_allclose(alone.flat_heads(), whole.flat_heads(), rtol=CLOSE)


def test_median_and_trimmed_mean_are_of_regions() -> None:
    """They are not made of sums: over regions they take each region's mean for one farm's."""
    rng = np.random.default_rng(0)
    rows = [
        UnitScores.from_flat(
            rng.random(HEADS).astype(np.float32), rng.random(NEURONS).astype(np.float32), SPEC
        )
        for _ in range(5)
    ]
    agreed = pooled([Part(1.0 + n, row, row) for n, row in enumerate(rows)], 0.0, "median")
    middle = np.median(np.stack([row.flat_heads() for row in rows]), axis=0)
    np.testing.assert_allclose(agreed.flat_heads(), middle.astype(np.float32))


# --- what a centre takes -------------------------------------------------------------------------


def reply(**changes: object) -> RegionReply:
    mean = np.full(HEADS, 0.1, np.float32)
    neurons = np.full(NEURONS, 0.1, np.float32)
    values: dict[str, object] = {
        "run": 1,
        "round": 1,
        "attempt": 1,
        "farm": "north",
        "base": DIGEST,
        "mask": DIGEST,
        "examples": 30,
        "accuracy": 0.5,
        "f1": 0.5,
        "loss": 1.0,
        "dal": 0.0,
        "steps": 3,
        "train_seconds": 1.0,
        "seconds": 2.0,
        "update": np.zeros(3, np.uint8),
        "farms": 3,
        "head_mean": mean,
        "head_most": mean,
        "neuron_mean": neurons,
        "neuron_most": neurons,
        "shift": mean,
        "totals": np.array([9.0, 3.0], np.float32),
    }
    return RegionReply.model_validate(values | changes)


def test_good_sums_are_taken() -> None:
    check_sums(reply(), SPEC)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_mean": None}, RejectReason.SHAPE),
        ({"neuron_most": np.zeros(NEURONS - 1, np.float32)}, RejectReason.SHAPE),
        ({"shift": np.full(HEADS, np.nan, np.float32)}, RejectReason.NOT_FINITE),
        ({"totals": np.array([np.inf, 3.0], np.float32)}, RejectReason.NOT_FINITE),
        ({"totals": np.array([0.0, 3.0], np.float32)}, RejectReason.MALFORMED),
        ({"totals": np.array([9.0, 4.0], np.float32)}, RejectReason.MALFORMED),
        ({"head_mean": np.full(HEADS, -0.1, np.float32)}, RejectReason.MALFORMED),
        ({"neuron_mean": np.full(NEURONS, 0.2, np.float32)}, RejectReason.MALFORMED),
    ],
)
def test_bad_sums_are_refused(changes: dict[str, object], reason: RejectReason) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_sums(reply(**changes), SPEC)
    assert caught.value.reason is reason
