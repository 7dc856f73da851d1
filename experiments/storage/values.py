"""Values as JSON and back, exactly; and what in them can be a number. Imports no JAX.

JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity", "-Infinity",
and a string that says one of these words gets a backslash in front. What is read is what was given.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
DEEPEST = 100  # lists in lists: far from where Python's own stack ends, wherever one is read


def from_bytes(text: bytes) -> dict[str, Any]:
    """A JSON object; ValueError where it isn't one, or leaves open what one of its keys means."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unambiguous)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return _decode(value, DEEPEST)


def to_text(value: Any, indent: int | None = None) -> str:
    """What `from_bytes` reads; TypeError for what JSON can't say."""
    return json.dumps(encode(value), indent=indent, allow_nan=False)


def shown(value: Any, most: int = 60) -> str:
    """A value as JSON in a message: printable, and not too long."""
    return shortened(to_text(value), most)


def shortened(text: str, most: int = 300) -> str:
    """`text`, or its beginning: what a file says may be of any length."""
    return text if len(text) <= most else f"{text[:most]}…"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a float can stand for it: NaN can, a truth value or an integer beyond 1e308 can't."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def encode(value: Any) -> Any:
    """`value` in what JSON can say: arrays and tuples as lists, paths as strings."""
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return encode(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return encode(os.fspath(value))
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value.lstrip("\\") in NOT_FINITE:
        return "\\" + value
    return value


def _decode(value: Any, deepest: int) -> Any:
    """The inverse of `encode` on what JSON can say."""
    if deepest < 0:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        return {key: _decode(item, deepest - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item, deepest - 1) for item in value]
    if isinstance(value, str) and value.lstrip("\\") in NOT_FINITE:
        return NOT_FINITE.get(value, value[1:])
    return value


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {shown(twice)} occurs twice")
    return found
