"""Whether a published number agrees with our runs, and the evidence if it does not. No JAX."""

from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from experiments.figures.tables import Row

AGREES, ORDERED, DIFFERS = "agrees", "agrees in order", "differs"
ENOUGH = 8  # fewer finite runs have no 1-99 % range, and bootstrap of one run is always certain
RESAMPLES = 4000


class Verdict(NamedTuple):
    """Whether the published value lies inside our 1-99 % range, or else in the claimed order."""

    word: str
    reference: str  # the schedule it is compared with
    confidence: float  # that the order of the two medians is the published one


def verdict(row: Row, rows: Sequence[Row]) -> Verdict:
    """The published value of `row` inside our range, or in the claimed order with 95 % confidence.

    The order is that to the setting's first schedule (of the first: to the last) in the same
    quantity; its confidence is the share of bootstrap resamples of both sets of seeds whose medians
    stand in the published order. A published value stands for all that round to its digits.
    """
    published = row.published or 0.0
    half_digit = 0.5 * 10.0 ** int(Decimal(str(published)).as_tuple().exponent)
    low, high = row.percentile(1) - half_digit, row.percentile(99) + half_digit
    inside = len(row.values) >= ENOUGH and low <= published <= high
    same = [other for other in rows if other.name == row.name and other.published is not None]
    other = same[-1] if row is same[0] else same[0]
    confidence = order_confidence(row, other)
    word = AGREES if inside else ORDERED if confidence >= 0.95 else DIFFERS
    return Verdict(word, other.schedule if other is not row else "", confidence)


def order_confidence(row: Row, other: Row) -> float:
    """Bootstrap confidence that two medians stand in the published order; NaN for too few runs."""
    claimed = np.sign((row.published or 0.0) - (other.published or 0.0))
    if not claimed or min(len(row.values), len(other.values)) < ENOUGH:
        return float("nan")
    rng = np.random.default_rng(0)  # the same report in every run
    medians = [
        np.median(rng.choice(values, (RESAMPLES, len(values))), axis=1)
        for values in (row.values, other.values)
    ]
    return float(np.mean(np.sign(medians[0] - medians[1]) == claimed))


def evidence(row: Row, found: Verdict, rows: Sequence[Row]) -> str:
    """A sentence about a row that differs: our range, the order, and the runs most alike."""
    published = row.published or 0.0
    where = f"{row.schedule}, {row.quantity}: published {row.show(published)}"
    if not len(row.values):
        return f"{where}; all of our runs diverged, as the original does on other machines."
    below = float(np.mean(row.values < published))
    sentence = (
        f"{where}; our runs {row.show(row.percentile(1))} to {row.show(row.percentile(99))} "
        f"(1-99 % of {len(row.values)}), {below:.0%} of them below the published one, "
        f"{row.share_diverged:.0%} diverged"
    )
    if np.isfinite(found.confidence):
        confidence = f"{found.confidence:.0%}"
        sentence += f"; the order to “{found.reference}” holds with confidence {confidence}"
    # A chaotic run can't be repeated, so look at the runs that resemble it in another quantity;
    # equal numbers of values mean that index i is the same run in both.
    for other in rows:
        same = other.schedule == row.schedule and len(other.values) == len(row.values)
        if same and other is not row and other.published:
            nearest = np.argsort(np.abs(np.log(other.values / other.published)))[:3]
            values = ", ".join(row.show(value) for value in row.values[nearest])
            return (
                f"{sentence}; the three runs nearest to the published {other.quantity} "
                f"({other.show(other.published)}) have {values}."
            )
    return f"{sentence}."
