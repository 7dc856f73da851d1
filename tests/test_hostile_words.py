"""Names with mark-up appear literally in the HTML report, on the terminal and in figures."""

from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from matplotlib.figure import Figure

from experiments import sweep_deep
from experiments.figures import claims, plots, report, tables, verdicts
from experiments.figures.tables import Row
from experiments.launch import cli

HOSTILE = [
    *("<script>alert(1)</script>", "</script>", "</table><h1>x", '" onload="x', "' x='", "&amp;"),
    *("a|b", "`x`", "``", "`", "[x](javascript:y)", "![x](y)", "[x][figure 1]", "**x**", "_x_"),
    *("# x", "x #", "- x", "1. x", "2)", "a\n\n# b", "a\r\nb", "<!--", "-->", "\\", "\\|"),
    *("~~x~~", "$x$", "~~~"),
    *("[bold]", "[/]", "[/bold]", "[link=x]y[/link]", "[red", ":car:", "\x1b[2J", "[@click=x]y"),
]
words = st.sampled_from(HOSTILE) | st.text(
    st.sampled_from("<>&\"'`|[]()!*_#-+=\\$~:/.1 \nax"), max_size=12
)


def page(folder, word):
    """A report with `word` in place of every name."""
    figure = folder / f"f{word.replace('/', '')}.png"
    figure.write_bytes(b"png")
    row = Row(word, word, "loss", ".2g", 0.5, np.array([0.4, 0.6]), 0.0)
    found = verdicts.claim(row, verdicts.Verdict(claims.FAILS, word, 0.5), [figure])
    chapter = report.Chapter(word, "python -m x", [found], [figure], [word])
    return report.rendered("html", 2, [chapter], 1.0)


def html_outline(text):
    """Tags and attribute names in order, texts, and sources of images."""
    elements, texts, sources = [], [], []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_comment = lambda data: elements.append("comment")
    parser.handle_endtag = lambda tag: elements.append(f"/{tag}")
    parser.handle_data = lambda data: texts.append(" ".join(data.split()))

    def start(tag, attributes):
        elements.extend([tag, *(name for name, _ in attributes)])
        sources.extend(value for name, value in attributes if name in ("src", "href"))

    parser.handle_starttag = start
    parser.feed(text)
    parser.close()
    return elements, texts, sources


@settings(max_examples=30)
@example(": #")
@example("1. x")
@given(words)
def test_a_report_has_the_same_elements_whatever_the_names(tmp_path, word):
    elements, texts, sources = html_outline(page(tmp_path, word))
    assert elements == html_outline(page(tmp_path, "word"))[0]
    assert " ".join(word.split()) in texts
    assert all(source.startswith("data:image/png;base64,") for source in sources)


@pytest.mark.parametrize(
    "word", [*filter(str.isprintable, HOSTILE), "[not bold]x[/not bold]", "[#ff0000]"]
)
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
    assert f"about {word}: last records" in text and f"setting {word}" in text


@settings(max_examples=60)
@given(st.text(max_size=40) | words)
@example("\u202eevil\u2028x\x9b2J\ud800")
def test_an_error_is_one_line_that_moves_nothing_on_the_terminal(text):
    message = cli.describe(ValueError(text))
    assert message.isprintable() and message.encode("utf-8")
    assert message == text or text != " ".join(text.split()) or not text.isprintable() or not text


@pytest.mark.parametrize("word", ["$x_{$", "$", "\\$", "a $b$ c", "\\frac$", "%", "{", "^_"])
def test_a_figure_shows_names_as_they_are_and_no_formula(monkeypatch, tmp_path, word):
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda fig, *args, **kwargs: shown.append(fig))
    x = np.arange(3.0)
    panel = plots.Panel(word, "y", {word: (x, x), "b": (x, x)})
    assert plots.figure(tmp_path / "f", [panel], title=word)
    fig = shown[0]
    legend = fig.legends[0].get_texts()[0].get_text()
    for text in (fig.get_suptitle(), fig.axes[0].get_title(), legend):
        assert fig.axes[0].title._preprocess_math(text) == (word, False)
