"""The report of a reproduction: every published number beside ours, as Markdown, HTML and JSON."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.figures import tables

HEADINGS = ("setting", "quantity", "published", "ours: median [5 %, 95 %]", "diverged", "verdict")

AGREES, ORDERED, DIFFERS = "agrees", "agrees in order", "differs"


class Verdict(NamedTuple):
    """Whether the published value lies inside our range, or else stands where it is claimed to."""

    word: str
    inside: bool
    reference: str  # the schedule it is compared with
    confidence: float  # that the order of the two medians is the published one


class Chapter(NamedTuple):
    """One setting's table and figures, and why rows that differ do."""

    title: str
    command: str
    rows: list[tables.Row]
    verdicts: list[Verdict | None]  # one per row, None where nothing is published
    figures: list[Path]
    evidence: list[str]


def score(chapters: Sequence[Chapter]) -> str:
    """`54 of 56 published numbers agree`, by kind."""
    words = [found.word for chapter in chapters for found in chapter.verdicts if found]
    inside, ordered = words.count(AGREES), words.count(ORDERED)
    share = (inside + ordered) / len(words)
    return (
        f"{inside + ordered} of {len(words)} published numbers agree ({share:.0%}): {inside} lie "
        f"inside our 1-99 % range, {ordered} more stand in the claimed order."
    )


def table(chapter: Chapter) -> list[tuple[str, ...]]:
    """Cells under HEADINGS, of the rows that have a published number."""
    cells = []
    for row, found in zip(chapter.rows, chapter.verdicts, strict=True):
        if found is not None and row.published is not None:
            low, middle, high = (row.show(row.percentile(level)) for level in (5, 50, 95))
            order = "" if found.word != ORDERED else f" ({found.confidence:.0%})"
            cells.append(
                (
                    row.schedule,
                    row.quantity,
                    row.show(row.published),
                    f"{middle} [{low}, {high}]",
                    f"{row.share_diverged:.0%}",
                    found.word + order,
                )
            )
    return cells


def introduction(seeds: int, chapters: Sequence[Chapter], seconds: float) -> list[str]:
    """The paragraphs above the tables."""
    return [
        score(chapters),
        f"{seeds} seeds per schedule (T1: {8 * seeds}), of the initialization where "
        "it is random and of SGD; the data are the paper's. The original printed one seed. Runs "
        "with large steps are chaotic: rounding decides where a run ends, on the original's "
        "machine as on this one. So a published number agrees when it lies inside the 1-99 % range "
        "of our runs that did not diverge, or else when the order to the setting's first schedule "
        "(of the first: to the last) is the published one with a bootstrap confidence of 95 % or "
        "more. Gradient descent has no seed: initial weights are multiplied by 1 + 1e-9 N(0, 1).",
        f"Made in {seconds:.0f} s, compilation and figures included (finished settings are read "
        "and not run again).",
    ]


def markdown(seeds: int, chapters: Sequence[Chapter], seconds: float) -> str:
    """The report as one Markdown file; figures are embedded at its end."""
    lines, embedded = ["# The paper's toy experiments, reproduced", ""], []
    for paragraph in introduction(seeds, chapters, seconds):
        lines += [_plain(paragraph), ""]
    for chapter in chapters:
        lines += [f"## {_plain(chapter.title)}", "", _code(chapter.command), ""]
        lines += [_line(HEADINGS), "|" + " --- |" * len(HEADINGS)]
        lines += [_line(cells) for cells in table(chapter)] + [""]
        lines += [f"- {_plain(sentence)}" for sentence in chapter.evidence] + [""]
        for figure in _images(chapter):
            name = f"figure {len(embedded) + 1}"  # a file's name could end the brackets
            lines += [f"![{_plain(figure.stem)}][{name}]", ""]
            embedded.append(f"[{name}]: {_data_uri(figure)}")
    return "\n".join([*lines, *embedded]) + "\n"


def page(seeds: int, chapters: Sequence[Chapter], seconds: float) -> str:
    """The report as one HTML file without outside references; what it prints is escaped."""
    title = "The paper's toy experiments, reproduced"
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(text)}</p>" for text in introduction(seeds, chapters, seconds)]
    for chapter in chapters:
        body.append(f"<h2>{html.escape(chapter.title)}</h2>")
        body.append(f"<p><code>{html.escape(chapter.command)}</code></p>")
        body.append("<table><tr>" + _cells("th", HEADINGS) + "</tr>")
        for cells in table(chapter):
            kind = "differs" if cells[-1] == DIFFERS else "agrees"
            body.append(f'<tr class="{kind}">' + _cells("td", cells) + "</tr>")
        body.append("</table>")
        items = "".join(f"<li>{html.escape(text)}</li>" for text in chapter.evidence)
        body.append(f"<ul>{items}</ul>" if items else "")
        body += [
            f'<img src="{_data_uri(figure)}" alt="{html.escape(figure.stem)}">'
            for figure in _images(chapter)
        ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{CSS}</style><body>" + "\n".join(body) + "</body></html>\n"
    )


CSS = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.2rem .6rem;text-align:left;"
    "border-bottom:1px solid #ddd}tr.differs td:last-child{color:#b00;font-weight:bold}"
    "img{max-width:100%;display:block;margin:1rem 0}"
)


def summary(chapters: Sequence[Chapter], seconds: float) -> dict:
    """What verdicts.json holds: the score, and every row with its verdict."""
    rows = [
        {
            "chapter": chapter.title,
            "schedule": row.schedule,
            "quantity": row.quantity,
            "published": row.published,
            "runs": len(row.values),
            "share_diverged": row.share_diverged,
            **{f"p{level}": row.percentile(level) for level in (1, 5, 50, 95, 99)},
            **found._asdict(),
        }
        for chapter in chapters
        for row, found in zip(chapter.rows, chapter.verdicts, strict=True)
        if found is not None
    ]
    return {"score": score(chapters), "seconds": round(seconds, 1), "rows": rows}


def _line(cells) -> str:
    return "| " + " | ".join(map(_plain, cells)) + " |"


def _plain(text: str) -> str:
    """Words that Markdown prints as they are, in one line: what they say is no mark-up."""
    text = re.sub(r"[\\`*_\[\]<>|&~$#]|^[+-]", r"\\\g<0>", " ".join(text.split()))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


def _code(text: str) -> str:
    """In more backticks than it has itself."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"{ticks}{text}{ticks}"


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)


def _images(chapter: Chapter) -> list[Path]:
    return [path for path in chapter.figures if path.suffix in (".png", ".gif")]


def _data_uri(path: Path) -> str:
    kind = path.suffix.removeprefix(".")
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
