"""Ranges of numeric flags, declared in the type of a field and checked by one function.

For example `lr_init: Positive` or `step_sizes: tuple[Positive, ...]`. NaN is in no range, inf only
in those that include it.
"""

import math
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints


class Range(NamedTuple):
    """An interval with brackets `ends`, as in [low, high), and another allowed value `also`."""

    low: float
    high: float = math.inf
    ends: str = "[)"
    also: float | None = None

    def check(self, flag: str, value: float) -> None:
        """Raises ValueError with flag, value and range unless `value` is allowed."""
        above = value > self.low or (self.ends[0] == "[" and value == self.low)
        below = value < self.high or (self.ends[1] == "]" and value == self.high)
        if not (above and below) and (self.also is None or value != self.also):
            also = "" if self.also is None else f" or {self.also}"
            interval = f"{self.ends[0]}{self.low}, {self.high}{self.ends[1]}"
            raise ValueError(f"{flag} is {value}; it must be in {interval}{also}.")


# Steps and sizes are int32 on devices, and JAX truncates seeds to 32 bits.
LARGEST = 2**31 - 1
Count = Annotated[int, Range(1, LARGEST, "[]")]
CountOrAll = Annotated[int, Range(1, LARGEST, "[]", also=-1)]
CountOrNone = Annotated[int, Range(0, LARGEST, "[]")]
TwoOrMore = Annotated[int, Range(2, LARGEST, "[]")]
Seed = Annotated[int, Range(0, 2**32 - 1, "[]")]
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
            allowed.check(f"--{name}", each)


def declared(config_type: type) -> dict[str, Range]:
    """The range of each field that declares one."""
    return {
        name: found
        for name, hint in get_type_hints(config_type, include_extras=True).items()
        for each in (hint, *get_args(hint))  # Positive, or the first of tuple[Positive, ...]
        for found in getattr(each, "__metadata__", ())
        if isinstance(found, Range)
    }
