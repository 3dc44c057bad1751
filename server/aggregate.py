"""Aggregation of spooled updates: chunk by chunk, in the order of farms, in bounded memory.

    mean_n = sum_i w_i x_in / sum_i w_i        FedAvg (McMahan et al. 2017), w_i = examples

Sums run over farms by name in float64, so the order of arrival, the chunk and the number of
slices cannot change a bit of the result. However many replies there are, one chunk of numbers is
in memory beside the result. What resists lying farms is in server/robust.py.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from common import codec
from common.codec import Floats, Header, Read
from common.config import Aggregation
from common.errors import ConfigError, ProtocolError, StateError
from server import robust
from server.robust import Doubles

Source: TypeAlias = tuple[Read, Header]

CHUNK = 1 << 20


class UpdateReader(Protocol):
    """A coded update that can be read in slices; the spool's readers are such."""

    @property
    def node(self) -> int:
        """The node that sent it."""
        ...

    @property
    def farm(self) -> str:
        """Its name: nodes get new numbers when they start again, and sums depend on the order."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the coded update from ``offset``."""
        ...


def aggregate(
    readers: Sequence[UpdateReader],
    weights: Sequence[float],
    *,
    count: int,
    base: str | None = None,
    chunk: int = CHUNK,
    clip: float | None = None,
    rule: Aggregation = "mean",
    liars: float = 0.2,
) -> Floats:
    """One update from many.

    Args:
        readers: the updates, in any order, one per node.
        weights: one positive weight per reader; median and trimmed mean count each farm once.
        count: numbers in an update, n.
        base: digest that all updates must be based on; ``None``: any.
        chunk: numbers decoded at a time, of one update (mean) or of all together (robust rules).
        clip: updates whose L2 norm exceeds ``clip`` times the median norm are scaled down to it;
            ``None``: no clipping.
        rule: how updates are merged; see server/robust.py.
        liars: share of farms that a robust rule is to withstand, below 1/2.

    Returns:
        fp32 (n,).

    Raises:
        ConfigError: ``clip`` is not above 0, ``liars`` is not in [0, 1/2) or the rule is unknown.
        StateError: there is nothing to aggregate, a node occurs twice, or a weight is not positive.
        ProtocolError: an update does not fit; it should have been refused when it arrived.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"updates are clipped to a multiple of their median norm, not {clip}")
    entries = _by_farm(readers, weights)
    headers = [_header(reader, base, count) for reader, _ in entries]
    sources = [(reader.read, header) for (reader, _), header in zip(entries, headers, strict=True)]
    shares = np.array([weight for _, weight in entries], dtype=np.float64)
    factors = np.ones(len(sources))
    if clip is not None:
        factors = _clip_factors([_norm(*source, chunk) for source in sources], clip)
    if rule == "mean":
        return _mean(sources, shares / shares.sum() * factors, count, chunk)
    return robust.merge(_Stack(sources, factors, count, chunk), shares, rule, liars)


def _mean(sources: Sequence[Source], shares: Doubles, count: int, chunk: int) -> Floats:
    mean = np.empty(count, dtype=np.float32)
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        total = np.zeros(stop - start, dtype=np.float64)
        for share, (read, header) in zip(shares, sources, strict=True):
            total += share * codec.decode_slice(read, header, start, stop)
        mean[start:stop] = total
    return mean


class _Stack:
    """Clipped updates side by side, (F, part of n) float64, a chunk of all numbers at a time."""

    def __init__(self, sources: Sequence[Source], factors: Doubles, count: int, chunk: int) -> None:
        self._sources, self._factors, self.count = sources, factors, count
        self._width = max(1, chunk // len(sources))

    def __iter__(self) -> Iterator[tuple[slice, Doubles]]:
        for start in range(0, self.count, self._width):
            stop = min(start + self._width, self.count)
            rows = [codec.decode_slice(*source, start, stop) for source in self._sources]
            yield slice(start, stop), np.stack(rows) * self._factors[:, None]


def _by_farm(
    readers: Sequence[UpdateReader], weights: Sequence[float]
) -> list[tuple[UpdateReader, float]]:
    entries = sorted(
        zip(readers, weights, strict=True), key=lambda entry: (entry[0].farm, entry[0].node)
    )
    nodes = [reader.node for reader, _ in entries]
    if not entries:
        raise StateError("no reply to aggregate; the round cannot be closed")
    if len(set(nodes)) < len(nodes):
        raise StateError(f"a farm's reply would count twice in the aggregate; nodes: {nodes}")
    for reader, weight in entries:
        if not (np.isfinite(weight) and weight > 0):
            raise StateError(f"the reply of node {reader.node} has weight {weight}, not above 0")
    return entries


def _header(reader: UpdateReader, base: str | None, count: int) -> Header:
    try:
        header = codec.read_header(reader.read(0, codec.HEADER_BYTES))
        codec.check_header(header, base=base, count=count)
    except ProtocolError as error:
        raise ProtocolError(f"reply of node {reader.node}: {error}", error.reason) from error
    return header


def _norm(read: Read, header: Header, chunk: int) -> float:
    """L2 norm of an update, in float64."""
    squares = 0.0
    for start in range(0, header.count, chunk):
        stop = min(start + chunk, header.count)
        part = codec.decode_slice(read, header, start, stop).astype(np.float64)
        squares += float(np.square(part).sum())
    return float(np.sqrt(squares))


def _clip_factors(norms: Sequence[float], clip: float) -> npt.NDArray[np.float64]:
    """At most 1 each: what brings a norm down to ``clip`` times the median norm."""
    lengths = np.array(norms, dtype=np.float64)
    limit = clip * np.median(lengths)
    return np.minimum(1.0, limit / np.maximum(lengths, np.finfo(np.float64).tiny))
