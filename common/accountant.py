"""What noise is worth: epsilon at a delta, exactly, for everything that a farm has sent.

The unit of privacy is all data of one farm, and neighbours differ by *replacement*: the guarantee
compares what a farm sends with what it would have sent had all of its images been others. (That a
farm takes part at all is no secret: the server knows who answers it.) A vector whose L2 norm is at
most C may then move by 2 C, so Gaussian noise of standard deviation z * C makes one reply

    mu-GDP,  mu = 2 C / (z C) = 2 / z                   (Dong, Roth and Su, 2019, theorem 1)

Authors who add or remove a unit instead, at distance C, print half of this mu. Replies compose
exactly, whatever the later ones make of the earlier (corollary 2 there), and mu-GDP is
(epsilon, delta)-DP for exactly

    delta(epsilon) = Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2)

(Balle and Wang, 2018, theorem 8). No gain is claimed for farms that are asked by chance: who
answers is seen. With u = epsilon / mu - mu / 2, v = u + mu and e^epsilon phi(v) = phi(u), the
second term is phi(u) R(v), R being Mills' ratio Phi(-x) / phi(x): nothing overflows.
"""

import math

from common.config import PrivacyConfig
from common.errors import ConfigError

_SERIES_FROM = 8.0
_SERIES_TERMS = 60


def mu_squared(config: PrivacyConfig, updates: int, scores: int) -> float:
    """mu^2 of so many updates and replies with scores: 4 (updates / z^2 + 2 scores / z_s^2).

    Scores count twice, for those of heads and those of neurons carry noise of their own. Infinite
    where something is sent without noise.
    """
    return _share(updates, config.noise) + _share(2 * scores, config.score_noise)


def _share(releases: int, noise: float) -> float:
    if releases == 0:
        return 0.0
    return math.inf if noise == 0 else 4.0 * releases / noise**2


def epsilon(mu_squared: float, delta: float) -> float:
    """The smallest epsilon for which mu-GDP is (epsilon, delta)-DP, never below it.

    Args:
        mu_squared: 0 (nothing was sent) to infinity (something without noise).
        delta: above 0, below 1.

    Raises:
        ConfigError: an argument is not as described.
    """
    if not (mu_squared >= 0 and 0 < delta < 1):
        raise ConfigError(f"no epsilon for mu^2 = {mu_squared} at delta = {delta}")
    if math.isinf(mu_squared):
        return math.inf
    mu, goal = math.sqrt(mu_squared), math.log(delta)
    if mu == 0 or log_delta(0.0, mu) <= goal:
        return 0.0
    # an upper bound: (mu^2 / 2)-zCDP (Bun and Steinke, 2016, proposition 1.3)
    low, high = 0.0, mu_squared / 2 + mu * math.sqrt(-2 * goal)
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if log_delta(middle, mu) > goal:
            low = middle
        else:
            high = middle
    return high


def log_delta(epsilon: float, mu: float) -> float:
    """Log delta(epsilon) of mu-GDP, for epsilon >= 0 and mu > 0; relative error about 1e-10."""
    u = epsilon / mu - mu / 2
    v = u + mu
    if u > 0:
        gap = _mills(u) - _mills(v)
        return _log_density(u) + math.log(gap) if gap > 0 else -math.inf
    return math.log(max(_tail(u) - math.exp(_log_density(u)) * _mills(v), math.ulp(0.0)))


def _log_density(x: float) -> float:
    return -0.5 * x * x - 0.5 * math.log(2 * math.pi)


def _tail(x: float) -> float:
    """Phi(-x)."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def _mills(x: float) -> float:
    """Phi(-x) / phi(x) for x >= 0; far out by Laplace's continued fraction."""
    if x < _SERIES_FROM:
        return _tail(x) / math.exp(_log_density(x))
    fraction = x
    for term in range(_SERIES_TERMS, 0, -1):
        fraction = x + term / fraction
    return 1 / fraction
