"""The scanner of tests/lab/promql.py finds every series of an expression, and nothing else."""

import pytest

from tests.lab.promql import Matcher, Selector, selectors

FOUND = {
    "up": ["up"],
    'up{job="fieldfed"} == 0': ["up"],
    "time() - a_seconds": ["a_seconds"],
    "sum by (job, le) (rate(a_bucket[5m] offset 1d)) / on (job) group_left (x) b:c": [
        "a_bucket",
        "b:c",
    ],
    "a > 0.1 and on (job) b == 1e3 or c unless ignoring (d) e": ["a", "b", "c", "e"],
    'a{x="} b{", y!~"c|d"}[$__range]': ["a"],
    "topk(3, count(a)) or vector(0) # and d": ["a"],
    "sum(a) by (b) + sum(c) without (d)": ["a", "c"],
    "-(a * 2h) ^ bool b": ["a", "b"],
}


@pytest.mark.parametrize("expression", FOUND)
def test_names(expression: str) -> None:
    assert [one.name for one in selectors(expression)] == FOUND[expression]


def test_matchers() -> None:
    found = selectors('a{x="$y", z!~"b|c"} + d')
    matchers = (Matcher("x", "=", "$y"), Matcher("z", "!~", "b|c"))
    assert found == [Selector("a", matchers), Selector("d")]
    assert [one.values for one in matchers] == [["$y"], ["b", "c"]]
