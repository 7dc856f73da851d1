"""Words that are mark-up elsewhere come out as words: in reports, on the terminal, in figures."""

from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from experiments import sweep_deep
from experiments.figures import plots, report, tables, verdicts
from experiments.figures.tables import Row
from experiments.launch import cli

HOSTILE = [
    *("<script>alert(1)</script>", "</script>", "</table><h1>x", '" onload="x', "' x='", "&amp;"),
    *("a|b", "`x`", "``", "`", "[x](javascript:y)", "![x](y)", "[x][figure 1]", "**x**", "_x_"),
    *("# x", "x #", "- x", "1. x", "2)", "a\n\n# b", "a\r\nb", "<!--", "-->", "\\", "\\|"),
    *("~~x~~", "$x$", "~~~"),
    *("[bold]", "[/]", "[/bold]", "[link=x]y[/link]", "[red", ":car:", "\x1b[2J", "[@click=x]y"),
]
COMMAND = "python -m experiments.diag_nets"
words = st.sampled_from(HOSTILE) | st.text(
    st.sampled_from("<>&\"'`|[]()!*_#-+=\\$~:/.1 \nax"), max_size=12
)


def chapter(folder, word):
    """A chapter that says `word` wherever a chapter says something."""
    figure = folder / f"f{word.replace('/', '')}.png"
    figure.write_bytes(b"png")
    row = Row(word, word, "loss", ".2g", 0.5, np.array([0.4, 0.6]), 0.0)
    found = verdicts.Verdict(verdicts.DIFFERS, word, 0.5)
    return report.Chapter(word, COMMAND, [(row, found)], [figure], [word])


class Outline(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.comments = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.comments.append(data)


@settings(max_examples=60)
@given(words)
def test_the_page_has_the_same_elements_whatever_the_names(tmp_path, word):
    page = lambda word: report.rendered("html", 2, [chapter(tmp_path, word)], 1.0)
    plain, other = Outline(page("word")), Outline(page(word))
    assert other.tags == plain.tags and other.comments == []
    names = lambda outline: [attribute[:2] for attribute in outline.attributes]
    assert names(other) == names(plain)
    as_it_was = " ".join(word.split())
    assert [t for t in other.text if " ".join(t.split()) == as_it_was] or not as_it_was
    sources = [value for _, name, value in other.attributes if name in ("src", "href")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def outline(markdown):
    """Elements in order, as a reader of Markdown with tables sees them, and the texts in them."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    elements, texts = [], []
    for token in reader.parse(markdown):
        elements.append((token.type, token.tag, token.info))
        for part in token.children or []:
            elements.append((part.type, part.tag, str(part.attrs.get("src", ""))[:10]))
            texts.append(part.content)
    joined = [e for e, before in zip(elements, [None, *elements], strict=False) if e != before]
    return joined, texts


@settings(max_examples=60)
@example(": #")
@example("1. x")
@given(words)
def test_the_markdown_has_the_same_elements_whatever_the_names(tmp_path, word):
    word = " ".join(word.split()) or "x"
    (plain, _), (other, texts) = (
        outline(report.rendered("md", 2, [chapter(tmp_path, each)], 1.0)) for each in ("word", word)
    )
    assert other == plain
    assert texts.count(word) == 4 and COMMAND in texts  # title, two cells, evidence


TERMINALS = [word for word in HOSTILE if word.isprintable()] + [
    "[not bold]x[/not bold]",
    "[#ff0000]",
]


@pytest.mark.parametrize("word", TERMINALS)
def test_tables_on_the_terminal_print_names_as_they_are(monkeypatch, tmp_path, capsys, word):
    monkeypatch.setenv("COLUMNS", "500")
    row = Row(word, f"of {word}", "loss", ".2g", 0.5, np.array([0.4, 0.6]), 0.0)
    tables.show(tmp_path / word, [row], title=f"about {word}")
    text = capsys.readouterr().out
    assert f"about {word}, at the last" in text and f" {word} " in text and f"of {word}" in text
    assert str(tmp_path / word) in text
    entry = {"setting": f"setting {word}", "outcome": "diverged"}
    sweep_deep.show(tmp_path, f"about {word}", [entry])
    text = capsys.readouterr().out
    assert f"about {word}: last rows" in text and f"setting {word}" in text


@settings(max_examples=200)
@given(st.text(max_size=40) | words)
@example("\u202eevil\u2028x\x9b2J\ud800")
def test_an_error_is_one_line_that_moves_nothing_on_the_terminal(text):
    told = cli.describe(ValueError(text))
    assert told.isprintable() and told.encode("utf-8")
    assert told == text or not text or not text.isprintable() or " ".join(text.split()) != text


@pytest.mark.parametrize("word", ["$x_{$", "$", "$$", "\\$", "a $b$ c", "\\frac$", "%", "{", "^_"])
def test_a_figure_shows_names_as_they_are_and_no_formula(monkeypatch, tmp_path, word):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **kwargs: shown.append(fig))
    x = np.arange(3.0)
    panel = plots.Panel(word, "y", {word: (x, x), "b": (x, x)})
    assert plots.figure(tmp_path / "f", [panel], title=word)
    fig = shown[0]
    texts = [fig.get_suptitle(), fig.axes[0].get_title(), fig.legends[0].get_texts()[0].get_text()]
    for text in texts:
        formula, is_math = fig.axes[0].title._preprocess_math(text)
        assert (formula, is_math) == (word, False)
