"""Reports of claims with their verdicts, as Markdown, HTML and JSON."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures import claims
from experiments.figures.claims import Claim
from experiments.figures.verdicts import ORDERED, SOURCE
from experiments.storage import files

TITLE = "The paper's toy experiments, reproduced"


class Chapter(NamedTuple):
    """The claims and figures of one setting, and a sentence about each number that differs.

    `page`, relative to the reports, shows the curves of its runs in a browser.
    """

    title: str
    command: str
    claims: list[Claim]
    figures: list[Path]
    evidence: list[str]
    page: str | None = None


def write(folder: Path, seeds: int, chapters: Sequence[Chapter], seconds: float) -> None:
    """Writes verdicts.json, report.md and report.html; figures are embedded in both reports."""
    claims.write(folder, [each for chapter in chapters for each in chapter.claims])
    for kind in ("md", "html"):
        text = rendered(kind, seeds, chapters, seconds)
        files.write_bytes(folder / f"report.{kind}", text.encode())


def rendered(kind: str, seeds: int, chapters: Sequence[Chapter], seconds: float) -> str:
    """The report as "md" or "html"."""
    import jinja2

    rule = (
        f"{seeds} seeds per schedule (T1: {8 * seeds}), of SGD and of the initialization where it "
        "is random; the data are the paper's. The original printed one seed. Runs with large steps "
        "are chaotic: rounding errors determine where a run ends, on any machine. Therefore a "
        "published number agrees if it is within the 1-99 % range of our runs that did not diverge "
        "(8 or more), or else if its order relative to the setting's first schedule (the first: "
        "relative to the last) is reproduced with a bootstrap confidence of 95 % or more. Gradient "
        "descent has no seed: initial weights are multiplied by 1 + 1e-9 N(0, 1)."
    )
    published = any(each.source == SOURCE for chapter in chapters for each in chapter.claims)
    introduction = [
        score(chapters),
        *([rule] if published else []),
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
        headings=claims.HEADINGS,
        fails=claims.FAILS,
        chapters=chapters,
        images=lambda chapter: [p for p in chapter.figures if p.suffix in (".png", ".gif")],
        data_uri=data_uri,
    )


def score(chapters: Sequence[Chapter]) -> str:
    """Sentences with the number of published numbers that agree, and of theory that holds."""
    every = [each for chapter in chapters for each in chapter.claims]
    published = [each for each in every if each.source == SOURCE]
    theory = [each for each in every if each.source != SOURCE]
    sentences = []
    if published:
        ordered = sum(each.verdict.startswith(ORDERED) for each in published)
        inside = sum(each.verdict == claims.HOLDS for each in published)
        share = (inside + ordered) / len(published)
        sentences.append(
            f"{inside + ordered} of {len(published)} published numbers agree ({share:.0%}): "
            f"{inside} are within our 1-99 % range, {ordered} more have the published order."
        )
    return " ".join(sentences + [claims.score(theory)] * bool(theory))


def data_uri(path: Path) -> str:
    """An image as a URI: a report is a single file."""
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
