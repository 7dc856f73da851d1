"""Ranges of numeric flags, declared in the type of the field and checked by one function.

A field `lr_init: Positive` or `step_sizes: tuple[Positive, ...]` is parsed as a float or as floats;
`check` then looks at its values. NaN is outside every range, inf outside all but `[..., inf]`.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints


class Range(NamedTuple):
    """The interval from `low` to `high`; a round bracket in `ends` excludes that end."""

    low: float
    high: float = math.inf
    ends: str = "[)"
    also: float | None = None  # a single allowed value outside the interval, such as -1 for "all"

    def holds(self, value: float) -> bool:
        """Whether `value` is allowed."""
        above = value > self.low or (self.ends[0] == "[" and value == self.low)
        below = value < self.high or (self.ends[1] == "]" and value == self.high)
        return (above and below) or value == self.also

    def __str__(self) -> str:
        also = "" if self.also is None else f" or {self.also}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}{also}"


# Steps and sizes are int32 on devices, and JAX drops the digits of a seed above 32 bits.
LARGEST = 2**31 - 1
Count = Annotated[int, Range(1, LARGEST, "[]")]
CountOrAll = Annotated[int, Range(1, LARGEST, "[]", also=-1)]
CountOrNone = Annotated[int, Range(0, LARGEST, "[]")]
Seed = Annotated[int, Range(0, 2**32 - 1, "[]")]
TwoOrMore = Annotated[int, Range(2, LARGEST, "[]")]
Positive = Annotated[float, Range(0, ends="()")]
NonNegative = Annotated[float, Range(0)]
AboveMinusOne = Annotated[float, Range(-1, ends="()")]
Finite = Annotated[float, Range(-math.inf, ends="()")]
Share = Annotated[float, Range(0, 1, "[]")]
PositiveShare = Annotated[float, Range(0, 1, "(]")]
Fraction = Annotated[float, Range(0, 1, "[)")]


def check(config: Any) -> None:
    """Raises ValueError for the first value of a dataclass that is outside its declared range."""
    for name, allowed in declared(type(config)).items():
        value = getattr(config, name)
        for each in value if isinstance(value, tuple) else (value,):
            check_value(f"--{name}", each, allowed)


def check_value(flag: str, value: float, allowed: Range) -> None:
    """Raises ValueError with the flag, its value and the range unless `value` is `allowed`."""
    if not allowed.holds(value):
        raise ValueError(f"{flag} is {value}; it must be {allowed}.")


def declared(config_type: type) -> dict[str, Range]:
    """The range of each field that declares one."""
    hints = get_type_hints(config_type, include_extras=True)
    found = {name: next(_ranges(hint), None) for name, hint in hints.items()}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _ranges(hint: Any) -> Iterator[Range]:
    if isinstance(hint, Range):
        yield hint
    for part in get_args(hint):  # the metadata of Annotated are among its arguments
        yield from _ranges(part)
