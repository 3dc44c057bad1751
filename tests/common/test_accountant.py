"""Epsilon against the integral it stands for, and what more noise, rounds and delta do to it."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.accountant import epsilon, log_delta, mu_squared
from common.config import PrivacyConfig
from common.errors import ConfigError

noises = st.floats(0.01, 1000)
deltas = st.floats(1e-12, 0.5)


def config(noise: float = 0.0, scores: float = 0.0) -> PrivacyConfig:
    return PrivacyConfig(clip=1.0, noise=noise, score_noise=scores)


def integral(eps: float, mu: float) -> float:
    """The hockey-stick divergence of N(mu, 1) from N(0, 1), summed up over a fine grid."""
    t, step = np.linspace(mu - 40, mu + 40, 4_000_001, retstep=True)
    with np.errstate(over="ignore"):
        excess = np.exp(-0.5 * (t - mu) ** 2) - np.exp(np.minimum(eps - 0.5 * t**2, 700))
    return float(np.maximum(excess, 0).sum() * step / math.sqrt(2 * math.pi))


@pytest.mark.parametrize(
    ("eps", "mu"),
    [(0.0, 1.0), (0.5, 0.3), (1.0, 1.0), (4.0, 1.0), (8.0, 2.0), (20.0, 4.0), (60, 9)],
)
def test_delta_is_the_divergence_of_two_shifted_gaussians(eps: float, mu: float) -> None:
    assert math.exp(log_delta(eps, mu)) == pytest.approx(integral(eps, mu), rel=1e-5, abs=1e-13)


@given(st.floats(0, 5), st.floats(0.2, 5))
def test_delta_is_what_the_textbook_formula_says_where_that_can_be_computed(
    eps: float, mu: float
) -> None:
    phi = NormalDist().cdf
    plain = phi(-eps / mu + mu / 2) - math.exp(eps) * phi(-eps / mu - mu / 2)
    assert math.exp(log_delta(eps, mu)) == pytest.approx(plain, rel=1e-6, abs=1e-12)


def test_one_gdp_is_the_published_pair() -> None:
    # Phi(-1/2) - e Phi(-3/2)
    assert math.exp(log_delta(1.0, 1.0)) == pytest.approx(0.1269367, abs=1e-7)
    assert epsilon(1.0, 0.1269367) == pytest.approx(1.0, abs=1e-6)


@given(st.floats(0.05, 0.99), st.floats(1e-9, 1e-2))
def test_the_classical_bound_is_never_tighter(eps: float, delta: float) -> None:
    sigma = math.sqrt(2 * math.log(1.25 / delta)) / eps  # Dwork and Roth, theorem A.1
    assert epsilon(1 / sigma**2, delta) <= eps


@given(noises, st.integers(1, 10_000), deltas)
def test_epsilon_keeps_its_delta_and_no_smaller_one_does(
    noise: float, rounds: int, delta: float
) -> None:
    spent = mu_squared(config(noise), rounds, 0)
    found = epsilon(spent, delta)
    assert math.isfinite(found)
    assert log_delta(found, math.sqrt(spent)) <= math.log(delta) + 1e-9
    if found > 0:
        assert log_delta(found * (1 - 1e-6), math.sqrt(spent)) >= math.log(delta) - 1e-9


@given(noises, st.integers(1, 1000), deltas, st.floats(1.01, 10))
def test_more_rounds_cost_more_and_more_noise_or_a_larger_delta_less(
    noise: float, rounds: int, delta: float, factor: float
) -> None:
    spent = epsilon(mu_squared(config(noise), rounds, 0), delta)
    assert epsilon(mu_squared(config(noise), rounds + 1, 0), delta) >= spent
    assert epsilon(mu_squared(config(noise * factor), rounds, 0), delta) <= spent
    assert epsilon(mu_squared(config(noise), rounds, 0), min(0.9, delta * factor)) <= spent


@given(st.floats(1e-3, 1e3), deltas)
def test_it_is_strictly_increasing_where_anything_is_spent_at_all(mu: float, delta: float) -> None:
    spent = epsilon(mu**2, delta)
    assert epsilon((1.1 * mu) ** 2, delta) > spent or spent == 0


def test_replies_compose_by_their_squares_and_scores_count_twice() -> None:
    both = mu_squared(config(noise=4.0, scores=5.0), updates=6, scores=2)
    assert both == pytest.approx(4 * 6 / 16 + 4 * 2 * 2 / 25)


def test_replacement_costs_twice_the_mu_of_adding_or_removing() -> None:
    assert mu_squared(config(noise=4.0), 1, 0) == (2 / 4) ** 2


def test_what_is_sent_without_noise_has_no_bound_and_nothing_costs_nothing() -> None:
    assert mu_squared(config(noise=1.0), updates=1, scores=1) == math.inf
    assert epsilon(math.inf, 1e-5) == math.inf
    assert mu_squared(config(), 0, 0) == 0 == epsilon(0.0, 1e-5)


@pytest.mark.parametrize(("spent", "delta"), [(-1, 0.1), (math.nan, 0.1), (1, 0.0), (1, 1.0)])
def test_nonsense_is_refused(spent: float, delta: float) -> None:
    with pytest.raises(ConfigError, match="no epsilon"):
        epsilon(spent, delta)
