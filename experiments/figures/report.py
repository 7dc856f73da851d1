"""Reports that compare published numbers with our runs, as Markdown, HTML and JSON."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures import tables
from experiments.figures.verdicts import AGREES, ORDERED, Verdict
from experiments.storage import files, records

TITLE = "The paper's toy experiments, reproduced"
HEADINGS = ("setting", "quantity", "published", "our median [5 %, 95 %]", "diverged", "verdict")


class Chapter(NamedTuple):
    """The table and figures of one setting, and a sentence about each row that differs."""

    title: str
    command: str
    compared: list[tuple[tables.Row, Verdict]]  # rows with a published number
    figures: list[Path]
    evidence: list[str]


def write(folder: Path, seeds: int, chapters: Sequence[Chapter], seconds: float) -> None:
    """Writes verdicts.json, report.md and report.html; figures are embedded in both reports."""
    rows = [
        {"chapter": chapter.title, "runs": len(row.values)} | row.entry() | found._asdict()
        for chapter in chapters
        for row, found in chapter.compared
    ]
    summary = {"score": score(chapters), "seconds": round(seconds, 1), "rows": rows}
    records.write_json(folder / "verdicts.json", summary)
    for kind in ("md", "html"):
        text = rendered(kind, seeds, chapters, seconds)
        files.write_bytes(folder / f"report.{kind}", text.encode())


def rendered(kind: str, seeds: int, chapters: Sequence[Chapter], seconds: float) -> str:
    """The report as "md" or "html"."""
    import jinja2

    introduction = [
        score(chapters),
        f"{seeds} seeds per schedule (T1: {8 * seeds}), of SGD and of the initialization where it "
        "is random; the data are the paper's. The original printed one seed. Runs with large steps "
        "are chaotic: rounding errors determine where a run ends, on any machine. Therefore a "
        "published number agrees if it is within the 1-99 % range of our runs that did not diverge "
        "(8 or more), or else if its order relative to the setting's first schedule (the first: "
        "relative to the last) is reproduced with a bootstrap confidence of 95 % or more. Gradient "
        "descent has no seed: initial weights are multiplied by 1 + 1e-9 N(0, 1).",
        f"Computed in {seconds:.0f} s, including compilation and figures (finished settings are "
        "loaded, not run again).",
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=kind == "html",
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(f"report.{kind}.j2").render(
        title=TITLE,
        introduction=introduction,
        headings=HEADINGS,
        chapters=chapters,
        table=table,
        images=lambda chapter: [p for p in chapter.figures if p.suffix in (".png", ".gif")],
        data_uri=_data_uri,
    )


def score(chapters: Sequence[Chapter]) -> str:
    """A sentence with the number of published numbers that agree, in range and in order."""
    words = [found.word for chapter in chapters for _, found in chapter.compared]
    inside, ordered = words.count(AGREES), words.count(ORDERED)
    share = (inside + ordered) / len(words)
    return (
        f"{inside + ordered} of {len(words)} published numbers agree ({share:.0%}): {inside} are "
        f"within our 1-99 % range, {ordered} more have the published order."
    )


def table(chapter: Chapter) -> list[tuple[str, ...]]:
    """Cells under HEADINGS, one row per published number."""
    confidence = lambda found: f" ({found.confidence:.0%})" if found.word == ORDERED else ""
    return [(*row.cells(), found.word + confidence(found)) for row, found in chapter.compared]


# Embedded figures: a report is a single file.
def _data_uri(path: Path) -> str:
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
