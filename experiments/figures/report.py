"""The report of a reproduction: published numbers and our runs, as Markdown, HTML and JSON."""

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.figures import style, tables
from experiments.figures.verdicts import AGREES, ORDERED, Verdict
from experiments.storage import records

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
        style.write(folder / f"report.{kind}", text.encode())


def rendered(kind: str, seeds: int, chapters: Sequence[Chapter], seconds: float) -> str:
    """The report as "md" or "html"; all texts are escaped, so that none is taken for mark-up."""
    import jinja2

    introduction = [
        score(chapters),
        f"{seeds} seeds per schedule (T1: {8 * seeds}), of the initialization where it is random "
        "and of SGD; the data are the paper's. The original printed one seed. Runs with large "
        "steps are chaotic: rounding decides where a run ends, on the original's machine as on "
        "this one. So a published number agrees when it lies inside the 1-99 % range of our runs "
        "that did not diverge (8 or more), or else when the order to the setting's first schedule "
        "(of the first: to the last) is the published one with a bootstrap confidence of 95 % or "
        "more. Gradient descent has no seed: initial weights are multiplied by 1 + 1e-9 N(0, 1).",
        f"Made in {seconds:.0f} s, including compilation and figures (finished settings are read "
        "and not run again).",
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=kind == "html",
        finalize=None if kind == "html" else _escaped_for_markdown,
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
    """How many of the published numbers agree, by kind."""
    words = [found.word for chapter in chapters for _, found in chapter.compared]
    inside, ordered = words.count(AGREES), words.count(ORDERED)
    share = (inside + ordered) / len(words)
    return (
        f"{inside + ordered} of {len(words)} published numbers agree ({share:.0%}): {inside} lie "
        f"inside our 1-99 % range, {ordered} more stand in the claimed order."
    )


def table(chapter: Chapter) -> list[tuple[str, ...]]:
    """Cells under HEADINGS, a line per published number."""
    return [
        (
            row.schedule,
            row.quantity,
            row.show(row.published),
            row.interval(),
            f"{row.share_diverged:.0%}",
            found.word + (f" ({found.confidence:.0%})" if found.word == ORDERED else ""),
        )
        for row, found in chapter.compared
    ]


def _escaped_for_markdown(value: Any) -> Any:
    """Escapes mark-up and joins lines, except in what the template calls safe."""
    if hasattr(value, "__html__"):
        return value
    text = re.sub(r"[\\`*_\[\]<>|&~$#]|^[+-]", r"\\\g<0>", " ".join(str(value).split()))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


# Figures inside the page: a report is one file that can be sent.
def _data_uri(path: Path) -> str:
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
