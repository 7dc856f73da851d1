"""Claims with a prediction, a measurement and a verdict, in verdicts.json and in tables. No JAX.

A command that checks theory ends as follows; `reproduce --theory` shows what it returns.

    def run(config: Config) -> claims.Finding:
        dataset = ...  # simulated, or loaded from the folder
        found = [
            claims.judged(
                "the loss settles at (1 - 1/eta^2) / 8",
                value=level,
                expected=claims.near(0.0382, relative=1e-3),
                source="docs/theory.md",
                setting="eta = 1.2",
                statistic="mean loss of 1,000 steps",
                figure="levels",
            ),
        ]
        claims.report(folder, found, title="Loss stabilization")  # verdicts.json, then the table
        return claims.Finding(folder, found, draw(folder, dataset))

A claim that fails in general but holds in a regime is two claims, the second with `under`. Failing
claims are results: they are written and shown like the others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.figures import terminal
from experiments.storage import records

HOLDS, UNDER, FAILS = "holds", "holds under", "does not reproduce"
HEADINGS = ("setting", "claim", "prediction", "measured", "statistic", "verdict")


class Expected(NamedTuple):
    """The values [low, high] that agree with a prediction, and the prediction as text."""

    text: str
    low: float
    high: float


def near(value: float, *, relative: float = 0.0, absolute: float = 0.0) -> Expected:
    """Values within relative * |value| + absolute of `value`."""
    reach = relative * abs(value) + absolute
    margin = f" ± {100 * relative:.3g}%" if relative else ""
    margin += f" ± {absolute:.3g}" if absolute else ""
    return Expected(f"{value:.6g}{margin}", value - reach, value + reach)


def at_least(bound: float) -> Expected:
    """Values of `bound` or more."""
    return Expected(f"≥ {bound:.6g}", bound, float("inf"))


def at_most(bound: float) -> Expected:
    """Values of `bound` or less."""
    return Expected(f"≤ {bound:.6g}", float("-inf"), bound)


class Claim(NamedTuple):
    """A statement, how it was measured, and whether it was reproduced."""

    claim: str
    source: str
    setting: str
    statistic: str  # what `value` is, such as "median of 64 seeds"
    value: float
    interval: tuple[float, float] | None  # of the value
    prediction: str
    verdict: str  # HOLDS, FAILS, or UNDER with a condition
    figure: str  # stem of its file in figures/, or ""
    form: str = ".4g"  # of value and interval in tables

    def cells(self) -> tuple[str, ...]:
        """The claim as text, under `HEADINGS`."""
        show = lambda number: format(number, self.form)
        between = f" [{', '.join(map(show, self.interval))}]" if self.interval else ""
        measured = f"{show(self.value)}{between}"
        return self.setting, self.claim, self.prediction, measured, self.statistic, self.verdict


class Finding(NamedTuple):
    """The result of a command that checks claims: its folder, its claims and its figures."""

    folder: Path
    claims: list[Claim]
    figures: list[Path]


def judged(
    claim: str,
    *,
    value: float,
    expected: Expected,
    source: str,
    setting: str,
    statistic: str,
    interval: tuple[float, float] | None = None,
    under: str = "",
    figure: str = "",
    form: str = ".4g",
) -> Claim:
    """A claim that is reproduced if expected.low <= value <= expected.high.

    `under` is the condition to which the measurement is restricted: "eta |eps| < 1" gives the
    verdict "holds under eta |eps| < 1". NaN is never reproduced.
    """
    holds = expected.low <= value <= expected.high
    word = (f"{UNDER} {under}" if under else HOLDS) if holds else FAILS
    value, text = float(value), expected.text
    return Claim(claim, source, setting, statistic, value, interval, text, word, figure, form)


def resampled_medians(
    rng: np.random.Generator, values: np.ndarray, resamples: int = 2000
) -> np.ndarray:
    """Medians of bootstrap samples of `values` [n], [resamples]."""
    return np.median(rng.choice(values, (resamples, len(values))), axis=1)


def score(claims: Sequence[Claim]) -> str:
    """A sentence with the number of claims per verdict."""
    count = lambda word: sum(each.verdict.startswith(word) for each in claims)
    under, fail = count(UNDER), count(FAILS)
    return (
        f"Of {len(claims)} claims {len(claims) - under - fail} hold, {under} hold under a "
        f"condition, and {fail} do not reproduce."
    )


def write(folder: Path, claims: Sequence[Claim]) -> None:
    """Writes verdicts.json: a list of claims, with the fields of `Claim` but `form`."""
    entries = [each._asdict() for each in claims]
    for entry in entries:
        del entry["form"]
    records.write_json(folder / "verdicts.json", entries)


def report(folder: Path, claims: Sequence[Claim], *, title: str) -> None:
    """Writes verdicts.json; then prints the claims as a table, their score, and the folder."""
    from rich.table import Table

    write(folder, claims)
    table = Table("claim", "prediction", "measured", "verdict", title=title)
    for each in claims:
        setting, claim, *numbers, _, verdict = each.cells()
        table.add_row(f"{claim} ({setting})", *numbers, verdict)
    terminal.show(table, score(claims), folder)
