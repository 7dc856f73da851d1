"""Whether a published number agrees with our runs, and the evidence if it does not. No JAX."""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from experiments.figures.tables import Row

AGREES, ORDERED, DIFFERS = "agrees", "agrees in order", "differs"
ENOUGH = 8  # fewer finite runs have no 1-99 % range
RESAMPLES = 4000


class Verdict(NamedTuple):
    """Whether the published value lies inside our range, or else in the claimed order."""

    word: str
    inside: bool
    reference: str  # the schedule it is compared with
    confidence: float  # that the order of the two medians is the published one


def verdict(row: Row, rows: Sequence[Row]) -> Verdict | None:
    """The published value inside our 1-99 % range, or the claimed order at 95 % confidence.

    The order is that to the setting's first schedule (of the first: to the last) in the same
    quantity; its confidence is the share of bootstrap resamples of both sets of seeds whose medians
    stand in the published order. A published value stands for all that round to its digits.
    """
    if row.published is None:
        return None
    half_digit = 0.5 * 10.0 ** int(Decimal(str(row.published)).as_tuple().exponent)
    low, high = row.percentile(1) - half_digit, row.percentile(99) + half_digit
    inside = len(row.values) >= ENOUGH and low <= row.published <= high
    same = [other for other in rows if other.name == row.name and other.published is not None]
    other = same[-1] if row is same[0] else same[0]
    confidence = order_confidence(row, other) if other is not row else float("nan")
    word = AGREES if inside else ORDERED if confidence >= 0.95 else DIFFERS
    return Verdict(word, bool(inside), other.schedule if other is not row else "", confidence)


def order_confidence(row: Row, other: Row) -> float:
    """Bootstrap confidence that the medians of two rows stand in the order of the published."""
    if row.published is None or other.published is None or row.published == other.published:
        return float("nan")
    if not len(row.values) or not len(other.values):
        return float("nan")
    rng = np.random.default_rng(0)
    medians = [
        np.median(rng.choice(values, (RESAMPLES, len(values))), axis=1)
        for values in (row.values, other.values)
    ]
    claimed = np.sign(row.published - other.published)
    return float(np.mean(np.sign(medians[0] - medians[1]) == claimed))


def evidence(row: Row, found: Verdict, rows: Sequence[Row]) -> str:
    """A sentence about a row that differs: our range, the order, and the runs most alike."""
    published = row.published or 0.0
    where = f"{row.schedule}, {row.quantity}: published {row.show(published)}"
    if not len(row.values):
        return f"{where}; all of our runs diverged, as the original does on other machines."
    below = float(np.mean(row.values < published))
    parts = [
        f"{where}; our runs {row.show(row.percentile(1))} to {row.show(row.percentile(99))} "
        f"(1-99 % of {len(row.values)}), {below:.0%} of them below the published one, "
        f"{row.share_diverged:.0%} diverged"
    ]
    if np.isfinite(found.confidence):
        parts.append(
            f"the order to “{found.reference}” holds with confidence {found.confidence:.0%}"
        )
    others = [
        other
        for other in rows
        if other.schedule == row.schedule and other is not row and other.published
        if len(other.values) == len(row.values)  # so that index i is the same run in both
    ]
    if others:  # a chaotic run can't be repeated, so look at the runs that resemble it
        other = others[0]
        nearest = np.argsort(np.abs(np.log(other.values / other.published)))[:3]
        values = ", ".join(row.show(value) for value in row.values[nearest])
        parts.append(
            f"the three runs nearest to the published {other.quantity} "
            f"({other.show(other.published or 0.0)}) have {values}"
        )
    return "; ".join(parts) + "."
