"""Which series an expression of PromQL asks for: names, and what is wanted of their labels."""

import re
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = re.compile(
    r'(?P<string>"(?:[^"\\]|\\.)*")|(?P<window>\[[^\]]*\])|(?P<labels>\{(?:[^}"]|"(?:[^"\\]|\\.)*")*\})'
    r"|(?P<number>\d[\w.]*)|(?P<name>[a-zA-Z_:][\w:]*)|(?P<sign>\S)"
)
_MATCHER: Final = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_LISTS: Final = {"by", "without", "on", "ignoring", "group_left", "group_right"}
"""Names of labels stand behind them, in brackets."""
_WORDS: Final = {
    *("and", "or", "unless", "bool", "offset", "inf", "nan"),
    *("sum", "min", "max", "avg", "group", "stddev", "stdvar", "count", "count_values"),
    *("bottomk", "topk", "quantile"),
}


@dataclass(frozen=True)
class Matcher:
    """What is wanted of a label."""

    label: str
    sign: str
    value: str

    @property
    def values(self) -> list[str]:
        """The values that it names, where it lists them."""
        return self.value.split("|") if "~" in self.sign else [self.value]


@dataclass(frozen=True)
class Selector:
    """A name, and what is wanted of its labels."""

    name: str
    matchers: tuple[Matcher, ...] = ()


def selectors(expression: str) -> list[Selector]:
    """Every series that is asked for, in order; functions and words of the language are none."""
    bare = re.sub(r"#[^\n]*", "", expression)
    tokens = [(str(one.lastgroup), one.group()) for one in _TOKEN.finditer(bare)]
    found: list[Selector] = []
    within = False  # a list of labels
    for (kind, text), (kind_after, after) in zip(tokens, [*tokens[1:], ("", "")], strict=True):
        if text in _LISTS:
            within = after == "("
        elif within:
            within = text != ")"
        elif kind == "name" and text.lower() not in _WORDS and after != "(":
            found.append(Selector(text, _matchers(after if kind_after == "labels" else "")))
    return found


def _matchers(labels: str) -> tuple[Matcher, ...]:
    return tuple(Matcher(*one) for one in _MATCHER.findall(labels))
