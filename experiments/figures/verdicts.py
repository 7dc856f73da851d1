"""Whether a published number agrees with our runs, and evidence if it does not. No JAX."""

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.figures.claims import FAILS, HOLDS, UNDER, Claim, resampled_medians
from experiments.figures.tables import Row

ORDERED = f"{UNDER} a comparison of order"
SOURCE = "printed by the paper's code"
ENOUGH = 8  # fewer finite runs give no useful 1-99 % range or bootstrap
RESAMPLES = 4000


class Verdict(NamedTuple):
    """Whether a published value is within our 1-99 % range, or else its order is reproduced."""

    word: str
    reference: str  # the schedule it is compared with
    confidence: float  # of the published order, by bootstrap


def verdict(row: Row, rows: Sequence[Row]) -> Verdict:
    """Compares the published value of `row` with our range, and else its order.

    The order is that relative to the setting's first schedule (of the first: to the last) in the
    same quantity; its confidence, of which 95 % is required, is the share of bootstrap resamples of
    both sets of seeds whose medians have the published order. The range is widened by half of the
    last published digit.
    """
    published = row.published or 0.0
    half_digit = 0.5 * 10.0 ** int(Decimal(str(published)).as_tuple().exponent)
    low, high = row.percentile(1) - half_digit, row.percentile(99) + half_digit
    inside = len(row.values) >= ENOUGH and low <= published <= high
    same = [other for other in rows if other.name == row.name and other.published is not None]
    other = same[-1] if row is same[0] else same[0]
    confidence = order_confidence(row, other)
    word = HOLDS if inside else ORDERED if confidence >= 0.95 else FAILS
    return Verdict(word, other.schedule if other is not row else "", confidence)


def claim(row: Row, found: Verdict, figures: Sequence[Path]) -> Claim:
    """The published number of `row` as a claim, whose interval is our 1-99 % range."""
    share = f"{row.share_diverged:.0%} diverged"
    statistic = f"median and 1-99 % range of {len(row.values)} runs, {share}"
    confidence = f" ({found.confidence:.0%})" if found.word == ORDERED else ""
    return Claim(
        claim=row.quantity,
        source=SOURCE,
        setting=row.schedule,
        statistic=statistic,
        value=row.percentile(50),
        interval=(row.percentile(1), row.percentile(99)),
        prediction=row.show(row.published),
        verdict=found.word + confidence,
        figure=next((path.stem for path in figures), ""),
        form=row.form,
    )


def order_confidence(row: Row, other: Row) -> float:
    """Bootstrap confidence that two medians have the published order; NaN for too few runs."""
    claimed = np.sign((row.published or 0.0) - (other.published or 0.0))
    if not claimed or min(len(row.values), len(other.values)) < ENOUGH:
        return float("nan")
    rng = np.random.default_rng(0)  # reproducible reports
    medians = [resampled_medians(rng, values, RESAMPLES) for values in (row.values, other.values)]
    return float(np.mean(np.sign(medians[0] - medians[1]) == claimed))


def evidence(row: Row, found: Verdict, rows: Sequence[Row]) -> str:
    """A sentence about a row that differs: our range, the order, and the most similar runs."""
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
    # A chaotic run can't be repeated: look at runs that are similar in another quantity. With equal
    # numbers of values, index i is the same run in both.
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
